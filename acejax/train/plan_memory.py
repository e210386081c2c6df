"""Bytes of one device in a training step, in closed form: nothing is compiled, no array is made."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from acejax.model import attention, remat
from acejax.model.config import MMDiTConfig
from acejax.model.mmdit import init
from acejax.parallel import rules
from acejax.train import lora
from acejax.train.config import LoraConfig, OptimizerConfig, TrainConfig
from acejax.train.optimizer import make_optimizer
from acejax.train.plan_compile import abstract_batch


@dataclasses.dataclass(frozen=True)
class Backend:
    """What a compiler holds beside what the program says, while one block is recomputed and differentiated.

    Attributes:
      mlp, heads, hidden: arrays [B, tokens, hidden_size] of the activations' dtype: of the MLP, of q, k, v and what
        attention makes of them, of the residual stream.
      logits: float32 arrays of attention's logits, where attention is no kernel.
      gathered: weights of a block gathered and cast, `f(config, bytes of the activations' dtype)`.
      reserve: bytes for what is not counted, and for holes between buffers.
    """

    mlp: float
    heads: float
    hidden: float
    logits: int
    gathered: Callable[[MMDiTConfig, int], float]
    reserve: float


def _block(config: MMDiTConfig) -> int:
    """Weights of a double block's kernels, the largest there is."""
    return 2 * config.hidden_size * (10 * config.hidden_size + 2 * config.mlp_size)


def _outside(config: MMDiTConfig) -> int:
    """Weights of the kernels that lie in no block, but for those of the time and guidance embedders' 256 inputs."""
    ends = config.in_channels + config.out_channels + config.context_in_dim + config.vec_in_dim
    return config.hidden_size * (ends + (4 + config.guidance_embed) * config.hidden_size)


def _two_blocks(config: MMDiTConfig, itemsize: int) -> float:
    """One in use and the next one on its way."""
    return 2 * itemsize * _block(config)


def _float32_copies(config: MMDiTConfig, itemsize: int) -> float:
    """XLA:CPU multiplies in float32 and communicates in it too: three kernels of an MLP, and two of qkv as they are."""
    width = config.hidden_size
    return 3 * 4 * width * config.mlp_size + 2 * itemsize * 3 * width**2


# "cpu" is what `acejax.train.plan_compile` sees on virtual devices: the full-size step within 2.5 % on all meshes
# tried with jax 0.10.2 (tests/train/test_plan.py), within 8 % with 0.10.0 and 0.11.2 on 64 devices; small models over
# the tensor axis within 12 %. The others count every array of a block's backward pass once and have not been held
# against such a device.
BACKENDS = {
    "cpu": Backend(mlp=7, heads=4, hidden=3, logits=3, gathered=_float32_copies, reserve=0.1e9),
    "gpu": Backend(mlp=16, heads=8, hidden=4, logits=3, gathered=_two_blocks, reserve=1.5e9),
    "rocm": Backend(mlp=16, heads=8, hidden=4, logits=3, gathered=_two_blocks, reserve=1.5e9),
    "tpu": Backend(mlp=16, heads=8, hidden=4, logits=3, gathered=_two_blocks, reserve=1.5e9),
}
MUON = 2.7  # copies of the gradients while Muon goes through the stacks: what it changes in place is copied before
VECTORS = 133  # float32 [hidden_size] that modulation holds of each sample of all devices


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      frozen: the model that a LoRA is trained on.
      parameters, optimizer, average, batch: what the step is given: parameters, moments, float32 EMA, features.
      gradients: of all parameters, and a float32 sum where parts of a batch are added up; of one block, and of what is
        in none, in a fused step.
      saved: what blocks keep for the backward pass.
      working: what is live while one block is recomputed and differentiated.
      gathered: weights of the block at work, from all devices.
      vectors: modulation of all samples: its kernels, a quarter of the weights, are not gathered, each device
        multiplies its rows with the vectors of all.
      updating: what Muon's update needs more than the backward pass, and a fused step's beside it.
      reserve: see Backend.
    """

    frozen: float
    parameters: float
    optimizer: float
    average: float
    batch: float
    gradients: float
    saved: float
    working: float
    gathered: float
    vectors: float
    updating: float
    reserve: float

    @property
    def arguments(self) -> float:
        return self.frozen + self.parameters + self.optimizer + self.average + self.batch

    @property
    def temporaries(self) -> float:
        return self.total - self.arguments

    @property
    def total(self) -> float:
        return sum(dataclasses.asdict(self).values())


def memory(run: TrainConfig, mesh: AbstractMesh, samples: int, image: int, text: int, backend: str) -> Memory:
    """Bytes of one device in a step over `samples` of `image` and `text` tokens.

    With B samples a device and a part of the batch, N tokens, H heads, A = B N hidden_size / seq arrays of the
    activations' dtype:

        saved    A (double blocks + single blocks), their inputs, and what `acejax.model.remat` says, that of heads
                 and MLP over the tensor axis
        working  A (mlp + heads + hidden), and logits 4 B H chunk N, of a kernel 8 B H N
        vectors  4 samples hidden_size VECTORS
    """
    model, dtype, held = run.model, jnp.dtype(run.execution.dtype), BACKENDS[backend]
    tensor, seq, accumulate = mesh.shape["tensor"], mesh.shape["seq"], run.optimizer.accumulate
    frozen, parameters, optimizer = state_bytes(model, run.lora, run.optimizer, mesh)
    local = samples / rules.batch_parts(mesh, accumulate)
    tokens = image + text
    array = local * tokens / seq * model.hidden_size * dtype.itemsize
    blocks = (model.depth, model.depth_single_blocks)
    saved = array * sum(blocks)
    for split, values in remat.values(model, run.execution.remat).items():
        kept = sum(count * value for count, value in zip(blocks, values, strict=True))
        saved += array / model.hidden_size * kept / (tensor if split else 1)
    batch = abstract_batch(model, 1, image, text)
    working = array * ((held.mlp + held.heads) / tensor + held.hidden)
    working += _logits(run, local, tokens, held, backend) / (tensor * seq)
    gathered = held.gathered(model, dtype.itemsize) / tensor
    vectors = 4 * samples / accumulate * model.hidden_size * VECTORS
    size = jnp.dtype(run.optimizer.param_dtype).itemsize
    summed = 4 / size * parameters  # as float32
    if run.optimizer.fused:
        gradients = size * (_block(model) + _outside(model))
    else:
        gradients = parameters + (summed if accumulate > 1 else 0)
    backward = gradients + saved + working + gathered + vectors
    updating = {"muon": max(MUON * parameters - backward, 0.0),
                "adafactor": run.optimizer.fused * 4.0 * 6 * model.hidden_size**2}  # the largest kernel's, in float32
    return Memory(
        frozen=frozen, parameters=parameters, optimizer=optimizer, average=summed if run.optimizer.ema else 0.0,
        batch=sum(leaf.size * leaf.dtype.itemsize for leaf in batch.values()) * samples / rules.batch_parts(mesh),
        gradients=gradients, saved=saved, working=working, gathered=gathered, vectors=vectors,
        updating=updating.get(run.optimizer.name, 0.0), reserve=held.reserve)


def _logits(run: TrainConfig, samples: float, tokens: int, held: Backend, backend: str) -> float:
    name = attention_of(run, tokens, backend)
    if name not in ("xla", "xla_chunked"):
        return 8 * samples * run.model.num_heads * tokens  # a kernel keeps two numbers a row
    chunk = tokens if name == "xla" else -(-tokens // -(-tokens // attention.CHUNK))
    return 4 * held.logits * samples * run.model.num_heads * chunk * tokens


def attention_of(run: TrainConfig, tokens: int, backend: str) -> str:
    """The implementation that a run takes for so many tokens on a platform."""
    return attention.resolve(run.execution.attention, backend, tokens, run.execution.dtype, run.model.head_dim)


@functools.lru_cache(maxsize=32)
def state_bytes(model: MMDiTConfig, adapter: LoraConfig | None, config: OptimizerConfig, mesh: AbstractMesh
                ) -> tuple[float, float, float]:
    """Bytes of one device: a LoRA's base, what is trained, and the optimizer's state, by the rules of
    `acejax.parallel.rules`."""
    frozen, params = {}, jax.eval_shape(functools.partial(init, model), jax.random.key(0))
    if adapter:
        params, scales = lora.shapes(adapter, model)
        frozen = lora.base_shapes(adapter, model) | {"scales": scales}
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.param_dtype)), params)
    state = jax.eval_shape(make_optimizer(config, 1).init, params)
    return _bytes(frozen, mesh), _bytes(params, mesh), _bytes(state, mesh)


def _bytes(tree: Any, mesh: AbstractMesh) -> float:
    return float(sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                     for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(rules.shardings(tree, mesh)),
                                            strict=True)))
