"""What the models are, and, apart from it, how one is computed (`Execution`)."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from acejax.model import remat

if TYPE_CHECKING:  # who only copies weights needs the geometries, and not the second that jax takes to import
    import jax

ATTENTION = ("auto", "xla", "xla_chunked", "cudnn", "flash")


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Geometry of a FLUX / ACE++ transformer; field names are FLUX's own.

    `in_channels` is the width of an image token and tells the variant: 64 (FLUX.1-dev: noisy latent), 384 (Fill and
    ACE++ LoRA: noisy, edit, mask) or 448 (ACE++ FFT: noisy, edit, modify, mask).

    Raises:
      ValueError: a size that is not positive, heads that do not divide the width, or rope axes that do not fill a head.
    """

    in_channels: int = 448
    out_channels: int = 64
    hidden_size: int = 3072
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    mlp_ratio: float = 4.0
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    context_in_dim: int = 4096
    vec_in_dim: int = 768
    guidance_embed: bool = True

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        _check_positive(self, but=("axes_dim", "guidance_embed"))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if sum(self.axes_dim) != self.head_dim or any(dim % 2 for dim in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim} must be even numbers that add up to the head size {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return round(self.hidden_size * self.mlp_ratio)

    @classmethod
    def flux_dev(cls) -> "MMDiTConfig":
        return cls(in_channels=64)

    @classmethod
    def flux_fill(cls) -> "MMDiTConfig":
        return cls(in_channels=384)

    @classmethod
    def ace_plus_lora(cls) -> "MMDiTConfig":
        """The released ACE++ LoRAs sit on FLUX.1-Fill-dev unchanged."""
        return cls.flux_fill()

    @classmethod
    def ace_plus_fft(cls) -> "MMDiTConfig":
        return cls(in_channels=448)

    @classmethod
    def tiny(cls, **changes: Any) -> "MMDiTConfig":
        """A model for tests and the demo: the same code and tree, about 1.5 M parameters."""
        tiny = cls(hidden_size=128, num_heads=4, depth=1, depth_single_blocks=3, axes_dim=(4, 14, 14),
                   context_in_dim=64, vec_in_dim=64)
        return dataclasses.replace(tiny, **changes)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Geometry of a FLUX autoencoder; field names are FLUX's own.

    Level i has `ch * ch_mult[i]` channels; each level but the last halves the picture's sides.

    Raises:
      ValueError: a size that is not positive, or a level that does not split into the norm's groups.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2  # of an encoder level; a decoder level has one more
    z_channels: int = 16
    num_groups: int = 32
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        _check_positive(self, but=("ch_mult", "shift_factor"))
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise ValueError(f"ch_mult is {self.ch_mult}; expected positive numbers, one a level")
        for width in (self.ch, *self.widths):
            if width % self.num_groups:
                raise ValueError(f"{width} channels are not a multiple of num_groups {self.num_groups}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.ch * factor for factor in self.ch_mult)

    @property
    def cell(self) -> int:
        """Pixels a latent cell, along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def flux(cls) -> "AutoencoderConfig":
        return cls()

    @classmethod
    def tiny(cls, **changes: Any) -> "AutoencoderConfig":
        """A model for tests: the same code and tree, 0.1 M parameters."""
        return dataclasses.replace(cls(ch=8, num_res_blocks=1, num_groups=4), **changes)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Geometry of a T5 v1.1 encoder, by default XXL, FLUX's; field names are those of its `config.json`.

    Raises:
      ValueError: a size that is not positive, or buckets that leave no near or no far distance in each direction.
    """

    vocab_size: int = 32_128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10_240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        _check_positive(self)
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 4:
            raise ValueError(f"relative_attention_num_buckets is {buckets}; expected a multiple of 4")
        if distance <= buckets // 4:
            raise ValueError(f"relative_attention_max_distance is {distance}; expected more than {buckets // 4}, "
                             f"a quarter of the {buckets} buckets")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Geometry of a CLIP text encoder, by default CLIP-L's, FLUX's; field names are those of its `config.json`.

    Raises:
      ValueError: a size that is not positive, or heads that do not divide the width.
    """

    vocab_size: int = 49_408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        _check_positive(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                             f"{self.num_attention_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def _check_positive(config: Any, but: tuple[str, ...] = ()) -> None:
    for field, value in vars(config).items():
        if field not in but and not value > 0:
            raise ValueError(f"{field} is {value}; expected a positive number")


def keep(x: "jax.Array", kind: str) -> "jax.Array":
    """The default `Execution.constrain`: leave the activation where the compiler puts it."""
    del kind
    return x


def stored(kernel: "jax.Array", path: str) -> "jax.Array":
    """The default `Execution.gather`: multiply with a kernel where it lies."""
    del path
    return kernel


def whole(kernel: "Callable[..., jax.Array]", kind: str) -> "Callable[..., jax.Array]":
    """The default `Execution.share`: a kernel as it is."""
    del kind
    return kernel


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed. It changes speed, memory and rounding, never what the parameters mean.

    Attributes:
      dtype: dtype of activations and matrix products; parameters are cast to it where they are used.
      reduce_dtype: dtype in which gradients of parameters are summed, over tokens, samples and devices, and travel
        between devices; None is `dtype`. With another one the model has no forward-mode derivative.
      int8_products: multiply kernels that are held in int8 as they are, with activations rounded token by token
        (`acejax.model.int8`), in place of casting them to `dtype`. It has no forward-mode derivative.
      attention: an implementation of `acejax.model.attention`. In the pure functions "auto" goes by the number of
        tokens alone ("xla" up to 1,024, "xla_chunked" above), so that a program compiled ahead of time does not depend
        on the host's device; `for_platform` names the fast kernel of a GPU or TPU, as training and editing do by
        themselves (`acejax.model.attention.resolve`).
      remat: what the backward pass recomputes: "none" (keep all), "full" (keep block inputs), or all but block inputs
        and the activations named, with commas: "attention", "attention,out" (`acejax.model.remat.TABLE`); with ":host"
        behind a name it is kept in the host's memory ("attention,out:host").
      chip: what the program is for, as `acejax.parallel.chips` names it; kernels are cut for it. "" is any.
      constrain: `f(x, kind)` pins an activation's sharding. The kinds: "hidden" [B, S, D], a stream and what is added
        to it; "row" [B, D], of each sample; "vector" [B, D], what modulation is made of, and "modulation"
        [B, vectors, D]; "heads" [B, S, heads * head_dim], queries, keys and values on their way into attention, and
        "tokens", of the same shape, what comes out of it.
      gather: `f(kernel, path)` brings the parts of a sharded kernel together just before it meets an activation; the
        path names the layer and the leaf ("single_blocks/mlp_in/kernel").
      share: `share(f, kind)` makes of a kernel `f(streams, rows, whole)` one that each device runs on its own part:
        trees of arrays [B, S, ...] of that kind ("heads": all tokens of its heads, or "hidden"), [B, ...], and of any
        other shape.
    """

    dtype: Any = np.float32
    attention: str = "auto"
    remat: str = "none"
    chip: str = ""
    reduce_dtype: Any = None
    int8_products: bool = False
    constrain: "Callable[[jax.Array, str], jax.Array]" = keep
    gather: "Callable[[jax.Array, str], jax.Array]" = stored
    share: "Callable[[Callable[..., jax.Array], str], Callable[..., jax.Array]]" = whole

    def __post_init__(self):
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        if self.reduce_dtype is not None:
            wanted = np.dtype(self.reduce_dtype)
            object.__setattr__(self, "reduce_dtype", None if wanted == self.dtype else wanted)
        if self.attention not in ATTENTION:
            raise ValueError(f"Execution.attention is {self.attention!r}; known: {', '.join(ATTENTION)}")
        try:
            remat.names(self.remat)
        except ValueError as error:
            raise ValueError(f"Execution.remat is {self.remat!r}; known: {remat.NONE}, {remat.FULL}, or with commas "
                             f"some of {', '.join(remat.TABLE)}, each also with {remat.HOST!r} behind it: in the "
                             "host's memory") from error

    @classmethod
    def for_platform(cls, platform: str, **changes: Any) -> "Execution":
        """The fast setting of "gpu", "tpu" or "cpu", as `jax.default_backend()` and a device's `platform` name them.

        A program that is compiled ahead of time names the platform that it is for. Another `dtype` that is given gets
        the attention that can do it: float32 on a GPU goes by length, as on a CPU.
        """
        import jax.numpy as jnp

        from acejax.model.attention import FAST, resolve

        dtype = changes.pop("dtype", jnp.bfloat16 if platform in FAST else cls.dtype)
        return cls(dtype, resolve(changes.pop("attention", "auto"), platform, dtype=dtype), **changes)
