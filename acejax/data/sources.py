"""`open_source`: training samples from whatever holds them, told apart by what is there."""

from collections.abc import Mapping, Sequence

from etils import epath

from acejax.data import dataset_folder, manifest
from acejax.data.sample import Sample
from acejax.errors import UserError

Fields = str | Sequence[str] | Mapping[str, str | None]


def open_source(path: epath.PathLike, split: str = "train", fields: Fields | None = None,
                prefix: epath.PathLike | None = None) -> Sequence[Sample]:
    """Samples with random access that pickle as their name and open again in another process.

    Args:
      path: a manifest (ACE's text or JSONL), a folder of pictures (`acejax.data.folder`), or a TFDS dataset's folder.
      split: of a TFDS dataset, as TFDS writes it: "train", "train[:95%]". A manifest is one split, whatever it is
        called, and has no slices.
      fields: of an ACE text the order of its fields; of a TFDS dataset which feature each field is read from
        ({"prompt": "caption"}).
      prefix: where a manifest's relative paths start, its own folder by default.

    Raises:
      UserError: nothing there, nothing of the three, or what the kind itself finds wrong.
    """
    path = epath.Path(path)
    if hasattr(fields, "items"):  # a ConfigDict is no Mapping
        fields = dict(fields.items())
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a manifest, a folder of pictures or a TFDS dataset")
    if path.is_dir() and dataset_folder.is_dataset(path):
        if prefix is not None or not isinstance(fields, Mapping | None):
            raise UserError(f"{path}: a TFDS dataset; expected no prefix, and fields as names: "
                            f"{{'prompt': 'caption'}}; found prefix {prefix!r}, fields {fields!r}")
        from acejax.data import dataset  # TFDS takes a second to import

        return dataset.read(path, split, fields)
    if isinstance(fields, Mapping):
        raise UserError(f"{path}: a manifest; expected fields as an order: {','.join(manifest.FIELDS)}; found "
                        f"{dict(fields)!r}")
    if not split.isidentifier():
        raise UserError(f"{path}: a manifest has no parts such as {split!r}; build a TFDS dataset (`acejax data "
                        "build`) or give two manifests")
    return manifest.Source(manifest.read(path, fields or manifest.FIELDS, prefix))
