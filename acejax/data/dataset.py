"""ACE++ samples as a TFDS dataset: array_record files with encoded pictures, written and read without TensorFlow.

Any TFDS dataset with these features can be trained on:
  task, prompt: text
  target: picture
  image, mask: sequences of no or one picture (the one to edit; 255 in the mask = generate)
  references: sequence of pictures
  detail: text, free (the built-in pictures keep there what their scores need)
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from acejax.errors import UserError

PICTURE = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
MASK = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
FEATURES = {
    "task": tfds.features.Text(), "prompt": tfds.features.Text(), "target": PICTURE,
    "image": tfds.features.Sequence(PICTURE), "mask": tfds.features.Sequence(MASK),
    "references": tfds.features.Sequence(PICTURE), "detail": tfds.features.Text()}

Record = dict[str, Any]


class ConditionUnits(tfds.core.GeneratorBasedBuilder):
    """Writes records (`record`) split by split."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: Mapping[str, Callable[[], Iterable[Record]]], **kwargs):
        self._splits = splits
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(FEATURES))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(make) for name, make in self._splits.items()}

    def _generate_examples(self, make: Callable[[], Iterable[Record]]) -> Iterator[tuple[int, Record]]:
        yield from enumerate(make())


def record(task: str, prompt: str, target: np.ndarray, image: np.ndarray | None = None,
           mask: np.ndarray | None = None, references: Sequence[np.ndarray] = (), detail: str = "") -> Record:
    """One sample as TFDS wants it: uint8 pictures [h, w, 3] and mask [h, w] become PNG bytes."""
    def listed(array):
        return [] if array is None else [_png(array)]
    return {"task": task, "prompt": prompt, "target": _png(target), "image": listed(image), "mask": listed(mask),
            "references": [_png(reference) for reference in references], "detail": detail}


def build(data_dir: epath.PathLike, splits: Mapping[str, Callable[[], Iterable[Record]]]) -> epath.Path:
    """Write the dataset below `data_dir` (nothing is done where it stands already); returns its folder."""
    builder = ConditionUnits(splits, data_dir=str(data_dir))
    tfds.disable_progress_bar()  # they are many, and short
    with contextlib.redirect_stdout(None):  # TFDS tells of a download that there is not
        builder.download_and_prepare()
    return epath.Path(builder.data_dir)


def read(folder: epath.PathLike, split: str) -> Sequence[Record]:
    """A split of the dataset in `folder`, with random access; pictures decoded to uint8 arrays, text to str.

    Raises:
      UserError: no dataset there, or no such split.
    """
    try:
        builder = tfds.builder_from_directory(str(folder))
    except Exception as error:
        raise UserError(f"{folder}: no TFDS dataset can be read there ({error})") from error
    if split not in builder.info.splits:
        raise UserError(f"{folder}: no split {split!r}; it has {', '.join(builder.info.splits)}")
    return _Decoded(builder.as_data_source(split=split))


class _Decoded(Sequence):
    """A data source whose text is str and whose absent pictures are None."""

    def __init__(self, source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends an iteration
        row = dict(self._source[index])
        for field in ("task", "prompt", "detail"):
            row[field] = row[field].decode()
        row["image"] = row["image"][0] if len(row["image"]) else None
        row["mask"] = row["mask"][0][..., 0] if len(row["mask"]) else None
        row["references"] = tuple(row["references"])
        return row


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
