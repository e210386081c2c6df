"""The frozen models around the transformer: pictures to latents, prompts to text features.

Each is read from disk when something has to be encoded, and not before; what it would give has a name (of its weights,
its dtype and everything else that matters), so that features made by another one are never taken for its own.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from acejax.data.hashes import Hashes
from acejax.data.latents import EncodePictures
from acejax.data.text import Tokenizers
from acejax.errors import UserError
from acejax.model import autoencoder, clip, t5
from acejax.model.config import AutoencoderConfig, CLIPConfig, T5Config
from acejax.model.dense import flattened
from acejax.parallel import kernels, rules
from acejax.parallel.mesh import make_mesh
from acejax.weights import load
from acejax.weights.identify import Model, open_model
from acejax.weights.source import Grown, Scaled, Tensor

EncodePrompts = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
RECIPE = 1  # changes when the models' code gives other numbers
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class EncodersConfig:
    """Where the encoders are and how they compute.

    Attributes:
      autoencoder, t5, clip: safetensors files, folders with one, or a FLUX pipeline's folder.
      tokenizers: a folder with FLUX's `tokenizer` (CLIP) and `tokenizer_2` (T5), as its pipeline has.
      dtype: of activations.
      autoencoder_dtype: of the autoencoder's; None is `dtype`.
      text_length: tokens that T5 reads; ACE++ and FLUX have 512. Shorter prompts are padded, longer ones cut.
      tile: side in latent cells (8 pixels) of the squares that larger pictures are cut into, to save memory.
      reference: prompts are taken as in ACE_plus's LoRA inference (`acejax.data.text.Tokenizers`).
    """

    autoencoder: str
    t5: str
    clip: str
    tokenizers: str
    dtype: str = "bfloat16"
    autoencoder_dtype: str | None = None
    text_length: int = 512
    tile: int | None = None
    reference: bool = False

    def __post_init__(self):
        for field in ("dtype", "autoencoder_dtype"):
            value = getattr(self, field)
            if value not in DTYPES and not (field == "autoencoder_dtype" and value is None):
                raise UserError(f"encoders.{field} is {value!r}; expected one of {', '.join(DTYPES)}")
        if self.text_length < 2:
            raise UserError(f"encoders.text_length is {self.text_length!r}; expected 2 tokens or more")

    def check_device(self, device: jax.Device) -> None:
        """Raises UserError for a dtype in which a device has no attention."""
        kernels.choose("xla", device, self.dtype, where="config.encoders.")
        kernels.choose("xla", device, self.autoencoder_dtype or self.dtype, where="config.encoders.autoencoder_")


@dataclasses.dataclass(frozen=True)
class Encoders:
    """What stands around the transformer, with names that change when a result would.

    Attributes:
      pictures: [B, 8h, 8w, 3] in [-1, 1] -> latents [B, h, w, 16].
      prompts: B prompts -> text [B, T, D] and pooled [B, P].
      picture_id: names what `pictures` gives.
      prompt_key: names what `prompts` gives for one; the same for prompts that are read alike.
      text_shape: (T, D, P) where it is known before anything is encoded.
      free_autoencoder, free_prompts: let go of what `pictures`, `prompts` has in memory; it is read again at the next
        call.
      text_id: names what `prompts` gives for any prompt; "" where only `prompt_key` tells, prompt by prompt.
    """

    pictures: EncodePictures
    prompts: EncodePrompts
    picture_id: str
    prompt_key: Callable[[str], bytes]
    text_shape: tuple[int, int, int] | None = None
    text_id: str = ""
    free_autoencoder: Callable[[], None] = lambda: None
    free_prompts: Callable[[], None] = lambda: None

    @classmethod
    def load(cls, config: EncodersConfig, mesh: Mesh | None = None, notes: epath.PathLike | None = None) -> "Encoders":
        """FLUX's encoders; their files are opened and hashed, the models are read when they are first called.

        Args:
          config: where they are.
          mesh: batches are split over its `fsdp` and `data` axes; None is all devices of this process.
          notes: a file that keeps the hashes of weights, by path, size and time of change.

        Raises:
          UserError: weights or tokenizers that can't be read.
        """
        absent = [f"{field}={getattr(config, field)}" for field in ("autoencoder", "t5", "clip", "tokenizers")
                  if not epath.Path(getattr(config, field)).exists()]
        if absent:
            raise UserError(f"config.encoders: {', '.join(absent)}: no such file or folder; expected the parts of "
                            "FLUX.1 on this machine: its hub folder has vae, text_encoder_2 (T5), text_encoder (CLIP), "
                            "tokenizer and tokenizer_2, and asks for its licence to be accepted")
        picture_model = open_model(config.autoencoder, AutoencoderConfig)
        t5_model, clip_model = open_model(config.t5, T5Config), open_model(config.clip, CLIPConfig)
        seen = Hashes(notes)
        weights = [[seen.of(path) for path in files(model)] for model in (picture_model, t5_model, clip_model)]
        seen.keep()
        tokenizers = Tokenizers.open(config.tokenizers, reference=config.reference)
        dtype = config.autoencoder_dtype or config.dtype
        name = xxhash.xxh3_128_hexdigest(json.dumps([RECIPE, weights[0], dtype, config.tile, "mean"]).encode())
        of_text = json.dumps([RECIPE, *weights[1:], config.dtype])
        text_id = xxhash.xxh3_128_hexdigest(json.dumps([of_text, config.text_length, config.reference, *(
            (path.name, xxhash.xxh3_128_hexdigest(path.read_bytes())) for name in ("tokenizer", "tokenizer_2")
            for path in sorted(pathlib.Path(config.tokenizers, name).iterdir()) if path.is_file())]).encode())
        prompts = _Prompts(t5_model, clip_model, tokenizers, config, mesh)

        def prompt_key(prompt: str) -> bytes:
            return xxhash.xxh3_128_digest(b"\0".join([of_text.encode(), *(ids.tobytes()
                                                                         for ids in prompts.ids([prompt]))]))

        shape = (config.text_length, t5_model.config.d_model, clip_model.config.hidden_size)
        pictures = _Pictures(picture_model, jnp.dtype(dtype), config.tile, mesh)
        return cls(pictures, prompts, name, prompt_key, shape, text_id, pictures.free, prompts.free)


class _Pictures:
    """The autoencoder's posterior mean, over a mesh."""

    def __init__(self, model: Model, dtype: Any, tile: int | None, mesh: Mesh | None):
        self._model, self._dtype, self._tile, self._mesh = model, dtype, tile, mesh

    def __call__(self, pictures: np.ndarray) -> jax.Array:
        run, mesh = self._loaded
        return run(*_split(mesh, pictures))[:len(pictures)]

    def free(self) -> None:
        self.__dict__.pop("_loaded", None)

    @functools.cached_property
    def _loaded(self) -> tuple[Callable[..., jax.Array], Mesh]:
        mesh, tile, dtype = self._mesh or _own_devices(), self._tile, self._dtype  # no self in the function: a cycle
        kernels.choose("xla", kernels.device_of(mesh), dtype, where="config.encoders.")
        config, params = load.load(self._model, mesh)  # would keep the weights in memory
        params = {"encoder": params["encoder"]}

        @jax.jit
        def encode(params, pictures):
            return autoencoder.encode(config, params, pictures, tile=tile, dtype=dtype)

        return functools.partial(encode, params), mesh


class _Prompts:
    """T5's features and CLIP's pooled one, over a mesh."""

    def __init__(self, t5_model: Model, clip_model: Model, tokenizers: Tokenizers, config: EncodersConfig,
                 mesh: Mesh | None):
        self._models, self._tokenizers, self._mesh = (t5_model, clip_model), tokenizers, mesh
        self._length, self._dtype = config.text_length, jnp.dtype(config.dtype)

    def ids(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Of T5 and of CLIP."""
        return self._tokenizers.t5_ids(prompts, self._length)[0], self._tokenizers.clip_ids(prompts)[0]

    def __call__(self, prompts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
        run, mesh = self._loaded
        text, pooled = run(*_split(mesh, *self.ids(prompts)))
        return text[:len(prompts)], pooled[:len(prompts)]

    def free(self) -> None:
        self.__dict__.pop("_loaded", None)

    @functools.cached_property
    def _loaded(self) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], Mesh]:
        mesh, dtype = self._mesh or _own_devices(), self._dtype
        kernels.choose("xla", kernels.device_of(mesh), dtype, where="config.encoders.")
        # T5 is stored in float32 as often as not, and is cast where it is used anyway
        each = each_leaf(kernels.device_of(mesh).platform)
        (t5_config, t5_params), (clip_config, clip_params) = (load.load(model, mesh, dtype, each)
                                                              for model in self._models)

        @jax.jit
        def encode(params, t5_ids, clip_ids):
            pooled = clip.apply(clip_config, params[1], clip_ids, dtype=dtype)[1]
            return t5.apply(t5_config, params[0], t5_ids, dtype=dtype), pooled

        return functools.partial(encode, (t5_params, clip_params)), mesh


def each_leaf(platform: str) -> Callable[[str, jax.Array], dict[str, jax.Array]]:
    """What stands in the place of a leaf of T5 or CLIP on a platform, as `acejax.weights.load.load` asks for it.

    A TPU would turn the kernels of queries, keys and values at each call: nearly half of what T5 costs.
    """
    return _flattened if platform == "tpu" else lambda path, leaf: {path: leaf}


def _flattened(path: str, leaf: jax.Array) -> dict[str, jax.Array]:
    return flatten_dict(flattened(unflatten_dict({path: leaf}, sep="/")), sep="/")


def _own_devices() -> Mesh:
    """Each process encodes by itself."""
    return make_mesh({"data": -1}, jax.local_devices())


def _split(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """Rows over the mesh; the last one is repeated until they divide."""
    sharding = rules.batch_sharding(mesh)
    short = -len(arrays[0]) % rules.batch_parts(mesh)
    return [jax.device_put(np.concatenate([array, np.repeat(array[-1:], short, 0)]) if short else array, sharding)
            for array in arrays]


def files(model: Model) -> list[pathlib.Path]:
    """The files that a model's tensors are in, by name."""
    return sorted({_place(tensor) for tensor in model.tensors.values()})


def _place(tensor: Tensor) -> pathlib.Path:
    return _place(tensor.stored) if isinstance(tensor, Scaled | Grown) else tensor.path
