"""The training loop, top to bottom: mesh, state, compiled steps, batches, checkpoints, metrics."""

import concurrent.futures
import contextlib
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from acejax.adapt.lora import spread
from acejax.checkpoint import Checkpoints, digest
from acejax.data.stream import Stream
from acejax.errors import UserError
from acejax.parallel import batch as batches
from acejax.parallel import kernels, memory, processes, rules
from acejax.parallel import mesh as meshes
from acejax.parallel.chips import chip_of
from acejax.train import lora as loras
from acejax.train.config import AUTO, TrainConfig
from acejax.train.executables import Place, afresh
from acejax.train.export import Exports
from acejax.train.plan import Plan, plan, remedy, settled
from acejax.train.preemption import Preempted, Preemption
from acejax.train.profile import Profiler, write_hlo
from acejax.train.program import Program
from acejax.train.start import check_start
from acejax.train.step import TrainState
from acejax.train.validate import HeldOut, Validation
from acejax.train.watch import Watch
from acejax.workdir import claim

FREE = ("execution", "mesh", "reading", "watch", "checkpoint",  # how, not what
        *(f"validation.{name}" for name in ("every", "grid_every", "grid", "steps", "guidance", "sigmas")),
        "steps",  # a run goes on beyond its end; less than it has made is refused
        "data.autoencoder.refine", "data.autoencoder.drafts",  # of the demo, once it is trained
        "evaluate.steps", "evaluate.thresholds", "cache.dir", "cache.batch",
        # what encoders give is told by the features' digest, whatever their names:
        "encoders.autoencoder", "encoders.t5", "encoders.clip", "encoders.tokenizers")


def check(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> tuple[TrainConfig, Mesh]:
    """What can be wrong with a run before it starts; nothing is written.

    A run that has checkpoints needs the weights no more that it began with, unless a LoRA is trained on them.

    Raises:
      UserError: as `TrainConfig.of`, a mesh or batch size that can't be, or weights to start from that do not fit.
    """
    run = TrainConfig.of(config)
    mesh = meshes.make_mesh(run.mesh)
    run.check_devices(mesh.size)
    kernels.choose(run.execution.attention, kernels.device_of(mesh), run.execution.dtype, run.model.head_dim,
                   "config.execution.")
    if run.execution.remat != AUTO:
        kernels.check_host(run.execution.remat, kernels.device_of(mesh), "config.execution.")
    rules.check_heads(mesh, run.model.num_heads)
    for _, size in config.get("data", {}).get("batch_sizes", ()):
        rules.check_batch(mesh, size, run.optimizer.accumulate)
    if run.lora:
        loras.check(run.lora, run.model)
    if run.init_from and (run.lora or not _begun(workdir)):
        check_start(run.init_from, run.model, grow=not run.lora or "img_in" in loras.targets(run.lora, run.model))
    return run, mesh


def _begun(workdir: epath.PathLike) -> bool:
    folder = epath.Path(workdir) / "checkpoints"
    return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike, stream: Stream,
          until: int | None = None, held_out: HeldOut | None = None, profile: str = "", dump_hlo: str = "",
          executables: str = "") -> tuple[TrainState, dict[str, float]]:
    """Train to `config.steps`, taking up what the workdir holds.

    Args:
      config: see `configs/demo.py`.
      workdir: gets config.json, checkpoints/, exports/, metrics.jsonl and TensorBoard files; hold its
        `acejax.workdir.lock`.
      stream: the batch of each step.
      until: stop after this step as if interrupted (the schedule stays that of the whole run).
      held_out: what `config.validation` is of, where there is any.
      profile: START:STOP, the steps that are traced into <workdir>/profile.
      dump_hlo: a folder that gets the compiled steps as text.
      executables: where compiled steps are found (`acejax.train.executables.check`).

    Returns:
      The final state and seconds spent: compile, train.

    Raises:
      UserError: as `check`; a workdir of another config, or with none but damaged checkpoints; a checkpoint or an
        export that can't be written.
      Preempted: SIGTERM reached a process of the run; the step is saved.
    """
    run, mesh = check(config, workdir)
    if run.execution.remat == AUTO:
        run = _settled(run, stream)
    with Preemption() as preemption, memory.told(lambda: _remedy(run, stream)):
        return _train(run, mesh, config, workdir, stream, until, preemption, held_out, profile, dump_hlo,
                      executables)


def _train(run: TrainConfig, mesh: Mesh, config: ml_collections.ConfigDict, workdir: epath.PathLike, stream: Stream,
           until: int | None, preemption: Preemption, held_out: HeldOut | None, profile: str, dump_hlo: str,
           executables: str) -> tuple[TrainState, dict[str, float]]:
    for bucket in stream.batch_sizes:
        rules.check_tokens(mesh, "a bucket of images", bucket)
    claim(workdir, config.to_dict(), FREE)
    program = Program.of(run, mesh, stream.references, len(stream.tasks))
    started = time.time()
    checkpoints = Checkpoints(workdir, run.checkpoint.keep, run.checkpoint.best)
    if restored := checkpoints.restore(program.state):
        start, state = restored
        if start > run.steps:
            raise UserError(f"workdir {workdir} holds step {start} of a run, config.steps is {run.steps}; expected at "
                            "least as many, or another --workdir")
        processes.say(f"resuming {workdir} at step {start}")
    else:
        if run.init_from:
            processes.say(f"starting from {run.init_from}")
        start, state = 0, program.begin()
    frozen = program.load_frozen()
    base = frozen and _agreed(digest(frozen), checkpoints.notes(start).get("base") if restored else None, run)

    stream = stream.share(batches.parts_of(mesh), rules.batch_parts(mesh))
    put = functools.partial(batches.to_mesh, mesh)
    stop = run.steps if until is None else min(until, run.steps)
    compiled = {}
    if start < stop:
        examples = stream.examples(start, stop)
        processes.say(_plan(run, stream, examples).line())
        kernels.warn_slow(run.execution.attention, kernels.device_of(mesh), _longest(examples), run.execution.dtype,
                          run.model.head_dim, "config.execution.")
        compiled = _compile(program, {bucket: put(batch) for bucket, batch in examples.items()}, frozen,
                            Place(executables))
    for bucket, step in compiled.items() if dump_hlo else ():
        write_hlo(dump_hlo, f"train_step_{bucket}_tokens", step)
    seconds = {"compile": time.time() - started}

    validation = None if held_out is None else Validation(program.setting, run.validation, held_out, mesh,
                                                          stream.batch_sizes, run.seed, frozen)
    watch = Watch(run, workdir, stream.tasks, start, int(state.skipped), validation)
    profiler = Profiler(workdir, profile, start)
    exports = Exports(workdir, run.model, run.checkpoint.layouts, run.checkpoint.export_dtype, bool(run.lora))
    done = start
    bar = tqdm(range(start, stop), initial=start, total=run.steps, unit="step",
               disable=not (sys.stderr.isatty() and processes.is_first()))
    with contextlib.closing(checkpoints), contextlib.closing(exports), contextlib.closing(watch), \
            contextlib.closing(profiler):  # whatever ends the run: what is being saved is saved
        for step, batch in zip(bar, stream.batches(start, stop, run.reading.threads, run.reading.ahead,
                                                   run.reading.workers), strict=True):
            with profiler.step(step):
                state, metrics = compiled[batch.bucket](state, put(batch.arrays), frozen=frozen)
            watch.step(metrics, batch, stream.batch_sizes[batch.bucket])
            done = step + 1
            profiler.after(done, metrics)
            leaving = preemption.reached(done)
            values = watch.report(done, state, last=leaving or done == stop, judge=not leaving)
            _show(bar, done, stop, values)
            checkpoints.check()
            if done % run.checkpoint.every == 0 or done == stop or leaving:
                with watch.meter.aside(state.step):
                    checkpoints.save(done, state, values.get("validation/loss"),
                                     _notes(config, run, stream, done) | ({"base": base} if base else {}))
            if run.checkpoint.export_every and (done % run.checkpoint.export_every == 0 or done == stop):
                with watch.meter.aside(state.step):
                    trained = state.params if state.ema is None else state.ema
                    exports.save(done, spread(trained, frozen["scales"]) if frozen else trained)
            if leaving:
                break
    seconds["train"] = watch.seconds
    if start < done < stop:
        processes.say(f"preempted: step {done} is saved; the same command goes on from there")
        raise Preempted(done)
    return state, seconds


def _show(bar: tqdm, done: int, stop: int, values: dict[str, float]) -> None:
    """Of a report, what is for the eye: beside the bar, or as a line where there is no terminal."""
    shown = {name.replace("/", " "): f"{values[name]:.4f}" for name in ("loss", "validation/loss") if name in values}
    shown |= {"skipped": f"{values['skipped']:.0f}"} if values.get("skipped") else {}
    if shown:
        bar.set_postfix(shown)
    if bar.disable and "steps_per_second" in values:
        left = (stop - done) / values["steps_per_second"]
        processes.say(f"step {done}/{bar.total}  {'  '.join(map(' '.join, shown.items()))}  {left:.0f} s left")


def _notes(config: ml_collections.ConfigDict, run: TrainConfig, stream: Stream, step: int) -> dict[str, Any]:
    """What a checkpoint says besides the state; batches and random numbers follow from the seed and the step alone."""
    return {"config": config.to_dict(), "seed": config.seed, "remat": run.execution.remat,
            "data": {"step": step, "stage": stream.schedule[step].stage,
                     "digest": getattr(stream.table, "digest", None)}}  # pictures read while training have none


def _agreed(found: str, noted: str | None, run: TrainConfig) -> str:
    """The digest of a LoRA's base, which must be what a run began with.

    Raises:
      UserError: it is another.
    """
    if noted not in (None, found):
        raise UserError(f"{run.init_from}: is not the model that this run's LoRA began on (the digest of what stays as "
                        f"it is was {noted}, now it is {found}); give back the weights that it was started with")
    return found


def _plan(run: TrainConfig, stream: Stream, examples: dict[int, dict[str, Any]] | None = None) -> Plan:
    """What the steps need of the devices that are here."""
    return plan(run, **_here(stream, examples or stream.examples(0, run.steps)))


def _settled(run: TrainConfig, stream: Stream) -> TrainConfig:
    """A run with execution.remat="auto", which is then told, as all its steps' plans make it on the devices here."""
    run = settled(run, **_here(stream, stream.examples(0, run.steps)))
    processes.say(f"config.execution.remat is 'auto': here {run.execution.remat!r}")
    return run


def _here(stream: Stream, examples: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The batches and the devices that are here, as plans take them by keyword."""
    text = next(iter(examples.values()))["text"].shape[1]
    buckets = {bucket: stream.batch_sizes[bucket] for bucket in examples}
    return {"buckets": buckets, "text": text, "chip": chip_of(jax.devices()[0]), "devices": jax.device_count(),
            "slices": meshes.count_slices(jax.devices())}


def _longest(examples: dict[int, dict[str, Any]]) -> int:
    """Tokens of the longest sequence, text and image."""
    return max(examples) + next(iter(examples.values()))["text"].shape[1]


def _remedy(run: TrainConfig, stream: Stream) -> str:
    """The plan, and what would make the run fit."""
    found = _plan(run, stream)
    return f"it was planned:\n{found.table()}\n{remedy(run, found, stream.batch_sizes)}"


def _compile(program: Program, examples: dict[int, dict[str, Any]], frozen: Any, place: Place) -> dict[int, Callable]:
    """One compiled step for each bucket that the run will meet: found, or made side by side and left for next time."""
    found = place.find(program, examples)
    missing = {bucket: batch for bucket, batch in examples.items() if bucket not in found}
    if not missing:
        return found
    processes.say(f"compiling the training step for {len(missing)} numbers of tokens ...")
    with concurrent.futures.ThreadPoolExecutor() as pool, afresh() if place.keeps else contextlib.nullcontext():
        lowered = {bucket: program.step.lower(program.state, batch, frozen=frozen)
                   for bucket, batch in missing.items()}
        made = dict(zip(lowered, pool.map(lambda low: low.compile(), lowered.values()), strict=True))
    place.keep(program, missing, made)
    return found | made
