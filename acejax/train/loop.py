"""The training loop, top to bottom: mesh, state, compiled steps, batches, checkpoints, metrics."""

import concurrent.futures
import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from acejax.checkpoint import Checkpoints
from acejax.data.layout import CanvasConfig
from acejax.data.stream import Stream
from acejax.errors import UserError
from acejax.model.config import Execution, MMDiTConfig
from acejax.parallel import mesh as meshes
from acejax.parallel import rules
from acejax.train.metrics import Writer, summarize
from acejax.train.optimizer import make_optimizer
from acejax.train.step import StepConfig, TrainState, init_state, train_step
from acejax.workdir import claim

FREE = ("execution", "mesh", "reading", "log_every", "checkpoint_every", "keep_checkpoints",  # how, not what
        "cache.dir", "cache.batch",  # what encoders give is told by the features' digest, whatever their names
        "encoders.autoencoder", "encoders.t5", "encoders.clip", "encoders.tokenizers")
FIELDS = {"": ("seed", "steps", "stages", "model", "data", "loss", "optimizer", "mesh", "execution", "reading",
               "log_every", "checkpoint_every", "keep_checkpoints"),  # by part: what must be there
          "loss": ("mask_weight", "sigma_shift", "sigma_spread"), "execution": ("dtype", "attention", "remat"),
          "optimizer": ("learning_rate", "warmup", "b1", "b2", "weight_decay", "clip")}


def check(config: ml_collections.ConfigDict) -> tuple[Mesh, MMDiTConfig, Execution]:
    """What can be wrong with a run before it starts; nothing is written.

    Raises:
      UserError: a part that is missing, a model, mesh, batch size or execution that can't be.
    """
    for part, fields in FIELDS.items():
        for field in fields:
            if field not in (config[part] if part else config):
                raise UserError(f"config.{f'{part}.' if part else ''}{field} is missing")
    if jax.process_count() > 1:
        raise UserError("training over several processes is not there yet; one process drives all devices of a host")
    if config.steps < 1 or config.seed < 0:
        raise UserError(f"config.steps is {config.steps} and config.seed {config.seed}; expected at least 1 and 0")
    if not 0 <= config.optimizer.warmup < 1:
        raise UserError(f"config.optimizer.warmup is {config.optimizer.warmup}; expected a share below 1 of the steps")
    mesh = meshes.make_mesh(config.mesh)
    for _, size in config.data.get("batch_sizes", ()):
        rules.check_batch(mesh, size)
    try:
        model = MMDiTConfig(**config.model)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error
    try:
        how = config.execution
        execution = Execution(jnp.dtype(how.dtype), how.attention, how.remat, rules.constrain(mesh))
    except (TypeError, ValueError) as error:
        raise UserError(f"config.execution: {error}") from error
    split = config.data.get("canvas", {}).get("split", CanvasConfig.split)
    if model.in_channels != (made := 448 if split else 384):
        raise UserError(f"config.model.in_channels is {model.in_channels}; with config.data.canvas.split={split} the "
                        f"data makes {made}")
    return mesh, model, execution


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike, stream: Stream,
          until: int | None = None) -> tuple[TrainState, dict[str, float]]:
    """Train to `config.steps`, taking up what the workdir holds.

    Args:
      config: see `configs/demo.py`.
      workdir: gets config.json, checkpoints/, metrics.jsonl and TensorBoard files.
      stream: the batch of each step.
      until: stop after this step as if interrupted (the schedule stays that of the whole run).

    Returns:
      The final state and seconds spent: compile, train.

    Raises:
      UserError: as `check`, or a workdir of another config.
    """
    mesh, model, execution = check(config)
    claim(workdir, config.to_dict(), FREE)
    setting = StepConfig(model, execution, stream.references, len(stream.tasks), config.loss.mask_weight,
                         config.loss.sigma_shift, config.loss.sigma_spread, config.seed)
    optimizer = make_optimizer(config.optimizer, config.steps)
    started = time.time()
    abstract = jax.eval_shape(functools.partial(init_state, setting, optimizer))
    placement = rules.shardings(abstract, mesh)
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    like = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                        abstract, placement)
    if restored := checkpoints.restore(like):
        start, state = restored
        print(f"resuming {workdir} at step {start}")
    else:
        state, start = jax.jit(init_state, static_argnums=(0, 1), out_shardings=placement)(setting, optimizer), 0

    put = functools.partial(_put, rules.batch_sharding(mesh))
    stop = config.steps if until is None else min(until, config.steps)
    compiled = {} if start >= stop else _compile(state, stream, start, stop, put, placement, setting, optimizer)
    seconds = {"compile": time.time() - started}

    writer = Writer(workdir, start)
    waiting: list[dict[str, jax.Array]] = []
    started = logged = time.time()
    since = start
    bar = tqdm(range(start, stop), initial=start, total=config.steps, unit="step", disable=not sys.stderr.isatty())
    for step, batch in zip(bar, stream.batches(start, stop, **config.reading), strict=True):
        state, metrics = compiled[batch.bucket](state, put(batch.arrays))
        waiting.append(metrics)
        done = step + 1
        if done % config.log_every == 0 or done == stop:
            values = summarize(jax.device_get(waiting), stream.tasks)
            values["seconds"] = writer.seconds + time.time() - started  # of training, interruptions left out
            values["steps_per_second"] = (done - since) / (time.time() - logged)
            logged, since, waiting = time.time(), done, []
            writer.write(done, values)
            bar.set_postfix(loss=f"{values['loss']:.3f}")
            if bar.disable:
                left = (stop - done) / ((done - start) / (logged - started))
                print(f"step {done}/{config.steps}  loss {values['loss']:.4f}  {left:.0f} s left", flush=True)
        if done % config.checkpoint_every == 0 or done == stop:
            checkpoints.save(done, state)
    seconds["train"] = writer.seconds + time.time() - started if start < stop else writer.seconds
    checkpoints.close()
    writer.close()
    return state, seconds


def _put(sharding: jax.sharding.NamedSharding, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's samples as global arrays."""
    return {name: jax.make_array_from_process_local_data(sharding, values) for name, values in batch.items()}


def _compile(state: Any, stream: Stream, start: int, stop: int, put, placement, setting: StepConfig, optimizer) -> dict:
    """One compiled step for each bucket that the run will meet, made side by side."""
    step = jax.jit(functools.partial(train_step, setting=setting, optimizer=optimizer), donate_argnums=0,
                   out_shardings=(placement, None))
    examples = stream.examples(start, stop)
    print(f"compiling the training step for {len(examples)} numbers of tokens ...", flush=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lowered = {bucket: step.lower(state, put(batch)) for bucket, batch in examples.items()}
        return dict(zip(lowered, pool.map(lambda low: low.compile(), lowered.values()), strict=True))
