"""Speed of the data path: decoded while training and from the feature cache, against Pillow's limit and PyTorch.

All columns read the same samples, in the same order, in one run, and take turns. A picture is a JPEG of 1 to 2
megapixels that is decoded (wanted, to edit, or a reference); masks are decoded too but not counted. A sample from the
cache counts as the pictures that it was made from.

  bare        Pillow alone: a JPEG at the least scale that suffices (draft), resized to its place on the canvas
  stream      acejax.data.online.Pictures through acejax.data.stream.Stream: canvases as bytes
  floats      the same, and from the bytes what the autoencoder sees
  cache       features from acejax.data.cache.features.Features through the stream
  torch       a DataLoader that makes the same canvases in float32 with antialiased bicubic resizing
  torch bytes the same in uint8, where torch resizes with vector instructions
  released    a DataLoader with the released code's recipe: nearest-exact, whole canvas, modify apart
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from acejax.data import buckets, manifest, prepare
from acejax.data.augment import AugmentConfig
from acejax.data.canvas import contents
from acejax.data.layout import CanvasConfig, Layout, visible
from acejax.data.manifest import Manifest, Row
from acejax.data.online import Pictures
from acejax.data.schedule import Stage
from acejax.data.stream import Stream, Table
from acejax.errors import UserError
from benchmarks import data_cache, data_files

WARM, AHEAD = 8, 4  # samples before the clock starts; samples made ahead
EARLY = 2000  # samples after which memory is looked at for the first time
RATIOS = {"stream / bare": 0.85, "stream / torch": 1.2, "cache / torch": 3.0, "floats / released": None,
          "stream / torch bytes": None}  # with their goals
Column = Callable[[], Iterator]


class Work(NamedTuple):
    """What all columns do: rows of the manifest, as often as a round needs them, with their layouts.

    Attributes:
      order: which samples of the source they are.
      pictures: of each sample.
    """

    order: list[int]
    rows: list[Row]
    layouts: list[Layout]
    pictures: np.ndarray


def main(argv: list[str]) -> int:
    """Measure and print; `--json` keeps the figures."""
    parser = argparse.ArgumentParser(prog="acejax bench data", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=500, help="distinct pictures")
    parser.add_argument("--samples", type=int, default=2000, help="lines of the manifest")
    parser.add_argument("--megapixels", type=float, nargs=2, default=(1.0, 2.0), metavar=("LEAST", "MOST"))
    parser.add_argument("--tokens", type=int, default=4096, help="the canvas' budget; a token is 16 x 16 pixels")
    parser.add_argument("--seconds", type=float, default=8, help="of a round of one column, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="processes that read; 0: this one does")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="then draw N samples and watch the memory")
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the pictures for the next run")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    counts = args.files, args.samples, args.rounds, args.tokens
    if min(counts) < 1 or args.workers < 0 or args.seconds <= 0 or args.soak < 0:
        raise UserError("bench data: expected at least one file, sample and round, and no negative number")
    if not 0 < args.megapixels[0] <= args.megapixels[1]:
        raise UserError(f"--megapixels {args.megapixels[0]:g} {args.megapixels[1]:g}; expected least and most")
    for name, path in (("--folder", args.folder), ("--json", args.json and args.json.parent)):
        if path and not path.is_dir():
            raise UserError(f"{name}: found no folder {path}")
    with tempfile.TemporaryDirectory(prefix="acejax-data-") as scratch:
        folder = pathlib.Path(scratch)
        path = data_files.generate(args.folder or folder, args.files, args.samples, tuple(args.megapixels))
        read, config = manifest.read(path), CanvasConfig(max_tokens=args.tokens)
        figures = {"date": datetime.date.today().isoformat(), "machine": machine(), "files": args.files,
                   "samples": args.samples, "tokens": args.tokens, "megapixels": list(args.megapixels),
                   "workers": args.workers, "jpeg_kilobytes": kilobytes(read)}
        figures |= measure(read, config, folder, args.seconds, args.rounds, args.workers)
        show(figures)
        if args.soak:
            figures["memory"] = soak(read, config, args.soak)
            print("memory: {early_megabytes:.0f} MB after {early:,} samples, {end_megabytes:.0f} MB after {samples:,}, "
                  "{most_megabytes:.0f} MB at most in between".format(**figures["memory"]))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(read: Manifest, config: CanvasConfig, folder: pathlib.Path, seconds: float, rounds: int, workers: int
            ) -> dict[str, Any]:
    """Pictures and samples a second of every column that can be measured here, and their ratios."""
    source = manifest.Source(read)
    stream = stream_of(Pictures(source, config))
    count = calibrated(read, config, stream, seconds * max(1, workers))
    work = make_work(read, config, stream, WARM + count + AHEAD * max(1, workers))
    columns, missing = make_columns(work, source, config, stream, folder, workers)
    pictures = float(work.pictures[WARM:WARM + count].mean())
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in columns}
    turns = [(name, column) for _ in range(rounds) for name, column in columns.items()]
    with tqdm(turns, "rounds") as progress:
        for name, column in progress:
            progress.set_postfix_str(name)
            taken[name].append(timed(column(), 10 * count if name == "cache" else count))
    figures = {name: summary(times, pictures, workers) for name, times in taken.items()}
    ratios = {name: ratio(*(figures[side] for side in name.split(" / "))) | {"goal": goal}
              for name, goal in RATIOS.items() if all(side in figures for side in name.split(" / "))}
    return {"round_samples": count, "rounds": rounds, "pictures_a_sample": pictures,
            "load": os.getloadavg(), "columns": figures, "ratios": ratios, "left_out": missing}


def make_columns(work: Work, source: Sequence, config: CanvasConfig, stream: Stream, folder: pathlib.Path,
                 workers: int) -> tuple[dict[str, Column], dict[str, str]]:
    """What can be measured, and why the rest cannot."""
    length = len(work.rows)

    def read(stream: Stream, steps: int) -> Iterator:
        return stream.batches(0, steps, threads=1, ahead=AHEAD, workers=workers)

    columns: dict[str, Column] = {
        "bare": lambda: bare(work, workers), "stream": lambda: read(stream, length),
        "floats": lambda: ([contents(one) for one in batch.arrays["canvas"]] for batch in read(stream, length))}
    missing = {}
    cached = stream_of(data_cache.build(source, work.order, config, folder))
    columns["cache"] = lambda: read(cached, 10 * length)
    if importlib.util.find_spec("torch"):
        from benchmarks import data_torch as peers
        columns |= {
            "torch": lambda: peers.samples(peers.Antialiased(work.rows, work.layouts), workers),
            "torch bytes": lambda: peers.samples(peers.AntialiasedBytes(work.rows, work.layouts), workers),
            "released": lambda: peers.samples(peers.Released(work.rows, config.max_tokens), workers)}
    else:
        missing |= dict.fromkeys(("torch", "torch bytes", "released"), "PyTorch is not installed")
    return columns, missing


def stream_of(table: Table) -> Stream:
    """One sample a step, as the released code has it."""
    chosen = buckets.choose(table.tokens)
    return Stream(table, [Stage(1)], chosen, dict.fromkeys(chosen, 1), seed=0)


def make_work(read: Manifest, config: CanvasConfig, stream: Stream, length: int) -> Work:
    """The first `length` samples of the stream, with the layouts that `Pictures` draws."""
    source = manifest.Source(read)
    order = [stream.schedule.sample(stream.schedule[step], 0) for step in range(length)]
    layouts = [prepare.plan(source[i], config, AugmentConfig(), np.random.default_rng((0, i))).layout for i in order]
    rows = [read.rows[i] for i in order]
    return Work(order, rows, layouts, np.array([1 + (row.image is not None) + len(row.references) for row in rows]))


def bare(work: Work, workers: int) -> Iterator:
    """Nothing but Pillow; the pictures are dropped."""
    if not workers:
        yield from map(bare_sample, work.rows, work.layouts)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_bare_pair, zip(work.rows, work.layouts, strict=True))


def bare_sample(row: Row, layout: Layout) -> None:
    """Decode and resize a sample's pictures and mask."""
    size = layout.height, layout.target_width
    for path, unit in zip((row.target, row.image, *row.references), (size, size, *zip(
            layout.contents[:-1], layout.widths[:-1], strict=True)), strict=True):
        if path is not None:
            bare_picture(path, unit, Image.Resampling.BICUBIC)
    if row.mask is not None:
        bare_picture(row.mask, size, Image.Resampling.BOX)


def bare_picture(path: str, size: tuple[int, int], filter: Image.Resampling) -> None:
    with Image.open(path) as image:
        top, left, height, width = visible(image.size[::-1])
        image.draft(None, (-(-image.width * size[1] // width), -(-image.height * size[0] // height)))
        image.load()
        top, left, height, width = visible(image.size[::-1])
        if (height, width) != size:
            image.resize(size[::-1], filter, (left, top, left + width, top + height), reducing_gap=3.0)


def _bare_pair(pair: tuple[Row, Layout]) -> None:
    bare_sample(*pair)


def calibrated(read: Manifest, config: CanvasConfig, stream: Stream, seconds: float) -> int:
    """How many samples Pillow makes in that time, at least 2."""
    wall, _ = timed(bare(make_work(read, config, stream, 2 * WARM), 0), WARM)
    return max(2, round(seconds / wall))


def timed(samples: Iterator, count: int) -> tuple[float, float]:
    """Seconds a sample, by the clock and of this process's CPU time, after a few samples that are not counted."""
    samples = iter(samples)
    for _ in range(WARM):
        next(samples)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(samples)
    taken = (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count
    for _ in samples:  # workers end by themselves
        pass
    return taken


def summary(times: Sequence[tuple[float, float]], pictures: float, workers: int) -> dict[str, Any]:
    """A column: medians over its rounds."""
    wall = statistics.median(pair[0] for pair in times)
    figures = {"pictures_per_second": pictures / wall, "samples_per_second": 1 / wall, "rounds": times}
    if not workers:
        cpu = statistics.median(pair[1] for pair in times)
        figures |= {"cpu_seconds_per_picture": cpu / pictures, "cpu_seconds_per_sample": cpu}
    return figures


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """How many times as fast, the median over rounds: by the clock, and by CPU time where it was measured."""
    pairs = list(zip(ours["rounds"], theirs["rounds"], strict=True))
    figures = {"wall": statistics.median(their[0] / our[0] for our, their in pairs)}
    if "cpu_seconds_per_sample" in ours:
        figures["cpu"] = statistics.median(their[1] / our[1] for our, their in pairs)
    return figures


def soak(read: Manifest, config: CanvasConfig, samples: int) -> dict[str, Any]:
    """Resident memory of this process while it draws samples, in two threads."""
    table = Pictures(manifest.Source(read), config)
    seen = []
    for number, _ in enumerate(stream_of(table).batches(0, samples, threads=2, ahead=AHEAD), 1):
        if number % max(1, samples // 100) == 0:
            seen.append((number, resident() / 1e6))
    early = min((one for one in seen if one[0] >= EARLY), default=seen[0])
    later = [megabytes for number, megabytes in seen if number >= early[0]]
    return {"samples": samples, "early": early[0], "early_megabytes": early[1], "end_megabytes": seen[-1][1],
            "most_megabytes": max(later), "least_megabytes": min(later), "growth_megabytes": seen[-1][1] - early[1],
            "megabytes": seen}


def resident() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not tell."""
    try:
        found = re.search(r"VmRSS:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def kilobytes(read: Manifest) -> dict[str, float]:
    """Sizes of the files."""
    sizes = [os.path.getsize(path) / 1000 for path in {row.target for row in read.rows}]
    return {"median": statistics.median(sizes), "least": min(sizes), "most": max(sizes)}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    versions = {"pillow": PIL.__version__, "numpy": np.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("torch"):
        versions["torch"] = importlib.metadata.version("torch")
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), **versions}


def show(figures: Mapping[str, Any]) -> None:
    """Print the columns, their ratios and what is left out."""
    print(f"{figures['files']} JPEGs of {figures['megapixels'][0]:g} to {figures['megapixels'][1]:g} megapixels "
          f"({figures['jpeg_kilobytes']['median']:.0f} KB), {figures['pictures_a_sample']:.2f} pictures a sample, "
          f"{figures['rounds']} rounds of {figures['round_samples']} samples, "
          f"{figures['workers'] or 'no'} workers, load {figures['load'][0]:.1f}")
    for name, row in figures["columns"].items():
        cpu = row.get("cpu_seconds_per_picture")
        print(f"{name:<12} {row['pictures_per_second']:7.1f} pictures/s {row['samples_per_second']:7.1f} samples/s"
              + ("" if cpu is None else f" {1e3 * cpu:7.1f} ms of CPU a picture"))
    for name, row in figures["ratios"].items():
        cpu = f", by CPU time {row['cpu']:.2f}" if "cpu" in row else ""
        goal = "" if row["goal"] is None else f"   (goal {row['goal']:g})"
        print(f"{name:<21} {row['wall']:5.2f}{cpu}{goal}")
    for name, why in figures["left_out"].items():
        print(f"{name}: left out, {why}")
