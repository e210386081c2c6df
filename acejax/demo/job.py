"""The demo from nothing to a report: pictures, autoencoder, features, two training stages, edits of the test photo."""

import dataclasses
import functools
import io
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from PIL import Image

from acejax import fields
from acejax.data import dataset, inputs, pictures, written
from acejax.data.augment import AugmentConfig
from acejax.data.build import build
from acejax.data.cache.build import CacheConfig
from acejax.data.canvas import denormalize
from acejax.data.config import DataConfig, SourceConfig, read_batches, read_stages
from acejax.data.encoders import Encoders
from acejax.data.layout import TOKEN, CanvasConfig
from acejax.data.sample import Sample
from acejax.data.stream import Stream
from acejax.data.subset import Subset, hold_out
from acejax.demo import evaluate, weights
from acejax.demo.autoencoder import Autoencoder, FitConfig, decode_latents, encode_pictures, fingerprint, fit, refine
from acejax.demo.grid import save_grid
from acejax.demo.pictures import SPLITS, TASKS, samples
from acejax.demo.surroundings import TEXT_TOKENS, TEXT_WIDTH, encode_prompts
from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.parallel import processes
from acejax.train import loop
from acejax.train.config import TrainConfig
from acejax.train.held import Held
from acejax.train.program import Program
from acejax.train.samples import sample_held, sampler, target_unit
from acejax.train.validate import HeldOut
from acejax.workdir import claim, claim_data

# fields of config.data that are read here
OWN = ("source", "samples", "tasks", "size", "scales", "vary", "autoencoder", "canvas")


def check(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> tuple[TrainConfig, Mesh]:
    """What the built-in pictures ask of a config; nothing is written. Returns the run and its mesh.

    Raises:
      UserError: as `acejax.train.loop.check`, or data, stages, evaluation or text sizes that can't be.
    """
    run, mesh = loop.check(config, workdir)
    fields.read(FitConfig, config.data, "autoencoder", "data.")
    stages = read_stages(config, ("demo",))
    if config.data.source != "demo":
        raise UserError(f"config.data.source is {config.data.source!r}; so far there is 'demo', the built-in pictures")
    if config.data.size % TOKEN or not 64 <= config.data.size <= 256:
        raise UserError(f"config.data.size is {config.data.size}; expected a multiple of {TOKEN} from 64 to 256 pixels")
    if len(config.data.scales) < 1 or min(config.data.scales) < 1:
        raise UserError(f"config.data.scales is {config.data.scales}; expected one or more, each at least 1")
    units = [(config.data.size // TOKEN) ** 2 * count for count in (1, 2, 3)]
    if [tokens for tokens, _ in config.data.batch_sizes] != units or config.data.samples < 1:
        raise UserError(f"config.data.batch_sizes is {config.data.batch_sizes} and samples {config.data.samples}; "
                        f"expected pairs (tokens, samples) for {units[0]}, {units[1]} and {units[2]} tokens, and at "
                        "least one sample a task")
    if min(config.evaluate.samples, config.evaluate.held) < 2 or config.evaluate.steps < 1:
        raise UserError(f"config.evaluate is {dict(config.evaluate)}; expected at least 2 samples, 2 held and 1 step")
    for field, found, known in (("split", config.evaluate.split, SPLITS[1:]),
                                ("thresholds", config.evaluate.thresholds, tuple(evaluate.THRESHOLDS))):
        if found not in known:
            raise UserError(f"config.evaluate.{field} is {found!r}; expected one of {', '.join(known)}")
    for field, tasks, known in (("data.tasks", config.data.tasks, TASKS), (
            "stages", {task for stage in stages for task in stage.weights or ()}, config.data.tasks)):
        if unknown := sorted(set(tasks) - set(known)):
            raise UserError(f"config.{field}: unknown task {', '.join(unknown)}; known: {', '.join(known)}")
    if (config.model.context_in_dim, config.model.vec_in_dim) != (TEXT_WIDTH, TEXT_WIDTH):
        raise UserError(f"config.model.context_in_dim and vec_in_dim must be {TEXT_WIDTH}, the text encoder's width")
    return run, mesh


def prepare(config: ml_collections.ConfigDict, workdir: epath.PathLike
            ) -> tuple[epath.Path, Autoencoder, Stream, HeldOut | None]:
    """Check the config, write the dataset (where it is not there yet), fit the autoencoder, encode the training split.

    Raises:
      UserError: as `check` and `acejax.train.loop.check`, or a workdir of another config.
    """
    run, mesh = check(config, workdir)
    claim(workdir, config.to_dict(), loop.FREE)
    processes.say("writing the pictures, fitting the autoencoder, encoding ...")
    place, judged, data = epath.Path(workdir), config.evaluate, config.data
    drawn = functools.partial(Drawn, tuple(data.tasks), size=data.size, scales=tuple(data.scales), vary=data.vary)
    with processes.first_alone("dataset"):
        folder = build(place / "data", {"train": drawn(data.samples, config.seed, "train"),
                                        "test": drawn(judged.samples, judged.seed, judged.split),
                                        "held": drawn(judged.held, judged.seed, "held")})
        rows = dataset.read(folder, "train")
        if not (place / weights.AUTOENCODER).exists():
            fitting = fields.read(FitConfig, data, "autoencoder", "data.")
            targets = _targets(rows, fitting.pictures, config.seed)
            weights.save_autoencoder(place / weights.AUTOENCODER, fit(fitting, targets, config.seed))
    autoencoder = weights.load_autoencoder(place / weights.AUTOENCODER)
    encoders = Encoders(jax.jit(functools.partial(encode_pictures, autoencoder)), encode_prompts,
                        fingerprint(autoencoder),
                        str.encode, (TEXT_TOKENS, TEXT_WIDTH, TEXT_WIDTH))
    features = inputs.make_features(
        DataConfig({"demo": SourceConfig(str(folder))}, CanvasConfig(**data.canvas.to_dict()), AugmentConfig(), None,
                   CacheConfig(str(place / "cache"), "float32", batch=64), config.seed), {"demo": rows}, encoders)
    batches = read_batches(data, OWN)
    table, held_out = features, None
    if run.validation.every or run.validation.grid_every:
        table, held = hold_out(features, run.validation.held, config.seed)
        decode = jax.jit(functools.partial(decode_latents, autoencoder))
        held_out = HeldOut(held, lambda latents: denormalize(decode(latents[None])[0]),
                           lambda index: rows[features.origin(index)[1]].prompt)
    claim_data(workdir, table.digest)
    return folder, autoencoder, inputs.make_stream(read_stages(config, ("demo",)), config.steps, batches, table, mesh,
                                                   config.seed, accumulate=run.optimizer.accumulate), held_out


def run(config: ml_collections.ConfigDict, workdir: epath.PathLike, setup_seconds: float = 0.0,
        command: str = "acejax demo") -> dict[str, Any]:
    """The whole demo; writes `edits.png`, `report.json` and `weights/` into the workdir and returns the report.

    `command` is noted beside the weights, as what made them.
    """
    workdir = epath.Path(workdir)
    started = time.time()
    done = workdir / "report.json"
    again = done.exists() and json.loads(done.read_text())["steps"] == config.steps  # trained; it is edited again
    if done.exists():
        before = weights.read_note(workdir / "weights")["command"]
        command = before if again else f"{before}, then {command}"
    folder, autoencoder, stream, held_out = prepare(config, workdir)
    if not again:
        _spend(workdir, {"setup": setup_seconds, "data": time.time() - started})
    state, spent = loop.train(config, workdir, stream, held_out=held_out)
    if not again:
        _spend(workdir, {"compile": spent["compile"]})
    params = state.params if state.ema is None else state.ema
    fitting = fields.read(FitConfig, config.data, "autoencoder", "data.")
    refined = fitting.refine and {"steps": fitting.refine, "drafts": fitting.drafts, "of": config.evaluate.steps}
    if refined and again and weights.read_note(workdir / "weights").get("refined") == refined:
        autoencoder = weights.load_autoencoder(workdir / "weights" / weights.AUTOENCODER)
    elif refined:
        started = time.time()
        processes.say("training the decoder on what the transformer makes ...")
        rows = dataset.read(folder, "train")
        autoencoder = refine(fitting, autoencoder, _targets(rows, fitting.pictures, config.seed),
                             *drafts(config, workdir, params, stream, rows, fitting.drafts), config.seed)
        _spend(workdir, {"refine": time.time() - started})
    seconds = _spend(workdir, {}) | {"train": spent["train"]}  # which holds earlier starts
    print("editing the test photo ...", flush=True)
    started = time.time()
    note = {"command": command, "seed": config.seed, "steps": config.steps, "euler_steps": config.evaluate.steps,
            "tasks": [task for task in TASKS if task in config.data.tasks], "scales": config.data.scales,
            "repainting": config.data.canvas.scales.to_dict(),
            "seconds": round(sum(seconds.get(part, 0.0) for part in ("data", "compile", "train", "refine")), 1),
            "train_seconds": round(seconds["train"], 1)} | ({"refined": refined} if refined else {})
    weights.save(workdir / "weights", MMDiTConfig(**config.model), params, autoencoder, config.data.size, note)
    editor = weights.load_editor(workdir / "weights")  # what is judged is what is saved
    test, held = ({task: [row for row in rows if row["task"] == task] for task in TASKS if task in config.data.tasks}
                  for rows in (list(map(decoded, dataset.read(folder, split))) for split in ("test", "held")))
    scores, edits = evaluate.evaluate(editor, test, held, config.evaluate.seed)
    fine = evaluate.reconstruction(lambda shown: decode_latents(autoencoder, encode_pictures(autoencoder, shown)),
                                   [row for task in test if task != "text" for row in test[task]])
    save_grid(workdir / "edits.png", test, edits)
    seconds["evaluate"] = time.time() - started

    short = evaluate.missed(scores, fine, config.evaluate.thresholds)
    report = {"tasks": scores, "autoencoder": fine, "judged_on": dict(config.evaluate),
              "loss": _losses(workdir), "seconds": {k: round(v, 1) for k, v in seconds.items()},
              "steps": config.steps, "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
              "seed": config.seed, "passed": not short, "missed": short}
    (workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def drafts(config: ml_collections.ConfigDict, workdir: epath.PathLike, params: Any, stream: Stream,
           rows: Sequence[Sample], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the transformer makes of `count` training samples at most, the pictures it should make, and weights, as
    `refine` takes them.

    Text to picture is left out: what is drawn there is not what the sample shows. A pixel weighs as in the loss.
    """
    trained, mesh = check(config, workdir)
    every = stream.table
    edits = np.flatnonzero([every.tasks[task] != "text" for task in every.task])
    chosen = Subset(every, np.random.default_rng(config.seed).permutation(edits)[:count])
    held, places = Held(chosen, mesh, dict(config.data.batch_sizes), config.seed), range(len(chosen))
    setting = Program.of(trained, mesh, stream.references, len(stream.tasks)).setting
    made = sample_held(sampler(setting, mesh), params, held, held.batches(places), config.evaluate.steps)
    latents = np.stack([target_unit(held.row(place), made[place]) for place in places])
    wanted, weight = [], []
    for place in places:
        row = decoded(rows[chosen.origin(place)[1]])
        inside = np.ones(row["target"].shape[:2], bool) if row["mask"] is None else row["mask"] > 127
        wanted.append(row["target"])
        weight.append(np.where(inside, config.loss.mask_weight, 1)[..., None].astype(np.float32))
    return latents, np.stack(wanted), np.stack(weight)


def _targets(rows: Sequence[Sample], most: int, seed: int) -> np.ndarray:
    picks = np.random.default_rng(seed).permutation(len(rows))[:most]
    return np.stack([decoded(rows[index])["target"] for index in picks])


def table(report: dict[str, Any]) -> str:
    """The report's scores as text."""
    lines = ["task             color  shape   held  shuffled   copy   grey  dB box  dB copy"]
    for task, row in report["tasks"].items():
        main = evaluate.MAIN[task]
        lines.append(f"{task:<15}" + "".join(f"{value:>{width}.{digits}f}" if value is not None else f"{'-':>{width}}"
                                             for value, width, digits in (
            (row[main], 7, 2), (row.get("shape_accuracy"), 7, 2), (row["held"][main], 7, 2), (row[f"shuffled_{main}"],
            10, 2), (row[f"copy_{main}"], 7, 2), (row[f"grey_{main}"], 7, 2), (row["psnr_box"], 8, 1),
            (row["psnr_box_copy"], 9, 1))))
    if "remove" in report["tasks"]:
        lines.append("remove: the share of symbols that are gone stands under color")
    return "\n".join([*lines, f"autoencoder: {report['autoencoder']['psnr']:.1f} dB on the pictures to be made"])


class Drawn(Sequence):
    """`count` drawn samples of each task, drawn when the first is asked for; `detail` is what the scores need."""

    def __init__(self, tasks: Sequence[str], count: int, seed: int, split: str, size: int, scales: tuple[float, ...],
                 vary: bool = False):
        self._tasks, self._count, self._split = tasks, count, split
        self._drawing = seed, split, size, scales, vary

    def __len__(self) -> int:
        return self._count * len(self._tasks)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def fingerprint(self, index: int) -> str:
        return f"{index} of {self._count} of {', '.join(self._tasks)} by {self._drawing}"

    @functools.cached_property
    def _samples(self) -> list[Sample]:
        return [Sample(drawn.task, drawn.prompt, _png(drawn.target), *(None if array is None else _png(array) for array
                       in (drawn.image, drawn.mask)), tuple(map(_png, drawn.references)), f"{self._split} {drawn.task}",
                       json.dumps([dataclasses.astuple(thing) for thing in drawn.things]))
                for task in self._tasks for drawn in samples(self._count, task, *self._drawing)]


def decoded(sample: Sample) -> dict[str, Any]:
    """The sample's fields with pictures as [h, w, 3] and the mask as [h, w] uint8 arrays."""
    def array(data: bytes | None, decode: Callable = pictures.decode) -> np.ndarray | None:
        return None if data is None else decode(data, sample.name)
    return {"task": sample.task, "prompt": sample.prompt, "detail": sample.detail, "target": array(sample.target),
            "image": array(sample.image), "mask": array(sample.mask, pictures.decode_mask),
            "references": tuple(map(array, sample.references))}


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _spend(workdir: epath.Path, more: dict[str, float]) -> dict[str, float]:
    """Adds to the seconds of what all starts of a run have ended, and returns them."""
    path = workdir / "seconds.json"
    spent = json.loads(path.read_text()) if path.exists() else {}
    spent |= {name: spent.get(name, 0.0) + value for name, value in more.items()}
    written.write(path, (json.dumps(spent) + "\n").encode())
    return spent


def _losses(workdir: epath.Path) -> dict[str, Any]:
    """First and last averages of the run, and the last L_ref and L_tar."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    return {"first": lines[0]["loss"], "last": last["loss"], "tar": last["L_tar"],
            "ref": [value for name, value in sorted(last.items()) if name.startswith("L_ref/")]}
