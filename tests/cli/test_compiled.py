"""Compiled programs are kept where the user wants them, and the second start of a command compiles nothing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from acejax.cli import compiled
from acejax.cli.main import main
from acejax.errors import UserError
from benchmarks import startup

ROOT = pathlib.Path(__file__).parents[2]
NAMES = (compiled.FOLDER, *compiled.THRESHOLDS)


def settings(code: str, **given: str) -> list:
    """jax's settings after some lines of Python, in a process with these variables and no others of the kind."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    printing = f"import json, jax; print(json.dumps([jax.config.values[name.lower()] for name in {NAMES}]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{printing}"], capture_output=True, text=True, check=True,
                          env=environment | {"PYTHONPATH": str(ROOT)} | given)
    return json.loads(done.stdout)


KEEP = "from acejax.cli import compiled; import sys; assert 'jax' not in sys.modules; compiled.keep("


@pytest.mark.parametrize("before", ["", "import jax; "])
def test_the_users_cache_folder_is_where_programs_are(tmp_path, before):
    code = before + (KEEP.replace("assert 'jax' not in sys.modules; ", "") if before else KEEP) + ")"
    assert settings(code, XDG_CACHE_HOME=str(tmp_path)) == [str(tmp_path / "acejax" / "compiled"), 0.0, 0]
    assert settings(code, XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR="gs://x/y",
                    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="3") == ["gs://x/y", 3.0, 0]
    assert not settings(code, XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR="")[0]  # none
    (tmp_path / "file").touch()
    assert not settings(code, XDG_CACHE_HOME=str(tmp_path / "file"))[0]  # where nothing can be written


def test_a_folder_that_is_given_comes_before_all_others(tmp_path):
    given = {"JAX_COMPILATION_CACHE_DIR": "gs://x/y"}
    assert settings(KEEP + f"{str(tmp_path / 'a' / 'b')!r})", **given)[0] == str(tmp_path / "a" / "b")
    assert settings(KEEP + "'gs://z')", **given)[0] == "gs://z" and not settings(KEEP + "'')", **given)[0]


def test_import_and_help_set_nothing():
    assert settings("import acejax; acejax.MMDiTConfig")[0] is None


def test_a_folder_that_cannot_be_is_told(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x: Not a directory; expected a folder, or nothing for none"):
        compiled.keep(str(tmp_path / "file" / "x"))
    assert main(["edit", "--demo", f"--compile_cache={tmp_path / 'file'}"]) == 2
    assert "--compile_cache=" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_the_second_start_of_an_edit_compiles_nothing(tmp_path):
    argv, _ = startup._edit(tmp_path)
    first, second = startup.start(tmp_path, argv), startup.start(tmp_path, argv)
    assert first["compiled"] == first["programs"] == second["programs"] > 20 and second["compiled"] == 0
    (tmp_path / "cache").rename(tmp_path / "gone")  # the count is of what the cache did
    assert startup.start(tmp_path, argv)["compiled"] == first["compiled"]


SMALL = """
from tests.train.small import MODEL, make_config

def get_config():
    config = make_config(((16, 8), (32, 8), (48, 8)))
    config.model.update(MODEL | {"context_in_dim": 64, "vec_in_dim": 64})
    config.update({"steps": 2, "stages": ({"share": 1.0, "weights": {"text": 1.0}},)})
    config.checkpoint.every = 1
    config.data.update({"tasks": ("text",), "samples": 40})
    config.data.autoencoder.pictures = 40
    return config
"""


def test_a_run_that_goes_on_compiles_nothing(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    argv, stop = startup._train(tmp_path)
    argv = [argv[0], f"--config={tmp_path / 'small.py'}", argv[2]]
    first = startup.start(tmp_path, argv)
    stop()
    second = startup.start(tmp_path, argv)
    assert (tmp_path / "run" / "checkpoints" / "2").exists()  # the step was made again
    assert first["compiled"] == first["programs"] > 20 and second["programs"] > 20 and second["compiled"] == 0
