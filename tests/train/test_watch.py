"""The training loop as it is watched: what it validates, draws, traces and dumps, and where it stops."""

import gzip
import json

import jax
import numpy as np
import pytest
from PIL import Image

from acejax import UserError, checkpoint
from acejax.data.schedule import Stage
from acejax.data.stream import Stream
from acejax.data.subset import hold_out
from acejax.train import profile
from acejax.train.config import TrainConfig
from acejax.train.loop import train
from acejax.train.profile import Profiler
from acejax.train.validate import HeldOut
from acejax.train.watch import Watch
from tests.train.small import Table, make_config
from tests.train.test_samples import decode

SIZES = {12: 8}  # one program


def watched():
    """A run of 6 steps that is validated every 2 and draws samples at its end."""
    config = make_config(((12, 8),))
    config.update({"steps": 6, "checkpoint": {"every": 2, "best": 1}})
    config.validation.update({"every": 2, "held": 2, "grid_every": 6, "grid": 1, "steps": 2, "sigmas": (0.2, 0.7)})
    return config


def inputs(table=None):
    training, held = hold_out(Table() if table is None else table, 2, 0)
    return Stream(training, [Stage(6)], [12], SIZES, seed=3), HeldOut(held, decode, "sample {}".format)


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("watched")
    stream, held_out = inputs()
    train(watched(), workdir, stream, held_out=held_out, profile="2:4", dump_hlo=str(workdir / "hlo"))
    return workdir


def test_a_run_is_validated_and_draws_samples(whole_run):
    found = lines(whole_run)
    assert [line["step"] for line in found if "validation/loss" in line] == [2, 4, 6]
    assert all({"learning_rate", "tokens_per_second_per_device", "padding", "seconds", "skipped"} < line.keys()
               for line in found)
    assert {"validation/task/a", "validation/sigma/0.7", "validation/L_ref/2", "validation/L_tar"} < found[1].keys()
    assert found[-1]["validation/loss"] < found[1]["validation/loss"]
    assert {name for line in found for name in line if "psnr" in name} == found[-1].keys() & {
        f"validation/psnr_{part}/{task}" for part in ("inside", "outside") for task in "abrs"}
    assert np.asarray(Image.open(whole_run / "samples" / "step_000006.png")).shape[2] == 3


@pytest.mark.soak
def test_a_resumed_run_has_the_same_validation_losses(whole_run, tmp_path):
    stream, held_out = inputs()
    train(watched(), tmp_path, stream, until=3, held_out=held_out)
    train(watched(), tmp_path, stream, held_out=held_out)
    again, before = ([{name: value for name, value in line.items() if name.startswith("validation/")}
                      for line in lines(workdir)] for workdir in (tmp_path, whole_run))
    assert again == before


def test_steps_are_traced_and_dumped(whole_run):
    (trace,) = (whole_run / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))
    events = events if isinstance(events, list) else events["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["2", "3"]
    assert list((whole_run / "profile").rglob("*.xplane.pb"))
    assert "ENTRY" in (whole_run / "hlo" / "train_step_12_tokens.hlo.txt").read_text()
    assert "temp_size_in_bytes" in (whole_run / "hlo" / "train_step_12_tokens.memory.txt").read_text()


def test_the_window_of_a_resumed_run(tmp_path, monkeypatch, capsys):
    traced = []
    monkeypatch.setattr(profile.jax.profiler, "start_trace", lambda folder, **_: traced.append("start"))
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: traced.append("stop"))

    def run(first: int, stop: int) -> list:
        traced.clear()
        profiler = Profiler(tmp_path, "4:7", first)
        for step in range(first, stop):
            with profiler.step(step):
                traced.append(step)
            profiler.after(step + 1, ())
        profiler.close()
        return list(traced)

    assert run(2, 9) == [2, 3, "start", 4, 5, 6, "stop", 7, 8]
    assert run(5, 9) == ["start", 5, 6, "stop", 7, 8]  # what is left of it
    assert run(3, 6) == [3, "start", 4, 5, "stop"]  # a run that ends within
    assert not capsys.readouterr().out.count("nothing is left")
    assert run(7, 9) == [7, 8] and "goes on at step 7, nothing is left to profile" in capsys.readouterr().out


@pytest.mark.parametrize("window", ("5", "7:7", "9:3", "a:b", "-1:4", "1:2:3"))
def test_a_window_that_is_none(tmp_path, window):
    with pytest.raises(UserError, match=f"--profile={window}: expected START:STOP"):
        Profiler(tmp_path, window)


def test_the_host_stays_close_to_the_devices(tmp_path, monkeypatch):
    """A step is sent off when the one `AHEAD` before it is done."""
    config, (stream, _), waited = TrainConfig.of(watched()), inputs(), []
    seen = Watch(config, tmp_path, stream.tasks)
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    for step in range(4):
        seen.step({"loss": step}, stream[step], 8)
    assert waited == [[], [], [{"loss": 0}], [{"loss": 1}]]


def test_bad_steps_stop_a_run_and_leave_its_checkpoint_whole(tmp_path):
    """From one point on targets are NaN."""
    stream, held_out = inputs()

    class Broken(Stream):
        def __getitem__(self, step: int):
            batch = super().__getitem__(step)
            if step >= 2:
                batch.arrays["target"] = np.full_like(batch.arrays["target"], np.nan)
            return batch

    broken = Broken(stream.table, [Stage(6)], [12], SIZES, seed=3)
    config = watched()
    config.watch.bad_steps = 1
    with pytest.raises(UserError, match=r"stopped at step 4: 2 steps were skipped.*The first one seen was step 3: loss "
                                        r"nan, gradient norm nan, tasks in its batch: "):
        train(config, tmp_path, broken, held_out=held_out)
    _, params = checkpoint.load_weights(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 0, 1]

    config.watch.bad_steps = 2  # the message's number: a run may go on with more
    state, _ = train(config, tmp_path, stream, held_out=held_out)
    assert int(state.skipped) == 0 and int(state.step) == 6  # it went on at step 2, with good batches
