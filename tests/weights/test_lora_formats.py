"""LoRA files of other programs: the same numbers from every format, given back as they were, every mistake named."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import acejax
from acejax.adapt import lora as adapt
from acejax.weights import keymaps
from acejax.weights.lora_formats import load_lora, save_lora
from tests import judges, loras
from tests.counts import count
from tests.goldens import cases
from tests.loras import ALPHA, CONFIG, HIDDEN, INPUTS, MODULES, RANK, velocity
from tests.model.test_parity import difference
from tests.weights.test_load import Dangerous

TOKENS = cases.inputs(CONFIG)
FORMATS = loras.files(loras.factors())
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def write(folder: pathlib.Path, tensors, metadata=None, adapter=None) -> pathlib.Path:
    path = folder / "lora.safetensors"
    save_file(tensors, path, metadata)
    if adapter:
        (folder / "adapter_config.json").write_text(adapter)
    return path


def assert_same_tensors(path, tensors):
    stored = load_file(path)
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert stored[key].dtype == tensor.dtype, key
        np.testing.assert_array_equal(stored[key], tensor, err_msg=key)


@pytest.fixture(scope="module")
def merged_deltas():
    """What the LoRA of `FORMATS` adds to each kernel."""
    before, after = (flatten_dict(keymaps.from_foreign(CONFIG, state.__getitem__, "bfl"), sep="/")
                     for state in (loras.state(), loras.merged(loras.factors(), ALPHA / RANK)))
    deltas = {path.removesuffix("/kernel"): after[path] - before[path] for path in after if path.endswith("kernel")}
    return {module: delta.reshape(*delta.shape[:2], -1) for module, delta in deltas.items() if delta.any()}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_adds_the_same(tmp_path, merged_deltas, name):
    """alpha is not the rank here; a scale of the user's is put on top."""
    path = write(tmp_path, *FORMATS[name])
    for scale in (1.0, -0.5):
        found = loras.deltas(load_lora(path, CONFIG, scale))
        assert found.keys() == merged_deltas.keys()
        for module, delta in merged_deltas.items():
            np.testing.assert_allclose(found[module].reshape(delta.shape), scale * delta, atol=2e-6)


def test_an_attached_file_gives_the_merged_velocity(tmp_path):
    lora = load_lora(write(tmp_path, *FORMATS["comfy"]), CONFIG)
    expected = loras.expected(loras.factors(), ALPHA / RANK)
    assert difference(velocity(CONFIG, loras.params(), TOKENS, lora=lora), expected) < 1e-5
    assert difference(velocity(CONFIG, loras.params(), TOKENS), expected) > 0.1


def test_two_files_with_scales_give_the_velocity_of_weights_merged_with_both(tmp_path):
    """Attached as the editor does it; merged one after the other by `acejax.merge_lora`, and by numpy alone."""
    pairs, strengths = (loras.factors(), loras.factors(seed=3)), (0.5, -0.75)
    read, params = [], loras.params()
    for one, strength in zip(pairs, strengths, strict=True):
        path = write(tmp_path, *loras.files(one)["comfy"])
        read.append((load_lora(path, CONFIG), strength))
        params = acejax.merge_lora(params, load_lora(path, CONFIG, strength))
    found = velocity(CONFIG, loras.params(), TOKENS, lora=adapt.combine(read))
    assert difference(found, velocity(CONFIG, params, TOKENS)) < 1e-5
    one, two = (loras.merged(each, strength * ALPHA / RANK) for each, strength in zip(pairs, strengths, strict=True))
    both = {key: one[key] + two[key] - weight for key, weight in loras.state().items()}
    for state, least, most in (both, 0, 1e-5), (one, 0.1, 10), (two, 0.1, 10):  # neither of them does it alone
        merged = keymaps.from_foreign(CONFIG, state.__getitem__, "bfl")
        assert least <= difference(found, velocity(CONFIG, merged, TOKENS)) < most


@pytest.fixture
def uneven(tmp_path):
    """A diffusers file of a different A for every projection, ranks 2 and 3 by turns, some modules left out."""
    pairs = loras.split_factors(ranks=(2, 3))
    for part in ("transformer_blocks.0.attn.to_k", "transformer_blocks.1.ff.net.2",
                 "single_transformer_blocks.2.proj_mlp"):
        del pairs[part]
    pairs["single_transformer_blocks.0.attn.to_q"][1][:] = 0  # an untrained B stays, with its A
    tensors = {}
    for part, (down, up) in pairs.items():
        tensors |= {f"transformer.{part}.lora_A.weight": down, f"transformer.{part}.lora_B.weight": up}
    return pairs, tensors, write(tmp_path, tensors)


def test_another_a_for_each_projection(tmp_path, uneven):
    """diffusers -> ours -> diffusers is exact; ours -> ComfyUI -> ours computes the same."""
    pairs, tensors, path = uneven
    lora = load_lora(path, CONFIG)
    expected = loras.expected(pairs, 1.0)
    assert difference(velocity(CONFIG, loras.params(), TOKENS, lora=lora), expected) < 1e-5
    save_lora(tmp_path / "again.safetensors", CONFIG, lora, "diffusers")
    assert_same_tensors(tmp_path / "again.safetensors", tensors)
    save_lora(tmp_path / "comfy.safetensors", CONFIG, lora)
    stored = load_file(tmp_path / "comfy.safetensors")
    assert stored["lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight"].shape[0] in (7, 8)
    one, other = loras.deltas(lora), loras.deltas(load_lora(tmp_path / "comfy.safetensors", CONFIG))
    for module, delta in one.items():
        np.testing.assert_allclose(other[module], delta, atol=1e-6, err_msg=module)


@pytest.mark.parametrize("name", ["comfy", "split dims"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_comfy_comes_back_bit_for_bit(tmp_path, name, dtype):
    """Directly and by way of diffusers' split modules; a layer of another rank and one left out included."""
    tensors = {key: tensor if key.endswith("alpha") else tensor.astype(dtype)
               for key, tensor in FORMATS[name][0].items() if "single_blocks_1_linear2" not in key}
    if name == "comfy":
        tensors[f"{QKV}.lora_down.weight"] = tensors[f"{QKV}.lora_down.weight"][:3]
        tensors[f"{QKV}.lora_up.weight"] = np.ascontiguousarray(tensors[f"{QKV}.lora_up.weight"][:, :3])
        tensors[f"{QKV}.alpha"] = np.array(7, np.float32)  # 7 / 3 is no float, and comes back as 7
    lora = load_lora(write(tmp_path, tensors), CONFIG)
    assert lora["double_blocks"]["img"]["qkv"]["b"].dtype == dtype
    save_lora(tmp_path / "again.safetensors", CONFIG, lora)
    assert_same_tensors(tmp_path / "again.safetensors", tensors)
    save_lora(tmp_path / "split.safetensors", CONFIG, lora, "diffusers")
    save_lora(tmp_path / "back.safetensors", CONFIG, load_lora(tmp_path / "split.safetensors", CONFIG))
    assert_same_tensors(tmp_path / "back.safetensors", tensors)


def test_dtype_casts(tmp_path):
    lora = load_lora(write(tmp_path, *FORMATS["comfy"]), CONFIG, dtype=jnp.bfloat16)
    assert {leaf.dtype for path, leaf in flatten_dict(lora, sep="/").items() if not path.endswith("scale")} == {
        jnp.dtype(jnp.bfloat16)}
    save_lora(tmp_path / "half.safetensors", CONFIG, lora, dtype=np.float16)
    assert {tensor.dtype.name for key, tensor in load_file(tmp_path / "half.safetensors").items()
            if "alpha" not in key} == {"float16"}


@pytest.mark.parametrize("layout", ["comfy", "diffusers"])
def test_layers_outside_the_blocks(tmp_path, layout):
    """Every linear layer can carry a LoRA; diffusers keeps the final modulation's halves the other way round."""
    down, up = loras.drawn({"norm_out.linear": HIDDEN}, {"norm_out.linear": 2 * HIDDEN})["norm_out.linear"]
    tensors = {"transformer.norm_out.linear.lora_A.weight": down, "transformer.norm_out.linear.lora_B.weight": up}
    lora = load_lora(write(tmp_path, tensors), CONFIG)
    delta = np.asarray(loras.deltas(lora)["final_layer/modulation"])
    scale, shift = np.split(up @ down, 2)
    np.testing.assert_allclose(delta.T, np.concatenate([shift, scale]), atol=1e-6)
    save_lora(tmp_path / "again.safetensors", CONFIG, lora, layout)
    if layout == "diffusers":
        assert_same_tensors(tmp_path / "again.safetensors", tensors)
    jax.tree.map(np.testing.assert_array_equal, loras.deltas(load_lora(tmp_path / "again.safetensors", CONFIG)),
                 loras.deltas(lora))
    embedders = adapt.init(CONFIG, jax.random.key(0), 2, targets=("img_in", "time_in/.*"))
    save_lora(tmp_path / "all.safetensors", CONFIG, embedders, layout)
    jax.tree.map(np.testing.assert_array_equal, load_lora(tmp_path / "all.safetensors", CONFIG), embedders)


def test_several_loras_are_exported_as_one(tmp_path):
    """Strengths that differ go into B; one strength leaves the numbers alone."""
    one = load_lora(write(tmp_path, *FORMATS["comfy"]), CONFIG)
    two = load_lora(write(tmp_path, *loras.files(loras.factors(seed=3))["comfy"]), CONFIG)
    for strengths in ((1.0, 1.0), (0.7, -2.0)):
        both = adapt.combine(list(zip((one, two), strengths, strict=True)))
        expected = loras.deltas(both)
        for layout in ("comfy", "diffusers"):
            save_lora(tmp_path / "both.safetensors", CONFIG, both, layout)
            found = loras.deltas(load_lora(tmp_path / "both.safetensors", CONFIG))
            for module, delta in expected.items():
                np.testing.assert_allclose(found[module], delta, atol=1e-5)
            assert {tensor.shape[0] for key, tensor in load_file(tmp_path / "both.safetensors").items()
                    if "lora_down" in key or "lora_A" in key} == {2 * RANK}


@judges.needs_peft
@pytest.mark.parametrize("name", ["even", "uneven"])
def test_diffusers_loads_our_export(tmp_path, uneven, name):
    """Its own loader, on alpha != rank and on ranks that differ; and it reads our file as we read its."""
    path = uneven[2] if name == "uneven" else write(tmp_path, *FORMATS["comfy"])
    lora = load_lora(path, CONFIG, 0.75)
    save_lora(tmp_path / "ours.safetensors", CONFIG, lora, "diffusers")
    found = judges.flux_velocity(CONFIG, loras.params(), TOKENS, tmp_path / "ours.safetensors")
    assert difference(velocity(CONFIG, loras.params(), TOKENS, lora=lora), found) < 1e-4
    assert difference(velocity(CONFIG, loras.params(), TOKENS), found) > 0.1


def test_metadata_says_ranks_and_alphas(tmp_path, uneven):
    lora = load_lora(uneven[2], CONFIG, 0.5)
    save_lora(tmp_path / "ours.safetensors", CONFIG, lora, "diffusers")
    with safe_open(tmp_path / "ours.safetensors", framework="numpy") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    ranks = {part: len(down) for part, (down, _) in uneven[0].items()}
    assert set(fields["transformer.target_modules"]) == set(ranks)
    for part, rank in ranks.items():
        assert fields["transformer.rank_pattern"].get(f"^{part}", fields["transformer.r"]) == rank
        assert fields["transformer.alpha_pattern"].get(f"^{part}", fields["transformer.lora_alpha"]) == rank / 2


@pytest.mark.parametrize("fields, scale", [
    ({"r": 4, "lora_alpha": 8}, 2), ({"r": 4}, 1), ({"lora_alpha": 8, "use_rslora": True}, 4), ({"lora_alpha": 0}, 1),
    ({"lora_alpha": 8, "alpha_pattern": {"to_q": 2}}, 0.5), ({"lora_alpha": 8, "alpha_pattern": {"o_q": 2}}, 2),
    ({"lora_alpha": 8, "alpha_pattern": {"^attn.to_q": 2}}, 2),
    ({"lora_alpha": 8, "alpha_pattern": {"^transformer_blocks.0.attn.to_q": 2}}, 0.5)])
def test_alpha_of_peft(tmp_path, fields, scale):
    name = "transformer_blocks.0.attn.to_q"
    tensors = {f"base_model.model.{name}.lora_A.weight": np.ones((4, HIDDEN), np.float32),
               f"base_model.model.{name}.lora_B.weight": np.ones((HIDDEN, 4), np.float32)}
    found = load_lora(write(tmp_path, tensors, adapter=json.dumps(fields)), CONFIG)["double_blocks"]["img"]["qkv"]
    np.testing.assert_array_equal(found["scale"], np.array([[[scale, 0, 0]] * 4, [[0] * 3] * 4], np.float32))
    alpha = tensors | {f"base_model.model.{name}.alpha": np.array([1], ml_dtypes.bfloat16)}
    again = load_lora(write(tmp_path, alpha), CONFIG)["double_blocks"]["img"]["qkv"]
    assert again["scale"][0, 0, 0] == 0.25  # what the tensors say goes first


@pytest.mark.parametrize("alpha", [None, 0])
def test_kohya_without_alpha(tmp_path, alpha):
    tensors = {key: np.float32(alpha) if key.endswith("alpha") else tensor
               for key, tensor in FORMATS["comfy"][0].items() if alpha is not None or not key.endswith("alpha")}
    tensors = {key: np.asarray(tensor) for key, tensor in tensors.items()}
    assert (load_lora(write(tmp_path, tensors), CONFIG)["single_blocks"]["qkv"]["scale"] == 1).all()


def swift_bin(folder, state):
    torch = pytest.importorskip("torch")
    torch.save({key: torch.tensor(value) if isinstance(value, np.ndarray) else value for key, value in state.items()},
               folder / "adapter_model.bin")
    return folder / "adapter_model.bin"


@judges.needs_diffusers
def test_swift_s_bin(tmp_path):
    import torch
    tensors, _, adapter = FORMATS["swift"]
    (tmp_path / "adapter_config.json").write_text(adapter)
    half = {key: torch.from_numpy(tensor).bfloat16() for key, tensor in tensors.items()}
    torch.save(half, tmp_path / "adapter_model.bin")
    found = load_lora(tmp_path / "adapter_model.bin", CONFIG)["double_blocks"]["txt"]["mlp_in"]
    key = "model.double_blocks.1.txt_mlp.0.lora_A.0_SwiftLoRA.weight"
    np.testing.assert_array_equal(found["a"][1].T, tensors[key].astype(ml_dtypes.bfloat16))
    assert (found["scale"] == ALPHA / RANK).all()


def refused(path, *parts):
    """The one message of a `load_lora` that must fail; it names the file and `parts`."""
    with pytest.raises(acejax.UserError) as error:
        load_lora(path, CONFIG)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    assert message.startswith(f"{path}: ")
    for part in parts:
        assert part in message, message


@judges.needs_diffusers
def test_bin_runs_no_code(tmp_path):
    refused(swift_bin(tmp_path, {"x": Dangerous()}), "expected tensors saved by PyTorch", "UnpicklingError")
    refused(swift_bin(tmp_path, {"x": "no tensor"}), "expected a dense tensor")
    refused(swift_bin(tmp_path, {"x": np.zeros(3, np.int64)}), "'x' is stored as I64")
    (tmp_path / "adapter_model.bin").write_bytes(b"junk")
    refused(tmp_path / "adapter_model.bin", "expected tensors saved by PyTorch")
    refused(tmp_path / "absent.bin", "no such file")


def test_bin_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "x.bin").write_bytes(b"x")
    refused(tmp_path / "x.bin", "needs PyTorch (pip install torch", "or give safetensors")


A, B = f"{QKV}.lora_down.weight", f"{QKV}.lora_up.weight"
ZEROS = np.zeros((RANK, HIDDEN), np.float32)
DOWN, UP = FORMATS["comfy"][0][A], FORMATS["comfy"][0][B]


def nan(tensor, value=np.nan):
    out = tensor.copy()
    out[1, 1] = value
    return out


MISTAKES = {  # what to change in a ComfyUI file (None: drop it), what the message must say
    "no down": ({A: None}, f"'{B}' stands alone", "lora_down"),
    "no up": ({B: None}, f"'{A}' stands alone", "lora_up"),
    "alpha alone": ({A: None, B: None}, f"'{QKV}.alpha' stands alone"),
    "unknown module": ({"lora_unet_double_blocks_0_img_attn_kqv.lora_down.weight": ZEROS}, "img_attn_kqv", "no LoRA"),
    "a layer too many": ({"lora_unet_double_blocks_2_img_attn_qkv.lora_down.weight": ZEROS}, "blocks_2_img", "no LoRA"),
    "a weight": ({"double_blocks.0.img_attn.qkv.weight": ZEROS}, "'double_blocks.0.img_attn.qkv.weight'", "no LoRA"),
    "no name": ({"weight": ZEROS}, "'weight' is no LoRA"),
    "empty name": ({"": ZEROS}, "'' is no LoRA"),
    "LoHa": ({f"{QKV}.hada_w1_a": ZEROS}, f"'{QKV}.hada_w1_a' is LyCORIS"),
    "LoKr": ({f"{QKV}.lokr_w1": ZEROS}, "is LyCORIS"),
    "full difference": ({f"{QKV}.diff": ZEROS}, "is LyCORIS"),
    "DoRA": ({f"{QKV}.dora_scale": ZEROS}, "is a DoRA magnitude"),
    "PEFT's DoRA": ({"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector.weight": ZEROS}, "DoRA"),
    "bias": ({"double_blocks.0.img_attn.qkv.lora_B.bias": ZEROS[0]}, "qkv.lora_B.bias' is a LoRA bias"),
    "norm scale": ({"double_blocks.0.img_attn.norm.key_norm.scale": ZEROS[0]}, "is a whole norm scale"),
    "text encoder": ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": ZEROS}, "a text encoder's"),
    "two layouts": ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": ZEROS}, "one of diffusers'"),
    "twice": ({"double_blocks.0.img_attn.qkv.lora_A.weight": ZEROS}, "are the same factor"),
    "two adapters": ({"double_blocks.0.img_attn.proj.lora_A.1.weight": ZEROS,
                      "double_blocks.0.img_attn.proj.lora_A.2.weight": ZEROS}, "are the same factor"),
    "wider base": ({A: np.zeros((RANK, 2 * HIDDEN), np.float32)}, f"'{A}' has shape (4, 128); expected (4, 64)"),
    "longer base": ({B: np.zeros((9, RANK), np.float32)}, f"'{B}' has shape (9, 4); expected (192, 4)"),
    "other rank": ({B: np.zeros((192, 5), np.float32)}, "has shape (192, 5); expected (192, 4)"),
    "rank 0": ({A: ZEROS[:0], B: np.zeros((192, 0), np.float32)}, "has shape (0, 64); expected ('rank', 64)"),
    "transposed": ({A: np.ascontiguousarray(DOWN.T)}, "has shape (64, 4); expected (64, 64)"),
    "vector": ({A: ZEROS[0]}, "has shape (64,); expected ('rank', 64)"),
    "scalar": ({B: np.array(1, np.float32)}, "has shape (); expected (192, 4)"),
    "convolution": ({A: ZEROS[..., None, None]}, "has shape (4, 64, 1, 1)"),
    "NaN": ({A: nan(DOWN)}, f"'{A}' has numbers that are not finite"),
    "infinity in half": ({B: nan(UP, np.inf).astype(ml_dtypes.bfloat16)}, f"'{B}' has numbers that are not finite"),
    "too great for float32": ({B: nan(UP.astype(np.float64), 1e300)}, f"'{B}' has numbers that are not finite"),
    "a long name": ({"x" * 100_000: ZEROS}, "'" + "x" * 189 + "...' is no LoRA"),
    "a slow name": ({"norm" * 25_000: ZEROS}, "'normnorm"),
    "lines in a name": ({"x\ny": ZEROS}, r"'x\ny' is no LoRA"),
    "alpha is nearly 0": ({f"{QKV}.alpha": np.array(1e-60)}, f"alpha '{QKV}.alpha'", "is 1e-60; expected one finite"),
    "alpha beyond float32": ({f"{QKV}.alpha": np.array(1e300)}, f"alpha '{QKV}.alpha'", "is 1e+300; expected one"),
    "alpha NaN": ({f"{QKV}.alpha": np.array(np.nan, np.float32)}, f"alpha '{QKV}.alpha'", "is nan"),
    "alpha is two": ({f"{QKV}.alpha": np.ones(2, np.float32)}, "expected one finite number"),
    "integers": ({A: np.ones((RANK, HIDDEN), np.int8)}, f"'{A}' is stored as I8; expected one of F64, F32"),
    "quantised": ({A: np.ones((RANK, HIDDEN), ml_dtypes.float8_e4m3fn)}, f"'{A}' is stored as F8_E4M3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path, name):
    changes, *parts = MISTAKES[name]
    tensors = {key: tensor for key, tensor in (FORMATS["comfy"][0] | changes).items() if tensor is not None}
    refused(write(tmp_path, tensors), *parts)


@pytest.mark.parametrize("fields, part", [
    ("{", "is no JSON"), ("[]", "is list"), ('{"lora_alpha": "8"}', "is '8'; expected one finite number"),
    ('{"lora_alpha": NaN}', "alpha 'lora_alpha' of 'double_blocks.0.img_attn.proj' is nan"),
    ('{"lora_alpha": 1%s}' % ("0" * 400), "alpha 'lora_alpha' of 'double_blocks.0.img_attn.proj' is 1000"),
    ('{"lora_alpha": 1%s}' % ("0" * 5000), "adapter_config.json is no JSON"),
    ('{"alpha_pattern": {"lin": 1e-60}}', "alpha 'alpha_pattern' of 'double_blocks.0.img_mod.lin' is 1e-60"),
    ('{"lora_alpha": true}', "is True; expected one finite number"),
    ('{"alpha_pattern": {"%s": 1}}' % ("\\n" * 10_000), "expected numbers by module name"),
    ("[" * 200_000, "adapter_config.json is no JSON"),
    ('{"alpha_pattern": [1]}', "alpha_pattern in adapter_config.json is [1]"),
    ('{"alpha_pattern": {"(a+)+$": 1}}', "expected numbers by module name")])
def test_wrong_adapter_config(tmp_path, fields, part):
    refused(write(tmp_path, FORMATS["swift"][0], adapter=fields), part)


@pytest.mark.parametrize("text, part", [
    ("[" * 200_000, "metadata 'lora_adapter_metadata' is no JSON"),
    (json.dumps({"transformer.lora_alpha": 10**400}), "alpha 'lora_alpha' of")])
def test_hostile_metadata(tmp_path, text, part):
    refused(write(tmp_path, FORMATS["diffusers"][0], {"lora_adapter_metadata": text}), part)


def test_a_folder_with_its_adapter_config(tmp_path):
    tensors, _, adapter = FORMATS["swift"]
    write(tmp_path, tensors, adapter=adapter)
    assert (load_lora(tmp_path, CONFIG)["single_blocks"]["qkv"]["scale"] == ALPHA / RANK).all()


def test_other_files(tmp_path):
    refused(tmp_path / "absent.safetensors", "no such file")
    refused(write(tmp_path, {}), "found no tensors; expected a LoRA")
    path = write(tmp_path, *FORMATS["comfy"])
    whole = path.read_bytes()
    for content in (b"", b"not tensors, but long enough to hold a header", whole[:100], whole[:-1]):
        path.write_bytes(content)
        refused(path, "expected a whole safetensors file")
    refused(write(tmp_path, {"img_in.weight": ZEROS}), "no LoRA of this model")


@pytest.mark.parametrize("act, message", [
    (lambda lora: save_lora("x", CONFIG, lora, "kohya"), "layout is 'kohya'; known: comfy, diffusers"),
    (lambda lora: save_lora("x", CONFIG, {"blocks": lora["double_blocks"]["img"]}), "lora has 'blocks/mlp_in'"),
    (lambda lora: save_lora("x", CONFIG, adapt.combine([(lora, 0.0)])), "holds nothing"),
    (lambda lora: save_lora("x", CONFIG, lora, dtype=ml_dtypes.float8_e4m3fn), "dtype is float8_e4m3fn; a LoRA is"),
    (lambda lora: save_lora("x", CONFIG, jax.tree.map(lambda leaf: leaf + 1e6, lora), dtype=np.float16),
     r"lora_down.weight' has numbers up to 1e\+06, beyond F16"),
])
def test_wrong_lora_to_save(tmp_path, monkeypatch, act, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        act(adapt.init(CONFIG, jax.random.key(0), RANK, targets="double_blocks/.*"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["comfy", "diffusers"])
@pytest.mark.parametrize("rank", [1, 3, 6, 7])
def test_alphas_of_any_size_come_back(tmp_path, layout, rank):
    """What a file says of a rank comes back to the bit."""
    for alpha in np.random.default_rng(rank).lognormal(sigma=20, size=count(20, 400)).astype(np.float32):
        tensors = {A: DOWN[:1].repeat(rank, 0), B: UP[:, :1].repeat(rank, 1), f"{QKV}.alpha": np.array(alpha)}
        lora = load_lora(write(tmp_path, tensors), CONFIG)
        save_lora(tmp_path / "again.safetensors", CONFIG, lora, layout)
        again = load_lora(tmp_path / "again.safetensors", CONFIG)["double_blocks"]["img"]["qkv"]["scale"]
        assert (again == lora["double_blocks"]["img"]["qkv"]["scale"]).all(), alpha


def test_the_names_are_public_and_the_whole_table_is_tried():
    assert acejax.load_lora is load_lora and acejax.save_lora is save_lora
    assert len(MODULES) == 10 * CONFIG.depth + 3 * CONFIG.depth_single_blocks == len(INPUTS)
