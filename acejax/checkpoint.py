"""All Orbax calls: saving a run step by step and taking it up again; a model's weights alone."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from acejax.errors import UserError
from acejax.model.config import AutoencoderConfig, CLIPConfig, MMDiTConfig, T5Config

_KINDS = {kind.__name__: kind for kind in (MMDiTConfig, AutoencoderConfig, T5Config, CLIPConfig)}


class Checkpoints:
    """The checkpoints of one workdir, kept in `<workdir>/checkpoints/<step>`; saving goes on in the background."""

    def __init__(self, workdir: epath.PathLike, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            epath.Path(workdir).expanduser().resolve() / "checkpoints", options=options)  # Orbax wants absolute paths

    def latest(self) -> int | None:
        """The newest whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step with the shapes, dtypes and shardings of `like` (arrays or ShapeDtypeStructs)."""
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))

    def close(self) -> None:
        """Wait for what is being saved."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_weights(folder: epath.PathLike, config: Any, params: Any) -> None:
    """Write a model's parameters as an Orbax folder with a `model.json` that says what they are of."""
    folder = epath.Path(folder).expanduser().resolve()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params)
    note = {"kind": type(config).__name__, "config": dataclasses.asdict(config)}
    (folder / "model.json").write_text(json.dumps(note, indent=2) + "\n")  # last: it says that the folder is whole


def load_weights(path: epath.PathLike) -> tuple[Any, Any]:
    """Config and parameters (numpy arrays) of a folder of `save_weights`, or of a workdir's last checkpoint.

    Raises:
      UserError: a note that says no model, or no checkpoint.
    """
    path = epath.Path(path).expanduser().resolve()
    try:
        if (path / "model.json").exists():
            note = json.loads((path / "model.json").read_text())
            config, where, wrap = _KINDS[note["kind"]](**note["config"]), path / "params", None
        else:
            config = MMDiTConfig(**json.loads((path / "config.json").read_text())["model"])
            steps = [int(step.name) for step in (path / "checkpoints").iterdir() if step.name.isdigit()]
            where, wrap = path / "checkpoints" / str(max(steps, default="none")) / "default", "params"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: says of no model what it is ({type(error).__name__}: {error})") from None
    if not where.exists():
        raise UserError(f"{path}: no parameters there; expected {where}")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(where).item_metadata.tree
            wanted = {wrap: tree[wrap]} if wrap else tree  # the optimizer's moments stay on disk
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            restored = checkpointer.restore(where, args=ocp.args.PyTreeRestore(wanted, args, partial_restore=True))
    except Exception as error:  # whatever Orbax makes of files that are not its own, or not whole
        raise UserError(f"{where}: cannot be read as an Orbax checkpoint ({type(error).__name__})") from None
    return config, restored[wrap] if wrap else restored


def agree(workdir: epath.PathLike, config: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    """As `claim`, writing nothing: for a run that may still fail before it starts."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    found, wanted = (_flatten(one) for one in (json.loads(path.read_text()), json.loads(json.dumps(config))))
    for field in sorted(found.keys() | wanted.keys()):
        if found.get(field) != wanted.get(field) and not f"{field}.".startswith(tuple(f"{name}." for name in free)):
            raise UserError(
                f"workdir {workdir} holds a run with config.{field} = {found.get(field)!r}, this one has "
                f"{wanted.get(field)!r}; give another --workdir, or the config it was started with")


def claim(workdir: epath.PathLike, config: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    """Bind a workdir to a config: the first run writes `config.json`, a later one must agree with it.

    The fields `free`, and all below them, say how a run is computed, not what it computes, and may change.

    Raises:
      UserError: the workdir holds a run of another config, naming the first field that differs, or can't be written.
    """
    agree(workdir, config, free)
    _write(epath.Path(workdir) / "config.json", config)


def claim_data(workdir: epath.PathLike, digest: str) -> None:
    """Bind a workdir to the data that a run reads, as `claim`: the first run writes `data.json`.

    Raises:
      UserError: the run began with other data, or the workdir can't be written.
    """
    path = epath.Path(workdir) / "data.json"
    if path.exists() and (found := json.loads(path.read_text())["digest"]) != digest:
        raise UserError(f"workdir {workdir}: the data has changed since this run began (the digest of its features was "
                        f"{found}, now it is {digest}); give another --workdir, or the data it was started with")
    _write(path, {"digest": digest})


def _write(path: epath.Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / f"{path.name}.tmp"
        beside.write_text(json.dumps(content, indent=2))
        beside.replace(path)
    except OSError as error:
        raise UserError(f"workdir {path.parent} cannot be written: {error}") from error


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
