"""Full attention over a prefix of keys on a TPU, forward and backward each one kernel.

FlashAttention (arXiv 2205.14135, 2307.08691) for what a diffusion transformer needs: no causal mask, heads of 128, keys
that are valid up to a length. Scores lie with keys along the sublanes, so that the softmax's maxima and sums are plain
additions of registers and what belongs to a query is one row. Exponentials have base 2: queries come multiplied with
log2(e) / sqrt(128). The backward kernel keeps the queries' gradient of a head in fast memory while it goes over the
keys; kernels that give a part for each block of keys leave the sum of them to XLA.

Arrays are [B, S, heads * 128], as a matrix product writes them: a head is a column of whole tiles.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from acejax.model import remat

HEAD = 128  # features of a head
GAIN = math.log2(math.e) / math.sqrt(HEAD)  # that queries come multiplied with
INVALID = -30_000.0  # added to the scores of keys that are padding; 2 to its power is 0, and bfloat16 holds it
LOWEST = -1e30
VMEM = 100 * 2**20
BOTH_ROWS = (((1,), (1,)), ((), ()))  # a b^T
ROWS_COLUMNS = (((1,), (0,)), ((), ()))  # a b
BOTH_COLUMNS = (((0,), (0,)), ((), ()))  # a^T b


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How attention is cut.

    Attributes:
      queries, keys: of a block of the forward kernel.
      chunk: keys of it that are multiplied at a time.
      back_queries, back_keys, back_chunk: of the backward kernel.
      deep: whether the matrix unit is 256 deep, as on v6e and v7x. Then what masks a key is a second half of its 128
        features and costs nothing; elsewhere it is added to the scores.
    """

    queries: int
    keys: int
    chunk: int
    back_queries: int
    back_keys: int
    back_chunk: int
    deep: bool = False


def padded(tokens: int) -> int:
    """Tokens that attention is computed for: `tokens` and as little as makes them fall into large blocks."""
    size = -(-tokens // HEAD) * HEAD
    while _largest(size, CAPS[""][0]) < min(size, 1024):
        size += HEAD
    return size


CAPS = {  # by chip: the most of queries, keys and chunk, forward and backward, and whether the matrix unit is deep
    "": (2304, 1536, 768, 2304, 1536, 512, False),
    "v6e": (2304, 2304, 768, 2304, 1536, 512, True),
    "v7x": (2304, 2304, 768, 2304, 1536, 512, True),
}


def tiles(chip: str, tokens: int) -> Tiles:
    """The largest tiles within the chip's caps that divide so many tokens, a multiple of 128."""
    *caps, deep = CAPS.get(chip, CAPS[""])
    queries, keys, back_queries, back_keys = (_largest(tokens, caps[i]) for i in (0, 1, 3, 4))
    return Tiles(queries, keys, _chunk(keys, caps[2]), back_queries, back_keys, _chunk(back_keys, caps[5]), deep)


def _largest(tokens: int, most: int) -> int:
    return max(size for size in range(HEAD, min(most, tokens) + 1, HEAD) if tokens % size == 0)


def _chunk(keys: int, most: int) -> int:
    """A block's keys at a time: a large divisor within the cap; of a block that has none, all."""
    chunk = _largest(keys, most)
    return chunk if chunk >= 256 or keys <= HEAD else keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, tiles: Tiles,
           interpret: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(128)) v over the first `lengths` keys.

    Args:
      query, key, value: [B, S, heads * 128]; queries times `GAIN`.
      lengths: [B] int32 valid keys of each sample, at least 1. Keys and values beyond are finite.
      interpret: run the kernels as plain jax, on any device.

    Returns:
      [B, S, heads * 128] in query's dtype.
    """
    return _forward(query, key, value, lengths, tiles, interpret)[0]


def _save(query, key, value, lengths, tiles, interpret):
    out, total = _forward(query, key, value, lengths, tiles, interpret)
    out, total = checkpoint_name(out, remat.ATTENTION), checkpoint_name(total, remat.ATTENTION)
    return out, (query, key, value, lengths, out, total)


def _back(tiles, interpret, saved, gradient):
    return *_backward(*saved, gradient, tiles, interpret), None


attend.defvjp(_save, _back)


def _dot(a, b, dimensions):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _scores(query, key, start, length, deep: bool):
    """Scores [keys, queries] in base 2, at most INVALID + something for keys from `length` on."""
    row = start + jax.lax.broadcasted_iota(jnp.int32, (key.shape[0], HEAD), 0)
    if deep:
        first = jax.lax.broadcasted_iota(jnp.int32, row.shape, 1) == 0
        masked = jnp.where((row >= length) & first, INVALID, 0.0).astype(key.dtype)
        key, query = (jnp.concatenate(pair, axis=1) for pair in ((key, masked), (query, jnp.ones_like(query))))
        return _dot(key, query, BOTH_ROWS)
    masked = jnp.where(row >= length, INVALID, 0.0)
    return _dot(key, query, BOTH_ROWS) + jnp.tile(masked, (1, query.shape[0] // HEAD))


def _parameters(last: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", last, "arbitrary"), vmem_limit_bytes=VMEM)


def _forward(query, key, value, lengths, tiles, interpret):
    """(what attention gives, log2 of the sum of exponentials [B, heads, 1, S] float32)."""
    batch, size, width = query.shape
    steps = size // tiles.keys
    of_queries = pl.BlockSpec((1, tiles.queries, HEAD), lambda b, h, i, j, _: (b, i, h))
    of_keys = pl.BlockSpec((1, tiles.keys, HEAD), lambda b, h, i, j, _: (b, j, h))
    of_rows = pl.BlockSpec((1, 1, 1, tiles.queries), lambda b, h, i, j, _: (b, h, 0, i))
    row = pltpu.VMEM((1, tiles.queries), jnp.float32)
    return pl.pallas_call(
        functools.partial(_forward_kernel, chunk=tiles.chunk, steps=steps, deep=tiles.deep),
        name="attention_forward", interpret=interpret, compiler_params=_parameters("parallel"),
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype),
                   jax.ShapeDtypeStruct((batch, width // HEAD, 1, size), jnp.float32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(batch, width // HEAD, size // tiles.queries, steps),
            in_specs=[of_queries, of_keys, of_keys], out_specs=[of_queries, of_rows],
            scratch_shapes=[pltpu.VMEM((HEAD, tiles.queries), jnp.float32), row, row]),
    )(lengths, query, key, value)


def _forward_kernel(lengths, query, key, value, out, total, summed, greatest, weight, *, chunk, steps, deep):
    """One block of keys for one of queries. `summed` [128, queries] are weighted values, `greatest` and `weight`
    [1, queries] the maximum of the scores and the sum of exponentials so far."""
    step = pl.program_id(3)
    length = lengths[pl.program_id(0)]

    @pl.when(step == 0)
    def _():
        summed[...] = jnp.zeros_like(summed)
        greatest[...] = jnp.full_like(greatest, LOWEST)
        weight[...] = jnp.zeros_like(weight)

    start = step * key.shape[1]

    @pl.when(start < length)
    def _():
        most, sum_of = greatest[...], weight[...]
        for first in range(0, key.shape[1], chunk):
            part = slice(first, first + chunk)
            scores = _scores(query[0], key[0, part], start + first, length, deep)
            before, most = most, jnp.maximum(most, scores.max(0, keepdims=True))
            shares, shrink = jnp.exp2(scores - most), jnp.exp2(before - most)
            sum_of = shrink * sum_of + shares.sum(0, keepdims=True)
            values = _dot(value[0, part], shares.astype(value.dtype), BOTH_COLUMNS)
            summed[...] = shrink * summed[...] + values
        greatest[...], weight[...] = most, sum_of

    @pl.when(step == steps - 1)
    def _():
        out[0] = (summed[...] / weight[...]).T.astype(out.dtype)
        total[0, 0] = greatest[...] + jnp.log2(weight[...])


def _backward(query, key, value, lengths, out, total, gradient, tiles, interpret):
    """Gradients of queries, keys and values. Blocks of queries are the inner loop."""
    batch, size, width = query.shape
    steps, blocks = size // tiles.back_queries, size // tiles.back_keys

    def of_queries(columns):
        return pl.BlockSpec((1, tiles.back_queries, HEAD), columns)

    each = of_queries(lambda b, h, j, i, _: (b, i, h))
    # `out` is read while delta is made, the queries' gradient is written when all keys are seen.
    at_first = of_queries(lambda b, h, j, i, _: (b, jnp.where(j == 0, i, steps - 1), h))
    at_end = of_queries(lambda b, h, j, i, _: (b, jnp.where(j == blocks - 1, i, 0), h))
    of_keys = pl.BlockSpec((1, tiles.back_keys, HEAD), lambda b, h, j, i, _: (b, j, h))
    of_rows = pl.BlockSpec((1, 1, 1, tiles.back_queries), lambda b, h, j, i, _: (b, h, 0, i))
    accumulated = pltpu.VMEM((tiles.back_keys, HEAD), jnp.float32)
    return pl.pallas_call(
        functools.partial(_backward_kernel, chunk=tiles.back_chunk, steps=steps, blocks=blocks, deep=tiles.deep),
        name="attention_backward", interpret=interpret, compiler_params=_parameters("arbitrary"),
        out_shape=[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in (query, key, value)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(batch, width // HEAD, blocks, steps),
            in_specs=[each, of_keys, of_keys, at_first, each, of_rows], out_specs=[at_end, of_keys, of_keys],
            scratch_shapes=[pltpu.VMEM((size, HEAD), jnp.float32), accumulated, accumulated,
                            pltpu.VMEM((1, size), jnp.float32)]),
    )(lengths, query, key, value, out, gradient, total)


def _backward_kernel(lengths, query, key, value, out, gradient, total, query_out, key_out, value_out,
                     query_sum, key_sum, value_sum, delta, *, chunk, steps, blocks, deep):
    """One block of queries for one of keys. `delta` [1, S] is the inner product of what attention gave and of its
    gradient, `query_sum` [S, 128] and the other sums are gradients so far."""
    block, step = pl.program_id(2), pl.program_id(3)
    length = lengths[pl.program_id(0)]
    size = query.shape[1]
    rows = pl.ds(pl.multiple_of(step * size, HEAD), size)

    @pl.when(step == 0)
    def _():
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)

    @pl.when(block == 0)
    def _():
        query_sum[rows] = jnp.zeros((size, HEAD), jnp.float32)
        product = out[0].astype(jnp.float32) * gradient[0].astype(jnp.float32)
        delta[:, rows] = product.T.sum(0, keepdims=True)

    start = block * key.shape[1]

    @pl.when(start < length)
    def _():
        along, minus, queries = 0.0, delta[:, rows], query[0]
        for first in range(0, key.shape[1], chunk):
            part = slice(first, first + chunk)
            keys = key[0, part]
            shares = jnp.exp2(_scores(queries, keys, start + first, length, deep) - total[0, 0])
            value_sum[part] += _dot(shares.astype(gradient.dtype), gradient[0], ROWS_COLUMNS)
            slope = shares * (_dot(value[0, part], gradient[0], BOTH_ROWS) - minus)
            slope = slope.astype(queries.dtype)
            key_sum[part] += _dot(slope, queries, ROWS_COLUMNS)
            along = along + _dot(slope, keys, BOTH_COLUMNS)
        query_sum[rows] += along

    @pl.when(step == steps - 1)
    def _():
        key_out[0] = (math.log(2) * key_sum[...]).astype(key_out.dtype)
        value_out[0] = value_sum[...].astype(value_out.dtype)

    @pl.when(block == blocks - 1)
    def _():
        query_out[0] = (math.log(2) * query_sum[rows]).astype(query_out.dtype)
