"""`acejax edit` with the small weights: seeds, manifests that go on, the JSON report, and edits made again."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from acejax import AutoencoderConfig, CLIPConfig, T5Config
from acejax.cli import edit_run
from acejax.cli.config import _at_home
from acejax.cli.main import main
from acejax.data import encoders, progress
from acejax.data.hashes import Hashes
from acejax.demo import weights
from acejax.demo.weights import SHIPPED
from acejax.edit import files, record
from acejax.edit.editor import Editor
from acejax.edit.files import read_picture
from tests import tokenizers
from tests.goldens import cases
from tests.weights import models

EDIT = ["edit", "--demo", "--steps=1", "--prompt=a red heart"]
INPUTS = ["--image=in/a.png", "--mask=in/m.png"]


@pytest.fixture(autouse=True, scope="module")
def one_editor():
    """All commands of this file share what was compiled."""
    load, shared = weights.load_editor, weights.load_editor()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load_editor", lambda folder, loras=(): shared if folder == weights.SHIPPED and not loras
                      else load(folder, loras=loras))
        yield


@pytest.fixture
def place(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    Image.fromarray(rng.integers(0, 256, (90, 120, 3)).astype(np.uint8)).save(tmp_path / "in/a.png")
    mask = np.zeros((90, 120), np.uint8)
    mask[30:60, 40:70] = 255
    Image.fromarray(mask).save(tmp_path / "in/m.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def test_seeds_report_and_repetition(place, capsys, monkeypatch):
    assert main([*EDIT, *INPUTS, "--out=o.png", "--seed=3,4", "--json=r.json"]) == 0
    report = json.loads((place / "r.json").read_text())
    assert [row["out"] for row in report["edits"]] == ["o-3.png", "o-4.png"]
    about, side = report["edits"][1], weights.read_note()["size"] // 16
    assert about["seed"] == 4 and about["batch"] == [1, 2] and about["size"] == [120, 90]
    assert about["tokens"] == side * side
    assert about["task"] == "insert" and about["drift"] > 0 and about["seconds"] > 0 and about["window"]["width"] == 60
    first, second = read_picture("o-3.png"), read_picture("o-4.png")
    assert (first != second).any()

    assert main(["edit", "--from=o-4.png", f"--out={place}/in/../o-4.png"]) == 2
    assert "is the file that --from compares with" in capsys.readouterr().err
    monkeypatch.chdir("/")  # made again from anywhere, and written
    assert main(["edit", f"--from={place}/o-4.png", f"--out={place}/again.png"]) == 0
    assert "o-4.png: the same pixels" in capsys.readouterr().out
    np.testing.assert_array_equal(read_picture(place / "again.png"), second)
    monkeypatch.chdir(place)

    (place / "moved").mkdir()
    shutil.move("in/a.png", "moved/b.png")
    assert main(["edit", "--from=o-4.png"]) == 2
    assert "o-4.png can't be made again: image in/a.png is not there\n" in capsys.readouterr().err
    assert main(["edit", "--from=o-4.png", "--image=in/m.png"]) == 2
    assert "image in/m.png has changed (SHA-256 was" in capsys.readouterr().err
    with Image.open("again.png") as image:  # a file whose pixels were changed, and whose record was not
        image.load()
        image.putpixel((5, 5), (1, 2, 3))
        files.write_picture("again.png", np.asarray(image), {"acejax": image.text["acejax"]})
    assert main(["edit", "--from=again.png", "--image=moved/b.png"]) == 1
    assert "1 of 10,800 pixels differ, by" in capsys.readouterr().out


def test_the_step_cache_is_reported_recorded_and_repeated(place, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    line = ["edit", "--demo", "--prompt=a red heart", *INPUTS, "--steps=3", "--step_cache=1e9", "--measure_cache"]
    assert main([*line, "--out=o.png", "--json=r.json"]) == 0
    about = json.loads((place / "r.json").read_text())["edits"][0]
    assert about["step_cache"] == 1e9 and about["skipped"] == 1 and about["cache_error"] > 0
    out = capsys.readouterr().out
    assert "edit: step 3 of 3, 0 of 1 edits done\n" in out and "1 of 3 steps without the blocks, " in out
    assert record.read("o.png").step_cache == 1e9
    assert main(["edit", "--from=o.png"]) == 0


def test_a_crafted_record_is_told(place, capsys):
    assert main([*EDIT, *INPUTS, "--out=o.png"]) == 0
    about = json.loads(Image.open("o.png").text["acejax"])
    for field, value, said in (("base", True, "base is True"), ("demo", "x", "demo is 'x'"),
                               ("tile", "a\x1b[2Jb", "x1b")):
        crafted = about | {"opened": about["opened"] | {field: value}}
        files.write_picture("crafted.png", read_picture("o.png"), {"acejax": json.dumps(crafted)})
        assert main(["edit", "--from=crafted.png"]) == 2
        error = capsys.readouterr().err
        assert "its record can't be read" in error and said in error and "\x1b" not in error


def test_home_is_found_behind_an_equals_sign(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    assert main([*EDIT, "--image=~/in/a.png", "--mask=~/in/m.png", "--out=~/o.png"]) == 0
    assert _at_home(["--prompt=~/x", "--config=~/c.py", "--x=a~/b"]) == [
        "--prompt=~/x", f"--config={place}/c.py", "--x=a~/b"]
    assert (place / "o.png").exists() and not (place / "~").exists()


def test_other_weights_are_named(place, capsys):
    shutil.copytree(SHIPPED, place / "w")
    assert main([*EDIT, *INPUTS, "--weights=w", "--out=o.png"]) == 0
    path = place / "w" / "autoencoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["edit", "--from=o.png"]) == 2
    assert "weights w/autoencoder.safetensors has changed" in capsys.readouterr().err.replace(str(place) + "/", "")
    shutil.move("w", "v")
    assert main(["edit", "--from=o.png"]) == 2
    assert "no demo weights there" in capsys.readouterr().err


def test_a_manifest_that_was_stopped_goes_on(place, capsys, monkeypatch):
    lines = [{"image": "in/a.png", "mask": "in/m.png", "seed": seed, "out": f"{seed}.png"} for seed in range(3)]
    (place / "e.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write, line = edit_run.files.write_picture, [*EDIT, "--manifest=e.jsonl", "--out=res", "--batch=1"]

    def stopped(path, *more):
        if path.endswith("1.png"):
            raise KeyboardInterrupt
        write(path, *more)

    monkeypatch.setattr(edit_run.files, "write_picture", stopped)
    assert main(line) == 130
    assert listed(place / "res") == ["0.png"]
    before = (place / "res/0.png").stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main([*line, "--json=r.json"]) == 0
    assert "1 of 3 are there already" in capsys.readouterr().out
    assert listed(place / "res") == ["0.png", "1.png", "2.png"]
    assert (place / "res/0.png").stat().st_mtime_ns == before
    assert [row["line"] for row in json.loads((place / "r.json").read_text())["edits"]] == ["e.jsonl:2", "e.jsonl:3"]


def test_a_place_that_cannot_be_written_to_is_told_before_any_edit(place, capsys, monkeypatch):
    (place / "res").mkdir()
    (place / "res/sub").touch()
    lines = [{"image": "in/a.png", "mask": "in/m.png", "out": out} for out in ("a.png", "sub/b.png")]
    (place / "e.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = listed(place)
    assert main([*EDIT, "--manifest=e.jsonl", "--out=res"]) == 2
    assert "res/sub/b.png cannot be written" in capsys.readouterr().err and listed(place) == before
    monkeypatch.setattr("acejax.data.written.os.access", lambda folder, how: False)
    assert main([*EDIT, *INPUTS, "--out=o.png"]) == 2
    assert f"o.png cannot be written: {place} is read-only" in capsys.readouterr().err and listed(place) == before


def test_memory_that_is_not_there_is_told(place, capsys, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nAnd more.")

    monkeypatch.setattr(Editor, "_make", exhausted)
    for more in (["--out=o.png"], ["--warm_up"]):
        assert main([*EDIT, *INPUTS, *more]) == 2
        error = capsys.readouterr().err
        assert "the memory of the devices is exhausted (RESOURCE_EXHAUSTED: Out of memory" in error
        assert "--staged" in error and error.count("\n") == 1


def test_edits_do_without_notes_of_hashes(place):
    """A home that can't be written to, as containers have."""
    hashes = Hashes(place / "in/a.png/hashes.json")
    assert hashes.of(place / "in/m.png")
    hashes.keep()


def test_names_that_are_no_utf8(place, capsys):
    shutil.copy("in/a.png", "in/caf\udce9.png")
    assert main([*EDIT, "--image=in/caf\udce9.png", "--mask=in/m.png", "--out=caf\udce9.png", "--json=r.json"]) == 0
    assert json.loads((place / "r.json").read_text())["edits"][0]["out"] == "caf\udce9.png"
    assert main(["edit", "--from=caf\udce9.png"]) == 0
    assert "the same pixels" in capsys.readouterr().out


@pytest.fixture
def flux(place, monkeypatch):
    """A small model in FLUX's layout."""
    monkeypatch.setattr(encoders.Tokenizers, "open", functools.lru_cache(encoders.Tokenizers.open))
    widths = {"transformer": (dataclasses.replace(models.MMDIT, in_channels=384, context_in_dim=32, vec_in_dim=64,
                                                  mlp_ratio=1.0), "transformer.safetensors"),
              "vae": (AutoencoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1), "v.safetensors"),
              "text_encoder_2": (T5Config(vocab_size=32_128, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4),
                                 "t.safetensors"),
              "text_encoder": (CLIPConfig(vocab_size=49_408, hidden_size=64, intermediate_size=96,
                                          num_hidden_layers=1, num_attention_heads=1), "c.safetensors")}
    for name, (config, file) in widths.items():
        (place / "flux" / name).mkdir(parents=True)
        save_file(cases.state(config, layout=models.first(config)), place / "flux" / name / file)
    for name in ("tokenizer", "tokenizer_2"):
        (place / "flux" / name).symlink_to(tokenizers.folder() / name)
    return ["edit", "--base=flux", "--weights=flux/transformer", "--dtype=float32", "--out=o.png"]


@pytest.mark.parametrize("flags, message", [
    ([*INPUTS, "--prompt=x", "--task=canny_repaint"], "unknown task 'canny_repaint'"),
    (["--image=in/a.png", "--prompt=x", "--task=repainting"], "it needs a mask"), (INPUTS, "the prompt is empty"),
    ([*INPUTS, "--prompt=x", "--guidance=101"], "guidance is 101.0; expected 0 to 100"),
    ([*INPUTS, "--prompt=x", "--parity=other"], "parity is 'other'"),
    ([*INPUTS, "--prompt=x", "--contour=no.pt"], "--contour=no.pt: no such file or folder"),
    ([*INPUTS, "--prompt=x", "--tile=3"], "--tile=3: expected 4 cells of 8 pixels or more"),
    ([*INPUTS, "--prompt=x", "--measure_cache"], "measure_cache without step_cache")])
def test_a_bad_request_costs_no_reading_of_weights(place, flux, capsys, monkeypatch, flags, message):
    """Hashing FLUX's 34 GB takes minutes."""
    monkeypatch.setattr(Hashes, "of", lambda self, path: pytest.fail(f"{path} was hashed"))
    assert main([*flux, *flags]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.long
def test_released_weights_loras_and_their_record(place, flux, capsys):
    """With a LoRA and tiles: made, recorded, made again, and a changed LoRA named."""
    down, up = np.ones((2, 128), np.float32), np.ones((384, 2), np.float32)
    module = "lora_unet_double_blocks_0_img_attn_qkv.lora_"
    save_file({f"{module}down.weight": down, f"{module}up.weight": up}, place / "l.safetensors")
    Image.open("in/a.png").crop((30, 20, 78, 68)).save("in/a.png")
    Image.open("in/m.png").crop((30, 20, 78, 68)).save("in/m.png")
    edit = [*flux, *INPUTS, "--prompt=x", "--steps=1", "--tile=4"]
    assert main([*edit, "--out=lora.png", "--lora=l.safetensors:0.5"]) == 0
    kept = record.read("lora.png")
    assert kept.files[-1].path == "./l.safetensors" and kept.files[-1].scale == 0.5 and kept.guidance == 50
    assert kept.opened["tile"] == "4"
    assert [file.path for file in kept.files if file.field == "weights"] == [
        "./flux/transformer/transformer.safetensors", "./flux/vae", "./flux/text_encoder_2"]
    assert main(["edit", "--from=lora.png"]) == 0
    save_file({f"{module}down.weight": down, f"{module}up.weight": 2 * up}, place / "l.safetensors")
    assert main(["edit", "--from=lora.png"]) == 2
    assert "lora " in capsys.readouterr().err


LORA = "double_blocks.0.img_attn.proj.lora_"
MISTAKES = [
    (["--manifest=e.jsonl", "--out=res"], "e.jsonl:2: prompt 'a red zebra': the small weights do not know 'zebra'"),
    (["--manifest=e.jsonl", "--out=res"], "(3 edits have faults)"),
    (["--manifest=e.jsonl", "--out=no/res"], "expected a folder; no is not there"),
    (["--manifest=e.jsonl", "--out=res", "--image=in/a.png"], "--image with --manifest"),
    ([*INPUTS, "--out=o.png", "--lora=l.safetensors:0.5"], "shape (4, 8)"),
    ([*INPUTS, "--out=o.png", "--lora=no.safetensors"], "no.safetensors: no such file"),
    ([*INPUTS, "--out=o.png", "--lora=l.safetensors:x"], "the scale is 'x'; expected a number"),
    ([*INPUTS, "--out=o.png", "--guidance=3"], "guidance is 3.0; the small weights take none"),
    ([*INPUTS, "--out=o.png", "--steps=0"], "steps is 0; expected 1 to 1000"),
    ([*INPUTS, "--out=o.png", "--scale=2"], "scale is 2.0; expected 0 to 1"),
    ([*INPUTS, "--out=o.png", "--crop=all"], "crop is 'all'; expected auto, mask, none"),
    ([*INPUTS, "--out=o.png", "--size=10"], "size is '10'; expected WIDTHxHEIGHT"),
    ([*INPUTS, "--warm_up", "--json=j"], "--json with --warm_up, which makes no edit"),
    ([*INPUTS, "--out=o.png", "--tile=64"], "--tile is for FLUX's weights"),
    ([*INPUTS, "--out=o.png", "--seed=1,x"], "--seed=1,x: expected whole numbers"),
    ([*INPUTS, "--out=o.png", "--seed="], "--seed=: expected whole numbers"),
    ([*INPUTS, "--out=o.png", "--json=in"], "--json=in is a folder"),
    ([*INPUTS, "--out=o.png", "--lora=l.safetensors:nan"], "the scale is 'nan'; expected a number"),
    ([*INPUTS, "--out=o.png", "--seed=-1"], "seed is -1; expected 0 to"),
    ([*INPUTS, "--out=o.png", "--parity=reference"], "nothing was released"),
    ([*INPUTS, "--out=in/a.png"], "in/a.png is a picture to read"),
    ([*INPUTS, "--out=o.json.png", "--json=in/../o.json.png"], "is a file of the edits themselves"),
    ([*INPUTS, "--out=o.png", "--json=in/a.png"], "is a file of the edits themselves"),
    (["--manifest=g.jsonl", "--out=res", "--json=g.jsonl"], "--json=g.jsonl is a file of the edits themselves"),
    (["--manifest=f.jsonl", "--out=res"], "f.jsonl:2: out is res/x.png/y.png, below the file res/x.png of f.jsonl:1"),
    (["--image=in/link.png", "--out=in/a.png"], "in/link.png is a picture to read"),
    (["--image=in/long.png", "--prompt=remove it", "--out=o.webp"], "WEBP holds at most 16,383 a side"),
    (["--image=in/a.png", "--out=o.png", "--task=insert"], "task insert (paint a symbol inside the mask"),
    (["--from=in/a.png", "--steps=3"], "--prompt can't be given with it"),
    (["--from=in/a.png"], "in/a.png: no record of an edit in it"),
]


@pytest.mark.parametrize("flags, message", MISTAKES, ids=[" ".join(flags) for flags, _ in MISTAKES])
def test_mistakes_are_told_before_any_work(place, capsys, flags, message):
    lines = [{"image": "in/a.png", "mask": "in/m.png"}, {"image": "in/a.png", "mask": "in/m.png", "prompt":
             "a red zebra"}, {"image": "in/no.png"}, {"image": "in/a.png", "task": "insert"}]
    (place / "e.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (place / "f.jsonl").write_text('{"prompt": "a red heart on sky", "out": "x.png"}\n'
                                   '{"prompt": "a red heart on sky", "out": "x.png/y.png"}\n')
    (place / "g.jsonl").write_text('{"prompt": "a red heart on sky"}\n')
    (place / "in/link.png").symlink_to(place / "in/a.png")
    Image.new("RGB", (16_384, 8)).save(place / "in/long.png")
    save_file({LORA + "A.weight": np.zeros((4, 8)), LORA + "B.weight": np.zeros((8, 4))}, place / "l.safetensors")
    before = listed(place)
    line = EDIT if message.startswith("--prompt") or not flags[0].startswith("--from") else ["edit"]
    assert main([*line, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("acejax: ") and error.count("\n") == 1
    assert listed(place) == before


def test_the_tasks_are_listed(capsys):
    assert main(["edit", "--list_tasks"]) == 0
    printed = capsys.readouterr().out
    assert "try_on              needed    needed    1 or more" in printed and "local_editing" in printed
    assert main(["edit", "--list_tasks", "--demo"]) == 0
    printed = capsys.readouterr().out
    assert "two_references      needed    needed    2 " in printed
    assert "remove              needed    optional" in printed


def test_what_weights_were_not_trained_on_is_refused(place, capsys):
    """They know the word, and not what to do."""
    shutil.copytree(weights.SHIPPED, "less")
    note = weights.read_note()
    pathlib.Path("less/weights.json").write_text(json.dumps(note | {"tasks": [*set(note["tasks"]) - {"remove"}]}))
    assert main(["edit", "--list_tasks", "--demo", "--weights=less"]) == 0
    assert "remove" not in capsys.readouterr().out
    line = ["edit", "--demo", "--weights=less", *INPUTS, "--prompt=remove it", "--out=o.png"]
    assert main(line) == 2
    assert "have not learnt to remove; they know the tasks recolor, insert" in capsys.readouterr().err
    assert not (place / "o.png").exists()


def test_warming_up_writes_nothing(place, capsys):
    before = sorted(place.rglob("*"))
    assert main([*EDIT, *INPUTS, "--seed=3,4", "--warm_up"]) == 0
    assert "compiled for 1 kind of edits" in capsys.readouterr().out and sorted(place.rglob("*")) == before


def test_warming_up_makes_one_edit_of_a_shape_whatever_the_prompts(place, capsys):
    """With a step cache, which keeps prompts apart, too."""
    rows = [{"image": "in/a.png", "mask": "in/m.png", "prompt": prompt} for prompt in ("a red heart", "a blue star")]
    (place / "warm.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = ["edit", "--demo", "--steps=1", "--manifest=warm.jsonl", "--out=warm", "--step_cache=0.3", "--warm_up"]
    assert main(line) == 0
    assert "compiled for 1 kind of edits" in capsys.readouterr().out
