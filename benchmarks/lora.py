"""A LoRA teaches the small weights that come with acejax what they lack: symbols of two colours.

"a red and blue heart" has its upper half red and its lower half blue; the demo's pictures have one colour each. Scored
on the demo's test photo: the share of halves in the right colour, against the small weights alone, and against each
sample with another one's prompt. QLoRA trains the same on the weights in int8. What is scored is the export, read
again by the editor; where diffusers is installed, its own loader must make the same velocity of it.
"""

import argparse
import dataclasses
import functools
import importlib.util
import io
import json
import pathlib
import runpy
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image

import acejax
from acejax.cli.config import folder
from acejax.data import inputs
from acejax.data.augment import AugmentConfig
from acejax.data.cache.build import CacheConfig
from acejax.data.config import DataConfig, SourceConfig, read_batches, read_stages
from acejax.data.encoders import Encoders
from acejax.data.layout import TOKEN, CanvasConfig
from acejax.data.sample import Sample
from acejax.data.stream import Stream
from acejax.data.subset import hold_out
from acejax.data.written import check_place
from acejax.demo import evaluate, weights
from acejax.demo.autoencoder import encode_pictures, fingerprint
from acejax.demo.job import OWN
from acejax.demo.pictures import COLORS, HELD_PAIRS, box_sides, paint, samples
from acejax.demo.scores import color_of
from acejax.demo.surroundings import TEXT_TOKENS, TEXT_WIDTH, encode_prompts
from acejax.errors import UserError
from acejax.parallel.mesh import make_mesh, split_cpu
from acejax.train import loop
from acejax.train.config import LoraConfig
from acejax.train.lora import shapes
from acejax.train.step import tokens
from acejax.train.validate import HeldOut

TEST_SEED = 1_000_000
ABOVE = 0.3  # that the LoRA's accuracy must have above the small weights' and the control's
QUANTISED = 1.05  # times the LoRA's validation loss, that QLoRA's may be
Record = Mapping[str, Any]


def main(argv: list[str]) -> int:
    """Train both, print a table, write JSON; 1 where the LoRA has not learnt it, or QLoRA ends worse by 5 %.

    Raises:
      UserError: a flag that can't be.
    """
    parser = argparse.ArgumentParser(prog="acejax bench lora", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of each training (default: 600)")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA (default: 16)")
    parser.add_argument("--samples", type=int, default=500, help="training samples (default: 500)")
    parser.add_argument("--test", type=int, default=64, help="test samples (default: 64)")
    parser.add_argument("--workdir", help="keep the runs there, and go on with what is there")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    if min(args.steps, args.rank, args.test) < 2 or args.samples < 20:
        raise UserError("bench lora: --steps, --rank and --test must be 2 or more, --samples 20 or more")
    check_place(args.json)
    split_cpu(2)
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(pathlib.Path(args.workdir or scratch), args.steps, args.rank, args.samples, args.test)
    print(table(report))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return int(not report["holds"])


def measure(place: pathlib.Path, steps: int, rank: int, count: int, test: int) -> dict[str, Any]:
    """Both trainings, in folders of their names below `place`, and what their exports do on the test photo."""
    model = acejax.MMDiTConfig(**weights.read_note()["config"])
    autoencoder = weights.load_autoencoder(weights.SHIPPED / weights.AUTOENCODER)
    _, params = acejax.load_mmdit(weights.SHIPPED / "mmdit.safetensors", model, dtype="float32")
    records = list(two_colours(test, TEST_SEED, "test"))

    def judge(*loras: tuple[pathlib.Path, float]) -> dict[str, float]:
        editor = weights.load_editor(loras=loras)
        return {"accuracy": accuracy(evaluate.edit(editor, records, TEST_SEED, "off"), records),
                "shuffled": accuracy(evaluate.edit(editor, evaluate.shuffled(records), TEST_SEED, "off"), records)}

    runs = {"without": judge()}
    for name, base in ("lora", "bfloat16"), ("qlora", "int8"):
        print(f"\n== {name}", flush=True)
        config = make_config(model, steps, rank, count, base)
        first = train(config, place / name, autoencoder)
        path = place / name / "exports" / f"step_{steps:06d}_diffusers.safetensors"
        runs[name] = judge((path, 1.0)) | {"validation_loss": last_loss(place / name)}
        if all(importlib.util.find_spec(module) for module in ("torch", "diffusers", "peft")):
            runs[name]["diffusers_difference"] = against_diffusers(model, params, path, first)
    lora, qlora = runs["lora"], runs["qlora"]
    holds = (lora["accuracy"] > max(runs["without"]["accuracy"], lora["shuffled"]) + ABOVE
             and qlora["validation_loss"] < QUANTISED * lora["validation_loss"]
             and all(run.get("diffusers_difference", 0) < 1e-4 for run in runs.values()))
    return {"command": f"acejax bench lora --steps {steps} --rank {rank} --samples {count} --test {test}",
            "parameters": trained(model, rank), "runs": runs, "holds": holds}


def trained(model: acejax.MMDiTConfig, rank: int) -> int:
    """Numbers in the factors."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(LoraConfig(rank), model)[0]))


def make_config(model: acejax.MMDiTConfig, steps: int, rank: int, count: int, base: str) -> ml_collections.ConfigDict:
    """The demo's config with a LoRA on the small weights."""
    config = runpy.run_path(str(folder() / "demo.py"))["get_config"]()
    config.update({"steps": steps, "init_from": str(weights.SHIPPED / "mmdit.safetensors"),
                   "stages": ({"share": 1.0},), "model": dataclasses.asdict(model)})
    config.lora = {"rank": rank, "base": base}
    note = weights.read_note()
    config.data.update({"samples": count, "size": note["size"],
                        "batch_sizes": (((note["size"] // TOKEN) ** 2, 16),)})
    config.data.canvas.scales = {"insert": note["repainting"].get("insert", 1.0)}
    config.checkpoint.update({"every": steps, "export_every": steps, "export_layout": "comfy,diffusers"})
    config.validation.update({"every": steps, "held": 64})
    return config


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path, autoencoder: Mapping[str, np.ndarray]
          ) -> dict[str, np.ndarray]:
    """Train a run; its first batch."""
    rows = Rows(config.data.samples, config.seed)
    stream, held_out = make_inputs(config, workdir, autoencoder, "two_colours", rows)
    loop.train(config, workdir, stream, held_out=held_out)
    return stream[0].arrays


def make_inputs(config: ml_collections.ConfigDict, workdir: pathlib.Path, autoencoder: Mapping[str, np.ndarray],
                name: str, rows: Sequence[Sample]) -> tuple[Stream, HeldOut]:
    """What a run of the demo's config trains on and is judged by, of `rows`; features are kept beside the workdir."""
    encoders = Encoders(jax.jit(functools.partial(encode_pictures, autoencoder)), encode_prompts,
                        fingerprint(autoencoder), str.encode, (TEXT_TOKENS, TEXT_WIDTH, TEXT_WIDTH))
    data = DataConfig({name: SourceConfig("built-in")}, CanvasConfig(**config.data.canvas.to_dict()),
                      AugmentConfig(), None, CacheConfig(str(workdir.parent / "cache"), "float32", batch=64),
                      config.seed)
    features = inputs.make_features(data, {name: rows}, encoders)
    training, held = hold_out(features, config.validation.held, config.seed)
    stream = inputs.make_stream(read_stages(config, (name,)), config.steps, read_batches(config.data, OWN), training,
                                make_mesh(config.mesh.to_dict()), config.seed)
    return stream, HeldOut(held)


class Rows(Sequence):
    """`count` training samples, pictures as PNG."""

    def __init__(self, count: int, seed: int):
        self._drawn = list(two_colours(count, seed, "train"))
        self._name = f"{count} of {weights.read_note()['size']} pixels with seed {seed}"

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, index: int) -> Sample:
        drawn = self._drawn[index]
        return Sample("insert", drawn["prompt"], *map(png, (drawn["target"], drawn["image"], drawn["mask"])),
                      name=self.fingerprint(index))

    def fingerprint(self, index: int) -> str:
        return f"{index} of {self._name}"


def two_colours(count: int, seed: int, split: str) -> "Sequence[Record]":
    """Records as `acejax.demo.job.decoded` has them: the demo's `insert` with another colour in the lower half."""
    rng, made, note = np.random.default_rng((seed, count)), [], weights.read_note()
    for drawn in samples(8 * count, "insert", seed, split, note["size"], tuple(note["scales"])):
        (thing,) = drawn.things
        if thing.box[2] != box_sides(note["size"])[-1] or len(made) == count:  # the largest alone
            continue
        allowed = [color for color in COLORS if color != thing.color and (thing.shape, color) not in HELD_PAIRS]
        below = dataclasses.replace(thing, color=allowed[rng.integers(len(allowed))])
        target, lower = drawn.target.copy(), paint(drawn.image, below)
        middle = thing.box[0] + thing.box[2] // 2
        target[middle:] = lower[middle:]
        article = drawn.prompt.split()[0]
        made.append({"task": "insert", "prompt": f"{article} {thing.color} and {below.color} {thing.shape}",
                     "target": target, "image": drawn.image, "mask": drawn.mask, "references": (),
                     "things": (thing, below)})
    return made


def accuracy(pictures: Sequence[np.ndarray], records: Sequence[Record]) -> float:
    """Share of halves whose mean colour inside the symbol is nearest to the right one."""
    found = []
    for picture, record in zip(pictures, records, strict=True):
        above, below = record["things"]
        middle = above.box[2] // 2
        found += [color_of(picture, above, slice(None, middle)) == above.color,
                  color_of(picture, below, slice(middle, None)) == below.color]
    return float(np.mean(found))


def against_diffusers(model: acejax.MMDiTConfig, params: Any, path: pathlib.Path, batch: Mapping[str, np.ndarray]
                      ) -> float:
    """The most that diffusers' velocity of a batch differs from ours, in standard deviations."""
    from tests import judges

    sigma = np.linspace(0.1, 0.9, len(batch["lengths"]), dtype=np.float32)
    seen = dataclasses.replace(tokens(model, batch, batch["target"], sigma), lengths=None)
    ours = acejax.apply(model, params, seen, lora=acejax.load_lora(path, model))
    return judges.difference(ours, judges.flux_velocity(model, params, seen, path))


def last_loss(workdir: pathlib.Path) -> float:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["validation/loss"] for line in lines if "validation/loss" in line][-1]


def table(report: Mapping[str, Any]) -> str:
    """Accuracies and losses of each run."""
    lines = [f"\n{'':<10}{'accuracy':>10}{'shuffled':>10}{'validation loss':>17}{'diffusers':>11}"]
    for name, run in report["runs"].items():
        loss, other = run.get("validation_loss"), run.get("diffusers_difference")
        lines.append(f"{name:<10}{run['accuracy']:>10.2f}{run['shuffled']:>10.2f}"
                     f"{'' if loss is None else format(loss, '.4f'):>17}"
                     f"{'' if other is None else format(other, '.0e'):>11}")
    return "\n".join([*lines, "holds" if report["holds"] else "does not hold"])


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
