"""The T5 v1.1 encoder that FLUX reads prompts with: `init` and `apply` over a plain nested dict of arrays.

Pre-norm blocks without biases, a gated-GELU feed-forward, and one table of relative position biases for all layers.
Formulas: Raffel et al. 2020 section 2.1 and Shazeer 2020; transformers `models/t5/modeling_t5.py`. Pads take part in
attention, as FLUX was trained: there is no mask.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from acejax.model.config import T5Config
from acejax.model.dense import Dense

Params = dict[str, Any]


def buckets(config: T5Config, size: int) -> np.ndarray:
    """[size, size] int32: the bias bucket of each (query, key), told by key - query.

    Half the buckets look ahead. In each direction half are exact distances; the rest grow with the logarithm up to
    `relative_attention_max_distance` and the last one takes all beyond.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    ahead = np.arange(size)[None, :] - np.arange(size)[:, None]
    distance = np.abs(ahead)
    # a distance on a bucket's edge (16, 32, 64) belongs to the farther bucket whatever the last bit of the logarithm
    octaves = np.log(np.maximum(distance, exact) / exact) / math.log(config.relative_attention_max_distance / exact)
    far = exact + np.floor(octaves * (half - exact) + 1e-6)
    return (np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (ahead > 0)).astype(np.int32)


class Block(nn.Module):
    """Self-attention, then the gated feed-forward, each on a normed copy of the stream."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array):
        """x [B, T, D], bias [1, heads, T, T] float32 -> the stream's new value; nothing is collected by the scan."""
        c = self.config
        norm = functools.partial(nn.RMSNorm, c.layer_norm_epsilon, self.dtype)
        dense = functools.partial(Dense, dtype=self.dtype, use_bias=False)
        y = norm(name="attention_norm")(x)
        q, k, v = jnp.moveaxis(dense((3, c.num_heads, c.d_kv), name="qkv")(y), -3, 0)
        # scale 1: T5 has 1 / sqrt(d_kv) in its weights
        y = jax.nn.dot_product_attention(q, k, v, bias=bias, scale=1.0, implementation="xla")
        x = x + dense((c.d_model,), name="proj")(y.reshape(*y.shape[:2], -1))
        y = norm(name="mlp_norm")(x)
        y = nn.gelu(dense((c.d_ff,), name="mlp_gate")(y), approximate=True) * dense((c.d_ff,), name="mlp_in")(y)
        return x + dense((c.d_model,), name="mlp_out")(y), None


class T5(nn.Module):
    """The Linen module behind `init` and `apply`."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c = self.config
        x = nn.Embed(c.vocab_size, c.d_model, self.dtype, name="token_embedding")(ids)
        bias = nn.Embed(c.relative_attention_num_buckets, c.num_heads, name="relative_bias")(buckets(c, ids.shape[1]))
        stack = nn.scan(Block, length=c.num_layers, in_axes=nn.broadcast, variable_axes={"params": 0},
                        split_rngs={"params": True})
        x, _ = stack(c, self.dtype, name="blocks")(x, bias.transpose(2, 0, 1)[None])
        return nn.RMSNorm(c.layer_norm_epsilon, self.dtype, name="final_norm")(x)


@functools.partial(jax.jit, static_argnums=0)
def init(config: T5Config, key: jax.Array) -> Params:
    """Random float32 parameters as a plain nested dict; blocks are stacked along their first axis."""
    return T5(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def apply(config: T5Config, params: Params, ids: jax.Array, *, dtype: Any = jnp.float32) -> jax.Array:
    """Token ids [B, T], pads among them (FLUX: T = 512) -> features [B, T, d_model] in `dtype`.

    Norms and softmax are float32 whatever `dtype` is. A pure function of `params` and `ids`; an id beyond the
    vocabulary gives NaN.
    """
    return T5(config, jnp.dtype(dtype)).apply({"params": params}, ids)
