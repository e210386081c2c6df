"""The frozen models around the transformer, compiled for TPUs that are not here, as `benchmarks.tpu_side` does others.

    PYTHONPATH=CHECKOUT python -P tpu_encoders.py compile|kernels FIGURE FOLDER

One picture of 1024 x 1024 and one prompt, in bfloat16, as editing and the feature cache call them: the autoencoder's
weights as FLUX has them on disk, in float32, those of T5 and CLIP in bfloat16.
"""

import functools
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from acejax.data import encoders
from acejax.model import autoencoder, clip, t5
from acejax.model.config import AutoencoderConfig, CLIPConfig, T5Config

_found = importlib.util.spec_from_file_location("tpu_side", pathlib.Path(__file__).with_name("tpu_side.py"))
side = importlib.util.module_from_spec(_found)  # not the checkout's own, which an older commit does not have
_found.loader.exec_module(side)

DTYPE = jnp.dtype("bfloat16")
PICTURE, TEXT, TOKENS = 1024, 512, 77  # pixels a side; tokens of T5 and of CLIP


def pictures(topology: str, part: str):
    """The autoencoder's half of this name: pictures to latents or back."""
    here, config = _place(topology), AutoencoderConfig.flux()
    params = jax.eval_shape(lambda key: autoencoder.init(config, key), jax.random.key(0))
    latents = PICTURE // config.cell
    half, function, shape = {
        "encode": ("encoder", autoencoder.encode, (1, PICTURE, PICTURE, autoencoder.COLORS)),
        "decode": ("decoder", autoencoder.decode, (1, latents, latents, config.z_channels))}[part]
    arguments = side.placed(({half: params[half]}, jax.ShapeDtypeStruct(shape, jnp.float32)), here)
    return jax.jit(functools.partial(function, config, tile=None, dtype=DTYPE)), arguments, None


def prompts(topology: str, part: str):
    """Of T5 the features, of CLIP the pooled one."""
    here = _place(topology)
    model, config, tokens = {"t5": (t5, T5Config(), TEXT), "clip": (clip, CLIPConfig(), TOKENS)}[part]
    params = jax.eval_shape(lambda key: model.init(config, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, DTYPE), params)
    if hasattr(encoders, "each_leaf"):  # as they are held on a TPU
        from acejax.model.dense import flattened
        params = jax.eval_shape(flattened, params)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def encode(params, ids):
        features = model.apply(config, params, ids, dtype=DTYPE)
        return features if part == "t5" else features[1]

    return jax.jit(encode), side.placed((params, ids), here), None


def _place(topology: str) -> SingleDeviceSharding:
    return SingleDeviceSharding(side.devices(topology)[0])


FIGURES = {f"{name} {topology}": (make, topology, name)
           for make, names in ((pictures, ("encode", "decode")), (prompts, ("t5", "clip")))
           for name in names for topology in ("v6e-1", "v5e-1", "v5p-1")}

if __name__ == "__main__":
    side.FIGURES = FIGURES
    side.main(*sys.argv[1:])
