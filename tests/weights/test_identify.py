"""What a file is: geometry read off tensors, float8 with its scales, twins, grown inputs; each mistake named."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import acejax
from acejax.weights import geometry, keymaps, save
from acejax.weights.identify import open_model
from tests.goldens import cases
from tests.judges import difference
from tests.weights.models import CLIP, MMDIT, SMALL, T5, VAE, params, state

over_kinds = pytest.mark.parametrize("config", SMALL, ids=lambda config: type(config).__name__)
LOADERS = {type(MMDIT): acejax.load_mmdit, type(VAE): acejax.load_autoencoder, type(T5): acejax.load_t5,
           type(CLIP): acejax.load_clip}


def write(folder, tensors, name="x.safetensors"):
    save_file(tensors, folder / name)
    return folder / name


def refused(*parts, call=open_model, **given):
    with pytest.raises(acejax.UserError) as error:
        call(**given)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value), str(error.value)


@over_kinds
def test_geometry_is_read_off_the_tensors_of_every_layout(tmp_path, config):
    for layout in keymaps.layouts_of(config):
        path = tmp_path / f"{layout}.safetensors"
        save.save_model(path, config, params(config), layout)
        found, tree = LOADERS[type(config)](path)
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, tree, params(config))


@over_kinds
def test_full_size_geometry(config):
    """FLUX's own models, from names and shapes alone."""
    full = type(config)()
    for name, layout in keymaps.layouts_of(full).items():
        assert geometry.read(type(full), geometry.Shapes(keymaps.expected(full, name), layout)) == full


@pytest.mark.parametrize(("config", "told"), [
    (dataclasses.replace(MMDIT, num_heads=4, axes_dim=(8, 12, 12)), {"axes_dims_rope": [8, 12, 12]}),
    (dataclasses.replace(VAE, num_groups=16, scale_factor=0.5, shift_factor=0.25),
     {"norm_num_groups": 16, "scaling_factor": 0.5, "shift_factor": 0.25}),
    (dataclasses.replace(T5, relative_attention_max_distance=64), {"relative_attention_max_distance": 64}),
    (dataclasses.replace(CLIP, num_attention_heads=8), {"num_attention_heads": 8})])
def test_a_config_beside_the_file_tells_what_tensors_do_not(tmp_path, config, told):
    layout = list(keymaps.layouts_of(config))[-1]
    save.save_model(tmp_path / "model", config, params(config), layout)
    assert told.items() <= json.loads((tmp_path / "model" / "config.json").read_text()).items()
    assert LOADERS[type(config)](tmp_path / "model")[0] == config
    field = next(iter(told))
    (tmp_path / "model" / "config.json").write_text(json.dumps({field: "many"}))
    refused("config.json", field, "'many'", path=tmp_path / "model")


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_float8(tmp_path, dtype, scale):
    """Alone it is read exactly; ComfyUI's scales multiply in float32."""
    tensors, expected = {}, {}
    for key, tensor in state(MMDIT).items():
        short = tensor.astype(dtype) if tensor.ndim == 2 else tensor.astype(ml_dtypes.bfloat16)
        tensors[key] = short
        expected[key] = short.astype(np.float32)
        if tensor.ndim == 2 and scale is not None:
            tensors[key.removesuffix("weight") + "scale_weight"] = np.array(scale, np.float32)
            expected[key] = (expected[key] * np.float32(scale)).astype(ml_dtypes.bfloat16).astype(np.float32)
    if scale is not None:
        tensors["scaled_fp8"] = np.zeros(2, dtype)
    config, tree = acejax.load_mmdit(write(tmp_path, tensors))
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jax.numpy.dtype("bfloat16")}
    for key, tensor in keymaps.to_foreign(config, tree, "bfl", np.float32).items():
        np.testing.assert_array_equal(tensor, expected[key])


def test_float8_scales_that_cannot_be(tmp_path):
    short = {key: tensor.astype(ml_dtypes.float8_e4m3fn) for key, tensor in state(MMDIT).items()}
    for scale, told in ((np.zeros(3, np.float32), "shape (3,); expected one float"),
                        (np.array(np.nan, np.float32), "expected a finite scale"), (np.array(3), "is I64")):
        refused("'img_in.scale_weight'", told, path=write(tmp_path, short | {"img_in.scale_weight": scale}))
    plain = state(MMDIT) | {"img_in.scale_weight": np.ones((), np.float32)}
    refused("'img_in.weight' has a scale_weight but is stored as F32", path=write(tmp_path, plain))


def test_block_quantised_weights_are_named(tmp_path):
    packed = state(MMDIT) | {"txt_in.weight.absmax": np.zeros(4, np.float32),
                             "txt_in.weight.quant_state.bitsandbytes__nf4": np.zeros(4, np.uint8)}
    refused("'txt_in.weight.absmax'", "NF4", path=write(tmp_path, packed))


def test_scales_that_are_not_read_are_refused_whatever_the_flags(tmp_path):
    tensors = {key: tensor.astype(ml_dtypes.float8_e4m3fn) for key, tensor in state(MMDIT).items()}
    newer = tensors | {"txt_in.weight_scale": np.ones((), np.float32), "txt_in.comfy_quant": np.zeros(9, np.uint8)}
    refused("'txt_in.weight_scale'", "not read here", path=write(tmp_path, newer), allow_extra=True)
    refused("'nonsense.scale_weight' is left over", path=write(
        tmp_path, tensors | {"nonsense.scale_weight": np.ones((), np.float32)}))


@pytest.mark.parametrize(("config", "field", "value"), [
    (VAE, "norm_num_groups", "1e999"), (VAE, "norm_num_groups", "4.0"), (VAE, "scaling_factor", "Infinity"),
    (VAE, "shift_factor", "NaN"), (T5, "relative_attention_max_distance", "1e400"),
    (CLIP, "num_attention_heads", "4.0"),
    (MMDIT, "axes_dims_rope", "[16, 56.0, 56]"), (MMDIT, "axes_dims_rope", "[1e999]")])
def test_numbers_of_a_config_that_cannot_be(tmp_path, config, field, value):
    save.save_model(tmp_path / "m", config, params(config), list(keymaps.layouts_of(config))[-1])
    (tmp_path / "m" / "config.json").write_text(f'{{"{field}": {value}}}')
    refused("config.json", field, "expected", path=tmp_path / "m")


def test_twins_must_be_one_tensor(tmp_path):
    tensors = state(T5)
    twin = tensors["shared.weight"].copy()
    assert open_model(write(tmp_path, tensors | {"encoder.embed_tokens.weight": twin})).twins == (
        "encoder.embed_tokens.weight",)
    twin[1, 2] += 1
    refused("'encoder.embed_tokens.weight' and 'shared.weight' differ",
            path=write(tmp_path, tensors | {"encoder.embed_tokens.weight": twin}))
    alone = {"encoder.embed_tokens.weight" if key == "shared.weight" else key: x for key, x in tensors.items()}
    np.testing.assert_array_equal(acejax.load_t5(write(tmp_path, alone))[1]["token_embedding"]["embedding"],
                                  tensors["shared.weight"])


def test_another_kind_of_model_is_told(tmp_path):
    refused("not a FLUX transformer", call=acejax.load_mmdit, path=write(tmp_path, state(VAE)))
    refused("not a T5 encoder", call=acejax.load_t5, path=write(tmp_path, state(MMDIT)))


def grown(tmp_path, before: int, grow, after: int):
    """Velocities of a model of `before` channels and of what it grew to; what the new slots hold is arbitrary."""
    small, large = cases.config(before), cases.config(after)
    path = write(tmp_path, cases.state(small), f"{before}.safetensors")
    config, tree = acejax.load_mmdit(path, large, grow=grow)
    assert config == large
    wide = cases.inputs(large)
    noisy, edit, mask = wide.image[..., :64], wide.image[..., 64:128], wide.image[..., -256:]
    narrow = dataclasses.replace(wide, image=noisy if before == 64 else np.concatenate([noisy, edit, mask], -1))
    expected = acejax.apply(small, acejax.load_mmdit(path, small)[1], narrow)
    return acejax.apply(large, tree, wide), expected


@pytest.mark.parametrize(("before", "after"), [(64, 384), (64, 448), (384, 448)])
def test_growth_leaves_the_velocity_unchanged(tmp_path, before, after):
    found, expected = grown(tmp_path, before, after, after)
    assert difference(found, expected) < 1e-6


def test_the_references_growth_shifts_the_mask(tmp_path):
    """ACE_plus copies the leading columns: what the mask's weights read is then modify and the start of the mask."""
    found, expected = grown(tmp_path, 384, "reference", 448)
    assert difference(found, expected) > 0.1
    weight = acejax.load_mmdit(tmp_path / "384.safetensors", cases.config(448), grow="reference")[1]["img_in"]["kernel"]
    old = cases.state(cases.config(384))["img_in.weight"].T
    np.testing.assert_array_equal(weight, np.concatenate([old, np.zeros((64, 64), np.float32)]))


def test_growth_that_cannot_be(tmp_path):
    path = write(tmp_path, state(dataclasses.replace(MMDIT, in_channels=448)))
    refused("'img_in.weight' reads 448 channels; expected 64 or 384 to grow to 448", path=path, grow=448)
    refused("grow is 400; expected one of 384, 448, reference", path=path, grow=400)
    refused("and a config of 384", path=write(tmp_path, state(dataclasses.replace(MMDIT, in_channels=64))), grow=384,
            config=MMDIT.__class__(**{**vars(MMDIT), "in_channels": 64}))
