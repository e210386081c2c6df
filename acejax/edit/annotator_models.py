"""The networks behind contour and depth, from weights at hand; nothing is downloaded, and no code of a file runs.

Contour is informative-drawings' generator with 3 residual blocks and a sigmoid (Chan et al. 2022; `model.py` there,
scepter's `InfoDrawContourAnnotator`), written in JAX. Depth is DPT (MiDaS 3), which transformers keeps, in PyTorch.
"""

import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from acejax.errors import UserError
from acejax.weights.pickles import open_pickle
from acejax.weights.source import PICKLES, open_source, read_json, shown

Params = dict[str, np.ndarray]
BLOCKS = 3  # residual blocks
# The convolutions' names and PyTorch's kernels: [out, in, h, w]; transposed, in model3, [in, out, h, w].
KERNELS = {"model0.1": (64, 3, 7, 7), "model1.0": (128, 64, 3, 3), "model1.3": (256, 128, 3, 3),
           **{f"model2.{i}.conv_block.{j}": (256, 256, 3, 3) for i in range(BLOCKS) for j in (1, 5)},
           "model3.0": (256, 128, 3, 3), "model3.3": (128, 64, 3, 3), "model4.1": (1, 64, 7, 7)}
UNUSED = "neck.fusion_stage.layers.0.residual_layer1."  # of DPT: the first fusion has no residual; files leave it out


def contour(weights: str | os.PathLike, picture: np.ndarray) -> np.ndarray:
    """A line drawing of a picture [h, w, 3] in [0, 1], sides multiples of 4 from 8 on: [h, w] in [0, 1], lines dark.

    Raises:
      UserError: see `read_generator`.
    """
    return np.asarray(generate(read_generator(os.fspath(weights)), picture[None])[0])


@functools.lru_cache(maxsize=1)
def read_generator(path: str) -> Params:
    """The generator's tensors by their names in the file: safetensors, or PyTorch's own, which torch reads.

    Raises:
      UserError: a file that cannot be read, or another network's.
    """
    source = open_pickle(pathlib.Path(path)) if path.endswith(PICKLES) else open_source(path)
    expected = {f"{name}.weight": shape for name, shape in KERNELS.items()}
    expected |= {f"{name}.bias": (shape[1 if name.startswith("model3") else 0],) for name, shape in KERNELS.items()}
    found = {key: tensor.shape for key, tensor in source.tensors.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise UserError(f"{path}: not informative-drawings' generator with {BLOCKS} residual blocks: {shown(key)} "
                            f"is {found.get(key, 'missing')}; expected {expected.get(key, 'no such tensor')}")
    return {key: np.asarray(tensor[...], np.float32) for key, tensor in source.tensors.items()}


@jax.jit
def generate(params: Params, pictures: jax.Array) -> jax.Array:
    """The generator: pictures [B, h, w, 3] in [0, 1] -> drawings [B, h, w] in [0, 1]."""

    def conv(name: str, x: jax.Array, *, reflect: int = 0, down: bool = False) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (reflect, reflect), (reflect, reflect), (0, 0)), "reflect")
        return convolve(name, x, "OIHW", window_strides=(1 + down,) * 2, padding=((down, down),) * 2)

    def up(name: str, x: jax.Array) -> jax.Array:
        """ConvTranspose2d(3, stride=2, padding=1, output_padding=1): a flipped kernel over a picture with gaps."""
        return convolve(name, x, "IOHW", flip=True, window_strides=(1, 1), padding=((1, 2),) * 2, lhs_dilation=(2, 2))

    def convolve(name: str, x: jax.Array, kernel: str, flip: bool = False, **how: Any) -> jax.Array:
        weight = params[f"{name}.weight"]
        weight = weight[:, :, ::-1, ::-1] if flip else weight
        return jax.lax.conv_general_dilated(x, weight, dimension_numbers=("NHWC", kernel, "NHWC"), precision="highest",
                                            **how) + params[f"{name}.bias"]

    def norm(x: jax.Array) -> jax.Array:
        return (x - x.mean((1, 2), keepdims=True)) * jax.lax.rsqrt(x.var((1, 2), keepdims=True) + 1e-5)

    x = jax.nn.relu(norm(conv("model0.1", pictures, reflect=3)))
    for name in ("model1.0", "model1.3"):
        x = jax.nn.relu(norm(conv(name, x, down=True)))
    for i in range(BLOCKS):
        y = jax.nn.relu(norm(conv(f"model2.{i}.conv_block.1", x, reflect=1)))
        x += norm(conv(f"model2.{i}.conv_block.5", y, reflect=1))
    for name in ("model3.0", "model3.3"):
        x = jax.nn.relu(norm(up(name, x)))
    return jax.nn.sigmoid(conv("model4.1", x, reflect=3))[..., 0]


def depth(weights: str | os.PathLike, picture: np.ndarray) -> np.ndarray:
    """Inverse depth of a picture [h, w, 3] in [-1, 1], sides multiples of 64: [h, w] float32, the nearer the larger.

    Raises:
      UserError: see `read_dpt`.
    """
    model = read_dpt(os.fspath(weights))
    import torch

    height, width = picture.shape[:2]
    grid = height // model.config.patch_size, width // model.config.patch_size
    pixels = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)[None]))
    # MiDaS takes any size. transformers' embeddings refuse all but one, and its neck takes every grid for a square.
    model.dpt.embeddings.image_size = height, width
    with torch.inference_mode(), model.neck.register_forward_pre_hook(lambda neck, given: (given[0], *grid)):
        return model(pixels).predicted_depth[0].numpy()


@functools.lru_cache(maxsize=1)
def read_dpt(folder: str) -> Any:
    """transformers' DPTForDepthEstimation from a folder with `config.json` and weights.

    Raises:
      UserError: no PyTorch or transformers; a folder without them, or with another model.
    """
    config = pathlib.Path(folder) / "config.json"
    if not config.is_file():
        raise UserError(f"{config}: no such file; expected the folder of a DPT as transformers keeps it")
    found = read_json(config)
    if found.get("model_type") != "dpt" or found.get("backbone_config") and not found.get("is_hybrid"):
        raise UserError(f"{config}: found a model of type {shown(found.get('model_type'))}; expected dpt with its own "
                        "backbone, such as Intel/dpt-hybrid-midas or Intel/dpt-large")
    try:
        import torch  # noqa: F401 - transformers alone would fail later, and at length
        import transformers
    except ImportError as error:
        raise UserError(f"depth needs {error.name}: pip install acejax[text], and torch --index-url "
                        "https://download.pytorch.org/whl/cpu; or give a ready depth map") from None
    try:
        model, report = transformers.DPTForDepthEstimation.from_pretrained(folder, local_files_only=True,
                                                                           output_loading_info=True)
    except Exception as error:  # whatever the file makes the libraries say
        raise UserError(f"{folder}: cannot be read as a DPT ({' '.join(str(error).split())[:200]})") from None
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(UNUSED))
    if missing:
        raise UserError(f"{folder}: no whole DPT for depth: {shown(missing[0])} is missing")
    return model.eval()
