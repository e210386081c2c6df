"""Saving and restoring: what is kept, damage, other meshes and dtypes, failures in the background."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax import UserError, checkpoint
from acejax.checkpoint import Checkpoints
from acejax.model.config import MMDiTConfig
from tests.counts import count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Shaped as a training state."""

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None


def make_state(step: int) -> State:
    """Numbers that no compression shortens, and another state for each step."""
    rng = np.random.default_rng(step)
    params = {"a": {"kernel": jnp.asarray(rng.standard_normal((64, 48)), jnp.float32)},
              "b": jnp.asarray(rng.standard_normal(64), jnp.bfloat16)}
    return State(jnp.int32(step), params, (jax.tree.map(jnp.square, params), ()))


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def saved(workdir: pathlib.Path, steps=(1, 2, 3), **kwargs) -> pathlib.Path:
    checkpoints = Checkpoints(workdir, keep=len(steps), **kwargs)
    for step in steps:
        checkpoints.save(step, make_state(step), notes={"data": {"digest": "abc"}})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("three"))


@pytest.fixture
def copied(three, tmp_path):
    return pathlib.Path(shutil.copytree(three, tmp_path / "run"))


def test_what_is_saved_comes_back(three):
    checkpoints = Checkpoints(three, keep=3)
    step, state = checkpoints.restore(make_state(0))
    assert step == checkpoints.latest() == 3
    assert_equal(state, make_state(3))
    notes = checkpoints.notes(3)
    assert notes["step"] == 3 and notes["data"] == {"digest": "abc"} and notes["score"] is None
    assert {"python", "acejax", "jax", "flax", "optax", "orbax-checkpoint"} <= notes["versions"].keys()
    checkpoints.save(3, make_state(4))  # is there already
    checkpoints.close()
    assert_equal(Checkpoints(three, keep=3).restore(make_state(0))[1], make_state(3))


def test_an_empty_workdir_has_none(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None and checkpoints.restore(make_state(0)) is None


def test_the_last_and_the_best_stay(tmp_path):
    """The best outlive those that are newer, also over a restart; a step without a score, or with NaN, is never one."""
    checkpoints = Checkpoints(tmp_path, keep=2, best=2)
    for step, score in enumerate((3.0, 1.0, None, 2.0, float("nan"), 5.0)):
        checkpoints.save(step, make_state(step), score)
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    assert sorted(int(path.name) for path in folder.iterdir()) == [1, 3, 4, 5]
    checkpoints = Checkpoints(tmp_path, keep=2, best=2)
    for step, score in ((6, 4.0), (7, 1.5), (8, 9.0)):
        checkpoints.save(step, make_state(step), score)
    checkpoints.close()
    assert sorted(int(path.name) for path in folder.iterdir()) == [1, 7, 8]


def files(workdir: pathlib.Path, step: int, part: str) -> list[pathlib.Path]:
    """A step's files, the largest last."""
    found = (path for path in (workdir / "checkpoints" / str(step) / part).rglob("*") if path.is_file())
    return sorted(found, key=lambda path: path.stat().st_size)


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "numbers cut short": lambda run: truncate(files(run, 3, "state")[-1]),
    "a bit of the numbers flipped": lambda run: flip(files(run, 3, "state")[-1]),
    "no numbers": lambda run: files(run, 3, "state")[-1].unlink(),
    "no manifest": lambda run: (run / "checkpoints/3/state/manifest.ocdbt").unlink(),
    "no tree": lambda run: (run / "checkpoints/3/state/_METADATA").unlink(),
    "broken tree": lambda run: truncate(run / "checkpoints/3/state/_METADATA"),
    "no state": lambda run: shutil.rmtree(run / "checkpoints/3/state"),
    "no notes": lambda run: shutil.rmtree(run / "checkpoints/3/notes"),
    "broken notes": lambda run: truncate(run / "checkpoints/3/notes/metadata"),
    "other notes": lambda run: (run / "checkpoints/3/notes/metadata").write_text("[]"),
    "notes of other kinds": lambda run: (run / "checkpoints/3/notes/metadata").write_text(
        '{"score": null, "checksums": {"step": 3}}'),
    "empty": lambda run: [path.write_bytes(b"") for path in files(run, 3, "")],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_gives_way_to_the_one_before(copied, damage, capfd):
    DAMAGE[damage](copied)
    checkpoints = Checkpoints(copied, keep=3)
    step, state = checkpoints.restore(make_state(0))
    assert step == checkpoints.latest() == 2
    assert_equal(state, make_state(2))
    assert (copied / "damaged" / "3").is_dir()
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and told.startswith("step 3 is damaged (") and "going on from step 2" in told, told
    checkpoints.save(3, make_state(3))
    checkpoints.close()
    assert_equal(Checkpoints(copied, keep=3).restore(make_state(0))[1], make_state(3))


def test_damage_twice_loses_nothing(copied):
    for step in (3, 2):
        truncate(files(copied, step, "state")[-1])
    (copied / "damaged" / "3").mkdir(parents=True)
    assert Checkpoints(copied, keep=3).restore(make_state(0))[0] == 1
    assert sorted(path.name for path in (copied / "damaged").iterdir()) == ["2", "3", "3-2"]


def test_nothing_to_go_on_from_is_no_fresh_start(copied, capfd):
    """Also for a state that is not the one saved: no step is to blame, and none is moved."""
    before = sorted(copied.rglob("*"))
    with pytest.raises(UserError, match=r"no checkpoint can be restored \(step 3: .*step 2: .*step 1: "):
        Checkpoints(copied, keep=3).restore({"other": jnp.zeros(3)})
    wider = make_state(0)
    wider.params["b"] = jnp.zeros(65, jnp.bfloat16)
    with pytest.raises(UserError, match="no checkpoint can be restored"):
        Checkpoints(copied, keep=3).restore(wider)
    assert sorted(copied.rglob("*")) == before
    assert capfd.readouterr().err == ""


def test_the_checksums_see_every_bit():
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.int32):
        leaf = np.asarray(jnp.asarray(100 * rng.standard_normal((5, 7, 3)), dtype))
        reference = checkpoint._checksums({"x": leaf})
        assert reference == {"x": [str(leaf.dtype), checkpoint._sum(leaf)]}
        for bit in range(8 * leaf.nbytes):
            data = np.frombuffer(leaf.tobytes(), np.uint8).copy()
            data[bit // 8] ^= 1 << bit % 8
            assert checkpoint._sum(data.view(leaf.dtype).reshape(leaf.shape)) != reference["x"][1]


def test_weights_of_a_workdir(tmp_path):
    state = dataclasses.replace(make_state(1), ema=jax.tree.map(lambda leaf: leaf + 1, make_state(1).params))
    for name, value in (("with", state), ("without", dataclasses.replace(make_state(1), opt_state=()))):
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(1, value)
        checkpoints.close()
        (tmp_path / name / "config.json").write_text(json.dumps({"model": {}}))
        assert_equal(checkpoint.load_weights(tmp_path / name)[1], state.params)
    assert_equal(checkpoint.load_weights(tmp_path / "with", ema=True)[1], state.ema)
    assert_equal(checkpoint.load_weights(tmp_path / "without", ema=True)[1], state.params)
    flip(files(tmp_path / "without", 1, "state")[-1])
    with pytest.raises(UserError, match="has other numbers than were saved"):
        checkpoint.load_weights(tmp_path / "without")
    truncate(tmp_path / "with" / "checkpoints" / "1" / "notes" / "metadata")
    with pytest.raises(UserError, match=r"checkpoints/1: its notes are damaged \(JSONDecodeError"):
        checkpoint.load_weights(tmp_path / "with")


MEGABYTES, FIXED = count((200, 100), (1000, 0))  # of the state; and what does not grow with it: OCDBT's cache and more


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A float32 state, saved from one mesh."""
    return tmp_path_factory.mktemp("big")


def measured(big: pathlib.Path, order: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-m", "tests.checkpoint_memory", str(big), str(MEGABYTES), order],
                          cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
def test_memory(big):
    """Saving takes a copy of the state; restoring on another mesh, in another dtype, no more than one besides it."""
    saved = measured(big, "save")
    assert saved["save"] < saved["state"] + (FIXED + 50) * 10**6
    for dtype in count(("bfloat16",), ("bfloat16", "float32")):
        found = measured(big, dtype)
        assert found["restore"] < found["state"] + saved["state"] + FIXED * 10**6, dtype


def test_a_bucket_is_no_folder_here(bucket, monkeypatch):
    """What Orbax is told; how it writes to a bucket itself can't be seen without one."""
    monkeypatch.setattr(checkpoint, "_Manager", lambda folder, options: types.SimpleNamespace(
        folder=folder, all_steps=lambda: ()))
    assert str(Checkpoints("gs://pictures/run")._manager.folder) == "gs://pictures/run/checkpoints"
    run = bucket / "run"
    (run / "checkpoints" / "1" / "state").mkdir(parents=True)
    (run / "checkpoints" / "1" / "state" / "_METADATA").write_text("{}")
    (run / "config.json").write_text(json.dumps({"model": dataclasses.asdict(MMDiTConfig.tiny())}))
    assert checkpoint.weights_config("gs://pictures/run") == MMDiTConfig.tiny()
