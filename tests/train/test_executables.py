"""Compiled steps that a run leaves are found by the next start, which traces none; those of another run are not."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from acejax.errors import UserError
from acejax.parallel.mesh import make_mesh
from acejax.train import executables, saved
from acejax.train.config import TrainConfig
from acejax.train.executables import Place, Unfit, differences, key, load
from acejax.train.loop import train
from acejax.train.plan_compile import Kinds, step_on
from tests.train.small import losses, make_config, make_stream

ROOT = pathlib.Path(__file__).parents[2]
SIZES = ((12, 8),)
LOADS = "the step of 12 tokens: a saved executable, nothing to compile"


def run(folder, place, steps=2, **changed):
    """Losses of a run of one bucket."""
    config = make_config(SIZES)
    config.steps = steps
    config.update_from_flattened_dict(changed)
    train(config, folder, make_stream(steps, SIZES), executables=str(place))
    return losses(folder)


def test_what_is_saved_does_not_come_from_the_compile_cache(tmp_path):
    """jax serialises what it has read from there without some of its functions."""
    hits = []
    jax.monitoring.register_event_listener(lambda name, **about: hits.append(name) if "cache_hit" in name else None)
    before = {name: getattr(jax.config, name) for name in (
        "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")}

    def step():
        return jax.jit(lambda x: jnp.sin(x) @ x + 12345).lower(jnp.ones((4, 4))).compile()

    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        executables._cache(True)
        step()
        hits.clear()
        with executables.afresh():
            step()
        assert not hits
        step()
        assert hits
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        executables._cache(before["jax_enable_compilation_cache"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the step of a run, and the losses of that run."""
    place = tmp_path_factory.mktemp("steps")
    return place, run(tmp_path_factory.mktemp("run"), place)


def step(mesh=None, **changed):
    """The program of `run`, its batch as it is planned, and its file's name."""
    config = make_config(SIZES)
    config.steps = 2
    config.update_from_flattened_dict(changed)
    return step_on(TrainConfig.of(config), make_mesh(mesh or {"data": -1}), 8, 12, 3, Kinds(2, 4, True, "float32"))


def the_file(place):
    (file,) = place.glob("*.executable")
    return file


def test_the_next_start_traces_nothing_and_computes_the_same(made, tmp_path, monkeypatch, capsys):
    place, found = made
    monkeypatch.setattr("acejax.train.program.train_step", lambda *_, **__: pytest.fail("the step is traced"))
    assert run(tmp_path / "folder", place) == found
    assert LOADS in capsys.readouterr().out
    assert run(tmp_path / "file", the_file(place)) == found
    assert LOADS in capsys.readouterr().out and len(list(place.iterdir())) == 1


def test_a_file_that_can_not_be_loaded_hides_no_other(made, tmp_path, capsys):
    """As a step compiled ahead that a chip refuses: with the same key, and first by name."""
    place, found = made
    header = saved.read(the_file(place))
    shutil.copy(the_file(place), tmp_path / "step.executable")
    saved.write(tmp_path / "0.executable", header.key, header.metrics, b"of another runtime")
    assert run(tmp_path / "run", tmp_path) == found
    assert LOADS in capsys.readouterr().out
    (tmp_path / "step.executable").unlink()
    with pytest.raises(Unfit, match="0.executable can't be loaded here"):
        load(tmp_path / "0.executable", *step())


def test_a_folder_that_is_not_there_yet_is_a_folder(tmp_path):
    """As one of a bucket, which is there when something is in it."""
    assert Place(str(tmp_path / "new")).keeps and not Place(str(tmp_path / "new.executable")).keeps
    assert Place(str(tmp_path / "new")).find(step()[0], {}) == {}


def test_a_plan_s_step_is_the_run_s(made):
    """The key that `acejax plan --save` writes, from shapes alone, is that of the run's own arrays."""
    place, _ = made
    program, batch = step()
    assert differences(saved.read(the_file(place)).key, key(program, batch)) == []
    compiled = load(the_file(place), program, batch)
    zeros = {name: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding) for name, leaf in batch.items()}
    state = program.begin()
    after, metrics = compiled(state, zeros, frozen=None)
    assert int(after.step) == 1 and metrics["task"].shape == (4,) and metrics["ref"].shape == (2,)
    assert state.params["img_in"]["kernel"].is_deleted()  # the state is donated, as in the step that was compiled


def test_the_header_holds_the_key_and_is_read_without_running_anything(made, monkeypatch):
    place, _ = made
    monkeypatch.setattr(executables.serialize_executable, "deserialize_and_load", None)
    found = saved.read(the_file(place)).key
    assert found["mesh"] == {"data": jax.device_count(), "fsdp": 1, "tensor": 1, "seq": 1}
    assert found["versions"]["jax"] == jax.__version__ and found["batch"]["target"] == "float32[8,12,64]"
    assert found["config"]["optimizer"]["learning_rate"] and found["data"] == {"references": 2, "tasks": 4}


@pytest.mark.parametrize("changed, told", [
    ({"optimizer.learning_rate": 0.5}, "config.optimizer.learning_rate is 0.002, here 0.5"),
    ({"steps": 4}, "config.steps is 2, here 4"),
    ({"model.depth": 2}, "config.model.depth is 1, here 2"),
    ({"execution.compiler_options": {"xla_cpu_enable_fast_math": "1"}}, "options.xla_cpu_enable_fast_math is None"),
])
def test_another_run_says_what_differs(made, changed, told):
    place, _ = made
    with pytest.raises(Unfit, match=f"{the_file(place)} is of another step: .*{told}"):
        load(the_file(place), *step(**changed))


def test_another_version_source_or_flag_is_told(made, monkeypatch):
    place, _ = made
    monkeypatch.setattr(executables, "_source", lambda: "other")
    monkeypatch.setattr(executables.importlib.metadata, "version", lambda name: f"{name} 9")
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_fast_math=true")
    lines = differences(saved.read(the_file(place)).key, key(*step()))
    assert [line.partition(" is ")[0] for line in lines] == ["settings.XLA_FLAGS", *(
        f"versions.{name}" for name in ("acejax", "flax", "jax", "jaxlib", "optax"))]
    assert f"versions.jax is {jax.__version__!r}, here 'jax 9'" in lines
    with pytest.raises(Unfit, match="settings.XLA_FLAGS is .*; versions.acejax is .*; versions.flax is .*, and 3 more"):
        load(the_file(place), *step())


def test_a_run_of_another_step_compiles_and_leaves_its_own(made, tmp_path, capsys):
    place = tmp_path / "steps"
    place.mkdir()
    (place / "old.executable").write_bytes(the_file(made[0]).read_bytes())
    changed = {"optimizer.clip": 0.5}
    found = run(tmp_path / "run", place, **changed)
    told = capsys.readouterr().out
    assert "the step of 12 tokens: compiled; " in told and "old.executable is of another step: " in told
    assert "config.optimizer.clip is 1.0, here 0.5" in told and len(list(place.iterdir())) == 2
    assert run(tmp_path / "again", place, **changed) == found
    assert LOADS in capsys.readouterr().out and len(list(place.iterdir())) == 2


def test_damage_ends_the_run(made, tmp_path):
    file = tmp_path / "a.executable"
    file.write_bytes(the_file(made[0]).read_bytes()[:-9])
    with pytest.raises(UserError, match="a.executable is damaged: found .* bytes of a program"):
        Place(str(tmp_path)).find(*planned())


def planned():
    program, batch = step()
    return program, {12: batch}


def test_what_jax_does_not_load_is_compiled(tmp_path, capsys):
    """A file that is whole, with the right key, but of which jax makes no program."""
    program, batches = planned()
    saved.write(tmp_path / "a.executable", key(program, batches[12]), ("loss",), b"no program")
    assert Place(str(tmp_path)).find(program, batches) == {}
    assert "a.executable can't be loaded here (UnpicklingError" in capsys.readouterr().out


def test_what_jax_does_not_serialise_is_told(tmp_path, monkeypatch, capsys):
    def refuse(compiled):
        raise ValueError("Compilation does not support serialization")

    monkeypatch.setattr(executables.serialize_executable, "serialize", refuse)

    class Tree:
        num_leaves = 2

        @staticmethod
        def unflatten(leaves):
            return None, {"loss": 0}

    compiled = type("Step", (), {"out_tree": Tree})
    program, batches = planned()
    Place(str(tmp_path)).keep(program, batches, {12: compiled})
    assert "can't serialise this step (ValueError: Compilation does not support" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    executables.check(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    for path, told in ((tmp_path / "file", "is no saved executable"), (tmp_path / "file" / "x", "Not a directory"),
                       (tmp_path / "none.executable", "cannot be read: No such file")):
        with pytest.raises(UserError, match=told):
            executables.check(str(path))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="found 2 processes on CPUs, expected one"):
        executables.check(str(tmp_path))


MESHED = """
import json, pathlib, sys, jax
jax.config.update("jax_num_cpu_devices", 4)
from acejax.train.executables import Place
from tests.train.test_executables import SIZES, run, step
run_folder, place = map(pathlib.Path, sys.argv[1:])
print(run(run_folder, place, **{"mesh.data": 2, "mesh.fsdp": 2}))
program, batch = step({"data": 1, "fsdp": 4})
print(Place(str(place)).find(program, {12: batch}))
"""


@pytest.mark.long
def test_four_devices(tmp_path):
    """A mesh's step is found by its next start, with the same losses, and not by another mesh."""
    def start(name):
        done = subprocess.run([sys.executable, "-c", MESHED, str(tmp_path / name), str(tmp_path / "steps")],
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
        *lines, losses, other, found = done.stdout.splitlines()
        assert "mesh.data is 2, here 1; mesh.fsdp is 2, here 4" in other and found == "{}"
        return LOADS in lines, losses

    (tmp_path / "steps").mkdir()
    first, second = start("first"), start("second")
    assert (first[0], second[0]) == (False, True) and first[1] == second[1]
