"""A run as a whole, before its machines are rented: hours, price, what of the data it sees, what it keeps on disk."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from acejax.data import buckets as token_buckets
from acejax.parallel.mesh import abstract_mesh
from acejax.train.config import TrainConfig
from acejax.train.plan_compile import abstract_batch
from acejax.train.plan_data import Samples
from acejax.train.plan_estimate import GB, Plan
from acejax.train.plan_memory import state_bytes

DAY = 86400.0
PROCESS = 8e9  # bytes of host memory of a process with its libraries and programs, roughly
PACKED = 8  # pixels of a mask that the cache keeps in a byte


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run takes; seconds and what follows from them are estimates, None without a chip.

    Attributes:
      steps: its length.
      seconds: of a step: the mean over its buckets, of whose steps there are `shares`.
      shares: of the steps, by image tokens; where the data is not known, all are of the slowest bucket.
      hours: of all steps. Compiling, validation and saving come on top.
      steps_a_day, samples_a_day, tokens_a_day: tokens with text and padding.
      samples, tokens: of the whole run.
      data: samples of the run's own data, None where it is not known, and their image `data_tokens`.
      epochs: how often the run sees each of them.
      data_origin: where that was read, or why it is not known.
      checkpoint: bytes of one; `checkpoints` of all that are kept at a time.
      kept: number of those.
      export: bytes of the weights as they are exported once, in all layouts; `exports` of all of them.
      exported: how often.
      cache: bytes of the feature cache, None where the data is not known; `cache_found` where it is there, else an
        estimate; `cache_sample` that of one sample of the largest step.
      disk: bytes of checkpoints, exports and cache.
      host_memory: bytes of one machine while a checkpoint is written; `host_has` in the usual one,
        or its part of so many devices.
      price: of all chips for `hours`, None where `--price` is not given; `chip_hours` without it.
    """

    steps: int
    seconds: float | None
    shares: Mapping[int, float]
    hours: float | None
    steps_a_day: float | None
    samples_a_day: float | None
    tokens_a_day: float | None
    samples: float
    tokens: float
    data: int | None
    data_tokens: float | None
    epochs: float | None
    data_origin: str
    checkpoint: float
    checkpoints: float
    kept: int
    export: float
    exports: float
    exported: int
    cache: float | None
    cache_found: bool
    cache_sample: float
    disk: float
    host_memory: float | None
    host_has: float | None
    chip_hours: float | None
    price: float | None

    def table(self) -> str:
        """What one asks before renting."""
        lines = [f"the run of {self.steps:,} steps:"]
        if self.hours is not None:
            lines += [_line("time", f"{_duration(self.hours)} by estimate; compiling, validation and saving come on "
                                    "top"),
                      _line("a day", f"{self.steps_a_day:,.0f} steps, {_count(self.samples_a_day)} samples, "
                                     f"{_count(self.tokens_a_day)} tokens with text and padding"),
                      _line("chip-hours", f"{self.chip_hours:,.0f}" + (
                          "; --price=P of one tells what they cost" if self.price is None else ""))]
            lines += [_line("price", f"{self.price:,.0f} by estimate")] if self.price is not None else []
        lines += [_line("samples", f"{_count(self.samples)}, {_count(self.tokens)} tokens with text and padding"),
                  _line("your data", self._data())]
        lines += [_line("checkpoint", f"{_bytes(self.checkpoint)}; {self.kept} kept at a time, and one more while it "
                                      f"is written: {_bytes(self.checkpoints)}")]
        if self.exported:
            lines += [_line("exports", f"{_bytes(self.export)} each, {self.exported} of them: {_bytes(self.exports)}")]
        lines += [_line("features", self._features()), _line("disk", f"{_bytes(self.disk)} of all these")]
        if self.host_memory is not None:
            usual = "MORE than the usual machine has:" if self.host_memory > self.host_has else "usual are"
            lines += [_line("host memory", f"about {_bytes(self.host_memory)} of a machine while it saves; {usual} "
                                           f"{_bytes(self.host_has)}")]
        return "\n".join(lines)

    def _features(self) -> str:
        if self.cache is None:
            return f"at most {_bytes(self.cache_sample)} a sample of the largest step"
        return _bytes(self.cache) + (" are in the cache" if self.cache_found else " at most, by estimate")

    def _data(self) -> str:
        if self.data is None:
            return f"not known{self.data_origin and f': {self.data_origin}'}"
        tokens = "" if self.data_tokens is None else f", {_count(self.data_tokens)} image tokens"
        return f"{self.data:,} samples{tokens} ({self.data_origin}); {self.epochs:,.1f} epochs"


def whole(run: TrainConfig, found: Plan, chips: int, data: Samples | None = None, why: str = "",
          price: float | None = None, variants: int = 1) -> Run:
    """A planned run as a whole.

    Args:
      run: its config.
      found: its plan.
      chips: what is paid for.
      data: the run's own; None where it is not known, with the reason `why`.
      price: of a chip-hour, in any currency.
      variants: of a sample that the cache keeps.
    """
    shares = _shares(found, data)
    by_tokens = {step.image: step for step in found.steps}
    samples = run.steps * sum(share * by_tokens[image].samples for image, share in shares.items())
    tokens = run.steps * sum(share * by_tokens[image].tokens for image, share in shares.items())
    timed = found.largest.seconds is not None
    seconds = sum(share * by_tokens[image].seconds for image, share in shares.items()) if timed else None
    hours = run.steps * seconds / 3600 if timed else None
    a_day = DAY / seconds / run.steps if timed else None  # of the run
    checkpoint, export = _saved(run), _exported(run)
    kept = min(run.checkpoint.keep + run.checkpoint.best * bool(run.validation.every),
               -(-run.steps // run.checkpoint.every))
    exported = -(-run.steps // run.checkpoint.export_every) if run.checkpoint.export_every else 0
    cache = None
    if data is not None:
        cache = data.cached or (None if data.tokens is None else
                                _features(run, data.count, data.total, found.text, variants))
    host, has = _host(run, found, checkpoint, export if exported else 0.0)
    return Run(
        steps=run.steps, seconds=seconds, shares=shares, hours=hours,
        steps_a_day=a_day and a_day * run.steps, samples_a_day=a_day and a_day * samples,
        tokens_a_day=a_day and a_day * tokens, samples=samples, tokens=tokens,
        data=data and data.count, data_tokens=data and data.total, epochs=data and samples / data.count,
        data_origin=data.origin if data else why,
        checkpoint=checkpoint, checkpoints=(kept + 1) * checkpoint, kept=kept,
        export=export, exports=exported * export, exported=exported,
        cache=cache, cache_found=bool(data and data.cached),
        cache_sample=_features(run, 1, found.largest.image, found.text, variants),
        disk=(kept + 1) * checkpoint + exported * export + (cache or 0.0),
        host_memory=host, host_has=has,
        chip_hours=hours and hours * chips, price=hours * chips * price if timed and price is not None else None)


def _shares(found: Plan, data: Samples | None) -> dict[int, float]:
    """Of the steps, by image tokens: as often as the data fills a batch, all samples drawn alike."""
    if data is not None and data.tokens is not None:
        lengths = sorted(step.image for step in found.steps)
        if data.tokens.max() <= lengths[-1]:
            samples = dict(zip(*np.unique(token_buckets.assign(data.tokens, lengths), return_counts=True), strict=True))
            steps = {step.image: samples.get(step.image, 0) / step.samples for step in found.steps}
            return {image: float(count / sum(steps.values())) for image, count in steps.items() if count}
    slowest = max(found.steps, key=lambda step: (step.seconds or 0.0, step.tokens))
    return {slowest.image: 1.0}


def _saved(run: TrainConfig) -> float:
    """Bytes of a checkpoint: what is trained, the optimizer's state, the float32 average."""
    _, trained, optimizer = state_bytes(run.model, run.lora, run.optimizer, abstract_mesh({}, 1))
    average = trained * 4 / jnp.dtype(run.optimizer.param_dtype).itemsize if run.optimizer.ema else 0.0
    return trained + optimizer + average


def _exported(run: TrainConfig) -> float:
    """Bytes of the weights as they are exported once."""
    _, trained, _ = state_bytes(run.model, run.lora, run.optimizer, abstract_mesh({}, 1))
    numbers = trained / jnp.dtype(run.optimizer.param_dtype).itemsize
    dtype = jnp.dtype(run.checkpoint.export_dtype or run.optimizer.param_dtype)
    return numbers * dtype.itemsize * len(run.checkpoint.layouts)


def _features(run: TrainConfig, samples: int, tokens: float, text: int, variants: int) -> float:
    """Bytes of the feature cache, as if no two samples shared a picture or a prompt."""
    sample = abstract_batch(run.model, 1, 1, 1)
    size = {name: leaf.size * leaf.dtype.itemsize for name, leaf in sample.items()}
    of_token = size["edit"] + size["modify"] + size["target"] + size["mask"] / PACKED
    return variants * tokens * of_token + samples * (text * size["text"] + size["pooled"])


def _host(run: TrainConfig, found: Plan, checkpoint: float, export: float) -> tuple[float | None, float | None]:
    """Bytes of the first machine's memory while it saves: its devices' part of the checkpoint, copied, the weights that
    are exported (it alone has all of them), batches made ahead, and what devices keep there (`acejax.model.remat`)."""
    if found.chip is None:
        return None, None
    devices, has = found.chip.host
    here = min(devices, found.devices)
    batch = found.largest.memory.batch * here
    needed = PROCESS + checkpoint * here / found.devices + export + (run.reading.ahead + 1) * batch
    needed += here * max(step.offloaded for step in found.steps)
    return needed, has * here / devices


def _line(name: str, text: str) -> str:
    return f"  {name:<12}{text}"


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days ({hours:,.0f} hours)"


def _count(number: float) -> str:
    """With a unit, three digits."""
    power = min(4, max(0, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.3g}{('', ' k', ' M', ' G', ' T')[power]}"


def _bytes(number: float) -> str:
    unit, name = next(((unit, name) for unit, name in ((1e12, "TB"), (GB, "GB")) if number >= unit), (1e6, "MB"))
    return f"{number / unit:.3g} {name}"
