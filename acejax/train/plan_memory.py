"""Bytes of one device in a training step, in closed form: nothing is compiled, no array is made.

What is live changes as a step goes on (`_phases`); its largest moment is what a device must hold.
"""

import dataclasses
import functools
import itertools
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
      gathered: weights of a block gathered and cast, `f(config, bytes of the activations' dtype)`, of one of the double
        blocks and of the single ones.
      vectors: float32 [hidden_size] that modulation holds of each sample of all devices.
      reserve: bytes for the program and what is not counted, and for holes between buffers.
      apart: whether the backward passes of the two stacks are two moments: what the single blocks have saved is given
        back before the double blocks' pass begins, gradients are there from their own stack's on, and parameters are
        copied a whole stack at a time, ahead of its loop (`Memory.copies`).
    """

    mlp: float
    heads: float
    hidden: float
    logits: int
    gathered: Callable[[MMDiTConfig, int], tuple[float, float]]
    vectors: int
    reserve: float
    apart: bool = False


def _block(config: MMDiTConfig) -> int:
    """Weights of a double block's kernels, the largest there is."""
    return 2 * config.hidden_size * (10 * config.hidden_size + 2 * config.mlp_size)


def _outside(config: MMDiTConfig) -> int:
    """Weights of the kernels that lie in no block, but for those of the time and guidance embedders' 256 inputs."""
    ends = config.in_channels + config.out_channels + config.context_in_dim + config.vec_in_dim
    return config.hidden_size * (ends + (4 + config.guidance_embed) * config.hidden_size)


def _two_blocks(config: MMDiTConfig, itemsize: int) -> tuple[float, float]:
    """One in use and the next one on its way."""
    return (2 * itemsize * _block(config),) * 2


def _float32_copies(config: MMDiTConfig, itemsize: int) -> tuple[float, float]:
    """XLA:CPU multiplies in float32 and communicates in it too: three kernels of an MLP, and two of qkv as they are."""
    width = config.hidden_size
    return (3 * 4 * width * config.mlp_size + 2 * itemsize * 3 * width**2,) * 2


def _own_block(config: MMDiTConfig, itemsize: int) -> tuple[float, float]:
    """The block at work: of a double block both streams; its modulation is not gathered."""
    stream = itemsize * config.hidden_size * (4 * config.hidden_size + 2 * config.mlp_size)
    return 2 * stream, stream


# "cpu" is what `acejax.train.plan_compile` sees on virtual devices: the full-size step within 2.5 % on all meshes
# tried with jax 0.10.2 (tests/train/test_plan.py), within 8 % with 0.10.0 and 0.11.2 on 64 devices; small models over
# the tensor axis within 12 %.
# "tpu" is read off the schedules that libtpu 0.0.50.1 (jax 0.12.0.1) makes of the full-size step for v5e, v5p and v6e:
# of the MLP two hidden layers, of the heads q, k, v before and after their biases and what attention gives, of the
# stream the block's input, its norm and its gradient; no modulation of other devices' samples is there at that moment;
# the reserve is the program (0.10 to 0.15 GB). Held against the compiler's peaks in tests/train/test_plan_peaks.py.
# GPUs count every array of a block's backward pass once; they have not been held against one.
BACKENDS = {
    "cpu": Backend(mlp=7, heads=4, hidden=3, logits=3, gathered=_float32_copies, vectors=133, reserve=0.1e9),
    "gpu": Backend(mlp=16, heads=8, hidden=4, logits=3, gathered=_two_blocks, vectors=133, reserve=1.5e9),
    "rocm": Backend(mlp=16, heads=8, hidden=4, logits=3, gathered=_two_blocks, vectors=133, reserve=1.5e9),
    "tpu": Backend(mlp=8, heads=7, hidden=3, logits=3, gathered=_own_block, vectors=0, reserve=0.15e9, apart=True),
}
SLICED = 4  # single blocks whose gathered weights a TPU's peak has more where the step goes over several slices: read
#             off the one peak that is known, v5e-256x2's
MUON = 2.7  # copies of the gradients while Muon goes through the stacks: what it changes in place is copied before
RELAID = 2 * 8 / 6  # modulation kernels of double blocks that a TPU's AdamW makes anew beside the old: of two leaves,
#                     parameter and moments, in a layout in which their 6 vectors take 8 rows


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      frozen: the model that a LoRA is trained on.
      parameters, optimizer, average, batch: what the step is given: parameters, moments, float32 EMA, features.
      copies: parameters of whole stacks, sharded as they are: in the activations' dtype where theirs is wider, and
        else those of queries, keys and values, which are laid out anew.
      gradients: of all parameters, and a float32 sum where parts of a batch are added up; of one block, and of what is
        in none, in a fused step.
      saved: what blocks keep for the backward pass.
      working: what is live while one block is recomputed and differentiated.
      gathered: weights of the block at work, from all devices.
      vectors: modulation of all samples: its kernels, a quarter of the weights, are not gathered, each device
        multiplies its rows with the vectors of all.
      updating: what the update needs more than the backward pass (Muon's, AdamW's on a TPU), and a fused step's beside
        it.
      reserve: see Backend.
    """

    frozen: float
    parameters: float
    optimizer: float
    average: float
    batch: float
    copies: float
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


def memory(run: TrainConfig, mesh: AbstractMesh, samples: int, image: int, text: int, backend: str, slices: int = 1
           ) -> Memory:
    """Bytes of one device in a step over `samples` of `image` and `text` tokens, on so many slices.

    With B samples a device and a part of the batch, N tokens, H heads, A = B N hidden_size / seq arrays of the
    activations' dtype:

        saved    A (double blocks + single blocks), their inputs, and what `acejax.model.remat` says, that of heads
                 and MLP over the tensor axis
        working  A (mlp + heads + hidden), and logits 4 B H chunk N, of a kernel 8 B H N; of what goes to the host's
                 memory (`offloaded`), one block's
        vectors  4 samples hidden_size (vectors of `Backend`)
    """
    model, held, accumulate = run.model, BACKENDS[backend], run.optimizer.accumulate
    frozen, parameters, optimizer = state_bytes(model, run.lora, run.optimizer, mesh, backend == "tpu")
    size = jnp.dtype(run.optimizer.param_dtype).itemsize
    summed = 4 / size * parameters  # as float32
    batch = abstract_batch(model, 1, image, text)
    phases = _phases(run, mesh, samples, image + text, backend, slices)
    phase = max(phases, key=lambda phase: sum(phase.values()))
    vectors = 4 * samples / accumulate * model.hidden_size * held.vectors
    found = Memory(
        frozen=frozen, parameters=parameters, optimizer=optimizer, average=summed if run.optimizer.ema else 0.0,
        batch=sum(leaf.size * leaf.dtype.itemsize for leaf in batch.values()) * samples / rules.batch_parts(mesh),
        **phase, vectors=vectors, updating=0.0, reserve=held.reserve)
    if run.optimizer.fused:
        return dataclasses.replace(found, updating=4.0 * 6 * model.hidden_size**2)  # the largest kernel's, in float32
    gradients = parameters + (summed if accumulate > 1 else 0)
    updating = gradients + _update(run, mesh, parameters, backend)
    return dataclasses.replace(found, updating=max(0.0, updating - sum(phase.values()) - vectors))


def _phases(run: TrainConfig, mesh: AbstractMesh, samples: int, tokens: int, backend: str, slices: int
            ) -> list[dict[str, float]]:
    """What is live beside the step's arguments, as fields of `Memory`, at the moments that may be the largest: in the
    backward pass of a single block, and of a double block."""
    model, dtype, held = run.model, jnp.dtype(run.execution.dtype), BACKENDS[backend]
    tensor, seq, accumulate = mesh.shape["tensor"], mesh.shape["seq"], run.optimizer.accumulate
    local = samples / rules.batch_parts(mesh, accumulate)
    array = local * tokens / seq * model.hidden_size * dtype.itemsize
    working = array * ((held.mlp + held.heads) / tensor + held.hidden)
    working += _logits(run, local, tokens, held, backend) / (tensor * seq)
    double, single = (block / tensor for block in held.gathered(model, dtype.itemsize))
    ahead = SLICED * single if slices > 1 and backend == "tpu" else 0.0
    of_double, of_single = _saved(run, array, tensor)
    working += max(_values(run, array, tensor, host=True))
    of_all, of_singles, copied_double, copied_single = stack_bytes(model, run.lora, run.optimizer, dtype.name, mesh,
                                                                   backend == "tpu")
    size = jnp.dtype(run.optimizer.param_dtype).itemsize
    carried = 4 / size * of_all if accumulate > 1 else 0.0
    if run.optimizer.fused:
        of_all = of_singles = size * (_block(model) + _outside(model))
        copied_double = copied_single = 0.0  # its loops take a layer at a time
    if not held.apart:
        return [{"copies": 0.0, "gradients": of_all + carried, "saved": of_double + of_single, "working": working,
                 "gathered": max(double, single) + ahead}]
    return [{"copies": copied_double + copied_single, "gradients": of_singles + carried, "saved": of_double + of_single,
             "working": working, "gathered": single + ahead},
            {"copies": copied_double, "gradients": of_all + carried, "saved": of_double, "working": working,
             "gathered": double + ahead}]


def _saved(run: TrainConfig, array: float, tensor: int) -> list[float]:
    """What the double and the single blocks save: their inputs, and what `acejax.model.remat` says."""
    named = _values(run, array, tensor)
    return [blocks * (array + more) for blocks, more in zip(_blocks(run), named, strict=True)]


def _values(run: TrainConfig, array: float, tensor: int, host: bool = False) -> list[float]:
    """Bytes of what a double and a single block save by name, `array` bytes of [B, tokens, hidden_size]."""
    kept = remat.values(run.model, run.execution.remat, host)
    return [array / run.model.hidden_size * sum(pair[kind] / (tensor if split else 1) for split, pair in kept.items())
            for kind in range(2)]


def _blocks(run: TrainConfig) -> tuple[int, int]:
    return run.model.depth, run.model.depth_single_blocks


def offloaded(run: TrainConfig, mesh: AbstractMesh, samples: int, tokens: int) -> float:
    """Bytes of the host's memory that one device fills in the forward pass and reads in the backward pass, of each part
    of the batch; arguments as of `memory`, `tokens` with text."""
    array = samples / rules.batch_parts(mesh, run.optimizer.accumulate) * tokens / mesh.shape["seq"]
    array *= run.model.hidden_size * jnp.dtype(run.execution.dtype).itemsize
    each = _values(run, array, mesh.shape["tensor"], host=True)
    return sum(blocks * more for blocks, more in zip(_blocks(run), each, strict=True))


def _update(run: TrainConfig, mesh: AbstractMesh, parameters: float, backend: str) -> float:
    """What an update holds beside the old state and the gradients."""
    if run.optimizer.name == "muon":
        return (MUON - 1) * parameters
    if run.optimizer.name == "adamw" and backend == "tpu" and run.lora is None:
        kernel = 4 * 6 * run.model.depth * run.model.hidden_size**2 / (mesh.shape["fsdp"] * mesh.shape["tensor"])
        return RELAID * kernel * (3 + bool(run.optimizer.ema))
    return 0.0


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
def state_bytes(model: MMDiTConfig, adapter: LoraConfig | None, config: OptimizerConfig, mesh: AbstractMesh,
                tiled: bool = False) -> tuple[float, float, float]:
    """Bytes of one device: a LoRA's base, what is trained, and the optimizer's state, by the rules of
    `acejax.parallel.rules`; `tiled` as a TPU lays them out."""
    frozen, params = _trees(model, adapter, config)
    state = jax.eval_shape(make_optimizer(config, 1).init, params)
    return _bytes(frozen, mesh, tiled), _bytes(params, mesh, tiled), _bytes(state, mesh, tiled)


def _trees(model: MMDiTConfig, adapter: LoraConfig | None, config: OptimizerConfig) -> tuple[Any, Any]:
    """What is frozen and what is trained, as ShapeDtypeStructs."""
    frozen, params = {}, jax.eval_shape(functools.partial(init, model), jax.random.key(0))
    if adapter:
        params, scales = lora.shapes(adapter, model)
        frozen = lora.base_shapes(adapter, model) | {"scales": scales}
    dtype = jnp.dtype(config.param_dtype)
    return frozen, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


@functools.lru_cache(maxsize=32)
def stack_bytes(model: MMDiTConfig, adapter: LoraConfig | None, config: OptimizerConfig, dtype: str,
                mesh: AbstractMesh, tiled: bool) -> tuple[float, float, float, float]:
    """Bytes of one device: what is trained, that of single blocks alone, and the copies (`Memory.copies`) of the double
    and of the single blocks' parameters, trained or not, for products in `dtype`."""
    frozen, params = _trees(model, adapter, config)
    leaves = [(rules.path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path((frozen, params))]
    size = jnp.dtype(dtype).itemsize

    def copies(stack: str) -> float:
        wide = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)) for path, leaf in leaves
                if stack in path and leaf.dtype.itemsize > size}
        turned = {path: leaf for path, leaf in leaves if stack in path and path.endswith(("qkv/kernel", "qkv/q"))}
        return _bytes(turned | wide, mesh, tiled)

    singles = {path: leaf for path, leaf in leaves if path.startswith("1/") and "single_blocks" in path}
    return _bytes(params, mesh, tiled), _bytes(singles, mesh, tiled), copies("double_blocks"), copies("single_blocks")


def _bytes(tree: Any, mesh: AbstractMesh, tiled: bool) -> float:
    size = _tiled if tiled else math.prod
    return float(sum(size(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                     for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(rules.shardings(tree, mesh)),
                                            strict=True)))


def _tiled(shape: tuple[int, ...]) -> int:
    """Numbers that an array takes on a TPU: two of its axes are rounded up to tiles of 8 x 128, those that cost the
    least. (A shard of 12 rows of 19 layers: the layers take 24.)"""
    if len(shape) < 2:
        return math.prod(shape)
    return min(math.prod(shape) // (rows * lanes) * (-(-rows // 8) * 8) * (-(-lanes // 128) * 128)
               for rows, lanes in itertools.permutations(shape, 2))
