"""Files of the Hugging Face hub, fetched through its own library into its own cache."""

import pathlib
import re

from acejax.errors import UserError

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt")


def looks_like_id(text: str) -> bool:
    """True for "owner/name" and "owner/name/folder/file.safetensors", where no such path is here."""
    return bool(_ID.fullmatch(text)) and not text.startswith((".", "/")) and not pathlib.Path(text).exists()


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
        return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(PATTERNS)))
    except errors.GatedRepoError:
        raise UserError(f"{repository} is gated: accept its licence at https://huggingface.co/{repository}, then run "
                        "`hf auth login`") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(f"{text}: no such path here, and the hub cannot be reached ({_line(error)})") from None
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:
        raise UserError(f"{text}: neither a path here nor on the hub ({_line(error)})") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
