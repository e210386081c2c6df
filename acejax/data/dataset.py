"""ACE++ samples in a TFDS dataset: what is stored, and reading it without TensorFlow and without decoding.

Any TFDS dataset can be trained on whose features give a target picture and a prompt (`read`); `acejax.data.build`
writes them as FEATURES has them:
  task, prompt: text
  target: picture
  image, mask: sequences of no or one picture (the one to edit; white in the mask = generate)
  references: sequence of pictures
  detail: text, free
"""

import operator
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from acejax.data import identity
from acejax.data.dataset_folder import INFO, find
from acejax.data.folder import NO_TASK
from acejax.data.sample import Sample
from acejax.errors import UserError

# No encoding_format: pictures stay the JPEG, PNG, WebP ... that they are.
PICTURE = tfds.features.Image(shape=(None, None, 3))
MASK = tfds.features.Image(shape=(None, None, 1))
FEATURES = tfds.features.FeaturesDict({
    "task": tfds.features.Text(), "prompt": tfds.features.Text(), "target": PICTURE,
    "image": tfds.features.Sequence(PICTURE), "mask": tfds.features.Sequence(MASK),
    "references": tfds.features.Sequence(PICTURE), "detail": tfds.features.Text()})
_SERIALIZER = tfds.core.ExampleSerializer(FEATURES.get_serialized_info())

TEXTS = ("task", "prompt", "detail")
PICTURES = ("target", "image", "mask", "references")
REQUIRED = ("target", "prompt")


def serialize(sample: Sample) -> bytes:
    """The sample as TFDS stores it: a tf.train.Example with the pictures' bytes as they are.

    Raises:
      UserError: text that is no valid unicode.
    """
    def listed(picture: bytes | None) -> list[bytes]:
        return [] if picture is None else [picture]
    try:
        texts = {field: getattr(sample, field).encode() for field in TEXTS}
    except UnicodeEncodeError as error:  # half a surrogate pair, as careless JSON has it
        raise UserError(f"{sample.name}: text that is no valid unicode: {error.object[:80]!r}") from None
    example = FEATURES.encode_example(texts | {
        "target": sample.target, "image": listed(sample.image), "mask": listed(sample.mask),
        "references": list(sample.references)})
    return _SERIALIZER.get_tf_example(example).SerializeToString(deterministic=True)  # two builds: the same bytes


def read(path: epath.PathLike, split: str = "train", fields: Mapping[str, str | None] | None = None) -> "Source":
    """The samples of a TFDS dataset in array_record, with random access.

    Args:
      path: the dataset's folder (NAME/VERSION), or a data_dir with just one dataset in it.
      split: as TFDS writes it: "train", "train[:95%]", "train+test".
      fields: which feature a field of `Sample` is read from, where it has another name: {"prompt": "caption"}; None
        leaves a field empty. Pictures are Image or Sequence(Image) features, text is Text, a string or a ClassLabel.

    Raises:
      UserError: no dataset there, no such split, files missing, or features that don't serve.
    """
    return Source(str(find(path)), split, dict(fields or {}))


class Source(Sequence):
    """A split's samples, pictures as the bytes that are stored; pickles as its name and opens again elsewhere."""

    def __init__(self, folder: str, split: str, fields: Mapping[str, str | None]):
        self._arguments = (folder, split, fields)
        self._where = f"{folder}/{split}"
        builder = _open(folder)
        self._columns = columns(folder, builder.info.features, fields)
        self._labels = {name: builder.info.features[name] for name in self._columns.values()
                        if isinstance(builder.info.features[name], tfds.features.ClassLabel)}
        self._records = _records(folder, builder, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # ends an iteration
        index %= len(self)
        name = f"{self._where}[{index}]"
        try:
            features = tf_example_pb2.Example.FromString(self._records[index]).features.feature
        except Exception as error:  # array_record's RuntimeError, protobuf's DecodeError
            raise UserError(f"{name}: cannot be read ({error}); build or copy the dataset again") from error
        values = {field: self._value(features[column], column) for field, column in self._columns.items()}
        for field, most in (("target", 1), ("image", 1), ("mask", 1)):
            found = len(values.get(field, ()))
            if found > most or field == "target" and not found:
                raise UserError(f"{name}: {found} pictures in {self._columns[field]!r} for {field}; expected one")
        try:
            texts = {"task": NO_TASK, "detail": ""} | {
                field: b"".join(values[field]).decode() for field in TEXTS if field in values}
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: text that is not UTF-8 ({error})") from None
        return Sample(target=values["target"][0], image=next(iter(values.get("image", ())), None),
                      mask=next(iter(values.get("mask", ())), None), references=tuple(values.get("references", ())),
                      name=name, **texts)

    def identity(self) -> str:
        """Another one when the dataset may have been written again."""
        folder = epath.Path(self._arguments[0])
        return identity.of_files((folder / INFO).read_text(), map(str, folder.glob("*.array_record*")))

    def __reduce__(self):
        return Source, self._arguments

    def _value(self, feature: tf_feature_pb2.Feature, column: str) -> Sequence[bytes]:
        if column in self._labels:
            return [self._labels[column].int2str(number).encode() for number in feature.int64_list.value]
        return feature.bytes_list.value


def columns(folder: str, features: tfds.features.FeatureConnector, fields: Mapping[str, str | None]) -> dict[str, str]:
    """Field of `Sample` -> feature to read it from.

    Raises:
      UserError: a field or feature that is not there, one of the wrong type, or no target or prompt.
    """
    if not isinstance(features, tfds.features.FeaturesDict):
        raise UserError(f"{folder}: its features are {_named(features)}; expected a FeaturesDict")
    has = "it has " + ", ".join(f"{name} ({_named(features[name])})" for name in sorted(features))
    unknown = sorted(set(fields) - {*TEXTS, *PICTURES})
    if unknown:
        raise UserError(f"fields: no field {', '.join(unknown)}; the fields are {', '.join((*PICTURES, *TEXTS))}")
    taken = set(fields.values())  # what was named for one field is not taken for another of its name
    found = {field: fields.get(field, field if field in features and field not in taken else None)
             for field in (*PICTURES, *TEXTS)}
    for field, column in found.items():
        kind, serves = ("a picture", _is_picture) if field in PICTURES else ("text", _is_text)
        if column is None and field in REQUIRED:
            raise UserError(f"{folder}: no feature for {field}; expected one of that name, {kind}, or "
                            f"fields={{{field!r}: NAME}}; {has}")
        if column is not None and column not in features:
            raise UserError(f"{folder}: no feature {column!r} for {field}; {has}")
        if column is not None and not serves(features[column]):
            raise UserError(f"{folder}: feature {column!r} for {field} is {_named(features[column])}; expected {kind} "
                            f"({'Image or Sequence(Image), 8 or 16 bit' if field in PICTURES else 'Text'})")
    return {field: column for field, column in found.items() if column is not None}


def _is_picture(feature: tfds.features.FeatureConnector) -> bool:
    if type(feature) is tfds.features.Sequence:
        feature = feature.feature
    return isinstance(feature, tfds.features.Image) and feature.np_dtype in (np.uint8, np.uint16)


def _is_text(feature: tfds.features.FeatureConnector) -> bool:
    if isinstance(feature, tfds.features.Text | tfds.features.ClassLabel):
        return True
    return isinstance(feature, tfds.features.Tensor) and not feature.shape and np.dtype(feature.np_dtype).kind in "OSU"


def _named(feature: tfds.features.FeatureConnector) -> str:
    """A feature's type, for messages."""
    if type(feature) is tfds.features.Sequence:
        return f"Sequence({_named(feature.feature)})"
    kind = type(feature).__name__
    return f"{kind} of {np.dtype(feature.np_dtype)}" if kind in ("Tensor", "Scalar", "Image") else kind


def _open(folder: str) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS raises what its JSON, protobuf and files do
        raise UserError(f"{folder}: no TFDS dataset can be read there ({first_line(error)})") from error


def _records(folder: str, builder: tfds.core.DatasetBuilder, split: str) -> Sequence[bytes]:
    """The serialised examples of a split."""
    names = [part.partition("[")[0] for part in split.split("+")]
    for name in names:
        if name not in builder.info.splits and name != "all":
            raise UserError(f"{folder}: no split {name!r}; it has {', '.join(builder.info.splits)}")
    try:
        records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    except NotImplementedError:
        raise UserError(f"{folder}: is stored as {builder.info.file_format.value}, which has no random access; "
                        "expected array_record: `tfds build --file_format=array_record`") from None
    except (ValueError, AssertionError) as error:
        raise UserError(f"{folder}: split {split!r}: {first_line(error)}") from error
    there = {file.name for file in epath.Path(folder).iterdir()}
    shards = [epath.Path(file).name for name in builder.info.splits for file in builder.info.splits[name].filenames
              if name in names]
    missing = [name for name in shards if name not in there]
    if missing:
        raise UserError(f"{folder}: {len(missing)} of {len(shards)} files are missing, {missing[0]} first; copy or "
                        "build the dataset again")
    return records


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
