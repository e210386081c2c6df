"""Reading and writing transformer files: numbers kept, layouts and geometry detected, every mistake named."""

import dataclasses
import json
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import acejax
from acejax.weights import keymaps, layout
from acejax.weights.load import load_mmdit
from acejax.weights.save import save_model
from benchmarks.convert import generate
from tests.counts import count
from tests.goldens import cases

MODEL = cases.config()
FLUX_HEADS = acejax.MMDiTConfig(in_channels=384, out_channels=32, hidden_size=128, num_heads=1, depth=1,
                                depth_single_blocks=2, mlp_ratio=2.0, context_in_dim=24, vec_in_dim=20)


@pytest.fixture
def state():
    return cases.state(MODEL)


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, expected)


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model."])
@pytest.mark.parametrize("layout", keymaps.LAYOUTS)
def test_layouts_and_prefixes_are_detected(tmp_path, state, layout, prefix):
    params = keymaps.from_foreign(MODEL, state.__getitem__, "bfl")
    foreign = keymaps.to_foreign(MODEL, params, layout)
    config, found = load_mmdit(write(tmp_path, {prefix + key: tensor for key, tensor in foreign.items()}), MODEL)
    assert config == MODEL
    assert_same(found, params)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("layout", keymaps.LAYOUTS)
def test_config_is_read_off_the_tensors(tmp_path, layout, guidance):
    model = dataclasses.replace(FLUX_HEADS, guidance_embed=guidance)
    params = keymaps.from_foreign(model, cases.state(model).__getitem__, "bfl")
    save_model(tmp_path / "x.safetensors", model, params, layout)
    config, found = load_mmdit(tmp_path / "x.safetensors")
    assert config == model
    assert_same(found, params)


@pytest.mark.parametrize("kind", [str, pathlib.Path, epath.Path])
def test_save_and_load_are_inverse(tmp_path, state, kind):
    params = keymaps.from_foreign(MODEL, state.__getitem__, "bfl")
    path = kind(tmp_path / "new" / "x.safetensors")
    save_model(path, MODEL, params)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.safetensors"]
    stored = load_file(path)
    assert stored.keys() == state.keys()
    assert all(np.array_equal(stored[key], state[key]) for key in state)
    assert_same(load_mmdit(path, MODEL)[1], params)


def test_failed_save_keeps_the_old_file(tmp_path, state, monkeypatch):
    params = keymaps.from_foreign(MODEL, state.__getitem__, "bfl")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def full_disk(path, *rest):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("acejax.weights.save._write_file", full_disk)
    with pytest.raises(acejax.UserError, match="cannot be written .*no space"):
        save_model(path, MODEL, params)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.safetensors", b"old")]


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout is 'comfy'; known: bfl, diffusers"):
        save_model("x", MODEL, {}, layout="comfy")


def test_dtypes(tmp_path, state):
    """bf16 survives bit for bit, `dtype` casts on the way in and out, and a mixed leaf loses nothing."""
    half = {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in state.items()}
    path = write(tmp_path, half)
    params = load_mmdit(path, MODEL)[1]
    assert_same(params, keymaps.from_foreign(MODEL, half.__getitem__, "bfl"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    cast = load_mmdit(path, MODEL, dtype=jnp.float32)[1]
    assert_same(cast, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))

    save_model(tmp_path / "f16.safetensors", MODEL, params, dtype=np.float16)
    with safe_open(tmp_path / "f16.safetensors", framework="numpy") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118

    mixed = half | {"single_blocks.1.linear1.weight": state["single_blocks.1.linear1.weight"]}
    found = load_mmdit(write(tmp_path, mixed), MODEL)[1]
    assert found["single_blocks"]["qkv"]["kernel"].dtype == jnp.float32
    assert found["single_blocks"]["qkv"]["bias"].dtype == jnp.bfloat16
    rows = state["single_blocks.1.linear1.weight"][3 * MODEL.hidden_size:]
    np.testing.assert_array_equal(found["single_blocks"]["mlp_in"]["kernel"][1], rows.T)


def refused(path, *parts, config=MODEL):
    """The one message of a `load_mmdit` that must fail; it names the file and `parts`."""
    with pytest.raises(acejax.UserError) as error:
        load_mmdit(path, config)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    for part in parts:
        assert part in message, message


def test_missing_file(tmp_path):
    refused(tmp_path / "absent.safetensors", "no such file")
    refused(tmp_path, "expected one safetensors file or index in this folder; found none")


class Dangerous:
    """A pickle that would raise if it were executed."""

    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize("content", [b"", b"\x80", b"not tensors, but long enough to hold a header",
                                     pickle.dumps(Dangerous())])
def test_other_formats(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path, "expected a whole safetensors file")


def test_truncated_file_at_any_length(tmp_path, state):
    path = write(tmp_path, state)
    whole = path.read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "expected a whole safetensors file", "cut short")


def test_other_model(tmp_path):
    refused(write(tmp_path, {"encoder.conv_in.weight": np.zeros(3, np.float32)}), "not a FLUX transformer",
            "img_in.weight", "x_embedder.weight", "found encoder.conv_in.weight")
    refused(write(tmp_path, {}), "found no tensors")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_missing_key(tmp_path, state, prefix):
    del state["double_blocks.1.txt_attn.qkv.weight"], state["final_layer.linear.bias"]
    path = write(tmp_path, {prefix + key: tensor for key, tensor in state.items()})
    refused(path, f"'{prefix}double_blocks.1.txt_attn.qkv.weight' (and 1 more) is missing", "expected (192, 64)",
            f"{len(state) + 2} tensors", f"found {len(state)}")


def test_left_over_key(tmp_path, state):
    path = write(tmp_path, state | {"single_blocks.3.linear1.bias": np.zeros(5, np.float32)})
    refused(path, "'single_blocks.3.linear1.bias' is left over", "found (5,)", "tensors of the bfl layout")


def test_guidance_that_the_config_does_not_have(tmp_path, state):
    refused(write(tmp_path, state), "'guidance_in.in_layer.bias' (and 3 more) is left over",
            config=dataclasses.replace(MODEL, guidance_embed=False))


def test_wrong_shape(tmp_path, state):
    refused(write(tmp_path, state), "'img_in.weight' has shape (64, 448)", "expected (64, 384)",
            config=cases.config(384))


def test_dtype_that_is_no_plain_float(tmp_path, state):
    path = write(tmp_path, state | {"txt_in.weight": state["txt_in.weight"].astype(np.int8)})
    refused(path, "'txt_in.weight' is stored as I8", "expected one of F64, F32, F16, BF16")


def test_geometry_that_tensors_do_not_tell(tmp_path, state):
    refused(write(tmp_path, state), "'img_in.weight' has shape (64, 448)", "has (32,)", "heads of 128", "give config=",
            config=None)
    del state["double_blocks.0.img_attn.norm.query_norm.scale"]
    refused(write(tmp_path, state), "'double_blocks.0.img_attn.norm.query_norm.scale' is missing", config=None)
    refused(write(tmp_path, state | {"img_in.weight": np.zeros(3, np.float32)}), "'img_in.weight' is (3,)",
            "expected 2 axes", config=None)
    refused(write(tmp_path, state | {"img_in.weight": np.zeros((0, 64), np.float32)}), "'img_in.weight' is (0, 64)",
            "none empty", config=None)


def test_a_missing_layer_is_missed_not_taken_for_a_shorter_model(tmp_path):
    state = cases.state(FLUX_HEADS)
    holed = {key: tensor for key, tensor in state.items() if not key.startswith("single_blocks.0.")}
    refused(write(tmp_path, holed), "'single_blocks.0.", "is missing", config=None)
    wild = state | {"single_blocks.987654321.norm.query_norm.scale": np.zeros(128, np.float32)}
    refused(write(tmp_path, wild), "'single_blocks.2.", "is missing", config=None)


def test_load_is_public():
    assert acejax.load_mmdit is load_mmdit


def test_layer_by_layer_is_the_same(tmp_path, state, monkeypatch):
    """How a stacked leaf too large for the host goes to a single device."""
    path = write(tmp_path, state)
    whole = load_mmdit(path, MODEL)[1]
    monkeypatch.setattr("acejax.weights.load.BY_LAYER", 0)
    assert_same(load_mmdit(path, MODEL)[1], whole)
    bf16 = load_mmdit(path, MODEL, dtype=jnp.bfloat16)[1]
    assert_same(bf16, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole))


def test_eight_devices_hold_one_shard_at_a_time(tmp_path):
    """Beyond the result the process grows by no more than a shard on its way; the largest leaf would show."""
    width = count(1024, 3072)
    config = dataclasses.replace(acejax.MMDiTConfig.flux_fill(), hidden_size=width, num_heads=width // 128, depth=1,
                                 depth_single_blocks=count(12, 6))
    path = tmp_path / "x.safetensors"
    generate(path, config)
    report = subprocess.run([sys.executable, "-m", "tests.weights.mesh", str(path)], capture_output=True, text=True,
                            check=True, cwd=pathlib.Path(acejax.__file__).parents[1]).stdout
    figures = json.loads(report)
    print(figures)
    assert figures["devices"] == 8 and figures["sharded"] > 0.99
    assert figures["result"] <= 1.05 * path.stat().st_size  # what is whole everywhere is small
    assert figures["shard"] * 8 == figures["leaf"]
    slack = 3 * figures["leaf"] // 4  # of the runtime itself
    assert figures["growth"] < figures["result"] + figures["shard"] + slack


def test_shards_hold_the_right_numbers(tmp_path, state):
    """Every cut that a mesh may ask for, against the whole leaf."""
    get = {key: tensor for key, tensor in state.items()}.__getitem__
    shapes = keymaps.leaf_shapes(MODEL)
    rng = np.random.default_rng(0)
    for path, copies in layout.grouped(keymaps.plan_for(MODEL, "bfl"), "path").items():
        whole = layout.leaf(copies, shapes[path], get, np.float32)
        for _ in range(count(3, 30)):
            region = tuple(slice(*sorted(rng.choice(size + 1, 2, replace=False))) for size in whole.shape)
            np.testing.assert_array_equal(layout.leaf(copies, shapes[path], get, np.float32, region), whole[region])


def test_a_shard_asks_the_disk_for_itself_alone(state):
    """What is made where it is sliced (float8 with its scale) is made for the shard, not for the whole leaf."""
    class Asked:
        def __init__(self, tensor):
            self.tensor, self.dtype = tensor, tensor.dtype

        def __getitem__(self, region):
            asked.append(self.tensor[region].size)
            return self.tensor[region]

    asked = []
    shapes = keymaps.leaf_shapes(MODEL)
    for path, copies in layout.grouped(keymaps.plan_for(MODEL, "bfl"), "path").items():
        if path.endswith("kernel"):  # by columns of [in, ...], as fsdp cuts
            shape, axis = shapes[path], len(shapes[path]) - len(copies[0].block)
            region = tuple(slice(0, size // 8 if i == axis else size) for i, size in enumerate(shape))
            asked.clear()
            part = layout.leaf(copies, shape, lambda key: Asked(state[key]), np.float32, region)
            assert sum(asked) == part.size <= np.prod(shape) // 8, path


@pytest.mark.parametrize("name", keymaps.LAYOUTS)
def test_regions_of_foreign_tensors_hold_the_right_numbers(state, name):
    params = flatten_dict(keymaps.from_foreign(MODEL, state.__getitem__, "bfl"), sep="/")
    shapes = keymaps.expected(MODEL, name)
    rng = np.random.default_rng(0)
    for key, copies in layout.grouped(keymaps.plan_for(MODEL, name), "key").items():
        whole = layout.tensor(copies, shapes[key], params, np.float32)
        region = tuple(slice(*sorted(rng.choice(size + 1, 2, replace=False))) for size in whole.shape)
        np.testing.assert_array_equal(layout.tensor(copies, shapes[key], params, np.float32, region), whole[region])
