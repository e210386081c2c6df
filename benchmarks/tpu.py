"""What the TPU's own compiler says that the 12B model's programs cost, of this checkout and of an older commit.

Attention of a layer, the full fine-tune step on 8, 64 and 256 chips, a single block, a LoRA step on an int8 base, and a
step of an edit on one chip and on eight: 512 text and 4,096 image tokens, one sample a device, bfloat16, ACE++'s
geometry. Then the models around it: a picture of 1024 x 1024, a prompt of 512 tokens. Cycles are libtpu's: its
estimates of products and fusions and the final schedules of kernels, loops times trips, without waiting for memory or
for other devices. Nothing runs; no figure was measured on a TPU.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from acejax.aot import compiler
from acejax.data import written
from acejax.errors import UserError
from acejax.model import flops
from acejax.model.config import MMDiTConfig
from acejax.parallel.chips import CHIPS
from benchmarks import tpu_run
from benchmarks.tpu_run import Cost

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "benchmarks" / "results" / "tpu.json"
CACHE = CHECKOUT / ".cache" / "tpu"
MILLION, BILLION, GB = 1e6, 1e9, 1e9
TEXT, IMAGE = 512, 4096
ATTENTION = ("attention", "splash")  # how kernels of attention are called


def whole(cost: Cost) -> float:
    return cost.total


def outside_attention(cost: Cost) -> float:
    return cost.total - cost.of_kernels(*ATTENTION)


def of_one_core(cost: Cost) -> float:
    """Kernels not divided by the cores that share them."""
    return cost.cycles + cost.of_kernels() * cost.cores


def zero_gathers(cost: Cost) -> float:
    return cost.zero_gathers


@dataclasses.dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
      name: of the row.
      unit: of its values.
      scale: what a value is divided by.
      programs: that are compiled for it, as the `FIGURES` of `side` name them; of several the cheapest counts.
      must: the most that it may be; a share of the older commit's where `relative`.
      goal: what would be better still.
      value: read off a program's cost.
      loop: of one layer of this stack.
      training: a full training step, of which MFU is told.
      side: the program that compiles it.
    """

    name: str
    unit: str
    scale: float
    programs: tuple[str, ...]
    must: float | None = None
    goal: float | None = None
    value: Callable[[Cost], float] = whole
    loop: str = ""
    relative: bool = False
    training: bool = False
    side: pathlib.Path = tpu_run.SIDE

    @property
    def chip(self) -> str:
        return next(chip for chip in CHIPS if chip in self.programs[0])


LAYER, STEP = "million cycles", "billion cycles"
MODEL = "million cycles a call"  # unlike a layer's, with seconds and memory
FIGURES = (
    *(Figure(f"attention {chip}", LAYER, MILLION, (f"attention {chip}",), must, goal, of_one_core)
      for chip, must, goal in (("v6e", 5.4, 4.4), ("v5p", 9.3, 7.4), ("v5e", 9.2, 7.3))),
    *(Figure(f"full {topology}", STEP, BILLION, (f"full {topology}",), must, goal, training=True)
      for topology, must, goal in (("v6e-8", 1.5, 1.0), ("v5p-128", 1.6, 1.4), ("v5e-256", 3.7, 3.1))),
    Figure("single block v6e-8, forward, outside attention", LAYER, MILLION, ("single block v6e-8",), 3.6, 3.0,
           outside_attention, "single_blocks"),
    Figure("one picture v6e-1, a step", STEP, BILLION, ("picture v6e-1",), 0.32, 0.25),
    *(Figure(f"LoRA, int8 base {topology}", STEP, BILLION, (f"lora {topology}",), 0.25, relative=True)
      for topology in ("v6e-1", "v6e-8")),
    Figure("one picture v6e-8, a step", STEP, BILLION, tuple(
        f"picture v6e-8 {axes}" for axes in ("tensor=8", "seq=8", "tensor=2,seq=4", "tensor=4,seq=2")), 0.09, 0.053),
    Figure("all-reduce that stands for a gather v5p-128", "GB", GB, ("full v5p-128",), 0.0, value=zero_gathers),
    *(Figure(f"{name} {topology}", MODEL, MILLION, (f"{program} {topology}",), side=tpu_run.ENCODERS)
      for name, program in (("autoencoder, encode", "encode"), ("autoencoder, decode", "decode"), ("T5", "t5"),
                            ("CLIP", "clip")) for topology in ("v6e-1", "v5e-1", "v5p-1")),
)
ROTATE = {f"attention {chip}": f"rotate {chip}" for chip in ("v6e", "v5p", "v5e")}  # listed beside, not counted


def main(argv: list[str]) -> int:
    """Compile each figure; 1 where one is not what it must be."""
    parser = argparse.ArgumentParser(prog="acejax bench tpu", description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="REV", help="a commit, compiled likewise: both values and their ratio")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="figures whose names start so")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE",
                        help=f"write the figures there; by default {RESULTS.relative_to(CHECKOUT)} where all are made. "
                             "With --only the file keeps its other rows, each with its own date and commit")
    parser.add_argument("--cache", type=pathlib.Path, metavar="FOLDER", default=CACHE,
                        help="of compiled programs, so that a run that was interrupted goes on; by default "
                             f"{CACHE.relative_to(CHECKOUT)}")
    parser.add_argument("--fresh", action="store_true", help="compile what the cache has as well")
    args = parser.parse_args(argv)
    compiler.check()
    figures = chosen(args.only)
    if args.json is None and not args.only:
        args.json = RESULTS
    written.check_place(args.json)
    others = _others(args.json, args.against, figures) if args.only and args.json else []
    rows = []
    with _checkout(args.against) as older:
        for count, figure in enumerate(figures, 1):
            print(f"[{count}/{len(figures)}] {figure.name} ...", flush=True)
            rows.append(measure(figure, older, args.cache.resolve(), args.fresh))
            print(f"      {line(rows[-1])}", flush=True)
    if args.json:
        record = report([*others, *rows], args.against, argv)
        written.write(args.json, (json.dumps(record, indent=1) + "\n").encode())
    print("\n" + "\n".join(line(row) for row in rows))
    return 0 if all(row["holds"] is not False for row in rows) else 1


def _others(path: pathlib.Path, against: str | None, figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """The rows of a record that are not made now.

    Raises:
      UserError: they were made with other versions, or held against another commit, or one is no figure.
    """
    if not path.is_file():
        return []
    record = json.loads(path.read_text())
    now = {"against": against and _git("rev-parse", "--short", against), "versions": tpu_run.versions()}
    for name, value in now.items():
        if record[name] != value:
            raise UserError(f"--json={path}: {name} of its rows is {record[name]}, here {value}; expected the same, or "
                            "another file")
    made = {figure.name for figure in figures}
    rows = [row for row in record["rows"] if row["figure"] not in made]
    if unknown := [row["figure"] for row in rows if row["figure"] not in {figure.name for figure in FIGURES}]:
        raise UserError(f"--json={path}: its row {unknown[0]!r} is no figure; expected another file")
    return rows


def chosen(only: Sequence[str] | None) -> list[Figure]:
    """The figures whose names start so, in any case.

    Raises:
      UserError: a name that is none's.
    """
    if not only:
        return list(FIGURES)
    for name in only:
        if not any(figure.name.startswith(name) for figure in FIGURES):
            raise UserError(f"--only: no figure is named {name!r}; known: "
                            + "; ".join(figure.name for figure in FIGURES))
    return [figure for figure in FIGURES if figure.name.startswith(tuple(only))]


@contextlib.contextmanager
def _checkout(revision: str | None) -> Iterator[pathlib.Path | None]:
    """A worktree of a commit while it is needed.

    Raises:
      UserError: no such commit, or no git.
    """
    if revision is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("--against: git is not installed here") from None
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def measure(figure: Figure, older: pathlib.Path | None, cache: pathlib.Path = CACHE, fresh: bool = False
            ) -> dict[str, Any]:
    """A row of the report: `ours`, `against` (None without an older checkout), `ratio`, `must` and whether it holds."""
    ours = side(figure, CHECKOUT, cache, fresh)
    against = side(figure, older, cache, fresh) if older else None
    row = {"figure": figure.name, "unit": figure.unit, "ours": ours["value"],
           "against": against and against["value"], "date": datetime.date.today().isoformat(),
           "commit": _git("describe", "--always", "--dirty")}
    return row | judge(figure, row["ours"], row["against"]) | {"details": {"ours": ours, "against": against}}


def judge(figure: Figure, ours: float, against: float | None) -> dict[str, Any]:
    """Ratio, and whether `must` and `goal` hold; None where that can't be told."""
    ratio = None if not against else round(ours / against, 4)
    must = figure.must
    if figure.relative:
        must = None if against is None else round(figure.must * against, 4)
    return {"ratio": ratio, "must": must, "holds": None if must is None else ours <= must,
            "goal": figure.goal, "reached": None if figure.goal is None else ours <= figure.goal}


def side(figure: Figure, tree: pathlib.Path, cache: pathlib.Path, fresh: bool) -> dict[str, Any]:
    """The value of one checkout, and what it is made of."""
    found = {}
    for program in figure.programs:
        started = time.monotonic()
        folder = tpu_run.compile_figure(tree, program, cache, fresh, figure.side)
        found[program] = tpu_run.cost(folder, figure.chip, figure.loop)
        print(f"      {program} of {'this checkout' if tree == CHECKOUT else 'the older commit'}: "
              f"{figure.value(found[program]) / figure.scale:.3f} {figure.unit} "
              f"({time.monotonic() - started:.0f} s)", flush=True)
    best = min(found, key=lambda program: figure.value(found[program]))
    told = {"value": round(figure.value(found[best]) / figure.scale, 4), "program": best}
    told |= describe(figure, found[best])
    if len(found) > 1:
        told["all"] = {program: round(figure.value(cost) / figure.scale, 4) for program, cost in found.items()}
    if figure.name in ROTATE and (tree / "acejax" / "model" / "tpu" / "rotate.py").is_file():
        folder = tpu_run.compile_figure(tree, ROTATE[figure.name], cache, fresh)
        turned = tpu_run.cost(folder, figure.chip)
        told["rotate, beside it"] = round(of_one_core(turned) / figure.scale, 4)
    return told


def describe(figure: Figure, cost: Cost) -> dict[str, Any]:
    """What a value is made of, per device."""
    chip, told = CHIPS[figure.chip], {"outside kernels": round(cost.cycles / figure.scale, 4)}
    if figure.scale != GB or figure.unit != "GB":
        told["in kernels"] = round(cost.of_kernels() / figure.scale, 4)
        told["kernels, million cycles"] = {name: f"{calls} x {cycles / MILLION:.3f}"
                                           for name, (calls, cycles) in sorted(cost.kernels.items())}
    if cost.cores > 1:
        told["cores that share kernels"] = cost.cores
    if figure.loop or figure.unit == LAYER:
        return told
    seconds = cost.total / chip.clock
    told |= {"seconds": round(seconds, 4), "peak GB": round(cost.peak / GB, 3),
             "collectives GB": {kind: round(size / GB, 3) for kind, size in sorted(cost.collectives.items())},
             "all-reduce that stands for a gather GB": round(cost.zero_gathers / GB, 3),
             "compile seconds": cost.seconds}
    if figure.training:
        model = flops.training_step(MMDiTConfig.ace_plus_fft(), TEXT, IMAGE)
        told["MFU"] = round(model / (seconds * chip.flops), 4)
    return told


def line(row: Mapping[str, Any]) -> str:
    """A row in words."""
    told = f"{row['figure']:48}{row['ours']:9.3f} {row['unit']:15}"
    if row["against"] is not None:
        told += f" against {row['against']:9.3f}" + (f", {row['ratio']:6.3f} of it" if row["ratio"] else "")
    if row["holds"] is not None:
        told += f"; must {row['must']:.3f}: {'holds' if row['holds'] else 'DOES NOT HOLD'}"
    if row["goal"] is not None:
        told += f", goal {row['goal']:.3f}{': reached' if row['reached'] else ''}"
    return told


def report(rows: Sequence[Mapping[str, Any]], against: str | None, argv: Sequence[str]) -> dict[str, Any]:
    """The record of a run, its rows in the order of `FIGURES`."""
    order = [figure.name for figure in FIGURES]
    rows = sorted(rows, key=lambda row: order.index(row["figure"]))
    return {
        "command": " ".join(["acejax bench tpu", *argv]), "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; compiled for TPUs that are not here",
        "versions": tpu_run.versions(), "against": against and _git("rev-parse", "--short", against),
        "tokens": {"text": TEXT, "image": IMAGE}, "rows": rows,
        "holds": all(row["holds"] is not False for row in rows)}
