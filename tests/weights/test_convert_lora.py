"""Conversion of LoRA files: what the report counts and measures, through the command, and that errors leave nothing."""

import json
import warnings

import ml_dtypes
import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

import acejax
from acejax.cli import convert as command
from acejax.weights import save
from acejax.weights.convert_lora import convert_lora
from tests import judges, loras
from tests.loras import CONFIG, HIDDEN, RANK

FORMATS = loras.files(loras.factors())
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
DOWN, UP = f"{QKV}.lora_down.weight", f"{QKV}.lora_up.weight"
BF16 = np.dtype(ml_dtypes.bfloat16)
ATTENTION = {f"transformer.transformer_blocks.0.attn.to_{name}": factors for name, factors in loras.drawn(
    dict.fromkeys("qkv", HIDDEN), dict.fromkeys("qkv", HIDDEN)).items()}


def write(folder, tensors, metadata=None, adapter=None):
    save_file(tensors, folder / "lora.safetensors", metadata)
    if adapter:
        (folder / "adapter_config.json").write_text(adapter)
    return folder / "lora.safetensors"


def split(alphas) -> dict[str, np.ndarray]:
    """A diffusers file of an A of its own for each of q, k and v, with these alphas."""
    tensors = {}
    for (name, (down, up)), alpha in zip(ATTENTION.items(), alphas, strict=True):
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": np.float32(alpha)}
    return {key: np.asarray(tensor) for key, tensor in tensors.items()}


@pytest.mark.parametrize("to", ["comfy", "diffusers"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_lossless_crossing_says_so(tmp_path, name, to):
    tensors = FORMATS[name][0]
    report = convert_lora(write(tmp_path, *FORMATS[name]), tmp_path / "out.safetensors", to, CONFIG)
    assert report.exact == report.used == len(tensors) and report.change == 0
    assert {key for row in report.rows for key in row.sources} == tensors.keys()
    assert {row.stored for row in report.rows} == {row.dtype for row in report.rows} == {"F32"}
    stored = load_file(tmp_path / "out.safetensors")
    assert {row.key: (row.shape, row.xxh3) for row in report.rows} == {
        key: (tensor.shape, xxhash.xxh3_64_hexdigest(tensor.tobytes())) for key, tensor in stored.items()}


def test_sources_are_the_tensors_that_were_used(tmp_path):
    report = convert_lora(write(tmp_path, split((4, 4, 4))), tmp_path / "out.safetensors", "comfy", CONFIG)
    sources = {row.key: row.sources for row in report.rows}
    for role, theirs in (("lora_down.weight", "lora_A.weight"), ("lora_up.weight", "lora_B.weight"),
                         ("alpha", "alpha")):
        assert sources[f"{QKV}.{role}"] == tuple(f"{name}.{theirs}" for name in ATTENTION)


@pytest.mark.parametrize("to", ["comfy", "diffusers"])
def test_another_dtype_is_measured_against_the_source(tmp_path, to):
    tensors = FORMATS["comfy"][0]
    report = convert_lora(write(tmp_path, tensors), tmp_path / "out.safetensors", to, CONFIG, BF16)
    factors = [tensor for key, tensor in tensors.items() if not key.endswith("alpha")]
    change = max(np.abs(factor - factor.astype(BF16).astype(np.float32)).max() for factor in factors)
    assert report.change == pytest.approx(change) and report.exact == 0
    assert {(row.stored, row.dtype) for row in report.rows if not row.key.endswith("alpha")} == {("F32", "BF16")}
    wide = convert_lora(tmp_path / "out.safetensors", tmp_path / "wide.safetensors", to, CONFIG, np.float32)
    assert wide.change == 0 and wide.exact == wide.used


def test_float64_stays(tmp_path):
    tensors = {key: tensor.astype(np.float64) for key, tensor in FORMATS["comfy"][0].items()}
    tensors[DOWN][0, 0] = 1 / 3
    report = convert_lora(write(tmp_path, tensors), tmp_path / "out.safetensors", "comfy", CONFIG)
    assert report.exact == report.used and report.change == 0
    np.testing.assert_array_equal(load_file(tmp_path / "out.safetensors")[DOWN], tensors[DOWN])


def test_strengths_that_differ_in_one_module(tmp_path):
    """ComfyUI has one alpha for all of qkv: B takes the rest, without loss where the quotient is a power of two."""
    whole = convert_lora(write(tmp_path, split((4, 8, 2))), tmp_path / "a.safetensors", "comfy", CONFIG)
    assert whole.exact == whole.used == 9 and whole.change == 0
    rounded = convert_lora(write(tmp_path, split((4, 5, 4))), tmp_path / "b.safetensors", "comfy", CONFIG)
    assert rounded.exact == 6 and rounded.used == 9 and 0 < rounded.change < 1e-6


def test_a_part_that_does_not_come_back_is_not_counted(tmp_path):
    tensors = FORMATS["comfy"][0] | {DOWN: FORMATS["comfy"][0][DOWN].astype(BF16).astype(np.float32),
                                     UP: FORMATS["comfy"][0][UP].astype(BF16).astype(np.float32)}
    report = convert_lora(write(tmp_path, tensors), tmp_path / "out.safetensors", "diffusers", CONFIG, BF16)
    assert report.exact == 3  # A, B and alpha of the one module that bfloat16 holds


def changed(**alphas):
    """A ComfyUI file with other tensors: None leaves one out."""
    return {key: tensor for key, tensor in (FORMATS["comfy"][0] | alphas).items() if tensor is not None}


def spiked(dtype=np.float32):
    up = FORMATS["comfy"][0][UP].astype(dtype)
    up[3, 1] = 1e6
    return changed(**{UP: up})


ALPHAS = [key for key in FORMATS["comfy"][0] if key.endswith("alpha")]
MISTAKES = {  # tensors, --to, --dtype, what the message must say
    "float8": (changed(), "comfy", ml_dtypes.float8_e4m3fn, "a LoRA is not stored as F8_E4M3; expected --dtype"),
    "float8_e5m2": (changed(), "diffusers", ml_dtypes.float8_e5m2, "a LoRA is not stored as F8_E5M2"),
    "too great": (spiked(), "comfy", np.float16, f"'{UP}' gives numbers up to 1e+06, beyond F16; expected another"),
    "too great, split": (spiked(), "diffusers", np.float16, f"'{UP}' gives numbers up to 1e+06, beyond F16"),
    "one alpha too small": (changed(**{f"{QKV}.alpha": np.array(1e-60)}), "diffusers", None, f"alpha '{QKV}.alpha'"),
    "all too small": (changed(**dict.fromkeys(ALPHAS, np.array(1e-60))), "comfy", None, "is 1e-60; expected one"),
    "alpha too great": (changed(**{f"{QKV}.alpha": np.array(1e300)}), "comfy", None, f"alpha '{QKV}.alpha'"),
    "quotient too great": (split((1e-30, 1e30, 1)), "comfy", None, "to_k.lora_B.weight' gives numbers up to"),
    "joint alpha too great": (split((3e38,) * 3), "comfy", None, ".alpha' gives numbers up to 9e+38, beyond F32; "
                              "expected a smaller alpha"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_leave_nothing(tmp_path, name):
    tensors, to, dtype, part = MISTAKES[name]
    source = write(tmp_path, tensors)
    with warnings.catch_warnings(), pytest.raises(acejax.UserError) as error:
        warnings.simplefilter("error")
        convert_lora(source, tmp_path / "new" / "out.safetensors", to, CONFIG, dtype)
    assert str(error.value).startswith(f"{source}: ") and part in str(error.value), error.value
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_float8_is_refused_before_any_work(tmp_path):
    with pytest.raises(acejax.UserError, match="a LoRA is not stored as F8_E4M3"):
        convert_lora(tmp_path / "absent.safetensors", tmp_path / "out.safetensors", "comfy", CONFIG,
                             ml_dtypes.float8_e4m3fn)


def test_a_disk_that_changes_a_bit(tmp_path, monkeypatch):
    def flawed(place, tensors, metadata, write=save.write_tensors):
        write(place, tensors, metadata)
        content = bytearray(place.read_bytes())
        content[-1] ^= 1
        place.write_bytes(content)

    source, target = write(tmp_path, FORMATS["comfy"][0]), tmp_path / "out.safetensors"
    monkeypatch.setattr(save, "write_tensors", flawed)
    with pytest.raises(acejax.UserError, match=r"out.safetensors: what was written does not read back"):
        convert_lora(source, target, "comfy", CONFIG)
    assert list(tmp_path.iterdir()) == [source]


def test_nothing_is_overwritten(tmp_path):
    source = write(tmp_path, FORMATS["comfy"][0])
    before = source.read_bytes()
    with pytest.raises(acejax.UserError, match="is there already"):
        convert_lora(source, source, "comfy", CONFIG)
    assert source.read_bytes() == before


# The command, on FLUX's own geometry: two modules of rank 2, hidden 3072.
WIDTH = 3072
FLUX = {"double_blocks.18.img_attn.qkv": 3 * WIDTH, "single_blocks.37.linear1": 7 * WIDTH}
PAIRS = loras.drawn(dict.fromkeys(FLUX, WIDTH), FLUX, rank=2)
ADAPTER = json.dumps({"r": 2, "lora_alpha": 1.5})


def run(*args) -> dict:
    """The report of a conversion that must succeed."""
    target = args[1]
    assert command.main([str(arg) for arg in (*args, "--json", f"{target}.json")]) == 0
    (report,) = json.loads(target.with_name(f"{target.name}.json").read_text())
    return report


def comfy(dtype=BF16, alpha=1.5):
    tensors = {}
    for module, (down, up) in PAIRS.items():
        name = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down.astype(dtype), f"{name}.lora_up.weight": up.astype(dtype),
                    f"{name}.alpha": np.array(alpha, np.float32)}
    return tensors


def dotted(form, dtype=BF16):
    return {form.format(module, role): factor.astype(dtype) for module, factors in PAIRS.items()
            for role, factor in zip("AB", factors, strict=True)}


def assert_same(path, tensors):
    stored = load_file(path)
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert stored[key].dtype == tensor.dtype and stored[key].tobytes() == tensor.tobytes(), key


def test_comfy_to_diffusers_and_back(tmp_path, capsys):
    source = write(tmp_path, comfy())
    report = run(source, tmp_path / "d.safetensors", "--to", "diffusers")
    assert report["model"] == "FLUX LoRA" and report["used"] == report["exact"] == 6 and report["change"] == 0
    assert len(report["rows"]) == 14 and report["not_finite"] == []  # q, k, v and q, k, v, mlp
    assert "back again  6 of 6 tensors bit for bit" in capsys.readouterr().out
    report = run(tmp_path / "d.safetensors", tmp_path / "c.safetensors", "--to", "comfy")
    assert report["used"] == report["exact"] == 14
    assert_same(tmp_path / "c.safetensors", comfy())


def test_swift_to_comfy(tmp_path):
    source = write(tmp_path, dotted("model.{}.lora_{}.0_SwiftLoRA.weight"), adapter=ADAPTER)
    report = run(source, tmp_path / "c.safetensors", "--to", "comfy")
    assert report["used"] == report["exact"] == 4 and report["change"] == 0
    assert_same(tmp_path / "c.safetensors", comfy())


@judges.needs_diffusers
def test_swift_s_pickle_to_comfy(tmp_path):
    import torch
    (tmp_path / "adapter_config.json").write_text(ADAPTER)
    torch.save({key: torch.from_numpy(tensor.view(np.int16)).view(torch.bfloat16)
                for key, tensor in dotted("model.{}.lora_{}.0_SwiftLoRA.weight").items()}, tmp_path / "lora.bin")
    report = run(tmp_path / "lora.bin", tmp_path / "c.safetensors", "--to", "comfy")
    assert report["used"] == report["exact"] == 4
    assert_same(tmp_path / "c.safetensors", comfy())


def test_bfl_to_diffusers(tmp_path, capsys):
    source = write(tmp_path, dotted("{}.lora_{}.weight", np.float32))
    report = run(source, tmp_path / "d.safetensors", "--to", "diffusers", "--dtype", "bfloat16")
    assert report["exact"] == 0 and report["used"] == 4 and report["change"] > 0
    assert "14 F32 to BF16" in capsys.readouterr().out
    run(tmp_path / "d.safetensors", tmp_path / "c.safetensors", "--to", "comfy")
    assert_same(tmp_path / "c.safetensors", comfy(alpha=RANK / 2))


def test_the_command_leaves_nothing_of_a_mistake(tmp_path):
    source = write(tmp_path, comfy())
    for to, dtype, part in (("comfy", "float8_e4m3fn", "a LoRA is not stored as"), ("bfl", "float32", "found a LoRA")):
        with pytest.raises(acejax.UserError, match=part):
            run(source, tmp_path / "out.safetensors", "--to", to, "--dtype", dtype)
    assert list(tmp_path.iterdir()) == [source]
