"""Conversion: bit-exact ways there and back, what the report says, and 2,000 broken files (in full counts)."""

import json
import os
import pathlib
import shutil
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

import acejax
from acejax.cli import convert as command
from acejax.weights import convert, keymaps, save
from acejax.weights.identify import open_model
from tests.counts import count
from tests.weights import mutations
from tests.weights.models import CLIP, MMDIT, SMALL, T5, VAE, first, params, state

BF16 = np.dtype(ml_dtypes.bfloat16)


def run(*args) -> int:
    return command.main([str(arg) for arg in args])


@pytest.fixture
def written(tmp_path):
    """A bfloat16 file of a small model in its first layout."""
    def write(config=MMDIT, prefix="", dtype=BF16, **extra):
        path = tmp_path / "source.safetensors"
        save_file({prefix + key: tensor.astype(dtype) for key, tensor in state(config).items()} | extra, path)
        return path
    return write


def same(source: pathlib.Path, target: pathlib.Path, prefix: str = "") -> None:
    one, other = load_file(source), load_file(target)
    assert {prefix + key for key in one} == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[prefix + key].dtype
        assert tensor.tobytes() == other[prefix + key].tobytes(), key


@pytest.mark.parametrize("config", [MMDIT, VAE], ids=["transformer", "autoencoder"])
def test_bfl_to_diffusers_and_back_is_bit_exact(written, tmp_path, config):
    source = written(config)
    assert run(source, tmp_path / "diffusers", "--to", "diffusers", "--json", tmp_path / "report.json") == 0
    assert run(tmp_path / "diffusers", tmp_path / "back.safetensors", "--to", "bfl") == 0
    same(source, tmp_path / "back.safetensors")

    (report,) = json.loads((tmp_path / "report.json").read_text())
    stored = load_file(source)
    assert report["used"] == report["exact"] == len(stored)
    assert not report["left_over"] and not report["not_finite"] and report["change"] == 0
    assert {key for row in report["rows"] for key in row["sources"]} == stored.keys()
    assert {row["key"] for row in report["rows"]} == load_file(report["files"][0]).keys()


def test_the_report_has_each_tensors_checksum(written, tmp_path):
    model = open_model(written())
    report = convert.convert(model, tmp_path / "out.safetensors", "diffusers")
    stored = load_file(tmp_path / "out.safetensors")
    assert {row.key: row.xxh3 for row in report.rows} == {
        key: xxhash.xxh3_64_hexdigest(tensor.tobytes()) for key, tensor in stored.items()}


@pytest.mark.parametrize("chunk", [64, 1000])
def test_chunks_of_any_size(written, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("acejax.weights.source.CHUNK", chunk)
    source = written()
    assert run(source, tmp_path / "d.safetensors", "--to", "diffusers") == 0
    monkeypatch.undo()
    assert run(tmp_path / "d.safetensors", tmp_path / "b.safetensors", "--to", "bfl") == 0
    same(source, tmp_path / "b.safetensors")


def test_comfy_has_its_prefix_and_is_read_again(written, tmp_path):
    source = written()
    assert run(source, tmp_path / "comfy.safetensors", "--to", "comfy") == 0
    same(source, tmp_path / "comfy.safetensors", "model.diffusion_model.")
    assert run(tmp_path / "comfy.safetensors", tmp_path / "bfl.safetensors", "--to", "bfl") == 0
    same(source, tmp_path / "bfl.safetensors")


def test_shards_with_an_index(written, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "SHARD", 100_000)
    source = written()
    assert run(source, tmp_path / "d", "--to", "diffusers") == 0
    monkeypatch.undo()
    files = sorted(path.name for path in (tmp_path / "d").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 200_000 for path in (tmp_path / "d").glob("*.safetensors"))
    for given in (tmp_path / "d", tmp_path / "d" / "diffusion_pytorch_model.safetensors.index.json"):
        assert run(given, tmp_path / "b.safetensors", "--to", "bfl") == 0
        same(source, tmp_path / "b.safetensors")
        (tmp_path / "b.safetensors").unlink()


def test_orbax_and_back(written, tmp_path):
    source = written()
    assert run(source, tmp_path / "orbax", "--to", "orbax", "--json", tmp_path / "r.json") == 0
    (report,) = json.loads((tmp_path / "r.json").read_text())
    assert report["exact"] == report["used"] == len(load_file(source)) and report["written"] == "orbax"
    assert run(tmp_path / "orbax", tmp_path / "back.safetensors", "--to", "bfl") == 0
    same(source, tmp_path / "back.safetensors")


def test_orbax_that_does_not_fit_is_refused_with_the_figure(written, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_free_memory", lambda: 100_000)
    source = written()
    with pytest.raises(acejax.UserError, match=r"needs .* GB; 0\.0 GB are free.*convert to bfl"):
        run(source, tmp_path / "orbax", "--to", "orbax")
    assert not (tmp_path / "orbax").exists()


def test_a_wider_dtype_changes_nothing_and_a_narrower_one_is_measured(written, tmp_path):
    source = written(dtype=np.float32)
    wide, narrow, again = (tmp_path / f"{name}.safetensors" for name in ("wide", "narrow", "again"))
    assert run(source, narrow, "--to", "bfl", "--dtype", "bfloat16", "--json", tmp_path / "r.json") == 0
    (report,) = json.loads((tmp_path / "r.json").read_text())
    exact, rounded = load_file(source), load_file(narrow)
    largest = max(np.abs(exact[key] - rounded[key].astype(np.float32)).max() for key in exact)
    assert report["change"] == pytest.approx(largest) and report["exact"] == 0
    assert run(narrow, wide, "--to", "diffusers", "--dtype", "float32", "--json", tmp_path / "r.json") == 0
    (report,) = json.loads((tmp_path / "r.json").read_text())
    assert report["change"] == 0 and report["exact"] == report["used"]
    assert run(wide, again, "--to", "bfl", "--dtype", "bfloat16") == 0
    same(narrow, again)


def test_numbers_beyond_a_dtype_are_refused(written, tmp_path):
    source = written(dtype=np.float32)
    tensors = load_file(source)
    tensors["txt_in.weight"][1, 2] = 1e6
    save_file(tensors, source)
    with pytest.raises(acejax.UserError, match=r"'txt_in.weight' holds numbers up to 1e\+06, beyond F16"):
        run(source, tmp_path / "out.safetensors", "--to", "bfl", "--dtype", "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_nan_and_inf_are_reported(written, tmp_path, capsys):
    source = written()
    tensors = load_file(source)
    tensors["txt_in.bias"][:2] = np.nan
    tensors["txt_in.bias"][3] = -np.inf
    save_file(tensors, source)
    assert run(source, tmp_path / "out.safetensors", "--to", "diffusers", "--json", tmp_path / "r.json") == 1
    assert "context_embedder.bias" in capsys.readouterr().out
    (report,) = json.loads((tmp_path / "r.json").read_text())
    (row,) = [row for row in report["rows"] if row["nan"] or row["inf"]]
    assert (row["key"], row["nan"], row["inf"]) == ("context_embedder.bias", 2, 1)
    assert report["exact"] == report["used"]  # copied as they are


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2,
                                   ml_dtypes.float8_e4m3fn])
def test_what_is_finite_is_seen_in_the_bits(dtype):
    """All numbers of the short dtypes; the edges of the long ones."""
    size = np.dtype(dtype).itemsize
    if size <= 2:
        numbers = np.arange(256**size).astype(f"u{size}").view(dtype)
    else:
        limits = np.finfo(dtype)
        numbers = np.array([0.0, -0.0, limits.max, limits.min, limits.smallest_subnormal, -limits.smallest_subnormal,
                            np.nan, -np.nan, np.inf, -np.inf], dtype)
    expected = np.isfinite(numbers)
    assert not expected.all()
    found = [convert._all_finite(numbers[i:i + 1]) for i in range(0, len(numbers), count(1 + len(numbers) // 3000, 1))]
    np.testing.assert_array_equal(found, expected[::count(1 + len(numbers) // 3000, 1)])
    assert convert._all_finite(numbers[expected]) and not convert._all_finite(numbers)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_disk_that_lies_is_noticed(written, tmp_path, monkeypatch, dtype):
    """What is read back must be what the numbers are in the written dtype."""
    honest = save.write

    def lying(place, *rest, **more):
        files = honest(place, *rest, **more)
        with files[0].open("r+b") as file:
            file.seek(-3, 2)
            byte = file.read(1)
            file.seek(-3, 2)
            file.write(bytes([byte[0] ^ 1]))
        return files

    monkeypatch.setattr(save, "write", lying)
    source = written(dtype=np.float32)
    with pytest.raises(acejax.UserError, match="does not read back as it was written"):
        run(source, tmp_path / "out.safetensors", "--to", "diffusers", *(["--dtype", dtype] if dtype else []))
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_a_disk_that_lies_early_is_noticed(written, tmp_path, monkeypatch):
    """The first tensor is read back while the others are written; nothing is left."""
    honest = save._copy

    def lying(stored, file):
        at = file.tell()
        honest(stored, file)
        if stored.key == "img_in.weight":
            os.pwrite(file.fileno(), b"\x00\x01", at + 5)

    monkeypatch.setattr(save, "_copy", lying)
    source = written()
    for target in ("out.safetensors", "folder"):
        with pytest.raises(acejax.UserError, match="'x_embedder.weight' does not read back as it was written"):
            run(source, tmp_path / target, "--to", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_a_header_that_changes_is_noticed(written, tmp_path, monkeypatch):
    """Two tensors of one shape that changed places after they were read back."""
    honest = save.write

    def lying(place, *rest, **more):
        files = honest(place, *rest, **more)
        query, key = (b"transformer_blocks.0.attn.norm_" + name for name in (b"q.weight", b"k.weight"))
        with place.open("r+b") as file:  # in place: what is still being read back is mapped
            start = file.read(8)
            header = file.read(int.from_bytes(start, "little"))
            file.seek(8)
            file.write(header.replace(query, b"?").replace(key, query).replace(b"?", key))
        return files

    monkeypatch.setattr(save, "write", lying)
    with pytest.raises(acejax.UserError, match="header does not read back as it was written"):
        run(written(), tmp_path / "out.safetensors", "--to", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_what_is_known_and_not_needed_is_named(tmp_path, capsys):
    tensors = {f"text_model.{key}": tensor for key, tensor in state(CLIP).items()}
    save_file(tensors | {"text_projection.weight": np.eye(4, dtype=np.float32)}, tmp_path / "clip.safetensors")
    assert run(tmp_path / "clip.safetensors", tmp_path / "out.safetensors", "--to", "comfy") == 0
    assert "not needed  1: 'text_projection.weight'" in capsys.readouterr().out


def test_a_pipeline_comes_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "pipeline"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    save.save_model(folder / "transformer", MMDIT, params(MMDIT), "diffusers")
    save.save_model(folder / "vae", VAE, params(VAE), "diffusers")
    assert run(folder, tmp_path / "again", "--to", "diffusers", "--json", tmp_path / "r.json") == 0
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "model_index.json", "tokenizer", "transformer", "vae"]
    assert all(pathlib.Path(file).is_file() for report in json.loads((tmp_path / "r.json").read_text())
               for file in report["files"])
    assert run(tmp_path / "again", tmp_path / "comfy", "--to", "comfy") == 0

    (file,) = (folder / "vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(acejax.UserError, match="vae.*expected a whole safetensors file"):
        run(folder, tmp_path / "broken", "--to", "bfl")
    assert sorted(tmp_path.iterdir()) == before


def test_orbax_folders_that_are_not_whole(written, tmp_path):
    assert run(written(), tmp_path / "o", "--to", "orbax") == 0
    note = json.loads((tmp_path / "o" / "model.json").read_text())
    for change, told in (({"depth": 2}, "are not those of its config"), ({"depth": 1.5}, "are not those of its config"),
                         ({"hidden_size": 0}, "says of no model")):
        (tmp_path / "o" / "model.json").write_text(json.dumps(note | {"config": note["config"] | change}))
        with pytest.raises(acejax.UserError, match=told):
            run(tmp_path / "o", tmp_path / "x.safetensors", "--to", "bfl")
    (tmp_path / "o" / "model.json").write_text(json.dumps(note))
    for path in (tmp_path / "o" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(acejax.UserError, match="cannot be read as an Orbax checkpoint"):
        run(tmp_path / "o", tmp_path / "x.safetensors", "--to", "bfl")
    shutil.rmtree(tmp_path / "o" / "params")
    with pytest.raises(acejax.UserError, match="no parameters there"):
        run(tmp_path / "o", tmp_path / "x.safetensors", "--to", "bfl")


def test_float64_does_not_go_to_orbax_unsaid(written, tmp_path):
    source = written(dtype=np.float64)
    with pytest.raises(acejax.UserError, match="float64, which jax does not keep; give a --dtype"):
        run(source, tmp_path / "o", "--to", "orbax")
    assert run(source, tmp_path / "o", "--to", "orbax", "--dtype", "float32") == 0


@pytest.mark.parametrize("config", [MMDIT, VAE], ids=["transformer", "autoencoder"])
def test_memory_stays_below_three_tensors(tmp_path, config):
    """Beside the chunk that is under way nothing is held, whatever the file's size (numpy's own allocations)."""
    source = tmp_path / "source.safetensors"
    save.save_model(source, config, params(config), "bfl")
    model = open_model(source)
    largest = max(tensor.nbytes for tensor in model.tensors.values())
    convert.convert(model, tmp_path / "warm.safetensors", "diffusers")
    tracemalloc.start()
    convert.convert(model, tmp_path / "out.safetensors", "diffusers")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * largest + 2_000_000


def test_extra_tensors_are_named_or_left(written, tmp_path):
    source = written(**{"ema.decay": np.zeros(1, np.float32)})
    with pytest.raises(acejax.UserError, match="'ema.decay' is left over"):
        run(source, tmp_path / "out.safetensors", "--to", "bfl")
    assert run(source, tmp_path / "out.safetensors", "--to", "bfl", "--allow-extra", "--json", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())[0]["left_over"] == ["ema.decay"]
    assert "ema.decay" not in load_file(tmp_path / "out.safetensors")


def test_nothing_is_overwritten(written, tmp_path):
    source = written()
    before = source.read_bytes()
    with pytest.raises(acejax.UserError, match="is there already"):
        run(source, source, "--to", "bfl")
    assert source.read_bytes() == before


def test_a_whole_pipeline(tmp_path):
    """A diffusers pipeline's folder, to the files that ComfyUI wants and back."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    for config, name in ((MMDIT, "transformer"), (VAE, "vae"), (CLIP, "text_encoder"), (T5, "text_encoder_2")):
        layout = "diffusers" if "diffusers" in keymaps.layouts_of(config) else "hf"
        save.save_model(folder / name, config, params(config), layout, BF16)
    assert run(folder, tmp_path / "comfy", "--to", "comfy") == 0
    assert sorted(path.name for path in (tmp_path / "comfy").iterdir()) == sorted(command.FILES.values())
    for config, name in ((MMDIT, "transformer"), (VAE, "vae"), (CLIP, "text_encoder"), (T5, "text_encoder_2")):
        found = open_model(tmp_path / "comfy" / command.FILES[name], type(config), config)
        there = open_model(folder / name, type(config))
        assert there.config == config
        for key, tensor in keymaps.to_foreign(config, params(config), found.layout, BF16).items():
            np.testing.assert_array_equal(tensor, found.tensors[key][...])


def test_pickles_are_read_without_running_them(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {key: torch.from_numpy(tensor).to(torch.bfloat16) for key, tensor in state(MMDIT).items()}
    torch.save({"state_dict": {f"model.{key}": value for key, value in tensors.items()}}, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "a.safetensors", "--to", "bfl") == 0
    found = load_file(tmp_path / "a.safetensors")
    assert all(found[key].tobytes() == value.view(torch.int16).numpy().tobytes() for key, value in tensors.items())

    class Dangerous:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "executed",)

    torch.save({"img_in.weight": Dangerous()}, tmp_path / "b.pth")
    with pytest.raises(acejax.UserError, match="tensors saved by PyTorch and nothing else"):
        run(tmp_path / "b.pth", tmp_path / "b.safetensors", "--to", "bfl")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("config", SMALL, ids=lambda config: type(config).__name__)
def test_mutated_files(tmp_path, config, capsys):
    """Each of them ends in one message or in a report, within seconds, with nothing half-written."""
    save.save_model(tmp_path / "whole.safetensors", config, params(config), first(config), BF16)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    broken, target = tmp_path / "broken.safetensors", tmp_path / "out.safetensors"
    outcomes = set()
    for case in range(count(32, 500)):
        mutate, expected = list(mutations.MUTATIONS.items())[case % len(mutations.MUTATIONS)]
        broken.write_bytes(mutate(whole, np.random.default_rng(case)))
        started = time.monotonic()
        try:
            status = run(broken, target, "--to", "diffusers" if case % 3 else "bfl")
        except acejax.UserError as error:
            assert "\n" not in str(error) and broken.name in str(error), (mutate.__name__, case)
            assert len(str(error)) < 1000
            status = mutations.REFUSED
        else:
            assert target.is_file()
            target.unlink()
        assert time.monotonic() - started < 30
        assert {path.name for path in tmp_path.iterdir()} <= {"whole.safetensors", "broken.safetensors"}
        if expected == mutations.REFUSED:
            assert status == mutations.REFUSED, (mutate.__name__, case)
        elif expected == mutations.NOT_FINITE:
            assert status == 1, (mutate.__name__, case)
        outcomes.add((expected, status))
    capsys.readouterr()
    assert {(mutations.REFUSED, mutations.REFUSED), (mutations.NOT_FINITE, 1), (mutations.ANY, 0)} <= outcomes
