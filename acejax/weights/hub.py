"""Files of the Hugging Face hub, fetched through its own library into its own cache."""

import pathlib
import re

from acejax.errors import UserError
from acejax.weights.source import PICKLES, exists

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
WEIGHTS = (".safetensors", ".json", *PICKLES)
KEPT = ("json", "safetensors", "model", "txt")


def looks_like_id(text: str) -> bool:
    """True for "owner/name" and "owner/name/folder/file.safetensors", where no such path is here."""
    found = _ID.fullmatch(text)
    return bool(found) and not text.startswith(".") and not (found[2] is None and text.endswith(WEIGHTS)) and (
        not exists(pathlib.Path(text)))


def fetch(text: str) -> pathlib.Path:
    """Download (or find in the cache) a file or a whole repository; the local path.

    Raises:
      UserError: huggingface_hub is absent, or the hub can't be reached, has no such file, or asks for a licence.
    """
    repository, file = _ID.fullmatch(text).groups()
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise UserError(f"{text}: no such path here; to take it from the hub: pip install huggingface_hub") from None
    try:
        if file:
            return pathlib.Path(huggingface_hub.hf_hub_download(repository, file))
        # a pipeline's repository often holds the same weights a second time beside the folders
        inside = "*/" if huggingface_hub.file_exists(repository, "model_index.json") else ""
        patterns = ["model_index.json", *(f"{inside}*.{suffix}" for suffix in KEPT)]
        return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise UserError(f"{repository} is gated: accept its licence at https://huggingface.co/{repository}, then run "
                        "`hf auth login`") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(f"{text}: no such path here, and the hub cannot be reached ({_line(error)})") from None
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:
        raise UserError(f"{text}: neither a path here nor on the hub ({_line(error)})") from None
    except Exception as error:  # whatever the hub's HTTP library makes of a network that is not there
        raise UserError(f"{text}: no such path here, and the hub cannot be reached ({_line(error)})") from None


def local(source: str) -> pathlib.Path:
    """The path of a file or folder here or on the hub; raises as `fetch`."""
    return fetch(source) if looks_like_id(source) else pathlib.Path(source).expanduser()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
