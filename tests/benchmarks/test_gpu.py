"""The GPU figures: the PyTorch peer computes what we do, and all parts run at tiny size, without a figure."""

import json

import pytest

from acejax.errors import UserError
from benchmarks import gpu
from tests.judges import needs


@needs("torch")
@pytest.mark.soak
def test_the_peer_computes_what_acejax_does():
    from benchmarks import gpu_check
    found = gpu_check.check()
    assert set(found) == {"velocity", "gradient", "LoRA gradient", "Adafactor"}


@needs("torch")
def test_a_peer_that_computes_something_else_is_refused(monkeypatch):
    from benchmarks import gpu_check
    monkeypatch.setattr(gpu_check, "differences", lambda: {"velocity": 1e-6, "gradient": float("nan")})
    with pytest.raises(UserError, match="differs from acejax by gradient nan"):
        gpu_check.check()


def report(tmp_path, *parts):
    path = tmp_path / "gpu.json"
    assert gpu.main([*parts, "--tiny", "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.soak
def test_a_part_at_tiny_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "check", lambda: {"velocity": 0.0})  # a test of its own
    found = report(tmp_path, "step")
    assert "not measured" in capsys.readouterr().out
    for row in found["rows"]:
        if "error" not in row:  # the peer's, without torch
            assert row["finite"] and row["flops"] > 0 and row["device"] == "no GPU"
            assert {row[name] for name in ("ms", "tflops", "mfu", "peak_gb")} == {"not measured"}


@pytest.mark.soak
@needs("torch")
def test_all_parts_at_tiny_size(tmp_path):
    found = report(tmp_path)
    assert [(row["part"], row["side"]) for row in found["rows"]] == [
        ("step", "ours"), ("step", "peer"), ("lora", "ours"), ("lora", "peer"), ("qlora", "ours"),
        ("fused", "ours"), ("fused", "peer"), ("unfused", "ours")]
    assert all(row["finite"] and row["ms"] == "not measured" for row in found["rows"])
    assert max(found["check"].values()) < 1e-4 and {"jax", "torch"} <= found["versions"].keys()


WORK = {"tiny": True, "tokens": 4, "text": 2, "samples": 1, "repeats": 1, "remat": "full", "torch_compile": "default"}
SUITE = gpu.Suite(("lora",), True, WORK, rounds=2, seconds=60)


def test_figures_of_a_gpu(monkeypatch):
    """Times, TFLOP/s and MFU from what sides report; a side without memory has a row that says so."""
    def side(suite, part, side, scratch, until):
        if side == "peer":
            return {"error": "out of memory: 99 GB"}
        return {"ms": [100.0, 102.0, 104.0], "peak_gb": 31.0, "first_step_s": 1.0, "device": "NVIDIA H100 80GB HBM3"}

    monkeypatch.setattr(gpu, "run_side", lambda *arguments: side(*arguments) | {"seconds": 1.0})
    monkeypatch.setattr(gpu, "flops", lambda suite, part: 98_900_000_000_000 * 0.102)
    ours, peer = gpu.run_part(SUITE, "lora", None, torch=True)
    assert ours["ms"]["median"] == 102 and len(ours["ms"]["all"]) == 6 and ours["ms"]["turns"] == [102, 102]
    assert ours["tflops"] == pytest.approx(98.9) and ours["mfu"] == pytest.approx(0.1) and ours["peak_gb"] == 31
    assert peer["error"] == "out of memory: 99 GB" and "ms" not in peer
    gpu.show({"model": "12B", "text": 2, "tokens": 4, "samples": 1, "rows": [ours, peer]})


def test_the_12b_flops():
    """Of a forward pass and of training, counted apart from our code; a factor that two of our modules share counts at
    both."""
    shared = 3 * 2 * (512 + 4096) * 38 * 2 * 3072 * 64
    full = gpu.Suite((), False, WORK | {"tiny": False, "tokens": 4096, "text": 512}, 1, 60)
    assert gpu.flops(full, "step") == pytest.approx(74.4e12, rel=0.002)
    assert gpu.flops(full, "fused") == pytest.approx(223.2e12, rel=0.002)
    assert gpu.flops(full, "lora") == gpu.flops(full, "qlora") == pytest.approx(168.2e12 + shared, rel=5e-4)


def test_memory_that_is_not_there_is_a_row(tmp_path, monkeypatch):
    from benchmarks import gpu_ours, gpu_side

    def exhausted(work):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.\nmore")

    monkeypatch.setitem(gpu_ours.PARTS, "step", exhausted)
    work = json.dumps(WORK | {"part": "step"})
    assert gpu_side.main(["ours", work, str(tmp_path / "row.json")]) == 0
    assert json.loads((tmp_path / "row.json").read_text())["error"].startswith("out of memory: RESOURCE_EXHAUSTED")


@pytest.mark.parametrize("flags, message", [
    (["nosuch"], "unknown part 'nosuch'; known: step"), (["--tokens", "0"], "--tokens is 0"),
    (["--json", "no/such/folder/x.json"], "not a file in an existing folder")])
def test_mistakes_are_told_before_anything_runs(flags, message):
    with pytest.raises(UserError, match=message):
        gpu.main(flags)


def test_missing_modules_are_named_with_their_wheels(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "optax" else object())
    with pytest.raises(UserError, match="lacks optax.*pip download --no-deps .* -d wheels optax"):
        gpu.check_modules()
