"""The main job in small: every step of the real line, too short to learn."""

import json
import pathlib
import runpy
import shutil

import numpy as np
import pytest
from PIL import Image

from acejax import UserError
from acejax.cli.main import main
from acejax.demo import evaluate, job
from acejax.demo.autoencoder import decode_latents
from acejax.demo.pictures import TASKS, samples
from acejax.demo.weights import SHIPPED, load_autoencoder, load_editor, read_note, tasks_of
from acejax.edit.files import read_picture

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SMALL = ("--config.steps=30 --config.data.samples=40 --config.evaluate.samples=6 --config.evaluate.held=4 "
         "--config.evaluate.steps=2 --config.watch.every=5 --config.model.hidden_size=32 --config.model.num_heads=2 "
         "--config.model.depth_single_blocks=1 --config.model.axes_dim=(4,6,6)")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    return workdir, main(["demo", f"--workdir={workdir}", "--setup_seconds=3", *SMALL.split()])


def test_the_report_has_every_figure_and_tells_the_truth(done):
    workdir, code = done
    report = json.loads((workdir / "report.json").read_text())
    assert code == 1 and report["passed"] is False and report["missed"], "30 steps cannot pass"
    assert set(report["tasks"]) == set(TASKS) - {"remove"}
    for row in report["tasks"].values():
        assert row["samples"] == 6 and row["held"]["samples"] == 4
        assert {"color_accuracy", "shape_accuracy", "psnr_box", "psnr_box_copy", "shuffled_color_accuracy"} <= set(row)
        assert all(0 <= row[name] <= 1 for name in row if name.endswith("accuracy"))
    assert report["tasks"]["recolor"]["copy_color_accuracy"] == report["tasks"]["instruct"]["copy_color_accuracy"] == 0
    assert report["loss"]["last"] < report["loss"]["first"] and len(report["loss"]["ref"]) == 2
    assert set(report["seconds"]) == {"setup", "data", "compile", "train", "evaluate"}
    assert report["steps"] == 30 and report["seed"] == 0 and report["seconds"]["setup"] == 3
    assert read_picture(workdir / "edits.png").shape[0] > 500


def test_drafts_are_what_becomes_of_the_pictures_beside_them(tmp_path, monkeypatch):
    config = runpy.run_path(str(CONFIGS / "demo.py"))["get_config"]()
    config.data.samples, config.evaluate.samples, config.evaluate.held = 20, 2, 2
    config.validation.every, config.validation.held = 1, 2  # what is held out is not among them
    folder, autoencoder, stream, held_out = job.prepare(config, tmp_path)
    monkeypatch.setattr(job, "sample_held", lambda run, params, held, batches, steps: {  # a model that makes no error
        place: held.row(place)["target"] for batch in batches for place in batch.samples})
    rows = job.dataset.read(folder, "train")
    latents, wanted, weight = job.drafts(config, tmp_path, None, stream, rows, 40)
    assert len(latents) == len(wanted) == len(weight) == 40 and len(held_out.table) == 12
    made = np.asarray(decode_latents(autoencoder, latents))
    error = np.square(made[:, None] - (wanted / 127.5 - 1)[None]).mean((2, 3, 4))
    assert (error.argmin(1) == np.arange(40)).all(), "each is nearest to its own"
    areas = (weight == 4).mean((1, 2, 3))
    assert set(np.unique(weight)) == {1, 4} and (areas < 0.6).sum() > 20 and (areas == 1).any(), "masks, and none"


def test_seconds_of_interrupted_starts_add_up(tmp_path):
    for seconds in (2.0, 3.0):
        spent = job._spend(tmp_path, {"data": seconds})
    assert spent == {"data": 5.0} == job._spend(tmp_path, {})


def test_the_same_command_again_does_not_train_again(done, capsys):
    workdir, _ = done
    before, report = (workdir / "metrics.jsonl").read_text(), json.loads((workdir / "report.json").read_text())
    assert main(["demo", f"--workdir={workdir}", *SMALL.split()]) == 1
    assert "resuming" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == before
    again = json.loads((workdir / "report.json").read_text())
    assert again["tasks"] == report["tasks"], "a seed fixes the result"
    assert {**again["seconds"], "evaluate": 0} == {**report["seconds"], "evaluate": 0}


def test_more_steps_go_on_from_where_it_ended(done, tmp_path, capsys):
    before = json.loads((done[0] / "report.json").read_text())
    workdir = shutil.copytree(done[0], tmp_path / "longer")
    assert main(["demo", f"--workdir={workdir}", *SMALL.replace("steps=30", "steps=40").split()]) == 1
    assert f"resuming {workdir} at step 30" in capsys.readouterr().out
    after = json.loads((workdir / "report.json").read_text())
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    note = read_note(workdir / "weights")
    assert steps == [*range(5, 41, 5)] and after["steps"] == note["steps"] == 40
    assert [part.partition(" --config.data")[0] for part in note["command"].split(", then ")] == [
        "acejax demo --config.steps=30", "acejax demo --config.steps=40"]
    assert after["seconds"]["train"] > before["seconds"]["train"]
    earlier, later = (json.loads((place / "seconds.json").read_text()) for place in (done[0], workdir))
    assert later["data"] > earlier["data"] and later["compile"] > earlier["compile"], "not rounded, as in the report"
    assert main(["demo", f"--workdir={workdir}", *SMALL.split()]) == 2
    assert "holds step 40 of a run, config.steps is 30" in capsys.readouterr().err


def test_thresholds_can_be_missed_and_met(done):
    tasks = json.loads((done[0] / "report.json").read_text())["tasks"]
    good = {task: row | {"color_accuracy": 1.0, "shape_accuracy": 1.0, "shuffled_color_accuracy": 0.1,
                         "psnr_box": 23.0, "psnr_box_copy": 10.0, "held": {"color_accuracy": 1.0}}
            for task, row in tasks.items()}
    good["remove"] = {"gone": 1.0, "shuffled_gone": 0.0, "psnr_box": 20.0, "psnr_box_copy": 10.0, "held": {"gone": 1.0}}
    fine = {"psnr": 28.5}
    assert evaluate.missed(good, fine, "demo") == evaluate.missed(good, fine, "small_weights") == []
    for task, field, value in (("insert", "shape_accuracy", 0.5), ("text", "color_accuracy", 0.79),
                               ("reference", "shuffled_color_accuracy", 0.8), ("recolor", "psnr_box", 15.9),
                               ("instruct", "held", {"color_accuracy": 0.4}), ("remove", "gone", 0.4)):
        for thresholds in ("demo", "small_weights"):
            line, *_ = evaluate.missed(good | {task: good[task] | {field: value}}, fine, thresholds)
            assert line.startswith(f"{task}: ")
    assert evaluate.missed(good, {"psnr": 27.9}, "demo") == []
    assert evaluate.missed(good, {"psnr": 27.9}, "small_weights") == [
        "autoencoder: psnr (dB) is 27.900; expected at least 28.000"]


def test_a_shuffled_condition_is_another_samples(done):
    folder = done[0] / "data" / "condition_units" / "1.0.0"
    rows = [job.decoded(row) for row in job.dataset.read(folder, "test") if row.task == "reference"]
    mixed = evaluate.shuffled(rows)
    assert all(np.array_equal(mix["references"][0], other["references"][0])
               for mix, other in zip(mixed, [*rows[1:], rows[0]], strict=True))
    assert all(mix["prompt"] == row["prompt"] and mix["detail"] == row["detail"]
               for mix, row in zip(mixed, rows, strict=True))


def test_edit_a_picture_of_any_size(done, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (123, 201, 3)).astype(np.uint8)
    mask = np.zeros((123, 201), np.uint8)
    mask[40:80, 100:150] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    line = ["edit", "--demo", f"--weights={done[0] / 'weights'}", "--image", f"{tmp_path}/a.png", "--mask",
            f"{tmp_path}/m.png", "--prompt", "a red heart", "--seed", "3", "--out"]
    assert main([*line, f"{tmp_path}/o.png"]) == 0 and main([*line, f"{tmp_path}/again.png"]) == 0
    result = read_picture(tmp_path / "o.png")
    assert result.shape == image.shape
    np.testing.assert_array_equal(result[mask == 0], image[mask == 0])
    assert (result[mask > 0] != image[mask > 0]).any()
    assert (tmp_path / "o.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_every_task_edits(done):
    editor, note = load_editor(done[0] / "weights", steps=2), read_note(done[0] / "weights")
    for task in note["tasks"]:
        sample = next(samples(1, task, 5, "test", size := note["size"]))
        result = editor(task, sample.prompt, image=sample.image, mask=sample.mask, references=sample.references)
        assert result.shape == sample.target.shape == (size, size, 3)


def test_presets_hide_what_was_hidden_in_training(done):
    note = read_note(done[0] / "weights")
    hidden = {name: task.scale for name, task in tasks_of(note).items()}
    assert hidden == {name: 0.0 if name in ("recolor", "instruct", "remove") else 1.0 for name in note["tasks"]}
    assert tasks_of(note | {"repainting": {"insert": 0.25}})["insert"].scale == 0.25


FINE = (f"--config={CONFIGS}/small_weights.py --config.steps=8 "
        "--config.data.samples=6 --config.data.size=80 --config.data.batch_sizes=((25,4),(50,2),(75,2)) "
        "--config.data.autoencoder.steps=20 --config.data.autoencoder.width=8 --config.data.autoencoder.pictures=40 "
        "--config.data.autoencoder.refine=4 --config.data.autoencoder.drafts=9 "
        "--config.evaluate.samples=2 --config.evaluate.held=2 --config.evaluate.steps=1 "
        "--config.watch.every=2 --config.model.hidden_size=32 --config.model.num_heads=2 "
        "--config.model.depth_single_blocks=1 --config.model.axes_dim=(4,6,6)")


@pytest.mark.soak
def test_the_finer_kind_of_weights_at_another_size(tmp_path):
    assert main(["demo", f"--workdir={tmp_path}", *FINE.split()]) == 1
    report, note = (json.loads((tmp_path / name).read_text()) for name in ("report.json", "weights/weights.json"))
    assert set(report["tasks"]) == set(TASKS) and 0 <= report["tasks"]["remove"]["gone"] <= 1
    assert report["tasks"]["remove"]["copy_gone"] == 0 and report["autoencoder"]["psnr"] > 10
    assert (note["size"], note["autoencoder"]) == (80, "convolutional") and "--config.data.size=80" in note["command"]
    shipped = load_autoencoder(tmp_path / "weights" / "autoencoder.safetensors")
    trained = load_autoencoder(tmp_path / "autoencoder.safetensors")
    changed = {name for name in trained if not np.array_equal(shipped[name], trained[name])}
    assert {"decode", "decoder.in.kernel"} <= changed and not {name for name in changed if name.startswith("enc")}
    assert report["seconds"]["refine"] > 0
    picture = next(samples(1, "remove", 5, "test", 120)).image
    result = load_editor(tmp_path / "weights", steps=1)(None, "remove it", image=picture)
    assert result.shape == picture.shape


@pytest.mark.parametrize("file, text", [("weights.json", "{"), ("weights.json", "{}"), ("autoencoder.safetensors", "x"),
                                        ("autoencoder.safetensors", None)])
def test_weights_that_cannot_be_read_are_named(tmp_path, file, text):
    shutil.copytree(SHIPPED, tmp_path / "weights")
    path = tmp_path / "weights" / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=file):
        load_editor(tmp_path / "weights")
