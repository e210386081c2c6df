import json

import jax
import numpy as np
import pytest
import tensorboardX
from PIL import Image
from tensorboardX import SummaryWriter

from acejax import UserError
from acejax.model import flops
from acejax.model.config import MMDiTConfig
from acejax.train import meter, metrics
from acejax.train.bad_steps import BadSteps
from acejax.train.meter import Meter
from acejax.train.metrics import Writer, summarize


def step(loss=1.0, skipped=0, **parts):
    """Metrics of a step with one reference, tasks "a" and "b", and ten noise levels."""
    nothing = {"ref": np.zeros(1), "tar": np.float32(loss), "fraction": np.array([0.0, 1.0]), "task": np.zeros(2),
               "task_fraction": np.zeros(2), "sigma": np.zeros(10), "sigma_fraction": np.zeros(10)}
    return nothing | {"loss": np.float32(loss), "gradient_norm": np.float32(2), "skipped": np.int32(skipped)} | parts


def test_averages_by_share():
    first = step(2.0, ref=np.array([4.0]), tar=np.float32(1), fraction=np.array([0.25, 0.75]),
                 task=np.array([2.0, 0.0]), task_fraction=np.array([1.0, 0.0]),
                 sigma=np.eye(10)[3] * 5, sigma_fraction=np.eye(10)[3])
    second = step(4.0, ref=np.array([8.0]), tar=np.float32(3), fraction=np.array([0.5, 0.5]),
                  task=np.array([6.0, 2.0]), task_fraction=np.array([0.5, 0.5]),
                  sigma=np.eye(10)[3] * 7, sigma_fraction=np.eye(10)[3])
    found = summarize([first, second], ("a", "b"))
    assert found == pytest.approx({
        "skipped": 0, "loss": 3, "gradient_norm": 2, "task/b": 2, "L_ref/1": (0.25 * 4 + 0.5 * 8) / 0.75,
        "L_ref": (0.25 * 4 + 0.5 * 8) / 0.75, "L_tar": (0.75 + 0.5 * 3) / 1.25, "task/a": (2 + 3) / 1.5,
        "sigma/0.3": 6})


def test_skipped_steps_are_counted_and_left_out():
    bad = step(np.nan, 1, task=np.full(2, np.nan), task_fraction=np.full(2, np.nan))
    assert summarize([step(2.0), bad, step(4.0)], "ab")["loss"] == 3
    assert summarize([step(2.0), bad, bad], "ab")["skipped"] == 2
    assert summarize([bad], "ab") == {"skipped": 1}


def test_too_many_bad_steps_stop_a_run():
    bad = step(np.inf, 1, task_fraction=np.array([0.0, 1.0]), gradient_norm=np.float32(np.nan))
    guard = BadSteps(2, ("a", "b"), count=1)
    guard.look([step(), step()], 2)
    guard.look([step(), bad], 4)
    with pytest.raises(UserError, match=r"stopped at step 6: 3 steps were skipped.*bad_steps lets 2 pass\. The first "
                                        r"one seen was step 4: loss inf, gradient norm nan, tasks in its batch: b"):
        guard.look([step(), bad], 6)
    BadSteps(2, ("a", "b"), count=5).look([step()], 1)  # what a resumed run had before stops it only if more come


def test_speed_and_mfu_by_hand(monkeypatch):
    """Two steps in 5 s, of which 1 s was validation, on 4 devices of 1e9 FLOP/s."""
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    tiny = MMDiTConfig.tiny()
    measure = Meter(tiny, 4, 1e9)
    measure.add(8, 6, 16, np.array([16, 16]))
    measure.add(4, 6, 32, np.array([20, 24]))
    now[0] += 3
    with measure.aside(()):
        now[0] += 1
    now[0] += 1
    values = measure.read()
    computed, real = 8 * 22 + 4 * 38, 8 * 22 + 4 * 28
    work = 8 * flops.training_step(tiny, 6, 16) + 4 * flops.training_step(tiny, 6, 32)
    assert values == pytest.approx({"steps_per_second": 2 / 4, "tokens_per_second_per_device": real / 16,
                                    "padding": 1 - real / computed, "mfu": work / (4 * 4 * 1e9)})
    assert measure.seconds == 4
    now[0] += 1
    measure.add(8, 6, 16, np.array([16]))
    assert measure.read()["steps_per_second"] == 1 and measure.seconds == 5


def test_mfu_of_flux_against_a_number_by_hand():
    """The 12B model has 11.9e9 weights in its blocks: 6 N per token and 12 L S D for attention, of 4,608 tokens."""
    measure = Meter(MMDiTConfig.ace_plus_fft(), 1, 989e12)
    measure.add(1, 512, 4096, np.array([4096]))
    one = flops.training_step(MMDiTConfig.ace_plus_fft(), 512, 4096)
    per_block = 4 * 3072**2 + 2 * 3072 * 12288  # a double block has two of these, each for its own tokens
    by_hand = 6 * 4608 * 57 * per_block + 12 * 57 * 4608**2 * 3072
    assert one == pytest.approx(by_hand, rel=0.01)


def test_mfu_is_only_told_where_the_peak_is_known():
    measure = Meter.of(MMDiTConfig.tiny())
    measure.add(8, 6, 16, np.array([16]))
    assert ("mfu" in measure.read()) == (jax.default_backend() != "cpu")


def test_memory_is_the_devices_or_the_hosts():
    (name, value), = meter.memory().items()
    assert name == ("host_memory_gb" if jax.default_backend() == "cpu" else "device_memory_gb") and 0.05 < value < 500


def test_a_resumed_log_goes_on_at_its_step(tmp_path):
    first = Writer(tmp_path, 0)
    for number in (1, 2, 3):
        first.write(number, {"loss": float(number), "seconds": 10.0 * number})
    first.write(3, {"validation/loss": 5.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    again = Writer(tmp_path, 3)
    assert again.seconds == 30
    again.write(4, {"loss": 4.0})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4] and lines[3]["validation/loss"] == 5
    assert Writer(tmp_path, 1).seconds == 10


def test_a_log_in_a_bucket_keeps_its_lines(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboardX, "SummaryWriter", lambda folder, **kwargs: SummaryWriter(str(tmp_path), **kwargs))
    first = Writer(bucket / "run", 0)
    for number in (1, 2, 3):
        first.write(number, {"loss": float(number), "seconds": 10.0 * number})
    again = Writer(bucket / "run", 2)
    again.write(3, {"loss": 4.0})
    lines = (bucket / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1, 2, 4]


def test_a_grid_is_a_png_and_in_tensorboard(tmp_path):
    writer = Writer(tmp_path, 0)
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    writer.picture(500, picture)
    writer.close()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "step_000500.png")), picture)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_000500.png"]
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"validation/samples" in events.read_bytes()


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    writer = Writer(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    writer.picture(1, np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert not list(tmp_path.iterdir())
