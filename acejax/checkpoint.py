"""All Orbax calls: saving a run step by step and taking it up again; a model's weights alone."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from etils import epath
from jax.experimental import multihost_utils

from acejax import __version__
from acejax.errors import UserError
from acejax.model.config import AutoencoderConfig, CLIPConfig, MMDiTConfig, T5Config

_KINDS = {kind.__name__: kind for kind in (MMDiTConfig, AutoencoderConfig, T5Config, CLIPConfig)}
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
_BLOCK = 2**22  # numbers
_GROUP = 2**26  # bytes of small leaves that one program sums: XLA on a CPU makes a copy of each


class Checkpoints:
    """The checkpoints of one workdir; saving goes on in the background, and takes no more than a copy of the state.

    `<workdir>/checkpoints/<step>` has two items, written as one: `state`, and `notes` (JSON) with checksums of the
    state's numbers, the versions of the libraries, the score, and what the caller adds. Neither knows of meshes or
    processes. All processes of a run call each method at the same step.

    Args:
      workdir: of the run; nobody else may write there (`acejax.workdir.lock`).
      keep: how many of the newest steps stay.
      best: how many of those with the lowest scores stay besides.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 2, best: int = 0):
        self._workdir = _absolute(workdir)
        self._folder = self._workdir / "checkpoints"
        self._kept = _Kept(keep, best, {})
        _hush()
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept, cleanup_tmp_directories=True)
        self._manager = _Manager(self._folder, options=options)
        for step in self._manager.all_steps():
            with contextlib.suppress(OSError, ValueError):  # damaged notes score nothing
                self._kept.note(step, self.notes(step)["score"])

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def notes(self, step: int) -> dict[str, Any]:
        """What was noted with a step.

        Raises:
          OSError, ValueError: they are damaged.
        """
        return _notes(self._folder / str(step))

    def save(self, step: int, state: Any, score: float | None = None, notes: dict[str, Any] | None = None) -> None:
        """Begin to save a step, after the one before is written; nothing happens if it is there.

        Args:
          state: a tree of arrays; may be donated as soon as this returns.
          score: lower is better; None or NaN is no score.
          notes: JSON; of the data's state, the random numbers and the config.

        Raises:
          UserError: the save before could not be finished, or this one not begun.
        """
        if step in self._manager.all_steps():
            return
        score = score if score is not None and math.isfinite(score) else None
        notes = (notes or {}) | {"step": step, "score": score, "versions": versions(), "checksums": _checksums(state)}
        with self._failing():
            self._kept.note(step, score)
            self._manager.save(step, force=True, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)))

    def check(self) -> None:
        """Raises UserError when a save in the background has failed."""
        if not self._manager.is_saving_in_progress():
            with self._failing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for what is being saved.

        Raises:
          UserError: it could not be saved.
        """
        with self._failing():
            self._manager.wait_until_finished()
        self._manager.close()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The newest step that can be restored and its state; None where there is no checkpoint.

        Damaged steps that are newer are told of and moved to `<workdir>/damaged`. Every leaf is checked against the
        checksum of its numbers, unless `like` wants another dtype than was saved.

        Args:
          like: the state as arrays or ShapeDtypeStructs, with the shapes it was saved with and the dtypes and
            shardings to have now.

        Raises:
          UserError: there are checkpoints, and none can be restored; they stay where they are.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, problem = self._read(step, like)
            if problem is None:
                for bad, told in damaged.items():
                    self._set_aside(bad, told, step)
                return step, state
            damaged[step] = problem
        if damaged:
            raise UserError(f"{self._folder}: no checkpoint can be restored ("
                            + "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
                            + "); mend them, or give another --workdir to begin anew")
        return None

    def _read(self, step: int, like: Any) -> tuple[Any, str | None]:
        """A step's state and None, or None and what is wrong with it; all processes agree."""
        state, notes, problem = None, {}, None
        try:
            notes = self.notes(step)
            # The handler itself: the manager has barriers, at which a process that failed would be missing.
            state = ocp.StandardCheckpointHandler(restore_concurrent_gb=_concurrent(like)).restore(
                self._folder / str(step) / "state", args=ocp.args.StandardRestore(like))
        except Exception as error:  # whatever files, JSON, OCDBT and Orbax make of what is not whole
            problem = _reason(error)
        if _anywhere(problem is not None):
            return None, problem or "another process cannot read its part"
        saved = notes["checksums"]
        wrong = [path for path, (dtype, value) in _checksums(state).items()
                 if path not in saved or saved[path][0] == dtype and saved[path][1] != value]
        return (None, f"{wrong[0]} has other numbers than were saved") if wrong else (state, None)

    def _set_aside(self, step: int, problem: str, instead: int) -> None:
        """Move a damaged step away, so that it can be saved again."""
        place = self._workdir / "damaged" / str(step)
        number = 1
        while place.exists():
            number += 1
            place = self._workdir / "damaged" / f"{step}-{number}"
        multihost_utils.sync_global_devices("acejax: a damaged step has a new place")
        if jax.process_index() == 0:
            place.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(place)
            print(f"step {step} is damaged ({problem}) and is now in {place}; going on from step {instead}",
                  file=sys.stderr, flush=True)
        multihost_utils.sync_global_devices("acejax: a damaged step is set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Tells of a save that fails, here or in the background, and which step is safe."""
        try:
            yield
        except Exception as error:
            self._manager.reload()
            safe = self.latest()
            raise UserError(f"{self._folder}: a checkpoint could not be saved ({_reason(error)}); "
                            + ("there is none yet" if safe is None else f"step {safe} is safe")) from error


class _Manager(ocp.CheckpointManager):
    """Leaves jax's preemption counter alone: Orbax counts it back to the step that it finishes in the background, by
    which hosts could agree on a step that one of them has passed.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


@dataclasses.dataclass
class _Kept:
    """Orbax's preservation policy: the last steps and those with the lowest scores, of equals the newer."""

    last: int
    best: int
    scores: dict[int, float]

    def note(self, step: int, score: float | None) -> None:
        self.scores.pop(step, None)
        if score is not None:
            self.scores[step] = score

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = sorted((step for step in steps if step in self.scores), key=lambda step: (self.scores[step], -step))
        kept = {*steps[-self.last:], *scored[:self.best]}
        return [step in kept for step in steps]


def versions() -> dict[str, str]:
    """Of Python, acejax and the libraries that a run's numbers depend on; those not installed are left out."""
    found = {"python": platform.python_version(), "acejax": __version__}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def digest(tree: Any) -> str:
    """Names a tree's numbers, dtypes and paths; the same on any mesh. A pass over it on its devices."""
    return xxhash.xxh3_128_hexdigest(json.dumps(_checksums(tree), sort_keys=True).encode())


def _checksums(tree: Any) -> dict[str, list[Any]]:
    """Path -> [dtype, checksum] of each leaf; the same on any mesh, and another after any one bit has changed.

    Neither Orbax nor TensorStore checks an array's bytes (OCDBT does for its own tables). A pass over the state on its
    devices is cheaper than reading files again.
    """
    leaves = _by_path(tree)
    groups, size = [[]], 0
    for leaf in leaves.values():
        if size + leaf.nbytes > _GROUP:
            groups, size = [*groups, []], 0
        groups[-1].append(leaf)
        size += leaf.nbytes
    sums = [value for group in groups for value in jax.device_get(_sums(tuple(group)))]
    return {path: [str(leaf.dtype), int(value)] for (path, leaf), value in zip(leaves.items(), sums, strict=True)}


@jax.jit
def _sums(leaves: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Of each leaf sum((2 i + 1) bits[i]) modulo 2^32, i counting its numbers."""
    def one(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        count = jnp.uint32(0)
        for axis, size in enumerate(leaf.shape):
            count = count * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        return jnp.sum(bits * (2 * count + 1), dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


def _sum(leaf: np.ndarray) -> int:
    """`_sums` of one array, on the host and with little memory."""
    bits, total = leaf.reshape(-1).view(f"uint{8 * leaf.dtype.itemsize}"), 0
    for start in range(0, len(bits), _BLOCK):
        block = bits[start:start + _BLOCK].astype(np.uint32)
        weights = 2 * np.arange(start, start + len(block), dtype=np.uint64) + 1
        total += int(np.sum(block * weights.astype(np.uint32), dtype=np.uint32))
    return total % 2**32


def _absolute(path: epath.PathLike) -> epath.Path:
    """As Orbax wants it; to `resolve`, gs://bucket is a folder of the working directory."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.expanduser().resolve()


def _notes(step: epath.Path) -> dict[str, Any]:
    """The notes in a step's folder; raises as `Checkpoints.notes`."""
    notes = json.loads((step / "notes" / "metadata").read_text())
    try:
        whole = "score" in notes and all(len(mark) == 2 for mark in notes["checksums"].values())
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"the notes of step {step.name} are not whole")
    return notes


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _anywhere(value: bool) -> bool:
    """Whether it is so in any process."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(value)).any())


def _concurrent(like: Any) -> int:
    """GB to have under way at once while reading: Orbax wants room for the largest leaf, and would take 96."""
    return 1 + max((math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(like)), default=0) // 10**9


def _reason(error: BaseException) -> str:
    """The first cause in a line; of a long one the ends, where TensorStore says what it is about and why."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: " + (line if len(line) < 200 else f"{line[:60]} ... {line[-120:]}")


@functools.cache
def _hush() -> None:
    """TensorStore tells at length of each read or write that fails after the first, whose exception tells of all."""
    usual, known = sys.unraisablehook, ("TensorStore", "vent loop is closed")
    sys.unraisablehook = lambda told: None if any(name in str(told.exc_value) for name in known) else usual(told)


def save_weights(folder: epath.PathLike, config: Any, params: Any) -> None:
    """Write a model's parameters as an Orbax folder with a `model.json` that says what they are of."""
    folder = _absolute(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params)
    note = {"kind": type(config).__name__, "config": dataclasses.asdict(config)}
    (folder / "model.json").write_text(json.dumps(note, indent=2) + "\n")  # last: it says that the folder is whole


def weights_config(path: epath.PathLike) -> Any:
    """The config of what `load_weights` would load, from its note alone.

    Raises:
      UserError: as `load_weights`.
    """
    return _weights(_absolute(path))[0]


def load_weights(path: epath.PathLike, ema: bool = False, place: Callable[[Any], Any] | None = None
                 ) -> tuple[Any, Any]:
    """Config and parameters of a folder of `save_weights`, or of a workdir's last checkpoint, in the dtype they have.

    Args:
      path: the folder or workdir.
      ema: of a workdir, take the averaged parameters where the run keeps any.
      place: the shardings to read them into, from their ShapeDtypeStructs; None gives numpy arrays.

    Raises:
      UserError: a note that says no model, no checkpoint, or one that is damaged.
    """
    config, where, run = _weights(_absolute(path))
    _hush()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree, name = checkpointer.metadata(where).item_metadata.tree, None
            if run:  # the optimizer's moments stay on disk
                name = "ema" if ema and jax.tree.leaves(tree.get("ema")) else "params"
                tree = {name: tree[name]}
            if place is None:
                args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            else:
                shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
                args = jax.tree.map(lambda sharding: ocp.ArrayRestoreArgs(sharding=sharding), place(shapes))
            restored = checkpointer.restore(where, args=ocp.args.PyTreeRestore(tree, args, partial_restore=True))
    except Exception as error:  # whatever Orbax makes of files that are not its own, or not whole
        raise UserError(f"{where}: cannot be read as an Orbax checkpoint ({type(error).__name__})") from None
    if not run:
        return config, restored
    try:
        saved = _notes(where.parent)["checksums"]
    except (OSError, ValueError) as error:
        raise UserError(f"{where.parent}: its notes are damaged ({_reason(error)})") from None
    found = _checksums(restored) if place else {
        path: [str(leaf.dtype), _sum(leaf)] for path, leaf in _by_path(restored).items()}
    if wrong := [path for path, value in found.items() if saved.get(path) != value]:
        raise UserError(f"{where}: {wrong[0]} has other numbers than were saved")
    return config, restored[name]


def _weights(path: epath.Path) -> tuple[Any, epath.Path, bool]:
    """The model's config, where its parameters are, and whether that is a run's state."""
    try:
        if run := not (path / "model.json").exists():
            fields = json.loads((path / "config.json").read_text())
            if fields.get("lora"):
                raise UserError(f"{path}: a run that trains a LoRA has no model of its own; its LoRA files are in "
                                f"{path / 'exports'}")
            config = MMDiTConfig(**fields["model"])
            steps = [int(step.name) for step in (path / "checkpoints").iterdir() if step.name.isdigit()]
            where = path / "checkpoints" / str(max(steps, default="none")) / "state"
        else:
            note = json.loads((path / "model.json").read_text())
            config, where = _KINDS[note["kind"]](**note["config"]), path / "params"
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path}: says of no model what it is ({type(error).__name__}: {error})") from None
    if not where.exists():
        raise UserError(f"{path}: no parameters there; expected {where}")
    return config, where, run
