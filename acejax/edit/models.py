"""Files -> what an editor needs: FLUX or ACE++ in any layout, autoencoder, T5, CLIP, LoRAs.

Headers are read at once, so that a wrong file is named at once; weights when something needs them. `staged` is for
small cards: text encoders and transformer are never on the device together.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from acejax import checkpoint
from acejax.adapt import lora as adapt
from acejax.adapt.quantize import KINDS, quantize
from acejax.data.encoders import DTYPES, Encoders, EncodersConfig, files
from acejax.data.hashes import Hashes
from acejax.data.layout import TOKEN
from acejax.edit import transformer
from acejax.edit.sampler import INPUTS, Sampler
from acejax.errors import UserError
from acejax.model import autoencoder
from acejax.model.config import ATTENTION, AutoencoderConfig, CLIPConfig, Execution, MMDiTConfig, T5Config
from acejax.model.mmdit import Params
from acejax.parallel import kernels, rules
from acejax.parallel.mesh import make_mesh
from acejax.weights import hub, pickles
from acejax.weights.identify import KINDS as NAMES
from acejax.weights.identify import Model, identify, open_model, pipeline
from acejax.weights.load import load
from acejax.weights.lora_formats import load_lora
from acejax.weights.source import PICKLES, open_source

PROMPTS = 64  # whose features are kept: 4 MB each


@dataclasses.dataclass(frozen=True)
class ModelsConfig:
    """Where the models are and how they are held.

    Attributes:
      transformer: a safetensors file, a folder, a diffusers pipeline, a PyTorch file, a hub id, an Orbax folder or the
        workdir of a run.
      encoders: what stands around it.
      dtype: of the transformer's weights and activations.
      attention: an implementation of `acejax.model.attention`; "auto" is the platform's fast one.
      eight_bits: keep the blocks' kernels as "int8" or "float8".
      int8_products: multiply kernels in int8 as they are (`acejax.Execution.int8_products`).
      staged: read T5 and CLIP, use them, let go of them, and then read the transformer; and so again for new prompts.
      offload: keep what makes modulation on the host (6.5 GB of FLUX's).
      mesh: sizes of the axes over which the transformer is spread (`acejax.parallel.mesh`); None is one device. The
        encoders are on the first device.
    """

    transformer: str
    encoders: EncodersConfig
    dtype: str = "bfloat16"
    attention: str = "auto"
    eight_bits: str | None = None
    int8_products: bool = False
    staged: bool = False
    offload: bool = False
    mesh: Mapping[str, int] | None = None

    def __post_init__(self):
        for field, known in (("dtype", DTYPES), ("attention", ATTENTION), ("eight_bits", (None, *KINDS))):
            if getattr(self, field) not in known:
                raise UserError(f"{field} is {getattr(self, field)!r}; expected one of "
                                f"{', '.join(str(name) for name in known if name)}")
        if self.int8_products and self.eight_bits != "int8":
            raise UserError(f"int8_products with eight_bits={self.eight_bits}; expected eight_bits=int8 with it")


class Models:
    """The models of an editor: `Editor(Profile.of(models.config), models.sample, models.encode_pictures,
    models.decode_latents, models.encode_prompts)`.

    Args:
      config: what and how.
      notes: a file that keeps the hashes of the encoders' weights (`acejax.data.encoders`).

    Raises:
      UserError: what `acejax.weights.identify` finds wrong, other channels than 64, 384 or 448, a mesh that the devices
        or the heads do not make, attention or a dtype of it that the devices do not have.
    """

    def __init__(self, config: ModelsConfig, notes: epath.PathLike | None = None):
        self._how, self._notes = config, notes
        kernels.choose(config.attention, kernels.device_of(), config.dtype)  # before anything is read
        config.encoders.check_device(kernels.device_of())
        self._source = _open(config.transformer)
        self.config = self._source.config if isinstance(self._source, Model) else checkpoint.weights_config(
            self._source)
        if not isinstance(self.config, MMDiTConfig) or self.config.in_channels not in INPUTS:
            raise UserError(f"{config.transformer}: found {self.config}; expected a FLUX transformer of "
                            f"{', '.join(map(str, INPUTS))} input channels")
        self._mesh = None if config.mesh is None else make_mesh(config.mesh)
        if self._mesh is not None:
            rules.check_heads(self._mesh, self.config.num_heads)
        self._autoencoder = open_model(config.encoders.autoencoder, AutoencoderConfig)
        widths = (open_model(config.encoders.t5, T5Config).config.d_model,
                  open_model(config.encoders.clip, CLIPConfig).config.hidden_size)
        if widths != (self.config.context_in_dim, self.config.vec_in_dim):
            raise UserError(f"{config.encoders.t5} and {config.encoders.clip} give features of {widths[0]} and "
                            f"{widths[1]} numbers; {config.transformer} reads {self.config.context_in_dim} and "
                            f"{self.config.vec_in_dim}")
        self._sampler: Sampler | None = None
        self._prompts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._loras: dict[str, Params] = {}

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError for a canvas, in pixels, whose tokens do not fall apart over the mesh."""
        if self._mesh is not None:
            rules.check_tokens(self._mesh, f"a canvas of {width} x {height} pixels", height * width // TOKEN**2)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Text [B, T, D] and pooled [B, P]; of prompts that were seen before, from memory."""
        known = {prompt: self._prompts[prompt] for prompt in sorted(self._prompts, key=prompts.__contains__)}
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]:
            if self._how.staged:
                self._sampler = None
            for prompt in new:  # alone: one program for any number, and features that do not depend on the others'
                text, pooled = self._encoders.prompts([prompt])
                known = known | {prompt: (np.asarray(text)[0], np.asarray(pooled)[0])}
            if self._how.staged:
                self._encoders.free_prompts()
        self._prompts = dict([*known.items()][-PROMPTS:])  # those that were asked for last
        return tuple(np.stack(part) for part in zip(*(known[prompt] for prompt in prompts), strict=True))

    def encode_pictures(self, pictures: np.ndarray) -> jax.Array:
        """Pictures [B, 8h, 8w, 3] in [-1, 1] -> latents [B, h, w, 16]."""
        return self._encoders.pictures(pictures)

    def decode_latents(self, latents: Any) -> jax.Array:
        """Latents [B, h, w, 16] -> pictures [B, 8h, 8w, 3] about [-1, 1]."""
        return self._decoder(jnp.asarray(np.asarray(latents, np.float32)))

    def sample(self, *arguments: Any, **more: Any) -> jax.Array:
        """`acejax.edit.sampler.Sampler`'s call; reads the transformer if it is not there."""
        self._sampler = self._sampler or self._load()
        return self._sampler(*arguments, **more)

    def lora(self, files: Sequence[tuple[str, float]]) -> Params | None:
        """LoRA files with their strengths as one, for `sample` or an editor; None where there are none.

        A file that was used the last time is not read again. Another strength, or another file of the same rank, needs
        nothing to be compiled.

        Raises:
          UserError: a file that `acejax.load_lora` can't read, or for another model.
        """
        self._loras = {path: self._loras[path] if path in self._loras else jax.device_get(load_lora(
            hub.local(path), self.config)) for path, _ in files}
        return adapt.combine([(self._loras[path], strength) for path, strength in files]) if files else None

    def checksums(self, hashes: Hashes) -> list[tuple[str, str]]:
        """Path and xxh3_128 of the transformer's files, and what names the encoders' results."""
        if isinstance(self._source, Model):
            paths = files(self._source) if self._source.path.suffix not in PICKLES else [self._source.path]
        else:
            inside = pathlib.Path(self._source, "checkpoints")
            paths = sorted(path for path in (inside if inside.exists() else inside.parent).rglob("*") if path.is_file())
        found, where = [(str(path.absolute()), hashes.of(path)) for path in paths], self._how.encoders
        return [*found, (where.autoencoder, self._encoders.picture_id), (where.t5, self._encoders.text_id)]

    @functools.cached_property
    def _encoders(self) -> Encoders:
        """Not before they are needed: their files are hashed."""
        # What ACE_plus's LoRA inference does with prompts, its 448-channel model's does not.
        reference = self._how.encoders.reference and self.config.in_channels == 384
        first = make_mesh({"data": 1}, jax.local_devices()[:1])
        return Encoders.load(dataclasses.replace(self._how.encoders, reference=reference), first, self._notes)

    @functools.cached_property
    def _decoder(self) -> Callable[[jax.Array], jax.Array]:
        how = self._how.encoders
        config, params = load(self._autoencoder)
        run = functools.partial(autoencoder.decode, config, tile=how.tile,
                                dtype=jnp.dtype(how.autoencoder_dtype or how.dtype))
        return functools.partial(jax.jit(run), {"decoder": params["decoder"]})

    def _load(self) -> Sampler:
        how, dtype = self._how, jnp.dtype(self._how.dtype)
        if isinstance(self._source, Model):
            params, quant = transformer.load(self._source, self._mesh, dtype, eight_bits=how.eight_bits,
                                             offload=how.offload)
        else:
            mesh = self._mesh or make_mesh({"data": 1}, jax.local_devices()[:1])
            params = checkpoint.load_weights(self._source, ema=True, place=functools.partial(
                rules.shardings, mesh=mesh))[1]
            params, quant = jax.tree.map(lambda leaf: leaf.astype(dtype), params), None
            if how.eight_bits:
                params, quant = quantize(params, how.eight_bits)
        execution = Execution(dtype, how.attention, int8_products=how.int8_products)
        return Sampler(self.config, params, quant=quant, execution=execution, mesh=self._mesh, offload=how.offload)


def _open(source: str) -> Model | str:
    """A transformer's headers, or the path itself of an Orbax folder or a workdir."""
    path = hub.local(source)
    if (path / "model.json").exists() or (path / "checkpoints").exists():
        return str(path)
    if path.suffix in PICKLES:
        return identify(pickles.open_pickle(path), MMDiTConfig)
    return identify(open_source(pipeline(path).get(NAMES[MMDiTConfig][1], path)), MMDiTConfig)
