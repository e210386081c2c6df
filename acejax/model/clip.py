"""The CLIP text encoder whose pooled feature modulates FLUX: `init` and `apply` over a plain nested dict of arrays.

A causal pre-norm transformer with quick-GELU. Formulas: Radford et al. 2021 section 2.4 and openai/CLIP `model.py`;
transformers `models/clip/modeling_clip.py`. No text projection, as FLUX.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from acejax.model.config import CLIPConfig
from acejax.model.dense import Dense

Params = dict[str, Any]


def quick_gelu(x: jax.Array) -> jax.Array:
    return x * nn.sigmoid(1.702 * x)


def layer_norm(config: CLIPConfig, dtype: Any, name: str) -> nn.LayerNorm:
    """In float32; the variance from the centred values, as torch."""
    return nn.LayerNorm(config.layer_norm_eps, dtype, use_fast_variance=False, name=name)


class Block(nn.Module):
    """Causal self-attention, then the feed-forward, each on a normed copy of the stream."""

    config: CLIPConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array):
        """x [B, T, D] -> the stream's new value; nothing is collected by the scan."""
        c = self.config
        norm = functools.partial(layer_norm, c, self.dtype)
        dense = functools.partial(Dense, dtype=self.dtype)
        y = norm("attention_norm")(x)
        q, k, v = jnp.moveaxis(dense((3, c.num_attention_heads, c.head_dim), name="qkv")(y), -3, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        x = x + dense((c.hidden_size,), name="proj")(y.reshape(x.shape))
        y = quick_gelu(dense((c.intermediate_size,), name="mlp_in")(norm("mlp_norm")(x)))
        return x + dense((c.hidden_size,), name="mlp_out")(y), None


class CLIP(nn.Module):
    """The Linen module behind `init` and `apply`."""

    config: CLIPConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        x = nn.Embed(c.vocab_size, c.hidden_size, self.dtype, name="token_embedding")(ids)
        x = x + nn.Embed(c.max_position_embeddings, c.hidden_size, self.dtype, name="position_embedding")(
            jnp.arange(ids.shape[1]))
        stack = nn.scan(Block, length=c.num_hidden_layers, variable_axes={"params": 0}, split_rngs={"params": True})
        x, _ = stack(c, self.dtype, name="blocks")(x)
        hidden = layer_norm(c, self.dtype, "final_norm")(x)
        end = ids.argmax(-1)  # the end token has the largest id and also pads: argmax takes the first
        return hidden, jnp.take_along_axis(hidden, end[:, None, None], 1)[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def init(config: CLIPConfig, key: jax.Array) -> Params:
    """Random float32 parameters as a plain nested dict; blocks are stacked along their first axis."""
    return CLIP(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def apply(config: CLIPConfig, params: Params, ids: jax.Array, *, dtype: Any = jnp.float32
          ) -> tuple[jax.Array, jax.Array]:
    """Token ids [B, T] (FLUX: T = 77) -> hidden [B, T, hidden_size] and pooled [B, hidden_size], in `dtype`.

    `hidden` is after the final norm, `pooled` is its row at the first end-of-text token. Norms and softmax are float32
    whatever `dtype` is. A pure function of `params` and `ids`; an id beyond the vocabulary gives NaN.

    Raises:
      ValueError: more tokens than there are positions.
    """
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(f"ids have {ids.shape[1]} tokens, the config has {config.max_position_embeddings} positions")
    return CLIP(config, jnp.dtype(dtype)).apply({"params": params}, ids)
