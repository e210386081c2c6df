"""Annotators against what they promise, and their networks against PyTorch."""

import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from acejax.edit import annotator_models
from acejax.edit.annotators import NAMES, annotate, inside
from acejax.errors import UserError
from tests.counts import count
from tests.judges import needs, needs_transformers

PLAIN = [name for name in NAMES if name not in ("contour", "depth")]
RNG = np.random.default_rng(0)
needs_torch = needs("torch")


def noise(*size):
    return RNG.integers(0, 256, (*size, 3)).astype(np.uint8)


def edges(height, width):
    """A smooth picture with shapes in it."""
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 3) ** 2 < (min(height, width) / 4) ** 2
    return np.stack([255 * disc, x * 255 / width, (y + x) % 97 * 2], -1).astype(np.uint8)


@pytest.mark.parametrize("parity", [None, "reference"])
@pytest.mark.parametrize("name", PLAIN)
def test_any_size_stays(name, parity):
    for size in ((1, 1), (1, 200), (63, 5), (129, 200)):
        picture = noise(*size)
        kept = picture.copy()
        made = annotate(name, picture, parity=parity)
        assert made.shape == picture.shape and made.dtype == np.uint8
        np.testing.assert_array_equal(picture, kept)


@pytest.mark.parametrize("parity, weights", [(None, (0.299, 0.587, 0.114)), ("reference", (0.114, 0.587, 0.299))])
def test_grey_is_luma_and_parity_exchanges_red_and_blue(parity, weights):
    picture = noise(40, 50)
    made = annotate("grey", picture, parity=parity)
    assert (made == made[..., :1]).all()
    assert np.abs(made[..., 0] - picture @ np.array(weights)).max() <= 1


@pytest.mark.parametrize("parity", [None, "reference"])
def test_mosaic_has_flat_cells_that_follow_the_picture(parity):
    y, x = np.mgrid[:200, :330]
    picture = np.stack([x * 255 / 330, y * 255 / 200, 0 * x], -1).astype(np.uint8)
    made = annotate("mosaic", picture, parity=parity)
    for row in range(3):
        for column in range(5):
            cell = made[int(row * 200 / 3) + 2:int((row + 1) * 200 / 3) - 2, column * 66 + 1:(column + 1) * 66 - 1]
            assert (cell == cell[0, 0]).all()
            expected = 255 * (column + 0.5) / 5, 255 * (row + 0.5) / 3, 0
            np.testing.assert_allclose(cell[0, 0], expected, atol=12)


def test_canny_has_the_thresholds_100_and_200():
    """A step of d between grey levels has a Sobel gradient of 4d: edges begin at 200 and go on while above 100."""
    for strong, weak, first, rest in ((51, 26, True, True), (51, 24, True, False), (49, 49, False, False)):
        picture = np.zeros((80, 40, 3), np.uint8)
        picture[:40, 20:], picture[40:, 20:] = strong, weak
        made = annotate("canny", picture)
        assert set(np.unique(made)) <= {0, 255} and (made == made[..., :1]).all()
        near, far = made[:, 17:23, 0] == 255, np.delete(made, np.s_[17:23], 1)
        assert near[5:35].any(1).all() == near[5:35].any() == first
        assert near[45:75].any(1).all() == near[45:75].any() == rest
        assert not far[:35].any() and not far[45:].any()


@pytest.mark.parametrize("name", ["blur", "low_resolution"])
def test_detail_goes_and_colour_stays(name):
    picture = noise(256, 300)
    made = annotate(name, picture)
    assert made.std() < picture.std() / 3
    np.testing.assert_allclose(made.mean((0, 1)), picture.mean((0, 1)), atol=1)
    flat = np.full((256, 300, 3), (10, 100, 250), np.uint8)
    np.testing.assert_array_equal(annotate(name, flat), flat)


def test_low_resolution_keeps_a_quarter():
    """Stripes of 16 pixels stay, stripes of 2 go."""
    for stripe, contrast in ((16, 100), (2, 5)):
        picture = np.zeros((128, 128, 3), np.uint8)
        picture[:, np.arange(128) // stripe % 2 == 1] = 255
        assert (annotate("low_resolution", picture).std() > contrast) == (contrast == 100)


def test_inside_composites_by_the_mask():
    annotated, picture = np.full((2, 3, 3), 200, np.uint8), np.full((2, 3, 3), 100, np.uint8)
    mask = np.array([[0, 127, 128], [255, 51, 204]], np.uint8)
    np.testing.assert_array_equal(inside(annotated, picture, mask)[..., 0], [[100, 100, 200], [200, 100, 200]])
    np.testing.assert_array_equal(inside(annotated, picture, mask, parity="reference")[..., 0],
                                  [[100, 150, 150], [200, 120, 180]])
    for everywhere in (None, np.zeros_like(mask)):
        np.testing.assert_array_equal(inside(annotated, picture, everywhere), annotated)
    np.testing.assert_array_equal(inside(annotated, picture, np.zeros_like(mask), parity="reference"), picture)


def generator():
    """informative-drawings' generator as its authors wrote it down, with random weights."""
    import torch
    from torch import nn

    def normed(conv, features):
        return [conv, nn.InstanceNorm2d(features), nn.ReLU()]

    def residual():
        return [layer for _ in range(2) for layer in (nn.ReflectionPad2d(1), *normed(nn.Conv2d(256, 256, 3), 256))][:-1]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_block = nn.Sequential(*residual())

        def forward(self, x):
            return x + self.conv_block(x)

    torch.manual_seed(0)
    model = nn.Module()
    model.model0 = nn.Sequential(nn.ReflectionPad2d(3), *normed(nn.Conv2d(3, 64, 7), 64))
    model.model1 = nn.Sequential(*normed(nn.Conv2d(64, 128, 3, 2, 1), 128), *normed(nn.Conv2d(128, 256, 3, 2, 1), 256))
    model.model2 = nn.Sequential(*(Block() for _ in range(3)))
    model.model3 = nn.Sequential(*normed(nn.ConvTranspose2d(256, 128, 3, 2, 1, 1), 128),
                                 *normed(nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), 64))
    model.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(64, 1, 7), nn.Sigmoid())
    return model


@needs_torch
def test_contour_is_torchs(tmp_path):
    import torch

    model, picture = generator(), edges(24, 40)
    torch.save(model.state_dict(), tmp_path / "netG_A_latest.pth")
    save_file({key: value.numpy() for key, value in model.state_dict().items()}, tmp_path / "contour.safetensors")
    x = torch.from_numpy(picture.transpose(2, 0, 1)[None].copy()).float() / 255
    with torch.inference_mode():
        for part in (model.model0, model.model1, model.model2, model.model3, model.model4):
            x = part(x)
    expected = x[0, 0].numpy()
    drawn = annotator_models.contour(tmp_path / "contour.safetensors", picture.astype(np.float32) / 255)
    assert expected.std() > 0.05
    assert np.abs(drawn - expected).max() < 1e-5
    made = [annotate("contour", picture, weights=tmp_path / name) for name in ("netG_A_latest.pth",
                                                                             "contour.safetensors")]
    np.testing.assert_array_equal(*made)
    assert np.abs(made[0] - np.floor(expected * 255)[..., None]).max() <= 1
    for size in count([(23, 37)], [(23, 37), (1, 1), (5, 90)]):
        assert annotate("contour", noise(*size), weights=tmp_path / "contour.safetensors").shape == (*size, 3)


def test_contour_names_what_a_file_lacks(tmp_path):
    tensors = {}
    for name, shape in annotator_models.KERNELS.items():
        tensors |= {f"{name}.weight": np.zeros(shape, np.float16),
                    f"{name}.bias": np.zeros(shape[name.startswith("model3")], np.float16)}
    for i, (change, message) in enumerate([
            ({"model4.1.weight": np.zeros((3, 64, 7, 7), np.float16)}, r"model4\.1\.weight' is \(3, 64, 7, 7\)"),
            ({"model2.3.conv_block.1.bias": np.zeros(256, np.float16)}, "expected no such tensor"),
            ({"model0.1.bias": None}, r"is missing; expected \(64,\)"), ({}, None)]):
        given = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(given, path := tmp_path / f"{i}.safetensors")
        if message is None:
            assert annotator_models.read_generator(str(path)).keys() == tensors.keys()
        else:
            with pytest.raises(UserError, match=message):
                annotate("contour", noise(8, 8), weights=path)


def dpt(folder, hybrid):
    """A tiny DPT with random weights in a folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    own = {"is_hybrid": True, "backbone_featmap_shape": (1, 64, 4, 4), "neck_ignore_stages": [0, 1],
           "neck_hidden_sizes": [16, 32, 16, 16],
           "backbone_config": {"global_padding": "same", "layer_type": "bottleneck", "depths": [1, 1, 1],
                               "out_features": ["stage1", "stage2", "stage3"], "embedding_dynamic_padding": True,
                               "hidden_sizes": [16, 32, 64], "embedding_size": 16, "num_groups": 2}} if hybrid else {
        "neck_hidden_sizes": [16, 16, 16, 16]}
    model = transformers.DPTForDepthEstimation(transformers.DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, image_size=64, patch_size=16,
        backbone_out_indices=(0, 1, 2, 3), fusion_hidden_size=16, initializer_range=0.1, **own)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "attention" in name:
                weight.mul_(0.1)  # else all is everywhere
        model.head.head[-2].bias += 10  # its ReLU would clip most of a random depth
        model.save_pretrained(folder)
    return model


@needs_transformers
@pytest.mark.parametrize("hybrid", [False, True])
def test_depth_is_transformers_at_its_size_and_follows_the_picture_at_others(tmp_path, hybrid):
    import torch

    model, picture = dpt(tmp_path, hybrid), edges(64, 64)
    x = torch.from_numpy(picture.transpose(2, 0, 1)[None].copy()).float() / 127.5 - 1
    with torch.inference_mode():
        near = model(x).predicted_depth[0].numpy()
    assert near.std() > 0
    expected = np.floor((near - near.min()) / np.ptp(near) * 255)
    for parity in (None, "reference"):
        made = annotate("depth", picture, weights=tmp_path, parity=parity)
        assert np.abs(made - expected[..., None]).max() <= 1
        assert annotate("depth", noise(70, 200), weights=tmp_path, parity=parity).shape == (70, 200, 3)

    # 4 x 16 patches are as many as 8 x 8: what changes at one end must change the depth there.
    wide = np.full((64, 256, 3), 0.2, np.float32)
    changed = wide.copy()
    changed[:, 224:] = edges(64, 32) / 127.5 - 1
    difference = np.abs(annotator_models.depth(tmp_path, changed) - annotator_models.depth(tmp_path, wide))
    assert difference.shape == (64, 256)
    assert difference[:, 192:].mean() > 3 * difference[:, :128].mean()


@needs_transformers
def test_depth_names_what_a_folder_lacks(tmp_path):
    import transformers

    with pytest.raises(UserError, match="config.json: no such file"):
        annotate("depth", noise(8, 8), weights=tmp_path / "none")
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="model of type 'vit'; expected dpt"):
        annotate("depth", noise(8, 8), weights=tmp_path / "vit")
    transformers.DPTConfig(is_hybrid=False).save_pretrained(tmp_path / "empty")
    with pytest.raises(UserError, match="empty: cannot be read as a DPT"):
        annotate("depth", noise(8, 8), weights=tmp_path / "empty")
    model = dpt(tmp_path / "part", False)
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    model.save_pretrained(tmp_path / "part", state_dict=kept)
    with pytest.raises(UserError, match="no whole DPT for depth: 'head.head.0.bias' is missing"):
        annotate("depth", noise(8, 8), weights=tmp_path / "part")


@pytest.mark.parametrize("call, message", [
    ({"name": "sepia"}, "'sepia' is unknown; known: none, grey, mosaic, canny"),
    ({"name": "contour"}, "contour: expected weights=FILE .* or a ready map"),
    ({"name": "depth"}, "depth: expected weights=FOLDER .* or a ready map"),
    ({"name": "grey", "weights": "x.pth"}, "grey takes no weights; found x.pth"),
    ({"name": "grey", "parity": "exact"}, "parity is 'exact'; expected None or 'reference'"),
    ({"name": "contour", "weights": "/none.safetensors"}, "/none.safetensors: no such file"),
])
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        annotate(picture=noise(8, 8), **call)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"canny needs OpenCV: pip install acejax\[annotators\]"):
        annotate("canny", noise(8, 8))
    assert annotate("grey", noise(8, 8)).shape == annotate("mosaic", noise(8, 8)).shape
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "config.json").write_text('{"model_type": "dpt"}')
    with pytest.raises(UserError, match="depth needs torch: pip install"):
        annotate("depth", noise(8, 8), weights=tmp_path)


def test_mosaic_cells_are_pillows_where_the_sizes_divide():
    """Both ways of resizing put a cell's border at the same pixel."""
    picture = noise(128, 192)
    small = Image.fromarray(picture).resize((3, 2), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(annotate("mosaic", picture), np.asarray(small).repeat(64, 0).repeat(64, 1))
