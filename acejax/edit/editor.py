"""The editor: text and pictures in, pictures out. Encode once, sample as one compiled loop, decode, put back."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from acejax import flow, lcu
from acejax.data import latents
from acejax.data.canvas import Canvas, denormalize, editing, restore
from acejax.data.encoders import EncodePrompts
from acejax.data.latents import EncodePictures
from acejax.data.layout import CanvasConfig
from acejax.model.config import Execution, MMDiTConfig
from acejax.model.mmdit import Tokens, apply

CANVAS = CanvasConfig(editing_height=1.0)


class Editor:
    """Edits pictures with a 448-channel model.

    Args:
      config, params: the transformer.
      encode_pictures: pictures [B, 8h, 8w, 3] in [-1, 1] -> latents [B, h, w, 16].
      decode_latents: the way back.
      encode_prompts: prompts -> text [B, T, D] and pooled [B, P].
      steps: Euler steps.
      guidance: guidance scale, where the model has guidance.
      execution: how the transformer is computed.
      canvas: how large it works and how high references are.
    """

    def __init__(self, config: MMDiTConfig, params: Any, encode_pictures: EncodePictures,
                 decode_latents: Callable[[jax.Array], jax.Array], encode_prompts: EncodePrompts, *, steps: int = 16,
                 guidance: float = 1.0, execution: Execution = Execution(),
                 canvas: CanvasConfig = CANVAS):
        self._params, self._canvas = params, canvas
        self._encode_pictures, self._encode_prompts = encode_pictures, encode_prompts
        self._decode = decode_latents
        self._sample = jax.jit(functools.partial(_sample, config, execution, steps, guidance))

    def generate(self, canvases: Sequence[Canvas], prompts: Sequence[str], seed: int = 0) -> list[np.ndarray]:
        """What the model makes of canvases of one size: the target units, [h, w, 3] uint8, masked or not.

        A sample's noise depends on the seed and its place in the list.
        """
        text, pooled = self._encode_prompts(prompts)
        features = latents.encode(canvases, self._encode_pictures) | {"text": text, "pooled": pooled}
        sampled = self._sample(self._params, jax.tree.map(jnp.asarray, features), jax.random.key(seed))
        target = sampled[:, :, -(canvases[0].widths[-1] // lcu.CELL):]
        return list(denormalize(self._decode(target)))

    def __call__(self, prompt: str, image: np.ndarray | None = None, mask: np.ndarray | None = None,
                 references: Sequence[np.ndarray] = (), *, size: tuple[int, int] | None = None, scale: float = 1.0,
                 seed: int = 0) -> np.ndarray:
        """One edit; outside the mask the picture is the input's.

        Args:
          image, mask, references, scale: as `acejax.data.canvas.editing`. A picture larger than the canvas may be, or
            with sides that are no multiples of 16, is made smaller and its result larger again.
          size: height and width of the result where there is no image.

        Returns:
          [h, w, 3] uint8 of the image's size; beyond 4:1 only its middle is edited. Without an image of `size`, beyond
          4:1 of its middle.
        """
        canvas = editing(self._canvas, image, mask, references, size, scale)
        (result,) = self.generate([canvas], [prompt], seed)
        result, (top, left, height, width) = restore(result, size if image is None else image.shape[:2])
        if image is None:
            return result
        middle = np.s_[top:top + height, left:left + width]
        edited = image.copy()
        edited[middle] = result if mask is None else np.where(mask[middle][..., None] > 127, result, image[middle])
        return edited


def _sample(config: MMDiTConfig, execution: Execution, steps: int, guidance: float, params: Any,
            features: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """Latents [B, h, w, 16] of the whole canvas."""
    batch, height, width, channels = features["edit"].shape
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch))
    noise = jax.vmap(lambda k: jax.random.normal(k, (height, width, channels)))(keys)
    full = jnp.full((batch,), guidance) if config.guidance_embed else None

    def velocity(latents, sigma):
        image, positions = lcu.pack(latents, features["edit"], features["mask"], features["modify"])
        tokens = Tokens(image, positions, features["text"], features["pooled"], jnp.full((batch,), sigma), full)
        return lcu.unpack(apply(config, params, tokens, execution=execution), height, width)

    return flow.euler(velocity, noise, flow.schedule(steps, height * width // lcu.PATCH**2))
