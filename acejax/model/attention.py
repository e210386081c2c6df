"""One attention call with several implementations.

Padding is always a suffix: text is never masked and an image is padded at its end, so `lengths` (valid keys of each
sample, a prefix) replaces the [B, S, S] mask of ACE_plus `modules/flux.py`; both agree on every valid token. What
padded queries return is finite and meaningless.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from acejax.model.tpu import attention as flash

LONG = 1024  # tokens above which "auto" goes by query chunks
CHUNK = 512  # the most queries at a time
FAST = {"gpu": "cudnn", "tpu": "flash"}  # the kernel of a platform, as `jax.default_backend()` names it


def attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None,
              implementation: str = "auto") -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v over the first `lengths` keys.

    Args:
      q, k, v: [B, S, heads, head_dim].
      lengths: [B] int32 valid keys of each sample, or None when all are valid.
      implementation: "xla" (plain; S x S logits in memory), "xla_chunked" (query chunks, recomputed in the backward
        pass), "cudnn" (GPU, float16 / bfloat16), "flash" (TPU, heads of 128), or "auto": by length alone; `resolve`
        tells the fast one of a platform. One runs on one device; on a mesh, `acejax.parallel.rules.share` gives each
        device its own samples and heads.

    Returns:
      [B, S, heads, head_dim] in q's dtype.

    Raises:
      ValueError: an unknown implementation, or "flash" for heads that it does not take.
    """
    if implementation == "auto":
        implementation = _by_length(q.shape[1])
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is unknown; known: auto, {', '.join(_IMPLEMENTATIONS)}")
    return _IMPLEMENTATIONS[implementation](q, k, v, lengths)


def resolve(name: str, platform: str, tokens: int | None = None, dtype: Any = jnp.bfloat16, head_dim: int = 128) -> str:
    """The implementation that stands for a name on a platform: "auto" is the fast kernel where it can run.

    A pure function: nothing is asked of the devices that are here, so a program that is compiled ahead of time names
    the platform that it is for.

    Args:
      name: as `attention` takes it; any other than "auto" stands for itself.
      platform: "cpu", "gpu" (CUDA), "tpu" or another of jax's.
      tokens: of the sequence. None leaves what goes by length, where there is no kernel, to `attention`: "auto".
      dtype: of q, k and v.
      head_dim: of q, k and v.
    """
    if name != "auto":
        return name
    fast = FAST.get(platform)
    if fast and not lacking(fast, platform, dtype, head_dim):
        return fast
    return name if tokens is None else _by_length(tokens)


def lacking(name: str, platform: str, dtype: Any = jnp.bfloat16, head_dim: int = 128) -> str:
    """Why an implementation can't run on a platform, or "". Arguments as of `resolve`.

    Of float16: XLA's plain attention refuses it on a CPU and on a TPU (float32 sums of float16 products), Mosaic on a
    TPU. Of cuDNN: jax's `_src/cudnn/fused_attention_stablehlo.py` (up to 256 on Hopper).
    """
    if np.dtype(dtype) == np.float16 and platform in ("cpu", "tpu"):
        return f"float16 is for GPUs, a {platform} has no attention in it; expected bfloat16 or float32"
    for home, kernel in FAST.items():
        if name == kernel and platform != home:
            return f"{name} is a kernel for {'CUDA GPUs' if home == 'gpu' else 'TPUs'}, here is a {platform}"
    if name == "flash" and head_dim != flash.HEAD:
        return f"flash takes heads of {flash.HEAD}, not {head_dim}"
    if name == "cudnn" and np.dtype(dtype).itemsize != 2:
        return f"cudnn takes bfloat16 and float16, not {np.dtype(dtype).name}"
    if name == "cudnn" and (head_dim % 8 or head_dim > 128):
        return f"cudnn takes heads of 8 to 128 in steps of 8, not {head_dim}"
    return ""


def check_heads(head_dim: int) -> None:
    """Raises ValueError for heads that the TPU's kernels would take apart or together."""
    if head_dim != flash.HEAD:
        raise ValueError(lacking("flash", "tpu", head_dim=head_dim))


def _by_length(tokens: int) -> str:
    return "xla" if tokens <= LONG else "xla_chunked"


def _xla(q, k, v, lengths):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="xla")


def _cudnn(q, k, v, lengths):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")


def _xla_chunked(q, k, v, lengths):
    """Plain attention over one chunk of queries at a time; the backward pass recomputes a chunk's logits."""
    batch, size, heads, dim = q.shape
    chunks = -(-size // CHUNK)
    chunk = -(-size // chunks)  # equal chunks: little padding
    q = jnp.pad(q, ((0, 0), (0, chunks * chunk - size), (0, 0), (0, 0)))
    q = q.reshape(batch, chunks, chunk, heads, dim).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda part: _xla(part, k, v, lengths)), q)
    return out.swapaxes(0, 1).reshape(batch, chunks * chunk, heads, dim)[:, :size]


def _flash(q, k, v, lengths):
    """The TPU kernel for heads that are ready: `acejax.model.joint` calls it with those that are not."""
    batch, size, heads, dim = q.shape
    check_heads(dim)
    total = flash.padded(size)
    lengths = jnp.full((batch,), size, jnp.int32) if lengths is None else lengths
    q, k, v = (jnp.pad(x.reshape(batch, size, -1), ((0, 0), (0, total - size), (0, 0))) for x in (q, k, v))
    gained = (q.astype(jnp.float32) * flash.GAIN).astype(q.dtype)
    out = flash.attend(gained, k, v, lengths, flash.tiles("", total))
    return out[:, :size].reshape(batch, size, heads, dim)


_IMPLEMENTATIONS = {"xla": _xla, "xla_chunked": _xla_chunked, "cudnn": _cudnn, "flash": _flash}
