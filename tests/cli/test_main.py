"""A user's mistakes end in one line and exit code 2, with nothing written; through the real command."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from acejax.cli import demo
from acejax.cli.main import COMMANDS, main
from acejax.demo.weights import SHIPPED
from tests.goldens import cases
from tests.weights.models import MMDIT

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a picture, masks and a broken file."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 120, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    mask = np.zeros((90, 120), np.uint8)
    mask[30:60, 40:70] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(mask[:50]).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "out.png").write_text("precious")
    (tmp_path / "w.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "p.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    save_file({"decoder.weight": np.zeros(3)}, tmp_path / "other.safetensors")
    module = "double_blocks.0.img_attn.proj.lora_"
    save_file({module + "A.weight": np.zeros((4, 8)), module + "B.weight": np.zeros((8, 4))},
              tmp_path / "lora.safetensors")
    shutil.copy(SHIPPED / "mmdit.safetensors", tmp_path)
    save_file(cases.state(MMDIT), tmp_path / "flux.safetensors")
    (tmp_path / "pairs.jsonl").write_text('{"task": "x", "prompt": "p", "target": "a.png"}\n{}}\n'
                                          '{"task": "x", "prompt": "p", "target": "broken.png"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


EDIT = "edit --demo --out=out.png "
CONFIG = f"--config={ROOT / 'configs' / 'demo.py'} "
MISTAKES = [
    ("nosuch", "no command 'nosuch'; the commands are demo, train, plan, edit, serve, convert, data, bench"),
    ("edit --prompt=x", "add --demo"),
    (EDIT, "the prompt is empty; expected what to make"),
    ("edit --demo --prompt=x", "--out is missing"),
    (EDIT + "--prompt=x --nosuch=1", "Unknown command line flag 'nosuch'"),
    (EDIT + "--prompt=x --seed=abc", "seed"),
    (EDIT + "--image=nosuch.png --mask=m.png --prompt=a_red_heart", "picture nosuch.png: no such file"),
    (EDIT + "--image=broken.png --mask=m.png --prompt=a_red_heart", "picture broken.png: found no picture"),
    (EDIT + "--image=a.png --mask=small.png --prompt=a_red_heart",
     "mask small.png is 120 x 50 pixels (width x height); its picture is 120 x 90"),
    (EDIT + "--mask=m.png --prompt=a_red_heart", "--mask without --image"),
    (EDIT + "--image=a.png --mask=m.png --task=upscale --prompt=a_red_heart", "unknown task 'upscale'; the tasks are "),
    (EDIT + "--image=a.png --task=insert --prompt=a_red_heart",
     "it needs a mask; given: a picture"),
    (EDIT + "--image=a.png --mask=m.png --reference=broken.png --prompt=this_heart", "broken.png: found no picture"),
    (EDIT + "--image=a.png --mask=m.png --prompt=a_red_zebra", "do not know 'zebra'; they know: a, an, and"),
    (EDIT + "--image=a.png --mask=m.png --weights=. --prompt=a_red_heart", "no demo weights there"),
    ("edit --demo --image=a.png --mask=m.png --out=no/out.png --prompt=a_red_heart", "the folder no is not there"),
    ("convert nosuch.safetensors o.safetensors --to bfl", "nosuch.safetensors: no such file"),
    ("convert . o.safetensors --to bfl", "expected one safetensors file or index in this folder; found flux.safeten"),
    ("convert broken.png o.safetensors --to bfl", "broken.png: expected a whole safetensors file"),
    ("convert a.png out.png --to bfl", "out.png: is there already"),
    ("convert w.gguf o.safetensors --to bfl", "found a GGUF file"),
    ("convert p.bin o.safetensors --to bfl", "p.bin: expected tensors saved by PyTorch and nothing else"),
    ("convert other.safetensors o.safetensors --to bfl", "not a FLUX transformer or FLUX autoencoder"),
    ("convert mmdit.safetensors o.safetensors --to bfl", "FLUX's heads of 128"),
    ("convert flux.safetensors o --to bfl", "o: expected a name that ends in .safetensors for --to bfl"),
    ("convert flux.safetensors o.safetensors --to bfl --grow=384", "reads 384 channels; expected 64 or 384 to grow"),
    ("convert flux.safetensors o.safetensors --to bfl --json=no/r.json", "--json=no/r.json: its folder is not there"),
    ("convert flux.safetensors out.png/o.safetensors --to bfl", "cannot be written"),
    ("convert flux.safetensors o.safetensors --to orbax", "expected the name of a folder for --to orbax"),
    ("convert " + 300 * "x" + " o.safetensors --to bfl", "no such file"),
    ("convert flux.safetensors " + 300 * "x" + ".safetensors --to bfl", "cannot be written"),
    ("convert my/flux.safetensors o.safetensors --to bfl", "my/flux.safetensors: no such file"),
    ("convert lora.safetensors o.safetensors --to bfl", "found a LoRA; expected --to comfy or diffusers"),
    ("convert lora.safetensors o.safetensors --to comfy", "has shape (4, 8); expected (4, 3072)"),
    ("convert black-forest-labs/FLUX.1-dev o --to diffusers", "no such path here, and the hub cannot be reached"),
    ("train --workdir=run", "--config=FILE.py is missing; configs that come with acejax: ace_plus.py, ace"),
    ("train --config=nosuch.py --workdir=run", "config file nosuch.py is not there"),
    (f"train {CONFIG}", "--workdir=DIR is missing"),
    ("train --config=ace_plus.py:foo --workdir=run", "topology 'foo' is unknown; expected a chip and a number"),
    (f"train {CONFIG} --workdir=run --config.nosuch=1", "no such config field: nosuch"),
    (f"train {CONFIG} --workdir=run --config.optimizer.learningrate=1",
     "no such config field: optimizer.learningrate; did you mean learning_rate?"),
    (f"train {CONFIG} --workdir=run --config.stages[2].share=1", "tuple index out of range"),
    (f"train {CONFIG} --workdir=run learning_rate=1", "or --config.optimizer.learning_rate=1"),
    (f"train {CONFIG} --workdir=run --seed=1", "Unknown command line flag 'seed'; write --config.seed=1"),
    ("train configs/demo.py --workdir=run", "'configs/demo.py' is no flag; write --config=configs/demo.py"),
    (f"train {CONFIG} --workdir=run --config.mesh.fsdp=-1", "has several axes of -1"),
    ("plan --config=ace_plus.py --topology=h100x8 --config.stages=3", "config.stages[0] is 3; expected fields"),
    (f"train {CONFIG} --workdir=run --config.steps=many", "steps"),
    (f"train {CONFIG} --workdir=run steps=5", "'steps=5' is no flag; write --config.steps=5"),
    (f"train {CONFIG} --workdir=run --config.model.num_heads=3", "config.model: hidden_size 128 is not a multiple"),
    (f"train {CONFIG} --workdir=run --config.mesh.fsdp=7", "does not make up"),
    (f"train {CONFIG} --workdir=run --config.model.depth=0", "config.model: depth is 0; expected a positive number"),
    (f"train {CONFIG} --workdir=run --config.model.in_channels=384", "canvas.split=True the data makes 448"),
    (f"train {CONFIG} --workdir=run --config.data.batch_sizes=((16,8),)", "for 16, 32 and 48 tokens"),
    (f"train {CONFIG} --workdir=run --config.data.source=mine", "config.data.sources is missing; expected fields"),
    (f"train {CONFIG} --workdir=out.png", "workdir out.png cannot be written"),
    ("data nosuch", "no command data 'nosuch'; the commands are check"),
    ("data check nosuch.jsonl", "manifest nosuch.jsonl: no such file or folder"),
    ("data check a.png", "manifest a.png: found a binary file"),
    ("data check pairs.jsonl --sheet=no/s.png", "--sheet=no/s.png: its folder is not there"),
    ("data check pairs.jsonl --sheet=s.jpg", "expected the name of a .png file"),
    ("data check pairs.jsonl --batch_size=0", "expected at least 1"),
    ("data check pairs.jsonl --fields=prompt", "lacks target_image"),
    ("data check pairs.jsonl --seed=-1", "--seed=-1: expected 0 or more"),
    ("data check pairs.jsonl --max_tokens=1", "canvas.max_tokens is 1"),
    ("data check pairs.jsonl", "pairs.jsonl: 2 faults in 2 of 3 samples"),
    ("bench convert --json=no/r.json", "--json=no/r.json: its folder is not there"),
    (f"demo {CONFIG} --workdir=run --config.evaluate.held=0", "at least 2 samples"),
    (f"demo {CONFIG} --workdir=run --config.execution.attention=fast", "'fast'; known: auto"),
]
# Kernels that a CPU does not have, told before anything is looked at: no weights, no data, nothing from the hub.
ON_A_CPU = [
    (f"demo {CONFIG} --workdir=run --config.execution.attention=flash", "config.execution.attention is 'flash'"),
    ("train --config=ace_plus.py:h100x1 --workdir=run --config.execution.attention=cudnn",
     "config.execution.attention is 'cudnn': cudnn is a kernel for CUDA GPUs, here is a cpu; expected auto"),
    ("train --config=ace_plus.py --workdir=run --config.execution.dtype=float16",
     "config.execution.dtype is 'float16': float16 is for GPUs"),
    ("edit --base=black-forest-labs/FLUX.1-Fill-dev --prompt=x --out=o.png --dtype=float16", "--dtype is 'float16'"),
    ("serve --base=black-forest-labs/FLUX.1-Fill-dev --dtype=float16", "--dtype is 'float16'"),
    ("data cache --config=ace_plus.py --config.encoders.dtype=float16", "config.encoders.dtype is 'float16'"),
]


MISTAKES += ON_A_CPU * (os.environ["JAX_PLATFORMS"] == "cpu")


@pytest.mark.parametrize("line, message", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistakes(line, message, place, capsys):
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert main([arg.replace("_", " ") if arg.startswith("--prompt") else arg for arg in line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("acejax: ") and message in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_through_the_command(place):
    """The same in a process of its own: exit code, one line, no traceback."""
    line = ["-m", "acejax.cli.main", "edit", "--demo", "--image=nosuch.png", "--prompt=x", "--out=o.png"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *line], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "acejax: picture nosuch.png: no such file\n"


def test_the_tool_is_the_command(place):
    line = [str(ROOT / "tools" / "convert_weights"), "nosuch.safetensors", "o.safetensors", "--to", "bfl"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *line], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("acejax: nosuch.safetensors: no such file")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: acejax {command}" in capsys.readouterr().out


def test_usage(capsys):
    assert main([]) == 2 and main(["--help"]) == 0 and main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_the_demos_command_is_noted_with_what_decides_its_result():
    argv = ["--workdir", "runs/x", "--config", "a b.py", "--config.steps=3", "--config.model.guidance_embed",
            "--setup_seconds=3"]
    assert demo.command(argv) == "acejax demo --config 'a b.py' --config.steps=3 --config.model.guidance_embed"
