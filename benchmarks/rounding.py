"""Full fine-tunes at a rate of 1e-5 in bfloat16 against one in float32: Adafactor, from the small weights that come
with acejax, on negatives of the pictures that they know.

An update of 1e-5 is less than half a step of bfloat16 for each weight above 0.005. Three runs have the same start,
seed, batches and noise, and compute in float32; what differs is how parameters are kept:

  float32     as they are
  stochastic  bfloat16, rounded up or down at random (`optimizer.rounding=stochastic`)
  nearest     bfloat16, rounded to the nearest

Judged by the validation loss of samples held out. It holds where `stochastic` ends within 5 % of `float32`, where
`nearest` leaves at least half of the weights, bit for bit, as they were, and where `float32` lowers the loss by more
than those 5 %: otherwise a run that stands still would do as well.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import runpy
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import xxhash

import acejax
from acejax.cli.config import folder
from acejax.data.layout import TOKEN
from acejax.data.sample import Sample
from acejax.data.written import check_place
from acejax.demo import weights
from acejax.demo.pictures import samples
from acejax.demo.tasks import TASKS
from acejax.errors import UserError
from acejax.parallel.mesh import make_mesh, split_cpu
from acejax.train import loop
from acejax.train.config import TrainConfig
from acejax.train.program import Program
from acejax.train.validate import Validation
from benchmarks.lora import make_inputs, png

RATE = 1e-5
BATCH = 16
RUNS = {"float32": ("float32", "stochastic"), "stochastic": ("bfloat16", "stochastic"),
        "nearest": ("bfloat16", "nearest")}  # parameters' dtype and, where it is bfloat16, rounding
WITHIN = 0.05  # of the loss in float32, that stochastic rounding may be off by
UNMOVED = 0.5  # of the weights, that rounding to the nearest must leave as they were


def main(argv: list[str]) -> int:
    """Train all three, print a table, write JSON; 1 where it does not hold.

    Raises:
      UserError: a flag that can't be.
    """
    parser = argparse.ArgumentParser(prog="acejax bench rounding", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of each training (default: 600)")
    parser.add_argument("--samples", type=int, default=200, help="of each task, held-out ones too (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, batches, noise and rounding (default: 0)")
    parser.add_argument("--workdir", help="keep the runs there, and go on with what is there")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.samples < 20 or args.seed < 0:
        raise UserError("bench rounding: --steps must be 1 or more, --samples 20 or more, --seed 0 or more")
    check_place(args.json)
    split_cpu(2)
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(pathlib.Path(args.workdir or scratch), args.steps, args.samples, args.seed)
    print(table(report))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return int(bool(report["missed"]))


def measure(place: pathlib.Path, steps: int, count: int, seed: int) -> dict[str, Any]:
    """All runs, in folders of their names below `place`."""
    note, file = weights.read_note(), weights.SHIPPED / "mmdit.safetensors"
    autoencoder = weights.load_autoencoder(weights.SHIPPED / weights.AUTOENCODER)
    tasks = [task for task in note["tasks"] if TASKS[task].references == (0, 0)]  # of one size: one bucket
    rows, runs = Negatives(tasks, count, seed, note["size"], tuple(note["scales"])), {}
    for name, kept in RUNS.items():
        print(f"\n== {name}", flush=True)
        config = make_config(note, steps, count, seed, *kept)
        stream, held = make_inputs(config, place / name, autoencoder, "negatives", rows)
        run, mesh = TrainConfig.of(config), make_mesh(config.mesh.to_dict())
        program = Program.of(run, mesh, stream.references, len(stream.tasks))
        losses = Validation(program.setting, run.validation, held, mesh, stream.batch_sizes, seed).losses
        start = program.begin().params
        end = loop.train(config, place / name, stream)[0].params
        before, after = (losses(params)["validation/loss"] for params in (start, end))
        runs[name] = {"loss_before": before, "loss": after, "identical": identical(start, end)}
    versions = {"acejax": acejax.__version__, "jax": jax.__version__, "python": platform.python_version()}
    return {"command": f"acejax bench rounding --steps {steps} --samples {count} --seed {seed}", "versions": versions,
            "steps": steps, "learning_rate": RATE, "batch": BATCH, "seed": seed, "tasks": tasks,
            "held": len(held.table),
            "weights": {"size": note["size"], "xxh3_128": xxhash.xxh3_128_hexdigest(file.read_bytes()),
                        "parameters": sum(leaf.size for leaf in jax.tree.leaves(start))}} | judged(runs)


def judged(runs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The runs with the share of the float32 run's loss and of its drop that each has, and what was missed."""
    reference, nearest = runs["float32"], runs["nearest"]

    def drop(run: Mapping[str, float]) -> float:
        return run["loss_before"] - run["loss"]

    made = {name: run | {"loss_over_float32": run["loss"] / reference["loss"],
                         "drop_over_float32": drop(run) / drop(reference) if drop(reference) else None}
            for name, run in runs.items()}
    off = made["stochastic"]["loss_over_float32"] - 1
    missed = [line for line, short in (
        (f"stochastic ends {off:+.1%} from float32, expected within {WITHIN:.0%}", abs(off) > WITHIN),
        (f"nearest leaves {nearest['identical']:.1%} of the weights as they were, expected {UNMOVED:.0%} or more",
         nearest["identical"] < UNMOVED),
        (f"float32 goes from {reference['loss_before']:.4f} to {reference['loss']:.4f}: too little to tell, as "
         f"standing still would be within {WITHIN:.0%} too; expected more --steps",
         reference["loss_before"] <= (1 + WITHIN) * reference["loss"]),
        ("the runs start at different losses", len({round(run["loss_before"], 5) for run in runs.values()}) > 1),
    ) if short]
    return {"runs": made, "missed": missed}


def make_config(note: Mapping[str, Any], steps: int, count: int, seed: int, dtype: str, rounding: str
                ) -> ml_collections.ConfigDict:
    """The demo's config with a full fine-tune of the small weights."""
    config = runpy.run_path(str(folder() / "demo.py"))["get_config"]()
    config.update({"seed": seed, "steps": steps, "init_from": str(weights.SHIPPED / "mmdit.safetensors"),
                   "stages": ({"share": 1.0},), "model": dataclasses.asdict(acejax.MMDiTConfig(**note["config"]))})
    config.data.update({"samples": count, "size": note["size"],
                        "batch_sizes": (((note["size"] // TOKEN) ** 2, BATCH),)})
    config.data.canvas.scales = note["repainting"]
    config.optimizer.update({"name": "adafactor", "learning_rate": RATE, "schedule": "constant", "warmup": 0.0,
                             "param_dtype": dtype, "rounding": rounding})
    config.checkpoint.every = steps
    config.validation.held = 32
    return config


class Negatives(Sequence):
    """`count` samples of each task as `acejax.demo.pictures.samples` draws them; pictures are negatives, as PNG."""

    def __init__(self, tasks: Sequence[str], count: int, seed: int, size: int, scales: tuple[float, ...]):
        self._name = f"{count} of {', '.join(tasks)} with seed {seed} of {size} pixels at {scales}"
        self._made = [Sample(drawn.task, drawn.prompt, png(255 - drawn.target),
                             None if drawn.image is None else png(255 - drawn.image),
                             None if drawn.mask is None else png(drawn.mask), name=f"{drawn.task} {index}")
                      for task in tasks for index, drawn in enumerate(
                          samples(count, task, seed, "train", size, scales))]

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: int) -> Sample:
        return self._made[index]

    def fingerprint(self, index: int) -> str:
        return f"{index} of {self._name}"


def identical(before: Any, after: Any) -> float:
    """The share of weights that are, bit for bit, what they were: in bfloat16, whatever they are kept in."""
    same = [np.asarray(old.astype(jnp.bfloat16).view(jnp.uint16) == new.astype(jnp.bfloat16).view(jnp.uint16)).ravel()
            for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    return float(np.concatenate(same).mean())


def table(report: Mapping[str, Any]) -> str:
    """Losses, and the share of weights that stood still, of each run."""
    lines = [f"\nvalidation loss on {report['held']} samples, {report['steps']} steps at {report['learning_rate']:g}",
             f"{'':<12}{'before':>9}{'after':>9}{'/ float32':>11}{'drop / float32':>16}{'weights unmoved':>17}"]
    for name, run in report["runs"].items():
        share = run["drop_over_float32"]
        lines.append(f"{name:<12}{run['loss_before']:>9.4f}{run['loss']:>9.4f}{run['loss_over_float32']:>11.4f}"
                     f"{'-' if share is None else format(share, '.3f'):>16}{run['identical']:>17.1%}")
    return "\n".join([*lines, *(report["missed"] or ["holds"])])
