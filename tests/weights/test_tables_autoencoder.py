"""The autoencoder's key tables: the published names and shapes, and exact ways there and back."""

import jax
import ml_dtypes
import numpy as np
import pytest

import acejax
from acejax.model import autoencoder
from acejax.weights import keymaps
from tests import judges
from tests.goldens import cases

FLUX = acejax.AutoencoderConfig.flux()
MODEL = cases.autoencoder()
over_layouts = pytest.mark.parametrize("layout", ["bfl", "diffusers"])


def published() -> dict[str, tuple[int, ...]]:
    """Every tensor of ae.safetensors, written out apart from the tables (BFL `modules/autoencoder.py`)."""
    widths = 128, 256, 512, 512
    convs = {"encoder.conv_in": (128, 3, 3, 3), "encoder.conv_out": (32, 512, 3, 3),
             "decoder.conv_in": (512, 16, 3, 3), "decoder.conv_out": (3, 128, 3, 3)}
    norms = {"encoder.norm_out": 512, "decoder.norm_out": 128}

    def block(at, inputs, outputs):
        norms.update({f"{at}.norm1": inputs, f"{at}.norm2": outputs})
        convs.update({f"{at}.conv1": (outputs, inputs, 3, 3), f"{at}.conv2": (outputs, outputs, 3, 3)})
        if inputs != outputs:
            convs[f"{at}.nin_shortcut"] = outputs, inputs, 1, 1

    for side in ("encoder", "decoder"):
        block(f"{side}.mid.block_1", 512, 512)
        block(f"{side}.mid.block_2", 512, 512)
        norms[f"{side}.mid.attn_1.norm"] = 512
        convs |= {f"{side}.mid.attn_1.{name}": (512, 512, 1, 1) for name in ("q", "k", "v", "proj_out")}
    before = 128
    for level, width in enumerate(widths):
        for b in range(2):
            block(f"encoder.down.{level}.block.{b}", width if b else before, width)
        if level < 3:
            convs[f"encoder.down.{level}.downsample.conv"] = width, width, 3, 3
        before = width
    for level, width in reversed(tuple(enumerate(widths))):
        for b in range(3):
            block(f"decoder.up.{level}.block.{b}", width if b else before, width)
        if level > 0:
            convs[f"decoder.up.{level}.upsample.conv"] = width, width, 3, 3
        before = width
    weights = convs | {name: (width,) for name, width in norms.items()}
    return {f"{name}.weight": shape for name, shape in weights.items()} | {
        f"{name}.bias": shape[:1] for name, shape in weights.items()}


def count(shapes, start="") -> int:
    return sum(int(np.prod(shape)) for key, shape in shapes.items() if key.startswith(start))


def test_full_size_bfl_has_the_published_244_tensors():
    expected = keymaps.expected(FLUX, "bfl")
    assert expected == published()
    assert len(expected) == 244
    assert (count(expected, "encoder."), count(expected, "decoder.")) == (34_274_208, 49_545_475)
    assert count(expected) == 83_819_683


def test_one_name_or_shape_changed_is_seen():
    """The comparison above looks at every tensor."""
    expected = keymaps.expected(FLUX, "bfl")
    for key, shape in published().items():
        others = {name: other for name, other in published().items() if name != key}
        assert expected != others
        assert expected != others | {f"{key}s": shape}
        assert expected != others | {key: (shape[0] + 1, *shape[1:])}


@judges.needs_diffusers
def test_full_size_diffusers_has_the_names_and_shapes_of_autoencoder_kl():
    import torch

    with torch.device("meta"):
        judge = judges.autoencoder_kl(FLUX)
    shapes = {key: tuple(tensor.shape) for key, tensor in judge.state_dict().items()}
    assert keymaps.expected(FLUX, "diffusers") == shapes
    assert (len(shapes), count(shapes)) == (244, 83_819_683)


@over_layouts
def test_plan_covers_every_number_once(layout):
    """Each foreign element and each of ours is the end of exactly one copy."""
    foreign = {key: np.zeros(shape, int) for key, shape in keymaps.expected(MODEL, layout).items()}
    ours = {path: np.zeros(shape, int) for path, shape in keymaps.leaf_shapes(MODEL).items()}
    for copy in keymaps.plan_for(MODEL, layout):
        foreign[copy.key][copy.region] += 1
        ours[copy.path][copy.index] += 1
    assert all((counts == 1).all() for tree in (foreign, ours) for counts in tree.values())


def test_both_layouts_tell_the_same_tree():
    """A renaming written apart from the tables stands between them; the tree is the one of `init`."""
    state = cases.state(MODEL)
    from_bfl = keymaps.from_foreign(MODEL, state.__getitem__, "bfl")
    from_diffusers = keymaps.from_foreign(MODEL, judges.autoencoder_names(state).__getitem__, "diffusers")
    jax.tree.map(np.testing.assert_array_equal, from_bfl, from_diffusers)
    made = jax.eval_shape(autoencoder.init, MODEL, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, from_bfl) == jax.tree.map(lambda leaf: leaf.shape, made)


@over_layouts
def test_round_trips_are_bit_exact(layout):
    """BFL -> ours -> either layout -> ours -> BFL, in bfloat16."""
    state = {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in cases.state(MODEL).items()}
    params = keymaps.from_foreign(MODEL, state.__getitem__, "bfl")
    foreign = keymaps.to_foreign(MODEL, params, layout)
    assert {key: tensor.shape for key, tensor in foreign.items()} == keymaps.expected(MODEL, layout)
    assert all(tensor.flags.c_contiguous for tensor in foreign.values())
    again = keymaps.from_foreign(MODEL, foreign.__getitem__, layout)
    back = keymaps.to_foreign(MODEL, again, "bfl")
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype
        np.testing.assert_array_equal(back[key], tensor)


def test_a_marker_tells_the_layout():
    layouts = keymaps.layouts_of(MODEL)
    for name, layout in layouts.items():
        key = layout.key(layout.marker)
        assert [other for other in layouts if key in keymaps.expected(MODEL, other)] == [name]


def test_wrong_tree_is_named():
    params = keymaps.from_foreign(MODEL, cases.state(MODEL).__getitem__, "bfl")
    del params["decoder"]["conv_in"]["bias"]
    with pytest.raises(ValueError, match=r"'decoder/conv_in/bias' has shape None, the config expects \(64,\)"):
        keymaps.to_foreign(MODEL, params, "bfl")
