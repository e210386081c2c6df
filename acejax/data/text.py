"""Prompts -> token ids of FLUX's two text encoders, as ACE++ was trained to read them.

Sources: ACE_plus `modules/embedder.py` (cleaning, added tokens) and `infer_lora.py` (its LoRAs, through diffusers).
transformers serves for its tokenizers alone and needs no PyTorch.
"""

import dataclasses
import html
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from acejax.errors import UserError

# "{image}" in a prompt stands for the picture to edit. ACE++ reads these as rows 32,100 on of T5's table.
ADDED_TOKENS = ("<img>", "{image}", "{caption}", "{mask}", "{ref_image}", *(f"{{image{i}}}" for i in range(1, 10)))
FIRST_ADDED = 32_100
T5_PAD, T5_END = 0, 1
CLIP_START, CLIP_END = 49_406, 49_407  # the end also pads


def clean(text: str) -> str:
    """A prompt as ACE++ was trained on it: encoding mended, HTML unescaped twice, whitespace made single spaces."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


@dataclasses.dataclass(frozen=True)
class Tokenizers:
    """FLUX's two tokenizers; `open` reads them.

    Attributes:
      t5, clip: transformers' tokenizers.
      reference: prompts as ACE_plus's LoRA inference through diffusers takes them: not cleaned, `{image}` the only
        added token. Its id is then 32,100, where training had 32,101: the released LoRAs run on another vector than
        they were trained on.
    """

    t5: Any
    clip: Any
    reference: bool = False

    @classmethod
    def open(cls, folder: str | os.PathLike | None = None, *, t5: str | os.PathLike | None = None,
             clip: str | os.PathLike | None = None, reference: bool = False) -> "Tokenizers":
        """Read the tokenizers from local folders; nothing is downloaded and no code of a folder runs.

        Args:
          folder: FLUX as diffusers keeps it, with `tokenizer` (CLIP) and `tokenizer_2` (T5).
          t5: a folder with T5's `tokenizer.json`, instead of `tokenizer_2`.
          clip: a folder with CLIP's `vocab.json` and `merges.txt`, instead of `tokenizer`.
          reference: see the class.

        Raises:
          UserError: a folder that is not given, absent, without its files, unreadable, or another model's.
        """
        if folder is None and None in (t5, clip):
            raise UserError(f"tokenizers: found t5={t5}, clip={clip}; expected both, or FLUX's folder with both")
        t5 = pathlib.Path(t5 if t5 is not None else pathlib.Path(folder) / "tokenizer_2")
        clip = pathlib.Path(clip if clip is not None else pathlib.Path(folder) / "tokenizer")
        read_t5 = _read("T5Tokenizer", t5, ("tokenizer.json",))
        read_clip = _read("CLIPTokenizer", clip, ("vocab.json", "merges.txt"))
        added = ["{image}"] if reference else list(ADDED_TOKENS)
        read_t5.add_tokens(added, special_tokens=True)
        _check(t5, "T5", {"pad": read_t5.pad_token_id, "end": read_t5.eos_token_id,
                          **dict(zip(added, read_t5.convert_tokens_to_ids(added), strict=True))},
               {"pad": T5_PAD, "end": T5_END, **{token: FIRST_ADDED + i for i, token in enumerate(added)}})
        _check(clip, "CLIP", {"start": read_clip.bos_token_id, "end": read_clip.eos_token_id},
               {"start": CLIP_START, "end": CLIP_END})
        return cls(read_t5, read_clip, reference)

    def t5_ids(self, prompts: Sequence[str], length: int = 512) -> tuple[np.ndarray, np.ndarray]:
        """[B, length] int32 ids, padded, the end token last even when cut; and [B] int32 tokens that were cut off."""
        return self._ids(self.t5, prompts, length, T5_PAD)

    def clip_ids(self, prompts: Sequence[str], length: int = 77) -> tuple[np.ndarray, np.ndarray]:
        """As `t5_ids`, for CLIP, which pads with its end token."""
        return self._ids(self.clip, prompts, length, CLIP_END)

    def _ids(self, tokenizer: Any, prompts: Sequence[str], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(prompts, str):
            raise TypeError(f"expected a list of prompts; found one string, {prompts[:40]!r}")
        ids = np.full((len(prompts), length), pad, np.int32)
        cut = np.zeros(len(prompts), np.int32)
        for i, prompt in enumerate(prompts):
            tokens = tokenizer(prompt if self.reference else clean(prompt), verbose=False).input_ids
            cut[i] = max(0, len(tokens) - length)
            if cut[i]:
                tokens = tokens[:length - 1] + tokens[-1:]
            ids[i, :len(tokens)] = tokens
        return ids, cut


def _read(name: str, folder: pathlib.Path, files: tuple[str, ...]) -> Any:
    """A tokenizer by its class, not by what the folder says it is: so none of the folder's code can run."""
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: no such file; expected a tokenizer's folder with {' and '.join(files)}")
    logging.getLogger("transformers").addFilter(_no_notice)
    import transformers

    try:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise UserError(f"{folder}: cannot be read as a {name} ({error}); expected {' and '.join(files)} of FLUX"
                        ) from None


def _no_notice(record: logging.LogRecord) -> bool:
    """Drops what transformers says on import where there is no PyTorch."""
    return not record.getMessage().startswith("PyTorch was not found")


def _check(folder: pathlib.Path, name: str, found: dict[str, int], expected: dict[str, int]) -> None:
    for token, id in expected.items():
        if found[token] != id:
            raise UserError(f"{folder}: not FLUX's {name} tokenizer: the id of {token!r} is {found[token]}; "
                            f"expected {id}")
