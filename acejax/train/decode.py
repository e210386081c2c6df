"""FLUX's autoencoder for looking at samples: read when the first picture is drawn, by the process that draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from acejax.data.canvas import denormalize
from acejax.data.encoders import EncodersConfig
from acejax.model import autoencoder
from acejax.model.config import AutoencoderConfig
from acejax.train.samples import Decode
from acejax.weights.identify import open_model
from acejax.weights.load import load


def make_decode(config: EncodersConfig) -> Decode:
    """Latents [h, w, 16] -> picture [8h, 8w, 3] uint8, compiled for each size.

    Raises:
      UserError: an autoencoder that can't be read; of its file the header is read now.
    """
    model = open_model(config.autoencoder, AutoencoderConfig)
    dtype = jnp.dtype(config.autoencoder_dtype or config.dtype)

    @functools.cache
    def decoder():
        geometry, params = load(model)
        run = functools.partial(autoencoder.decode, geometry, tile=config.tile, dtype=dtype)
        return jax.jit(run), {"decoder": params["decoder"]}

    def decode(latents: np.ndarray) -> np.ndarray:
        run, params = decoder()
        return denormalize(run(params, jnp.asarray(latents, jnp.float32)[None])[0])

    return decode
