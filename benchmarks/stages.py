"""The two stages of ACE++ on the demo's pictures, from a text-to-image model trained here, against skipping the first.

  text_to_image  64 channels, on the text task alone
  stage1         grown from it to 448: the tasks without references
  stage2         from stage 1, in a workdir of its own: all tasks
  one_run        both stages in one workdir and one schedule, of as many steps
  control        all tasks from the start, of as many steps
"""

import argparse
import json
import pathlib
import runpy
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from acejax import MMDiTConfig, apply, checkpoint
from acejax.cli.config import folder
from acejax.data.written import check_place
from acejax.demo import job
from acejax.demo.pictures import TASKS
from acejax.errors import UserError
from acejax.parallel.mesh import make_mesh, split_cpu
from acejax.train import loop
from acejax.train.start import load_start
from acejax.train.step import tokens

ALL = {"text": 0.5, "insert": 1.3, "recolor": 1.0, "instruct": 1.5, "reference": 1.4, "two_references": 1.6}
ZERO_REF = {task: ALL[task] for task in ("text", "insert", "recolor", "instruct")}


def main(argv: list[str]) -> int:
    """Train all of them, print a table, write JSON; 1 when the growth changed the velocity or stage 1 saw a reference.

    Raises:
      UserError: a flag that can't be.
    """
    parser = argparse.ArgumentParser(prog="acejax bench stages", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__)
    parser.add_argument("--steps", type=int, nargs=3, default=(1500, 1500, 3000), metavar=("T", "S1", "S2"),
                        help="of the text-to-image model, stage 1 and stage 2 (default: 1500 1500 3000)")
    parser.add_argument("--samples", type=int, default=1200, help="training samples a task (default: 1200)")
    parser.add_argument("--test", type=int, default=96, help="test samples a task (default: 96)")
    parser.add_argument("--workdir", help="keep the runs there, and go on with what is there")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    if min(*args.steps, args.samples, args.test) < 2:
        raise UserError("bench stages: --steps, --samples and --test must be 2 or more")
    check_place(args.json)
    split_cpu(2)
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(pathlib.Path(args.workdir or scratch), *args.steps, args.samples, args.test)
    print(table(report))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return int(report["first_velocity_change"] > 1e-6 or report["stage1_L_ref"] != 0)


def measure(place: pathlib.Path, first: int, one: int, two: int, samples: int, test: int) -> dict[str, Any]:
    """All runs, in folders of their names below `place`."""
    def config(steps: int, *stages: tuple[float, Mapping[str, float]], start: str | None = None
               ) -> ml_collections.ConfigDict:
        made = runpy.run_path(str(folder() / "demo.py"))["get_config"]()
        made.update({"steps": steps, "init_from": start and str(place / start),
                     "stages": tuple({"share": share, "weights": weights} for share, weights in stages)})
        made.data.samples = samples
        made.evaluate.update({"samples": test, "held": max(test // 2, 2)})
        return made

    print("\n== text_to_image", flush=True)
    begin = config(first, (1.0, {"text": 1.0}))
    begin.model.in_channels = 64
    _, _, stream, _ = job.prepare(begin, place / "text_to_image")
    loop.train(begin, place / "text_to_image", stream)

    total = one + two
    both = (one / total, ZERO_REF), (two / total, ALL)
    runs = {"stage1": config(one, (1.0, ZERO_REF), start="text_to_image"),
            "stage2": config(two, (1.0, ALL), start="stage1"),
            "one_run": config(total, *both, start="text_to_image"),
            "control": config(total, (1.0, ALL), start="text_to_image")}
    reports = {}
    for name, run in runs.items():
        print(f"\n== {name}", flush=True)
        reports[name] = job.run(run, place / name)
    return {"command": f"acejax bench stages --steps {first} {one} {two} --samples {samples} --test {test}",
            "first_velocity_change": _growth(runs["stage1"], place), "stage1_L_ref": _most_l_ref(place / "stage1"),
            "runs": {name: {"steps": report["steps"], "loss": report["loss"]["last"], "tasks": {
                task: {score: report["tasks"][task][score] for score in ("color_accuracy", "shape_accuracy")}
                for task in TASKS}} for name, report in reports.items()}}


def _growth(config: ml_collections.ConfigDict, place: pathlib.Path) -> float:
    """The most that the velocity of a batch of stage 1 changes by the growth, over its standard deviation."""
    small, params = checkpoint.load_weights(place / "text_to_image")
    _, _, stream, _ = job.prepare(config, place / "stage1")
    batch = stream[0].arrays
    sigma = np.linspace(0.1, 0.9, len(batch["lengths"]), dtype=np.float32)
    model = MMDiTConfig(**config.model)
    grown = load_start(str(place / "text_to_image"), model, make_mesh({"data": -1}))
    before, after = (np.asarray(apply(one, weights, tokens(one, batch, batch["target"], sigma)))
                     for one, weights in ((small, params), (model, grown)))
    return float(np.abs(after - before).max() / before.std())


def _most_l_ref(workdir: pathlib.Path) -> float:
    return max(json.loads(line).get("L_ref", 0.0) for line in (workdir / "metrics.jsonl").read_text().splitlines())


def table(report: dict[str, Any]) -> str:
    """Colour and shape accuracy of each run, task by task."""
    lines = ["\ncolor / shape accuracy", f"{'task':<16}" + "".join(f"{name:>14}" for name in report["runs"])]
    for task in TASKS:
        cells = (run["tasks"][task] for run in report["runs"].values())
        lines.append(f"{task:<16}" + "".join(
            f"{cell['color_accuracy']:>8.2f} /{cell['shape_accuracy']:>4.2f}" for cell in cells))
    return "\n".join([*lines, f"the first velocity changes by {report['first_velocity_change']:.1e} of its standard "
                              f"deviation; the greatest L_ref of stage 1 is {report['stage1_L_ref']:g}"])
