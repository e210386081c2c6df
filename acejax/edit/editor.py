"""The editor: text and pictures in, pictures out. Encode once, sample as one compiled loop, decode, put back."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from acejax.data import latents
from acejax.data.canvas import Canvas, denormalize, normalize
from acejax.data.encoders import EncodePrompts
from acejax.data.latents import EncodePictures
from acejax.data.released_layout import Size
from acejax.edit.annotators import annotator
from acejax.edit.prepare import Annotate, Prepared, finish, prepare
from acejax.edit.profile import Profile
from acejax.edit.request import Options, Request, Result
from acejax.edit.sampler import Sampler
from acejax.lcu import CELL

Say = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Checked:
    """A request that can be made.

    Attributes:
      kind: requests of one kind can be made at once.
      shape: requests of one shape, as many at once, take the same programs.
      prompt: what the model will be told.
      size: height and width of the result.
    """

    kind: Hashable
    shape: Hashable
    prompt: str
    size: Size


class Editor:
    """Edits pictures with one set of weights.

    Args:
      profile: what the weights want.
      sampler: the transformer.
      encode_pictures: pictures [B, 8h, 8w, 3] in [-1, 1] -> latents [B, h, w, 16].
      decode_latents: the way back.
      encode_prompts: prompts -> text [B, T, D] and pooled [B, P].
      lora: pairs to add to the transformer (`acejax.adapt.lora`); may be replaced between edits.
      annotate: (name, picture) -> the control map of a picture; None: what needs no weights (`acejax.edit.annotators`).
      batch: most edits that are made at once.
      check_prompt: raises UserError for a prompt that can't be read.
      check_size: raises UserError for a canvas, height and width in pixels, that the sampler can't take.
    """

    def __init__(self, profile: Profile, sampler: Sampler, encode_pictures: EncodePictures,
                 decode_latents: Callable[[jax.Array], jax.Array], encode_prompts: EncodePrompts, *, lora: Any = None,
                 annotate: Annotate | None = None, batch: int = 4,
                 check_prompt: Callable[[str], object] = lambda prompt: None,
                 check_size: Callable[[int, int], object] = lambda height, width: None):
        self.profile, self.lora = profile, lora
        self._sampler, self._encode_pictures, self._decode = sampler, encode_pictures, decode_latents
        self._annotate = annotate or annotator(parity=profile.canvas.parity)
        self._encode_prompts, self._batch = encode_prompts, batch
        self._check_prompt, self._check_size = check_prompt, check_size

    def __call__(self, task: str | None, prompt: str, *, image: np.ndarray | None = None,
                 mask: np.ndarray | None = None, references: Sequence[np.ndarray] = (), seed: int = 0,
                 options: Options = Options(), **more: Any) -> np.ndarray:
        """One edit: [h, w, 3] uint8 of the picture's size; the arguments are those of `Request`.

        Raises:
          UserError: as `edit`.
        """
        request = Request(prompt, task, image, mask, tuple(references), seed=seed, **more)
        return self.edit([request], options)[0].picture

    def edit(self, requests: Sequence[Request], options: Options = Options(), say: Say | None = None) -> list[Result]:
        """The results of several edits; those of equal shapes are made at once, and each as if it were alone.

        Args:
          say: is told what happens and how much of the whole is done (0 to 1), step by step.

        Raises:
          UserError: a request that can't be, before any of them is begun.
        """
        steps, guidance = self.profile.steps_of(options.steps), self.profile.guidance_of(options.guidance)
        tell = say or (lambda *_: None)
        tell("laying out the pictures", 0.0)
        prepared = [prepare(self.profile, request, options, self._annotate) for request in requests]
        tell("reading the prompts", 0.05)
        text, pooled = (np.asarray(part) for part in self._encode_prompts([one.prompt for one in prepared]))
        results: dict[int, Result] = {}
        for members in groups([_kind(one, options) for one in prepared], self._batch):
            def part(what: str, share: float, count: int = len(members)) -> None:
                tell(what, 0.1 + 0.9 * (len(results) + count * share) / len(prepared))

            part(f"making {len(members)} of {len(prepared)}", 0.0)
            chosen = [prepared[index] for index in members]
            made = self._make(chosen, (text[members], pooled[members]), steps, guidance, options, say and part)
            results.update(zip(members, made, strict=True))
        tell("done", 1.0)
        return [results[index] for index in range(len(prepared))]

    def _make(self, prepared: Sequence[Prepared], text: tuple[np.ndarray, np.ndarray], steps: int,
              guidance: float | None, options: Options, say: Say | None) -> list[Result]:
        """The results of requests of one kind."""
        whole = steps

        def stepped(done: int, ran: int) -> None:
            nonlocal whole
            whole = ran
            if say is not None:
                say(f"step {done} of {steps}", done / steps)

        given = [one.canvas for one in prepared], text, [one.request.seed for one in prepared], steps, guidance
        errors = [None] * len(prepared)
        exact = self.generate(*given, say=say and stepped) if options.measure_cache else None
        cached = options.step_cache is not None
        made = self.generate(*given, cache=options.step_cache, say=stepped if say or cached else None)
        if exact is not None:
            errors = [float(np.sqrt(np.square(one.astype(np.float32) - other).mean()))
                      for one, other in zip(made, exact, strict=True)]
        kept = self._reconstructed(prepared)
        return [dataclasses.replace(finish(one, picture, options, same), skipped=steps - whole, cache_error=error)
                for one, picture, same, error in zip(prepared, made, kept, errors, strict=True)]

    def _reconstructed(self, prepared: Sequence[Prepared]) -> list[np.ndarray | None]:
        """What the autoencoder alone makes of the pictures whose pixels are kept where they do not change."""
        if all(one.kept is None for one in prepared):
            return [None] * len(prepared)
        blank = np.zeros_like(next(one.kept for one in prepared if one.kept is not None))
        pictures = normalize(np.stack([blank if one.kept is None else one.kept for one in prepared]))
        return [None if one.kept is None else picture for one, picture in zip(
            prepared, denormalize(self._decode(self._encode_pictures(pictures))), strict=True)]

    def read(self, prompts: Sequence[str]) -> None:
        """Read prompts of edits to come: weights that take turns in memory then do so once for all of them."""
        self._encode_prompts(prompts)

    def check(self, request: Request, options: Options = Options()) -> Checked:
        """Look at a request without making it.

        Raises:
          UserError: as `edit` would.
        """
        self.profile.steps_of(options.steps), self.profile.guidance_of(options.guidance)

        def stands_in(name: str, picture: np.ndarray) -> np.ndarray:
            self._annotate(name, picture[:CELL, :CELL])  # whether it can be
            return picture

        prepared = prepare(self.profile, request, options, stands_in)
        self._check_prompt(prepared.prompt)
        self._check_size(*prepared.canvas.mask.shape)
        return Checked(_kind(prepared, options), _shape(prepared), prepared.prompt, prepared.size)

    def generate(self, canvases: Sequence[Canvas], text: tuple[np.ndarray, np.ndarray], seeds: Sequence[int],
                 steps: int, guidance: float | None, *, cache: float | None = None,
                 say: Callable[[int, int], None] | None = None) -> list[np.ndarray]:
        """What the model makes of canvases of one layout, masked or not: target units (with parity whole canvases).

        Args:
          text: the prompts' text [B, T, D] and pooled [B, P] features.
          seeds: of each one's noise.
          cache, say: as the sampler's.

        Returns:
          Pictures [h, w, 3] uint8.
        """
        features = latents.encode(canvases, self._encode_pictures) | {"text": text[0], "pooled": text[1]}
        noise = jnp.stack([jax.random.normal(jax.random.key(seed), features["edit"].shape[1:]) for seed in seeds])
        sampled = self._sampler(features, noise, steps, guidance, self.lora, cache=cache, say=say)
        if not canvases[0].joined:
            sampled = sampled[:, :, -(canvases[0].widths[-1] // CELL):]
        return list(denormalize(self._decode(sampled)))


def groups(shapes: Sequence[Hashable], batch: int) -> list[list[int]]:
    """Indices of what can be made at once, equal shapes and at most `batch`, by the first of each."""
    found: dict[Hashable, list[int]] = {}
    for index, shape in enumerate(shapes):
        found.setdefault(shape, []).append(index)
    return [members[start:start + batch] for members in found.values() for start in range(0, len(members), batch)]


def _kind(prepared: Prepared, options: Options) -> Hashable:
    """The shape; with a step cache also the prompt, which decides what steps are left out."""
    return _shape(prepared) if options.step_cache is None else (*_shape(prepared), prepared.prompt)


def _shape(prepared: Prepared) -> Hashable:
    return prepared.canvas.mask.shape, prepared.canvas.widths
