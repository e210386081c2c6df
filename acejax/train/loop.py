"""The training loop, top to bottom: mesh, state, compiled steps, batches, checkpoints, metrics."""

import concurrent.futures
import functools
import sys
import time
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from acejax.checkpoint import Checkpoints
from acejax.data.stream import Stream
from acejax.model.config import Execution
from acejax.parallel import batch as batches
from acejax.parallel import mesh as meshes
from acejax.parallel import processes, rules
from acejax.train.config import TrainConfig
from acejax.train.export import Exports
from acejax.train.metrics import Writer, summarize
from acejax.train.optimizer import learning_rate, make_optimizer
from acejax.train.preemption import Preempted, Preemption
from acejax.train.start import load_start, open_start
from acejax.train.step import StepConfig, TrainState, init_state, train_step
from acejax.workdir import claim

FREE = ("execution", "mesh", "reading", "watch", "checkpoint",  # how, not what
        *(f"validation.{name}" for name in ("every", "grid_every", "grid", "steps", "guidance", "sigmas")),
        "cache.dir", "cache.batch",  # what encoders give is told by the features' digest, whatever their names
        "encoders.autoencoder", "encoders.t5", "encoders.clip", "encoders.tokenizers")


def check(config: ml_collections.ConfigDict) -> tuple[TrainConfig, Mesh]:
    """What can be wrong with a run before it starts; nothing is written.

    Raises:
      UserError: as `TrainConfig.of`, a mesh or batch size that can't be, or weights to start from that do not fit.
    """
    run = TrainConfig.of(config)
    mesh = meshes.make_mesh(run.mesh)
    rules.check_heads(mesh, run.model.num_heads)
    for _, size in config.get("data", {}).get("batch_sizes", ()):
        rules.check_batch(mesh, size, run.optimizer.accumulate)
    if run.init_from:
        open_start(run.init_from, run.model)
    return run, mesh


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike, stream: Stream,
          until: int | None = None) -> tuple[TrainState, dict[str, float]]:
    """Train to `config.steps`, taking up what the workdir holds.

    Args:
      config: see `configs/demo.py`.
      workdir: gets config.json, checkpoints/, exports/, metrics.jsonl and TensorBoard files; hold its
        `acejax.workdir.lock`.
      stream: the batch of each step.
      until: stop after this step as if interrupted (the schedule stays that of the whole run).

    Returns:
      The final state and seconds spent: compile, train.

    Raises:
      UserError: as `check`; a workdir of another config, or with none but damaged checkpoints; a checkpoint or an
        export that can't be written.
      Preempted: SIGTERM reached a process of the run; the step is saved.
    """
    with Preemption() as preemption:
        return _train(config, workdir, stream, until, preemption)


def _train(config: ml_collections.ConfigDict, workdir: epath.PathLike, stream: Stream, until: int | None,
           preemption: Preemption) -> tuple[TrainState, dict[str, float]]:
    run, mesh = check(config)
    for bucket in stream.batch_sizes:
        rules.check_tokens(mesh, "a bucket of images", bucket)
    claim(workdir, config.to_dict(), FREE)
    how = run.execution
    setting = run.setting(Execution(how.dtype, how.attention, how.remat, rules.constrain(mesh), rules.share(mesh)),
                          stream.references, len(stream.tasks))
    optimizer = make_optimizer(run.optimizer, run.steps)
    started = time.time()
    abstract = jax.eval_shape(functools.partial(init_state, setting, optimizer))
    placement = rules.shardings(abstract, mesh)
    checkpoints = Checkpoints(workdir, run.checkpoint.keep, run.checkpoint.best)
    like = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                        abstract, placement)
    if restored := checkpoints.restore(like):
        start, state = restored
        processes.say(f"resuming {workdir} at step {start}")
    else:
        state, start = _begin(run, mesh, setting, optimizer, placement), 0

    stream = stream.share(batches.parts_of(mesh), rules.batch_parts(mesh))
    put = functools.partial(batches.to_mesh, mesh)
    stop = run.steps if until is None else min(until, run.steps)
    compiled = {} if start >= stop else _compile(state, stream, start, stop, mesh, placement, setting, optimizer)
    seconds = {"compile": time.time() - started}

    rate = jax.jit(learning_rate(run.optimizer, run.steps))
    writer = Writer(workdir, start)
    exports = Exports(workdir, run.model, run.checkpoint.export_layout)
    done = start
    waiting: list[dict[str, jax.Array]] = []
    started = logged = time.time()
    since = start
    bar = tqdm(range(start, stop), initial=start, total=run.steps, unit="step",
               disable=not (sys.stderr.isatty() and processes.is_first()))
    for step, batch in zip(bar, stream.batches(start, stop, run.reading.threads, run.reading.ahead,
                                               run.reading.workers), strict=True):
        state, metrics = compiled[batch.bucket](state, put(batch.arrays))
        waiting.append(metrics)
        done = step + 1
        leaving = preemption.reached(done)
        if done % run.watch.every == 0 or done == stop or leaving:
            values = summarize(jax.device_get(waiting), stream.tasks)
            values["learning_rate"] = float(rate(step))
            values["seconds"] = writer.seconds + time.time() - started  # of training, interruptions left out
            values["steps_per_second"] = (done - since) / (time.time() - logged)
            logged, since, waiting = time.time(), done, []
            writer.write(done, values)
            bar.set_postfix(loss=f"{values['loss']:.3f}")
            if bar.disable:
                left = (stop - done) / ((done - start) / (logged - started))
                processes.say(f"step {done}/{run.steps}  loss {values['loss']:.4f}  {left:.0f} s left")
        checkpoints.check()
        if done % run.checkpoint.every == 0 or done == stop or leaving:
            checkpoints.save(done, state, notes=_notes(config, stream, done))
        if run.checkpoint.export_every and (done % run.checkpoint.export_every == 0 or done == stop):
            exports.save(done, state.params if state.ema is None else state.ema)
        if leaving:
            break
    seconds["train"] = writer.seconds + time.time() - started if start < stop else writer.seconds
    checkpoints.close()
    exports.close()
    writer.close()
    if start < done < stop:
        processes.say(f"preempted: step {done} is saved; the same command goes on from there")
        raise Preempted(done)
    return state, seconds


def _begin(run: TrainConfig, mesh: Mesh, setting: StepConfig, optimizer, placement: TrainState) -> TrainState:
    """The state before the first step, on the mesh."""
    if run.init_from is None:
        return jax.jit(init_state, static_argnums=(0, 1), out_shardings=placement)(setting, optimizer)
    processes.say(f"starting from {run.init_from}")
    begin = jax.jit(init_state, static_argnums=(0, 1), out_shardings=placement, donate_argnums=2)
    return begin(setting, optimizer, load_start(run.init_from, run.model, mesh))


def _notes(config: ml_collections.ConfigDict, stream: Stream, step: int) -> dict[str, Any]:
    """What a checkpoint says besides the state; batches and random numbers follow from the seed and the step alone."""
    return {"config": config.to_dict(), "seed": config.seed,
            "data": {"step": step, "stage": stream.schedule[step].stage,
                     "digest": getattr(stream.table, "digest", None)}}  # pictures read while training have none


def _compile(state: Any, stream: Stream, start: int, stop: int, mesh: Mesh, placement, setting: StepConfig,
             optimizer) -> dict:
    """One compiled step for each bucket that the run will meet, made side by side."""
    step = jax.jit(functools.partial(train_step, setting=setting, optimizer=optimizer), donate_argnums=0,
                   out_shardings=(placement, None))
    examples = stream.examples(start, stop)
    for batch in examples.values():
        rules.check_tokens(mesh, "text", batch["text"].shape[1])
    processes.say(f"compiling the training step for {len(examples)} numbers of tokens ...")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lowered = {bucket: step.lower(state, batches.to_mesh(mesh, batch)) for bucket, batch in examples.items()}
        return dict(zip(lowered, pool.map(lambda low: low.compile(), lowered.values()), strict=True))
