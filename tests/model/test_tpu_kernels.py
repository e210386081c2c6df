"""The TPU's kernels, interpreted on a CPU, against the plain formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax.model import mmdit
from acejax.model.attention import attention
from acejax.model.joint import rms_norm
from acejax.model.rope import apply_rope, rotations
from acejax.model.tpu import attention as flash
from acejax.model.tpu import norm
from acejax.model.tpu.attention import Tiles
from acejax.model.tpu.rotate import Stream, rotate

BATCH, SIZE, HEADS = 2, 512, 2
LENGTHS = {"full": (512, 512), "partial": (400, 257), "in the first block": (1, 77)}
TILES = {  # forward and backward apart: queries, keys, chunk
    "more queries": Tiles(512, 128, 128, 256, 128, 128),
    "more keys": Tiles(128, 512, 512, 128, 256, 256),
    "chunks": Tiles(256, 512, 128, 512, 256, 128),
    "one": Tiles(512, 512, 256, 512, 512, 512),
}


def drawn(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def close(found, expected, tolerance):
    """Within a share of the greatest value of each array."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


def deep(tiles, value):
    return Tiles(**vars(tiles) | {"deep": value})


def by_kernel(q, k, v, lengths, tiles):
    """As `attention`, of [B, S, heads, 128]."""
    flat = (x.reshape(BATCH, SIZE, -1) for x in ((q.astype(jnp.float32) * flash.GAIN).astype(q.dtype), k, v))
    return flash.attend(*flat, lengths, tiles, True).reshape(q.shape)


def attended(lengths, dtype, function):
    """What attention gives on valid queries, and the gradients of its inputs."""
    q, k, v = (drawn(seed, BATCH, SIZE, HEADS, 128, dtype=dtype) for seed in range(3))
    lengths = jnp.array(lengths, jnp.int32)
    valid = (jnp.arange(SIZE) < lengths[:, None])[:, :, None, None]
    cotangent = drawn(3, *q.shape)

    def loss(q, k, v):
        out = function(q, k, v, lengths)
        return (jnp.where(valid, out, 0) * cotangent).sum(), jnp.where(valid, out, 0)

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients


@pytest.fixture(scope="module")
def plain():
    """`attended` by XLA in float32, by the lengths' name."""
    return {name: attended(lengths, jnp.float32, attention) for name, lengths in LENGTHS.items()}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("is_deep", [False, True])
@pytest.mark.parametrize("tiles", TILES)
def test_attention_is_that_of_xla(tiles, is_deep, lengths, plain):
    """Float32's own rounding: 512 summands each up to 2^-24 off, twice."""
    def kernel(*inputs):
        return by_kernel(*inputs, deep(TILES[tiles], is_deep))

    close(attended(LENGTHS[lengths], jnp.float32, kernel), plain[lengths], 1e-5)


@pytest.mark.parametrize("is_deep", [False, True])
def test_attention_in_bfloat16_is_off_by_its_rounding(is_deep, plain):
    """bfloat16 keeps 8 bits: inputs and shares are each up to 2^-9 off, the query twice (its gain), and so are what
    comes out and the slopes that go back. Scores are sums of 128 products whose roundings do not agree: with normal
    inputs the greatest is about 5, its error 5 * 2^-9, and a share's as much. 2^-6 is 8 roundings."""
    def kernel(*inputs):
        return by_kernel(*inputs, deep(TILES["chunks"], is_deep))

    out, gradients = attended(LENGTHS["partial"], jnp.bfloat16, kernel)
    assert out.dtype == jnp.bfloat16 and {part.dtype for part in gradients} == {np.dtype(jnp.bfloat16)}
    found = jax.tree.map(lambda x: x.astype(jnp.float32), (out, gradients))
    close(found, plain["partial"], 2**-6)


@pytest.mark.parametrize("is_deep", [False, True])
def test_padding_is_finite_and_has_no_part(is_deep):
    """Whatever finite numbers lie in it, large ones too: neither in what comes out nor in a gradient."""
    q, k, v, cotangent = (drawn(seed, BATCH, SIZE, HEADS * 128) for seed in range(4))
    lengths = jnp.array((1, 300), jnp.int32)
    valid = (jnp.arange(SIZE) < lengths[:, None])[:, :, None]

    def made(k, v):
        out, back = jax.vjp(lambda *parts: flash.attend(*parts, lengths, deep(TILES["chunks"], is_deep), True), q, k, v)
        return out, back(cotangent)

    out, gradients = jax.jit(made)(k, v)
    other_out, other_gradients = jax.jit(made)(jnp.where(valid, k, 100 * k), jnp.where(valid, v, 100.0))
    assert all(jnp.isfinite(x).all() for x in (out, *gradients))
    np.testing.assert_array_equal(out, other_out)
    jax.tree.map(np.testing.assert_array_equal, gradients, other_gradients)
    assert not jnp.where(valid, 0, gradients[1]).any() and not jnp.where(valid, 0, gradients[2]).any()
    np.testing.assert_allclose(out[0], jnp.broadcast_to(v[0, :1], out[0].shape), rtol=1e-6)  # one key alone


@pytest.mark.parametrize("chip", sorted({*flash.CAPS, "v5e"}))
def test_tiles_divide_any_length(chip):
    *caps, is_deep = flash.CAPS.get(chip, flash.CAPS[""])
    for size in range(128, 16_384 + 1, 128):
        total = flash.padded(size)
        found = flash.tiles(chip, total)
        blocks = found.queries, found.keys, found.back_queries, found.back_keys
        assert total % 128 == 0 and 0 <= total - size < 0.12 * size and flash.padded(total) == total
        assert all(total % block == 0 and block % 128 == 0 for block in blocks)
        assert all(block <= cap for block, cap in zip(blocks, (caps[i] for i in (0, 1, 3, 4)), strict=True))
        assert found.keys % found.chunk == 0 and found.back_keys % found.back_chunk == 0
        assert found.queries >= min(total, 1024) and found.deep == is_deep


def test_sizes_are_padded_to_whole_tiles():
    assert [flash.padded(size) for size in (1, 128, 129, 1000, 4608)] == [128, 128, 256, 1024, 4608]
    assert flash.tiles("v6e", 4608) == Tiles(2304, 2304, 768, 2304, 1536, 512, True)
    assert flash.tiles("", 4608) == Tiles(2304, 1536, 768, 2304, 1536, 512, False)


def streams_of(sizes, heads, dtype=jnp.float32):
    """Streams, and cos and sin of all their tokens."""
    parts = tuple(Stream(*(drawn(10 * i + j, BATCH, size, heads * 128, dtype=dtype) for j in range(3)),
                         1 + drawn(10 * i + 3, 128) / 4, 1 + drawn(10 * i + 4, 128) / 4)
                  for i, size in enumerate(sizes))
    positions = jax.random.randint(jax.random.key(5), (BATCH, sum(sizes), 3), 0, 40)
    return parts, rotations(positions, (16, 56, 56), 10_000)


def by_parts(streams, cos, sin):
    """As `rotate`: queries, keys and values one after the other."""
    def heads(x):
        return x.reshape(*x.shape[:2], -1, 128)

    query, key, value = (jnp.concatenate(part, axis=1) for part in zip(*(
        (rms_norm(heads(stream.query), stream.query_scale), rms_norm(heads(stream.key), stream.key_scale),
         heads(stream.value)) for stream in streams), strict=True))
    parts = flash.GAIN * apply_rope(query, cos, sin), apply_rope(key, cos, sin), value
    return tuple(part.reshape(*part.shape[:2], -1) for part in parts)


@pytest.mark.parametrize("sizes, heads", [((256,), 2), ((128, 256), 2), ((256, 640), 1), ((128,), 11)])
def test_rotation_is_norm_and_rope(sizes, heads):
    """Blocks of tokens and of heads (11: none of several divides them), with the gradients of streams and scales."""
    streams, rope = streams_of(sizes, heads)
    cotangents = tuple(drawn(100 + i, BATCH, sum(sizes), heads * 128) for i in range(3))

    def made(function):
        out, back = jax.vjp(lambda streams: function(streams, *rope), streams)
        return out, back(cotangents)

    found = jax.jit(lambda: made(lambda *inputs: rotate(*inputs, flash.GAIN, True)))()
    close(found, jax.jit(lambda: made(by_parts))(), 1e-5)


def test_rotation_rounds_as_the_parts_do():
    """In bfloat16, of which XLA is to leave none out: the norm's roundings are the same, but where a mean whose
    summands come in another order falls on the other side of a half. The query is rounded once where the parts do it
    after the rotation and after the gain."""
    streams, rope = streams_of((128, 128), 2, jnp.bfloat16)
    exact = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    query, key, value = exact(lambda: rotate(streams, *rope, flash.GAIN, True))()
    gained, expected_key, expected_value = exact(lambda: by_parts(streams, *rope))()
    np.testing.assert_array_equal(value, expected_value)
    assert (key != expected_key).mean() < 1e-3
    close((key, query), (expected_key, gained), 2**-7)


@pytest.mark.parametrize("size, width", [(128, 256), (512, 128), (384, 384)])
def test_norm_is_the_plain_one(size, width):
    x, shift, scale = 3 + 2 * drawn(0, BATCH, size, width), drawn(1, BATCH, 1, width), drawn(2, BATCH, 1, width)
    cotangent = drawn(3, *x.shape)
    assert norm.takes(x)

    def made(function):
        out, back = jax.vjp(function, x, shift, scale)
        return out, back(cotangent)

    found = jax.jit(lambda: made(lambda *inputs: norm.modulated_norm(*inputs, True)))()
    close(found, jax.jit(lambda: made(mmdit._norm))(), 1e-5)


def test_norm_takes_whole_tiles_alone():
    assert [norm.takes(jnp.zeros(shape)) for shape in ((1, 128, 128), (1, 130, 128), (1, 128, 100))] == [
        True, False, False]


def test_the_gain_is_that_of_base_2():
    assert flash.GAIN * math.log(2) == pytest.approx(1 / math.sqrt(128))
