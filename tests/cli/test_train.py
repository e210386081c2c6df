"""`acejax train` on one's own pictures, up to the loop: what it checks, says and binds the workdir to."""

import functools
import json
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from acejax import MMDiTConfig
from acejax.cli.main import main
from acejax.data import inputs
from acejax.train import decode, loop
from acejax.weights import keymaps
from tests.train.small import MODEL, Table

LINE = ["train", "--config=ace_plus_stage2.py", "--config.init_from=", "--config.model.depth=1",
        "--config.mesh.fsdp=1", "--cpu_devices=1", "--config.data.batch_tokens=8192"]

UNJUDGED = ("--config.validation.every=0", "--config.validation.grid_every=0")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """The command over features with a digest; the streams that the loop was given."""
    streams = []
    monkeypatch.setattr(loop, "train", lambda config, workdir, stream, **_: streams.append(stream) or (None, {}))
    monkeypatch.setattr(decode, "make_decode", lambda config: None)

    def run(*flags: str, digest: str = "one") -> int:
        table = Table()
        table.digest = digest
        monkeypatch.setattr(inputs, "make_features", lambda data, model: table)
        return main([*LINE, f"--workdir={tmp_path / 'run'}", *flags])

    return types.SimpleNamespace(run=run, streams=streams, workdir=tmp_path / "run")


def test_a_resume_on_other_data_is_refused(train, capsys):
    train.run = functools.partial(train.run, *UNJUDGED)
    assert train.run() == 0 and train.run() == 0
    assert train.run(digest="two") == 2
    assert "the data has changed since this run began (the digest of its features was one" in capsys.readouterr().err
    assert json.loads((train.workdir / "data.json").read_text()) == {"digest": "one"} and len(train.streams) == 2


def test_what_is_held_out_may_not_begin_or_end_within_a_run(train, capsys):
    assert train.run() == 0 and len(train.streams[0].table) == 160 - 4 * 4  # a tenth of each task's 40
    assert train.run("--config.validation.every=7") == 0
    assert train.run(*UNJUDGED) == 2 and "the data has changed since this run began" in capsys.readouterr().err


def test_where_things_lie_may_change_between_runs(train, capsys):
    assert train.run() == 0
    free = ["cache.dir=elsewhere", "cache.batch=3", *(f"encoders.{name}=x" for name in ("autoencoder", "t5", "clip",
                                                                                        "tokenizers"))]
    assert train.run(*(f"--config.{one}" for one in free)) == 0
    for flag in ("cache.variants=2", "encoders.text_length=64", "data.canvas.max_tokens=1024"):
        assert train.run(f"--config.{flag}") == 2
        assert f"holds a run with config.{flag.split('=')[0]} = " in capsys.readouterr().err


def test_the_share_of_broken_samples_is_the_configs(train):
    assert train.run("--config.data.max_broken=0.25") == 0
    assert train.streams[0]._max_broken == 0.25 and train.streams[0].batch_sizes == {256: 32}


def test_fewer_samples_than_a_batch_has_are_told(train, capsys):
    assert train.run("--config.data.batch_tokens=65536") == 2 and not train.streams
    assert "stage 1 has 144 samples, fewer than a batch: 256 of 256 tokens; expected more" in capsys.readouterr().err


@pytest.mark.parametrize("flag, message", [
    ("data.bucket_multiple=0", "config.data.bucket_multiple is 0"),
    ("data.batch_tokens=100", "data.batch_tokens is 100; expected at least 256"),
    ("data.batch_sizes=((256,0),)", "config.data.batch_sizes is ((256, 0),)"),
    ("seed=-1", "config.seed is -1; expected 0 or more"),
])
def test_mistakes_are_known_before_anything_is_written(train, flag, message, capsys):
    assert train.run(f"--config.{flag}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not train.streams and not train.workdir.exists()


@pytest.mark.parametrize("flag, message", [
    ("lora.rank=0", "config.lora: rank is 0; expected at least 1"),
    ("lora.rank=4000", "config.lora.rank is 4000; expected 1 to 3072, the model's width"),
    ("lora.targets=attention", "config.lora.targets: target 'attention' matches no linear layer; they are"),
    ("lora.init_from=lora.safetensors", "proj.lora_down.weight' has shape (64, 8); expected (64, 3072)"),
    ("init_from=base.safetensors", "'img_in.weight' (and 50 more) has shape (32, 384); expected (3072, 384)"),
])
def test_a_lora_that_cannot_be_is_told(train, tmp_path, monkeypatch, flag, message, capsys):
    """Files of another geometry, a LoRA's and its base's, too."""
    monkeypatch.chdir(tmp_path)
    module = "lora_unet_double_blocks_0_img_attn_proj.lora_"
    save_file({f"{module}{part}.weight": np.zeros(shape, np.float32) for part, shape in (
        ("down", (64, 8)), ("up", (8, 64)))}, "lora.safetensors")
    save_file({key: np.zeros(shape, np.float32) for key, shape in keymaps.expected(
        MMDiTConfig(in_channels=384, **MODEL), "bfl").items()}, "base.safetensors")
    assert main(["train", "--config=flux_fill_lora.py", f"--workdir={train.workdir}", "--config.model.depth=1",
                 "--config.model.depth_single_blocks=1", "--cpu_devices=1", f"--config.{flag}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not train.streams and not train.workdir.exists()
