"""Compiled steps that a run finds, so that it neither traces nor compiles them, and leaves for the next start.

A step is used where all that its program depends on is what it was compiled for: the key. The trees of its arguments
and results are made here from the run's own Program; of the file comes the program alone (`acejax.train.saved`).
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils, serialize_executable
from jax.experimental.compilation_cache import compilation_cache

import acejax
from acejax.errors import UserError
from acejax.parallel import kernels, processes, rules
from acejax.parallel.options import options
from acejax.train import saved
from acejax.train.program import Program

PACKAGES = ("jax", "jaxlib", "flax", "optax")
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
            "jax_numpy_dtype_promotion", "jax_use_shardy_partitioner", "jax_debug_nans", "jax_debug_infs",
            "jax_random_seed_offset", "jax_enable_custom_prng", "jax_softmax_custom_jvp", "jax_optimization_level",
            "jax_exec_time_optimization_effort", "jax_memory_fitting_level", "jax_memory_fitting_effort")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
OTHERS = re.compile(r"--xla_(force_host_platform_device_count|dump_\w+)\b")  # flags that change no program
TOLD = 3  # differences in a message
Steps = Mapping[int, jax.stages.Compiled]  # by the image tokens of a bucket


class Unfit(UserError):
    """A file whose program is not used, though nothing is wrong with the file."""


def check(path: str) -> None:
    """What can be wrong with a place for executables before a run starts.

    Raises:
      UserError: a file that is not there or is no saved executable; a folder that can't be; several processes on CPUs,
        where such programs wait for each other for ever (jax 0.10).
    """
    if (count := jax.process_count()) > 1 and jax.default_backend() == "cpu":
        raise UserError(f"--executables={path}: found {count} processes on CPUs, expected one, or accelerators: "
                        "compiled programs that several CPU processes load wait for each other for ever")
    place = epath.Path(path)
    if _is_file(place):
        saved.read(place)
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--executables={path}: {error.strerror or error}; expected a folder, or a file that `acejax "
                        "plan --save` has written") from error


def _is_file(path: epath.Path) -> bool:
    """By its name: a folder of a bucket is not there before it holds something."""
    return path.name.endswith(saved.SUFFIX) or path.is_file()


def key(program: Program, batch: Mapping[str, Any]) -> dict[str, Any]:
    """All that the compiled step of a batch depends on, as JSON has it.

    Args:
      program: the run's step.
      batch: its arguments, or ShapeDtypeStructs of them.
    """
    run, mesh, setting = program.run, program.mesh, program.setting
    device = kernels.device_of(mesh)
    how = dataclasses.asdict(run.execution) | {"compiler_options": None}  # they are below, with those of the platform
    lora = run.lora and dataclasses.asdict(run.lora) | {"init_from": None}  # of a file, shapes alone, in `state`
    found = {
        "versions": {"acejax": _source()} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "backend": _backend(device), "device": device.device_kind,
        "mesh": dict(mesh.shape), "places": [_place(each) for each in mesh.devices.flat],
        "settings": {name: getattr(jax.config, name, None) for name in SETTINGS} | {
            name: [flag for flag in os.environ.get(name, "").split() if not OTHERS.match(flag)]  # of two the last holds
            for name in FLAGS},
        "options": options(device.platform, run.execution.compiler_options) or {},
        "config": {"seed": run.seed, "steps": run.steps, "model": dataclasses.asdict(run.model), "execution": how,
                   "optimizer": dataclasses.asdict(run.optimizer), "loss": dataclasses.asdict(run.loss),
                   "lora": lora},
        "data": {"references": setting.references, "tasks": setting.tasks},
        "batch": {name: _shape(leaf) for name, leaf in sorted(batch.items())},
        "state": _digest(_lines((program.state, program.frozen))),
    }
    return json.loads(json.dumps(found))


def differences(found: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What a file's key has otherwise than the run's, as lines `field is A, here B`."""
    one, other = _flat(found), _flat(here)
    return [f"{name} is {_short(one.get(name))}, here {_short(other.get(name))}"
            for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


@contextlib.contextmanager
def afresh() -> Iterator[None]:
    """What is compiled in here comes from the compiler, and not from jax's cache of compiled programs.

    A program that was read from there can't be saved: jax serialises it, but without some of its functions, which is an
    error when it runs (`findings/jax-serialize-cached.sh`).
    """
    before = jax.config.jax_enable_compilation_cache
    _cache(False)
    try:
        yield
    finally:
        _cache(before)


def _cache(on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()  # jax looks at the setting once


def save(path: epath.PathLike, program: Program, batch: Mapping[str, Any], compiled: jax.stages.Compiled) -> int:
    """Write a step that was compiled `afresh`; returns the payload's bytes. Its devices need not be here.

    Raises:
      UserError: this jax can't serialise it, or the file can't be written.
    """
    metrics = tuple(sorted(compiled.out_tree.unflatten(range(compiled.out_tree.num_leaves))[1]))
    try:
        payload, *trees = serialize_executable.serialize(compiled)
    except Exception as error:  # jax pickles it, and a runtime may refuse
        raise UserError(f"jax {jax.__version__} can't serialise this step ({_line(error)}); it is not saved") from error
    if tuple(trees) != _trees(program, batch, metrics):
        raise UserError(f"{path}: the step's arguments or results are not those of the program that it was made of")
    saved.write(path, key(program, batch), metrics, payload)
    return len(payload)


def load(path: epath.PathLike, program: Program, batch: Mapping[str, Any]) -> jax.stages.Compiled:
    """The step that a file holds, ready for the mesh. **This runs what the file holds**: see `acejax.train.saved`.

    Raises:
      Unfit: its key is not the program's, or jax doesn't load it.
      UserError: the file is damaged.
    """
    header = saved.read(path)
    if others := differences(header.key, key(program, batch)):
        raise Unfit(f"{path} is of another step: {_some(others)}")
    trees = _trees(program, batch, header.metrics)
    devices = list(program.mesh.devices.flat)
    payload = saved.payload(path)
    try:
        compiled = serialize_executable.deserialize_and_load(payload, *trees, backend=devices[0].client,
                                                             execution_devices=devices)
        taken = [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(compiled.args_info)]
    except Exception as error:  # whatever a runtime, or jax's pickle, has against it
        raise Unfit(f"{path} can't be loaded here ({_line(error)})") from error
    given = [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(_arguments(program, batch))]
    if taken != given:
        raise Unfit(f"{path} takes other arrays than this step's: {len(taken)} of them, expected {len(given)}")
    return compiled


class Place:
    """Where a run's compiled steps are: a folder, or one file.

    Args:
      path: as `check` has found it good; "" is nowhere.
    """

    def __init__(self, path: str):
        self._path = path and epath.Path(path)
        self._folder = bool(path) and not _is_file(self._path)

    @property
    def keeps(self) -> bool:
        """Whether `keep` saves anything: what it gets is then to be compiled `afresh`."""
        return self._folder

    def find(self, program: Program, batches: Mapping[int, Mapping[str, Any]]) -> Steps:
        """The steps that are there, by bucket; a line for each of the others says why not.

        All processes find the same ones.

        Raises:
          UserError: a file that is damaged.
        """
        if not self._path:
            return {}
        files = sorted(self._path.glob(f"*{saved.SUFFIX}")) if self._folder else [self._path]
        keys = {file: saved.read(file).key for file in files}
        found, why = {}, {}
        for bucket, batch in batches.items():
            here = key(program, batch)
            apart = {file: len(differences(keys[file], here)) for file in files}
            same = [file for file in files if not apart[file]]
            nearest = same or sorted(files, key=apart.__getitem__)[:1]  # which says what differs
            why[bucket] = f"{self._path} has none yet"
            for file in nearest:
                try:
                    found[bucket] = load(file, program, batch)
                    break
                except Unfit as error:
                    why[bucket] = str(error)
        if jax.process_count() > 1:  # one program for all
            mine = np.array([bucket in found for bucket in batches])
            everywhere = multihost_utils.process_allgather(mine).reshape(-1, len(mine)).all(0)
            for bucket, good in zip(batches, everywhere, strict=True):
                if not good and found.pop(bucket, None):
                    why[bucket] = "another process can't load it"
        for bucket in batches:
            processes.say(f"the step of {bucket} tokens: " + (
                "a saved executable, nothing to compile" if bucket in found else f"compiled; {why[bucket]}"))
        return found

    def keep(self, program: Program, batches: Mapping[int, Mapping[str, Any]], compiled: Steps) -> None:
        """Save steps into the folder; the first process writes. What can't be saved is told, and no error."""
        if not self.keeps or not processes.is_first():
            return
        for bucket, step in compiled.items():
            name = f"step_{bucket}_tokens_{_digest(json.dumps(key(program, batches[bucket])))}{saved.SUFFIX}"
            try:
                save(self._path / name, program, batches[bucket], step)
            except UserError as error:
                processes.say(f"the step of {bucket} tokens is not saved: {error}")


def _arguments(program: Program, batch: Mapping[str, Any]) -> Any:
    return (program.state, dict(batch)), {"frozen": program.frozen}


def _trees(program: Program, batch: Mapping[str, Any], metrics: tuple[str, ...]) -> tuple[Any, Any]:
    """The trees of a step's arguments and of its results."""
    return tuple(map(jax.tree.structure, (_arguments(program, batch), (program.state, dict.fromkeys(metrics, 0)))))


def _backend(device: Any) -> str:
    """The platform and the build of its compiler, which writes the code."""
    build = " ".join(device.client.platform_version.removeprefix("PJRT C API").split())
    return f"{device.platform}: {build}" + (f", {_cpu()}" if device.platform == "cpu" else "")


@functools.cache
def _cpu() -> str:
    """What a CPU's code is made for: its instructions and the number of its cores."""
    told = pathlib.Path("/proc/cpuinfo")
    flags = re.search(r"^(flags|Features)\s*:(.*)$", told.read_text() if told.exists() else "", re.MULTILINE)
    return f"{platform.machine()}, {os.cpu_count()} cores, instructions {_digest(flags[2] if flags else '')}"


def _place(device: Any) -> str:
    """A device by its number and its place on the network."""
    where = [getattr(device, name) for name in ("slice_index", "coords") if getattr(device, name, None) is not None]
    return " ".join(map(str, (device.id, *where)))


@functools.cache
def _source() -> str:
    """A digest of acejax's own source, all of it: what a step depends on is not told apart."""
    root = pathlib.Path(acejax.__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if (name := path.relative_to(root)).parts[0] != "configs":  # an installed package has them inside
            total.update(f"{name.as_posix()}\n".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def _shape(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _lines(tree: Any) -> str:
    """Each leaf of a tree with its dtype, shape and sharding."""
    return "\n".join(f"{rules.path_of(path)} {_shape(leaf)} {leaf.sharding.spec}"
                     for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flat(tree: Any, before: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {before: tree}
    return {name: value for key, below in tree.items()
            for name, value in _flat(below, f"{before}.{key}" if before else key).items()}


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"{_short(value[:2])[:-1]}, ... {len(value)}]"
    return repr(value)


def _some(lines: list[str]) -> str:
    more = f", and {len(lines) - TOLD} more" if len(lines) > TOLD else ""
    return "; ".join(lines[:TOLD]) + more


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'nothing more').splitlines()[0][:200]}"
