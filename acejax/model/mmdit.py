"""The FLUX MMDiT with ACE++ inputs: `init` and `apply` over a plain nested dict of arrays.

Two scanned stacks: double blocks (text and image streams with their own weights, joint attention) and single blocks
(one stream). Formulas: black-forest-labs/flux `model.py` and `modules/layers.py`; padding: ACE_plus `modules/flux.py`.

The tree differs from BFL's in storage only. `qkv` is one leaf [layers, in, 3, heads, head_dim]; a single block's
`linear1` is kept as `qkv` and `mlp_in`, its `linear2` as `proj` and `mlp_out`, with the names of the double blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name

from acejax.model import remat
from acejax.model.config import Execution, MMDiTConfig
from acejax.model.dense import Dense
from acejax.model.joint import Heads, attend
from acejax.model.rope import rotations
from acejax.model.tpu import norm as kernel

Params = dict[str, Any]
TIME_CHANNELS = 256
FEW = 4  # blocks of a stack that are compiled one by one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the transformer sees.

    Attributes:
      image: [B, S, in_channels], from `acejax.lcu.pack`.
      positions: [B, S, 3] int32 grid positions of the image tokens (text sits at 0).
      text: [B, T, context_in_dim] text features; never masked, as FLUX.
      pooled: [B, vec_in_dim] pooled text feature.
      sigma: [B] float32 noise level in [0, 1].
      guidance: [B] guidance scale (1 in training, up to 50 when editing), or None for a model without guidance.
      lengths: [B] int32 valid image tokens (a prefix of S), or None when all are valid.
    """

    image: jax.Array
    positions: jax.Array
    text: jax.Array
    pooled: jax.Array
    sigma: jax.Array
    guidance: jax.Array | None = None
    lengths: jax.Array | None = None


def timestep_embedding(t: jax.Array) -> jax.Array:
    """[B] numbers -> [B, 256] float32: cos, then sin, of 1000 t at 128 log-spaced frequencies (BFL `layers.py`)."""
    half = TIME_CHANNELS // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = 1000.0 * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, execution: Execution) -> jax.Array:
    """LayerNorm without affine of x [B, S, D], then (1 + scale) x + shift, both [B, 1, D]; float32 inside, x's dtype
    back."""
    if execution.attention == "flash":
        return execution.share(_norm_by_kernel, "hidden")(x, (shift, scale), ())
    return _norm(x, shift, scale)


def _norm_by_kernel(x: jax.Array, rows: tuple[jax.Array, jax.Array], _: tuple[()]) -> jax.Array:
    return (kernel.modulated_norm if kernel.takes(x) else _norm)(x, *rows)


def _norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)
    return ((1 + scale.astype(jnp.float32)) * x32 + shift.astype(jnp.float32)).astype(x.dtype)


gelu = functools.partial(nn.gelu, approximate=True)


class StreamLayers(nn.Module):
    """The layers of one residual stream in one block, in two steps: before and after attention.

    A double block's stream modulates attention and MLP apart (6 vectors) and runs the MLP on what attention made; a
    single block (`parallel`) shares 3 vectors and runs both beside each other.
    """

    config: MMDiTConfig
    execution: Execution
    parallel: bool = False

    def setup(self):
        c = self.config
        dense = functools.partial(_dense, self.execution, gather=self.execution.gather)
        self.modulation = dense((3 if self.parallel else 6, c.hidden_size), zero=True)
        self.qkv = dense((3, c.num_heads, c.head_dim), parts=True)
        self.query_norm = Scale(c.head_dim)
        self.key_norm = Scale(c.head_dim)
        self.proj = dense((c.hidden_size,))
        self.mlp_in = dense((c.mlp_size,))
        self.mlp_out = dense((c.hidden_size,), use_bias=not self.parallel)  # linear2 has one bias: proj's

    def before(self, x: jax.Array, vec: jax.Array | None, modulation: jax.Array | None):
        """x [B, S, D] -> queries, keys and values, the scales of their norms, and what `after` needs.

        `modulation` [B, vectors, D] is what the layer would make of `vec` [B, D]; one of the two is given.
        """
        if modulation is None:
            modulation = self.modulation(self.execution.constrain(nn.silu(vec), "vector"))
        modulation = self.execution.constrain(modulation, "modulation")
        shift, scale, *rest = jnp.split(modulation[:, :, None], 3 if self.parallel else 6, axis=1)
        y = self.execution.constrain(modulated_norm(x, shift[:, 0], scale[:, 0], self.execution), "hidden")
        heads = (checkpoint_name(part, remat.QKV) for part in self.qkv(y))
        heads = Heads(*(self.execution.constrain(part, "heads") for part in heads))
        return heads, (self.query_norm(), self.key_norm()), (x, y, [part[:, 0] for part in rest])

    def after(self, attended: jax.Array, kept) -> jax.Array:
        """attended [B, S, heads * head_dim] -> the stream's new value [B, S, D]."""
        x, y, modulation = kept
        constrain = self.execution.constrain
        attended = constrain(self.proj(constrain(attended, "tokens")), "hidden")
        if self.parallel:
            (gate,) = modulation
            return x + gate * checkpoint_name(attended + self._mlp(y), remat.OUT)
        gate, shift, scale, mlp_gate = modulation
        x = x + gate * checkpoint_name(attended, remat.PROJ)
        y = constrain(modulated_norm(x, shift, scale, self.execution), "hidden")
        return x + mlp_gate * checkpoint_name(self._mlp(y), remat.OUT)

    def _mlp(self, y: jax.Array) -> jax.Array:
        hidden = checkpoint_name(self.mlp_in(y), remat.MLP)
        return self.execution.constrain(self.mlp_out(gelu(hidden)), "hidden")


class Scale(nn.Module):
    """The learned scale of a query or key norm."""

    size: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("scale", nn.initializers.ones, (self.size,), jnp.float32)


class DoubleBlock(nn.Module):
    """Text and image streams with their own weights, one joint attention; text comes first."""

    config: MMDiTConfig
    execution: Execution

    @nn.compact
    def __call__(self, streams, modulation, vec, rope, lengths):
        text, image = (self.execution.constrain(x, "hidden") for x in streams)
        text_stream = StreamLayers(self.config, self.execution, name="txt")
        image_stream = StreamLayers(self.config, self.execution, name="img")
        modulation = modulation or {}
        text_heads, text_scales, text_kept = text_stream.before(text, vec, modulation.get("txt"))
        image_heads, image_scales, image_kept = image_stream.before(image, vec, modulation.get("img"))
        attended = attend((text_heads, image_heads), (text_scales, image_scales), rope, lengths, self.execution)
        text, image = (self.execution.constrain(x, "hidden") for x in (
            text_stream.after(attended[:, :text.shape[1]], text_kept),
            image_stream.after(attended[:, text.shape[1]:], image_kept)))
        return (text, image), None


class SingleBlock(StreamLayers):
    """One stream over text and image together; attention and MLP side by side."""

    parallel: bool = True

    def __call__(self, x, modulation, vec, rope, lengths):
        heads, scales, kept = self.before(self.execution.constrain(x, "hidden"), vec, modulation)
        x = self.after(attend((heads,), (scales,), rope, lengths, self.execution), kept)
        return self.execution.constrain(x, "hidden"), None


class Embedder(nn.Module):
    """Linear, SiLU, linear: lifts a time, guidance or pooled text feature to the model's width."""

    config: MMDiTConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(_dense, self.execution, (self.config.hidden_size,), gather=self.execution.gather)
        x = nn.silu(dense(name="in_layer")(x))
        x = self.execution.constrain(x, "row")
        x = dense(name="out_layer")(x)
        return self.execution.constrain(x, "row")


class FinalLayer(nn.Module):
    """adaLN with (shift, scale), then the projection to velocity tokens."""

    config: MMDiTConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: jax.Array, vec: jax.Array | None, modulation: jax.Array | None) -> jax.Array:
        c, e = self.config, self.execution
        if modulation is None:
            vec = e.constrain(nn.silu(vec), "vector")
            modulation = _dense(e, (2, c.hidden_size), zero=True, name="modulation")(vec)
        shift, scale = jnp.split(e.constrain(modulation, "modulation"), 2, axis=1)
        x = e.constrain(modulated_norm(x, shift, scale, e), "hidden")
        return _dense(e, (c.out_channels,), zero=True, name="linear")(x)


def _dense(execution: Execution, features: tuple[int, ...], **more: Any) -> Dense:
    return Dense(features, execution.dtype, reduce_dtype=execution.reduce_dtype,
                 int8_products=execution.int8_products, **more)


def conditioning(config: MMDiTConfig, embed: Callable[[str, jax.Array], jax.Array], sigma: jax.Array,
                 pooled: jax.Array, guidance: jax.Array | None) -> jax.Array:
    """What modulates the model: [B, D]; `embed(name, x)` runs the embedder of that name."""
    vec = embed("time_in", timestep_embedding(sigma)) + embed("vector_in", pooled)
    return vec + embed("guidance_in", timestep_embedding(guidance)) if config.guidance_embed else vec


class MMDiT(nn.Module):
    """The Linen module behind `init` and `apply`."""

    config: MMDiTConfig
    execution: Execution = Execution()

    def setup(self):
        c, e = self.config, self.execution
        self.time_in, self.vector_in = Embedder(c, e), Embedder(c, e)
        if c.guidance_embed:
            self.guidance_in = Embedder(c, e)
        self.img_in, self.txt_in = _dense(e, (c.hidden_size,)), _dense(e, (c.hidden_size,))
        self.double_blocks = _stack(DoubleBlock, c, e, c.depth)
        self.single_blocks = _stack(SingleBlock, c, e, c.depth_single_blocks)
        self.final_layer = FinalLayer(c, e)

    def __call__(self, tokens: Tokens, modulation: Params | None = None, residual: jax.Array | None = None
                 ) -> tuple[jax.Array, jax.Array]:
        (text, image), vec, rope, lengths = self.embed(tokens, modulation is not None)
        given = dict.fromkeys(("double_blocks", "single_blocks", "final_layer")) if modulation is None else modulation
        constrain = self.execution.constrain
        if residual is not None:
            residual = constrain(residual, "hidden")
            return self.final_layer(constrain(image, "hidden") + residual, vec, given["final_layer"]), residual
        streams, _ = self.double_blocks((text, image), given["double_blocks"], vec, rope, lengths)
        x, _ = self.single_blocks(jnp.concatenate(streams, axis=1), given["single_blocks"], vec, rope, lengths)
        added = constrain(x[:, text.shape[1]:], "hidden") - constrain(image, "hidden")
        return self.head(x, vec, text.shape[1], given["final_layer"]), added

    def embed(self, tokens: Tokens, modulated: bool = False):
        """What blocks work on: the (text, image) streams, and vec (None where modulation is given), rope and lengths,
        which all of them see."""
        vec = None if modulated else conditioning(
            self.config, lambda name, x: getattr(self, name)(x), tokens.sigma, tokens.pooled, tokens.guidance)
        image, text = self.img_in(tokens.image), self.txt_in(tokens.text)
        text_size = text.shape[1]
        positions = jnp.pad(tokens.positions, ((0, 0), (text_size, 0), (0, 0)))
        rope = rotations(positions, self.config.axes_dim, self.config.theta)
        return (text, image), vec, rope, None if tokens.lengths is None else text_size + tokens.lengths

    def head(self, x: jax.Array, vec: jax.Array | None, text_size: int, given: jax.Array | None = None) -> jax.Array:
        """The velocity, from what the last block made of text and image."""
        return self.final_layer(x[:, text_size:], vec, given)


def _stack(block, config: MMDiTConfig, execution: Execution, length: int):
    """`length` blocks as one scan: stacked parameters, one compiled body; or, of so few that nothing is gained by that,
    one body each, which spares the loop's copies of all that the backward pass needs."""
    unroll = length if length <= FEW and execution.remat == remat.NONE else 1  # remat counts on the loop
    if execution.remat != remat.NONE:
        block = nn.remat(block, policy=_policy(execution.remat), prevent_cse=False)  # False: inside a scan
    in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)  # a modulation that is given is each layer's own
    stack = nn.scan(block, length=length, in_axes=in_axes, variable_axes={"params": 0, "lora": 0, "quant": 0},
                    split_rngs={"params": True}, unroll=unroll)
    return stack(config, execution)


def _policy(setting: str) -> Any:
    """What `jax.checkpoint` is told of a setting that is not "none"; None saves inputs alone."""
    found = remat.places(setting)
    host = [name for name, there in found.items() if there]
    if host:
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[name for name in found if name not in host], names_which_can_be_offloaded=host,
            offload_src="device", offload_dst=remat.PINNED)
    return jax.checkpoint_policies.save_only_these_names(*found) if found else None


def example(config: MMDiTConfig, batch: int = 1, image: int = 4, text: int = 1, dtype: Any = jnp.float32) -> Tokens:
    """Abstract tokens of the right shapes, for `init`, `jax.eval_shape` and ahead-of-time compiles."""
    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((batch, *shape), dtype)
    return Tokens(image=array(image, config.in_channels), positions=array(image, 3, dtype=jnp.int32),
                  text=array(text, config.context_in_dim), pooled=array(config.vec_in_dim),
                  sigma=array(dtype=jnp.float32), guidance=array(dtype=jnp.float32), lengths=array(dtype=jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def init(config: MMDiTConfig, key: jax.Array) -> Params:
    """Random float32 parameters as a plain nested dict; modulation and output start at zero (adaLN-zero)."""
    tokens = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example(config))
    return MMDiT(config).init(key, tokens)["params"]


def apply(config: MMDiTConfig, params: Params, tokens: Tokens, *, lora: Params | None = None,
          quant: Params | None = None, modulation: Params | None = None, execution: Execution = Execution()
          ) -> jax.Array:
    """The velocity [B, S, out_channels] of the image tokens, in `execution.dtype`.

    A pure function of its trees and `tokens`; `config` and `execution` are static (hashable).

    Args:
      config: the model.
      params: as by `init`; without the kernels that `quant` holds.
      tokens: what the model sees.
      lora: low-rank pairs to add (`acejax.adapt.lora`).
      quant: kernels in eight bits (`acejax.adapt.quantize`).
      modulation: what `acejax.model.modulation.modulations` gives for one noise level, guidance and pooled text, in
        place of the tokens' own; then the trees need not have the leaves that it was made of.
      execution: how to compute it.

    Raises:
      ValueError: tokens whose channels are not the config's, or a `lora` for layers that the model does not have.
    """
    return forward(config, params, tokens, lora=lora, quant=quant, modulation=modulation, execution=execution)[0]


def forward(config: MMDiTConfig, params: Params, tokens: Tokens, *, lora: Params | None = None,
            quant: Params | None = None, modulation: Params | None = None, residual: jax.Array | None = None,
            execution: Execution = Execution()) -> tuple[jax.Array, jax.Array]:
    """As `apply`, with what the blocks have added to the image's tokens, [B, S, hidden_size], beside the velocity.

    Given a `residual`, the blocks do not run and this is added in their place.
    """
    for field, found, expected in (("image", tokens.image.shape[-1], config.in_channels),
                                   ("text", tokens.text.shape[-1], config.context_in_dim),
                                   ("pooled", tokens.pooled.shape[-1], config.vec_in_dim)):
        if found != expected:
            raise ValueError(f"tokens.{field} has {found} channels, the config expects {expected}")
    if config.guidance_embed and tokens.guidance is None and modulation is None:
        raise ValueError("tokens.guidance is None, but the config has guidance_embed")
    collections = {"params": params}
    if quant is not None:
        collections["quant"] = quant
    if lora is not None:
        check_lora(collections, lora)
        collections["lora"] = lora
    return MMDiT(config, execution).apply(collections, tokens, modulation, residual)


def check_lora(collections: dict[str, Params], lora: Params) -> None:
    """Linen passes over variables that no module asks for; a LoRA that does nothing must not pass unseen."""
    kernels = ("kernel", "q", "parts")
    layers = {path[:-1] for tree in collections.values() for path in flatten_dict(tree) if path[-1] in kernels}
    unknown = sorted("/".join(path[:-1]) for path in flatten_dict(lora) if path[:-1] not in layers)
    if unknown:
        raise ValueError(f"lora has {unknown[0]!r}, which is no linear layer of the model")
