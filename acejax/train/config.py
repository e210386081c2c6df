"""What a training run is made of, apart from its data: a config's fields as frozen dataclasses, checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from acejax import fields
from acejax.adapt.targets import ACE_PLUS
from acejax.data.layout import CanvasConfig
from acejax.errors import UserError
from acejax.model import remat
from acejax.model.config import Execution, MMDiTConfig
from acejax.train.step import StepConfig

DATA = ("data", "stages", "encoders", "cache", "evaluate")  # what is not read here


def _at_least(config: Any, **least: int) -> None:
    for field, bound in least.items():
        if getattr(config, field) < bound:
            raise UserError(f"{field} is {getattr(config, field)}; expected at least {bound}")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """As `acejax.train.step.StepConfig` says."""

    mask_weight: float = 1.0
    sigma_shift: float = 0.0
    sigma_spread: float = 1.0

    def __post_init__(self):
        if self.mask_weight < 0 or self.sigma_spread < 0:
            raise UserError(f"mask_weight is {self.mask_weight} and sigma_spread {self.sigma_spread}; expected 0 or "
                            "more")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradient.

    Attributes:
      name: "adamw", "muon" or "adafactor".
      learning_rate: the greatest.
      schedule: "cosine" or "linear" to 0 at the run's end, or "constant", after
      warmup: a share of the steps.
      b1, b2, eps: AdamW's.
      momentum: Muon's.
      weight_decay: of all parameters.
      clip: the greatest global norm of a gradient, 0 for none.
      accumulate: parts that a batch is computed in.
      ema: decay of the averaged parameters, which are judged and exported; 0 for none.
      param_dtype: that parameters are kept in: "float32", or with Adafactor "bfloat16", then with
      rounding: "stochastic", or "nearest", by which small updates are lost.
      fused: Adafactor moves each block as soon as its gradient is there, so that no more than one block's ever is
        (`acejax.train.fused`): on one device, without clip and accumulate, with execution.remat="full".
    """

    learning_rate: float
    name: str = "adamw"
    schedule: str = "cosine"
    warmup: float = 0.02
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    param_dtype: str = "float32"
    rounding: str = "stochastic"
    fused: bool = False

    def __post_init__(self):
        for field, known in (("name", ("adamw", "muon", "adafactor")), ("schedule", ("cosine", "linear", "constant")),
                             ("param_dtype", ("float32", "bfloat16")), ("rounding", ("stochastic", "nearest"))):
            if getattr(self, field) not in known:
                raise UserError(f"{field} is {getattr(self, field)!r}; known: {', '.join(known)}")
        for field in ("warmup", "b1", "b2", "momentum", "ema"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}; expected 0 or more, below 1")
        _at_least(self, learning_rate=0, weight_decay=0, clip=0, accumulate=1)
        if self.eps <= 0:
            raise UserError(f"eps is {self.eps}; expected above 0")
        if self.name != "adafactor" and (self.fused or self.param_dtype != "float32"):
            field = "fused" if self.fused else "param_dtype"
            raise UserError(f"{field} is {getattr(self, field)!r} and name {self.name!r}; expected name='adafactor'")
        if self.fused and self.clip:
            raise UserError(f"clip is {self.clip} and fused True: the whole gradient's norm is known only when all "
                            "blocks have been moved; expected clip=0 (Adafactor bounds each layer's update itself)")
        if self.fused and self.accumulate > 1:
            raise UserError(f"accumulate is {self.accumulate} and fused True: blocks are moved by the gradient of a "
                            "whole batch; expected accumulate=1")


BASES = ("float32", "bfloat16", "int8", "float8")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is trained beside a model that stays as it is (`acejax.adapt.lora`).

    Attributes:
      rank: of every pair.
      alpha: a pair's product counts alpha / rank; None is the rank.
      targets: names of linear layers, or regular expressions over them, in our names ("double_blocks/.*/qkv") or in
        BFL's ("(model.)?double_blocks.*qkv").
      init_from: a LoRA file to go on from, of this rank; it brings its own alphas.
      base: how the model is held: "bfloat16", "float32", or its blocks' kernels as "int8" or "float8".
    """

    rank: int
    alpha: float | None = None
    targets: str | tuple[str, ...] = ACE_PLUS
    init_from: str | None = None
    base: str = "bfloat16"

    def __post_init__(self):
        _at_least(self, rank=1)
        if self.base not in BASES:
            raise UserError(f"base is {self.base!r}; known: {', '.join(BASES)}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"alpha is {self.alpha}; expected above 0, or None for the rank")
        if self.alpha is not None and self.init_from:
            raise UserError(f"alpha is {self.alpha}, and init_from brings its own; expected one of them")


AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """As `acejax.Execution`, which also needs the mesh.

    Attributes:
      int8_products: as there, for a LoRA on a base in int8.
      reduce_dtype: as there: "float32" for gradients that are summed and sent in it, beside `dtype` "bfloat16".
      remat: as there, or "auto", which `acejax.train.plan_remat` settles before a run starts.
      compiler_options: of XLA, over those of `acejax.parallel.options`.
    """

    dtype: str = "bfloat16"
    attention: str = "auto"
    remat: str = "full"
    reduce_dtype: str | None = None
    int8_products: bool = False
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        try:
            known = remat.FULL if self.remat == AUTO else self.remat
            Execution(self.dtype, self.attention, known)
        except TypeError as error:
            raise UserError(f"dtype is {self.dtype!r}; expected float32 or bfloat16") from error
        if self.reduce_dtype not in (None, self.dtype, "float32"):
            raise UserError(f"reduce_dtype is {self.reduce_dtype!r}; expected float32, or None for dtype")


@dataclasses.dataclass(frozen=True)
class ReadingConfig:
    """How batches are made ahead: by threads, or by processes (`workers`); `ahead` of them."""

    threads: int = 4
    workers: int = 0
    ahead: int = 4

    def __post_init__(self):
        _at_least(self, threads=1, workers=0, ahead=1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run.

    Attributes:
      every: steps between checkpoints.
      keep: the last so many stay,
      best: and the so many of least validation loss, of steps that have one (`validation.every`).
      export_every: steps between exports as safetensors, 0 for none, in
      export_layout: "bfl", "comfy" or "diffusers" (a LoRA has no "bfl"), or several with commas between, in
      export_dtype: "float32", "bfloat16" or "float16"; None is as trained.
    """

    every: int = 1000
    keep: int = 2
    best: int = 0
    export_every: int = 0
    export_layout: str = "bfl"
    export_dtype: str | None = None

    def __post_init__(self):
        _at_least(self, every=1, keep=1, best=0, export_every=0)
        if not set(self.layouts) <= set(known := ("bfl", "comfy", "diffusers")):
            raise UserError(f"export_layout is {self.export_layout!r}; known: {', '.join(known)}")
        if self.export_dtype not in (known := (None, "float32", "bfloat16", "float16")):
            raise UserError(f"export_dtype is {self.export_dtype!r}; known: {', '.join(map(str, known))}")

    @property
    def layouts(self) -> tuple[str, ...]:
        return tuple(self.export_layout.split(","))


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What a run reports: averages over `every` steps. More than `bad_steps` skipped ones stop it."""

    every: int = 50
    bad_steps: int = 10

    def __post_init__(self):
        _at_least(self, every=1, bad_steps=0)


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """How a run is judged while it trains, on samples that it does not train on.

    Attributes:
      every: steps between validation losses, 0 for none.
      held: samples of each task and source that are kept out of training,
      sources: or sources of their own, as `data.sources`.
      sigmas: the noise levels.
      grid_every: steps between sample pictures, 0 for none.
      grid: samples a task that are drawn,
      steps: in so many Euler steps
      guidance: at this guidance.
    """

    every: int = 0
    held: int = 8
    sources: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    grid_every: int = 0
    grid: int = 2
    steps: int = 28
    guidance: float = 1.0

    def __post_init__(self):
        _at_least(self, every=0, held=0, grid_every=0, grid=1, steps=1)
        if not self.sigmas or not all(0 < sigma <= 1 for sigma in self.sigmas):
            raise UserError(f"sigmas is {self.sigmas}; expected numbers above 0, up to 1")
        if (self.every or self.grid_every) and not self.held and not self.sources:
            raise UserError("held is 0 and there are no sources; expected one of them, or every and grid_every of 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
      steps: its length.
      model: what is trained.
      init_from: weights to start from: a safetensors file, a folder, a hub id, a workdir; None is random.
      lora: where a LoRA is trained on them, and not they.
      mesh: sizes of its axes.
      others: as the classes say.
    """

    seed: int
    steps: int
    model: MMDiTConfig
    optimizer: OptimizerConfig
    loss: LossConfig = LossConfig()
    init_from: str | None = None
    lora: LoraConfig | None = None
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    execution: ExecutionConfig = ExecutionConfig()
    reading: ReadingConfig = ReadingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
    validation: ValidationConfig = ValidationConfig()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TrainConfig":
        """Read a run's config; what the data is made of is left to `acejax.data.config`.

        Raises:
          UserError: a field that is missing, unknown, of another type or out of range, or a model of other channels
            than the data makes.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(config) - {*known, *DATA}):
            raise UserError(f"config.{unknown[0]}: no such field; expected {', '.join((*known, *DATA))}")
        values = {}
        for name, field in known.items():
            part = next(filter(dataclasses.is_dataclass, (field.type, *get_args(field.type))), None)
            if part is not None:
                if name in config or field.default is dataclasses.MISSING:
                    values[name] = fields.read(part, config, name)
            elif name in config:
                values[name] = fields.value(config[name], field.type, f"config.{name}")
            elif field.default is field.default_factory is dataclasses.MISSING:
                raise UserError(f"config.{name} is missing")
        run = cls(**values)
        if run.steps < 1 or run.seed < 0:
            raise UserError(f"config.steps is {run.steps} and config.seed {run.seed}; expected at least 1 and 0")
        if run.lora and run.checkpoint.export_every and "bfl" in run.checkpoint.layouts:
            raise UserError("config.checkpoint.export_layout has 'bfl'; a LoRA is written as 'comfy' or 'diffusers'")
        split = config.get("data", {}).get("canvas", {}).get("split", CanvasConfig.split)
        if run.model.in_channels not in (64, made := 448 if split else 384):
            raise UserError(f"config.model.in_channels is {run.model.in_channels}; with config.data.canvas.split="
                            f"{split} the data makes {made} (64 trains a text-to-image model on the targets alone)")
        if run.lora and (run.optimizer.fused or run.optimizer.param_dtype != "float32"):
            raise UserError("config.lora with config.optimizer.fused or param_dtype='bfloat16': a LoRA's factors are "
                            "small, and trained in float32 by the ordinary step")
        if run.execution.int8_products and (run.lora is None or run.lora.base != "int8"):
            raise UserError("config.execution.int8_products is True without a base in int8; expected config.lora.base="
                            "int8 with it")
        if run.optimizer.fused and run.execution.remat not in (remat.FULL, AUTO):
            raise UserError(f"config.execution.remat is {run.execution.remat!r} and config.optimizer.fused True, which "
                            "recomputes each block; expected 'full'")
        return run

    def check_devices(self, devices: int) -> None:
        """Raises UserError when the run can't be on so many devices."""
        if self.optimizer.fused and devices > 1:
            raise UserError(f"config.optimizer.fused is True on {devices} devices; it is made for one: expected False, "
                            "where config.mesh shards parameters and gradients (fsdp)")

    def setting(self, execution: Execution, references: int, tasks: int) -> StepConfig:
        """The static part of a step."""
        return StepConfig(self.model, execution, references, tasks, **dataclasses.asdict(self.loss), seed=self.seed,
                          accumulate=self.optimizer.accumulate, ema=self.optimizer.ema,
                          param_dtype=self.optimizer.param_dtype)
