"""Where a TFDS dataset is: the folder of one version, told by the files in it (TFDS itself need not be there)."""

from etils import epath

from acejax.errors import UserError

INFO = "dataset_info.json"  # with it a dataset is there
BUILDING = ".building"  # in it is what a build that has not ended needs
_VERSION = "[0-9]*.[0-9]*.[0-9]*"
_BELOW = (f"*/{_VERSION}", f"*/*/{_VERSION}")  # NAME/VERSION, NAME/CONFIG/VERSION


def is_dataset(path: epath.PathLike) -> bool:
    """Whether `path` is a TFDS dataset's folder, finished or begun, or a local data_dir with datasets in it."""
    path = epath.Path(path)
    if any((path / name).exists() for name in (INFO, "features.json", BUILDING)):
        return True
    return "://" not in str(path) and any(any(path.glob(f"{_BELOW[0]}/{name}")) for name in (INFO, BUILDING))


def find(path: epath.PathLike) -> epath.Path:
    """The dataset's folder: `path`, or the only dataset below it.

    Raises:
      UserError: no dataset there, one that is not finished, or several.
    """
    path = epath.Path(path)
    if (path / INFO).exists():
        return path
    if (path / BUILDING).exists():
        raise UserError(f"{path}: a dataset whose build did not end; the same `acejax data build` again goes on")
    if not path.is_dir():
        raise UserError(f"{path}: no TFDS dataset can be read there: no such folder")
    found = sorted(file.parent for depth in _BELOW for file in path.glob(f"{depth}/{INFO}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path}: found {len(found)} TFDS datasets in it; name one: {', '.join(map(str, found[:5]))}")
    for begun in path.glob(f"{_BELOW[0]}/{BUILDING}"):
        return find(begun.parent)
    raise UserError(f"{path}: no TFDS dataset can be read there: found no {INFO} in it; expected NAME/VERSION of a "
                    "dataset, or a folder with just one in it")
