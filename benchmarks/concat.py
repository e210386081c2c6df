"""What 0-3 conditions cost: as channels (LCU++), as tokens of the sequence, and in ACE++ as it was released.

Three layouts of the same network, with the same text and pictures:

  sequence   every condition joins the sequence as a picture's worth of tokens, 64 channels wide (ACE, Kontext)
  channel    every condition widens the tokens by 384 channels (edit 64, modify 64, mask 256): 448 wide with one;
             more than one is hypothetical, no such weights exist
  released   the first condition is the edit picture, in the channels; further ones are references, joined as tokens

FLOPs are closed-form, times those of a jitted forward pass with random weights. Each round runs every shape once, so
that a disturbance of the machine meets all of them alike.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import acejax
from acejax.errors import UserError
from acejax.model import flops

LAYOUTS = {
    "sequence": "all conditions as tokens",
    "channel": "all conditions as channels",
    "released": "ACE++ as released: edit picture as channels, references as tokens",
}
CONDITIONS = range(4)
NOISY, CONDITION = 64, 384  # channels of a token: the noisy latent, and what one condition adds
MODELS = {"tiny": acejax.MMDiTConfig.tiny(), "12b": acejax.MMDiTConfig.ace_plus_fft()}
TOKENS = {"tiny": 256, "12b": 4096}  # a picture's; attention is then 27 and 20 % of the FLOPs
PER_TEXT = 8  # image tokens for one text token: 4,096 and 512 in ACE++
CAVEAT = ("References still cost tokens. ACE++ spares those of the edit picture, its mask and the modify picture; "
          "a reference is joined to the target along the width and lengthens the sequence, "
          "unless both are scaled down to a token budget.")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the transformer is given: token width, and how many pictures of `tokens` tokens beside `text` tokens."""

    channels: int
    pictures: int
    tokens: int
    text: int

    @classmethod
    def of(cls, layout: str, conditions: int, tokens: int, text: int) -> "Shape":
        as_channels = {"sequence": 0, "channel": conditions, "released": min(conditions, 1)}[layout]
        return cls(NOISY + CONDITION * as_channels, 1 + conditions - as_channels, tokens, text)

    def config(self, base: acejax.MMDiTConfig) -> acejax.MMDiTConfig:
        return dataclasses.replace(base, in_channels=self.channels)

    def flops(self, base: acejax.MMDiTConfig) -> int:
        return flops.forward(self.config(base), self.text, self.pictures * self.tokens).total

    def inputs(self, base: acejax.MMDiTConfig, dtype: Any) -> acejax.Tokens:
        """One random sample: square pictures joined along the width."""
        side = math.isqrt(self.tokens) * acejax.lcu.PATCH
        grid = acejax.lcu.positions(side, side * self.pictures)[None]
        random = np.random.default_rng(0)
        image, text, pooled = (jnp.asarray(random.standard_normal(shape), dtype) for shape in (
            (*grid.shape[:2], self.channels), (1, self.text, base.context_in_dim), (1, base.vec_in_dim)))
        one = jnp.ones(1, jnp.float32)
        return acejax.Tokens(image, grid, text, pooled, sigma=0.5 * one, guidance=one)


def random_weights(config: acejax.MMDiTConfig, dtype: Any) -> dict[str, Any]:
    """Small random parameters for speed alone: one bank of numbers over and over, since drawing 12 billion is slow.

    They are made in `dtype`, so that the 12B model fits a card; the bank's length, a prime, keeps rows from repeating.
    """
    bank = jnp.asarray(0.02 * np.random.default_rng(0).standard_normal(1_000_003), dtype)

    @functools.partial(jax.jit, static_argnums=1)
    def fill(bank, shape):
        size = math.prod(shape)
        return jnp.broadcast_to(bank, (-(-size // bank.size), bank.size)).ravel()[:size].reshape(shape)

    return jax.tree.map(lambda leaf: fill(bank, leaf.shape),
                        jax.eval_shape(functools.partial(acejax.init, config), jax.random.key(0)))


def measure(base: acejax.MMDiTConfig, shapes: list[Shape], execution: acejax.Execution,
            repeats: int) -> dict[Shape, list[float]]:
    """Milliseconds of each forward pass, `repeats` rounds over all shapes after a round of warm-up."""
    widest = max(shapes, key=lambda shape: shape.channels)
    weights = random_weights(widest.config(base), execution.dtype)
    step = jax.jit(acejax.apply, static_argnames=("config", "execution"))
    calls = {}
    for shape in shapes:  # they share all weights; a narrower token meets the first rows of the input projection
        img_in = weights["img_in"] | {"kernel": weights["img_in"]["kernel"][:shape.channels]}
        calls[shape] = functools.partial(step, shape.config(base), weights | {"img_in": img_in},
                                         shape.inputs(base, execution.dtype), execution=execution)
        start = time.perf_counter()
        jax.block_until_ready(calls[shape]())
        print(f"compiled {shape.channels} channels x {shape.text} + {shape.pictures * shape.tokens} tokens "
              f"in {time.perf_counter() - start:.1f} s", file=sys.stderr)

    times = {shape: [] for shape in shapes}
    for _ in range(1 + repeats):
        for shape, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[shape].append(1e3 * (time.perf_counter() - start))
    return {shape: taken[1:] for shape, taken in times.items()}


def rows(base: acejax.MMDiTConfig, tokens: int, text: int, times: dict[Shape, list[float]] | None = None) -> dict:
    """layout -> one row for each number of conditions: shape, FLOPs, milliseconds, ratios to no condition."""
    first = Shape.of("sequence", 0, tokens, text)
    table = {}
    for layout in LAYOUTS:
        table[layout] = []
        for conditions in CONDITIONS:
            shape = Shape.of(layout, conditions, tokens, text)
            row = {"conditions": conditions, "in_channels": shape.channels, "image_tokens": shape.pictures * tokens,
                   "text_tokens": text, "flops": shape.flops(base),
                   "flop_ratio": shape.flops(base) / first.flops(base)}
            if times:
                row["ms"] = {name: pick(times[shape]) for name, pick in (
                    ("median", statistics.median), ("min", min), ("max", max))}
                row["time_ratio"] = row["ms"]["median"] / statistics.median(times[first])
            table[layout].append(row)
    return table


def run(model: str, tokens: int, text: int, repeats: int, execution: acejax.Execution) -> dict[str, Any]:
    """Measure one model and put it beside the closed form of the 12B model; what `--json` writes."""
    base = MODELS[model]
    shapes = dict.fromkeys(Shape.of(layout, n, tokens, text) for layout in LAYOUTS for n in CONDITIONS)
    load = os.getloadavg()[0]  # of others: taken before our own
    times = measure(base, list(shapes), execution, repeats)
    return {
        "benchmark": "concat",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"platform": jax.default_backend(), "device": device(), "cores": os.cpu_count(),
                    "load_average": load},
        "versions": {"acejax": acejax.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "model": model, "dtype": jnp.dtype(execution.dtype).name, "attention": execution.attention, "batch": 1,
        "tokens": tokens, "text_tokens": text, "repeats": repeats, "layouts": LAYOUTS,
        "measured": rows(base, tokens, text, times),
        "closed_form_12b": {str(size): rows(MODELS["12b"], size, 512) for size in (1024, 4096)},
        "caveat": CAVEAT,
    }


def device() -> str:
    """The accelerator's name, or the processor's."""
    kind, info = jax.devices()[0].device_kind, Path("/proc/cpuinfo")
    if kind != "cpu" or not info.exists():
        return kind
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(report: dict[str, Any]) -> None:
    """Print both tables and the caveat."""
    print(f"{report['model']} model, {report['tokens']} tokens a picture + {report['text_tokens']} text, "
          f"{report['dtype']}, {report['attention']} attention, {report['repeats']} interleaved rounds "
          f"on {report['machine']['device']}")
    for layout, table in report["measured"].items():
        print(f"\n  {LAYOUTS[layout]}\n  conditions  channels  image tokens       GFLOP  x FLOPs   median ms  "
              f"{'(min - max)':20}x time")
        for row in table:
            spread = "({min:.2f} - {max:.2f})".format(**row["ms"])
            print(f"  {row['conditions']:10}  {row['in_channels']:8}  {row['image_tokens']:12}  "
                  f"{row['flops'] / 1e9:10.3f}  {row['flop_ratio']:7.3f}  {row['ms']['median']:10.2f}  "
                  f"{spread:18}  {row['time_ratio']:6.2f}")
    for size, tables in report["closed_form_12b"].items():
        print(f"\n12b model, closed form: {size} tokens a picture + 512 text, TFLOP (x no condition)\n  conditions"
              + "".join(f"{layout:>20}" for layout in LAYOUTS))
        for conditions in CONDITIONS:
            cells = (tables[layout][conditions] for layout in LAYOUTS)
            print(f"  {conditions:10}" + "".join(
                f"{row['flops'] / 1e12:10.1f} (x{row['flop_ratio']:6.4f})" for row in cells))
    print(f"\n{CAVEAT}")


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the measured ratios beside those of the 12B model: time as solid lines, FLOPs dashed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {  # color, marker and its size (hollow ones show what lies under them), label
        "sequence": ("#c0392b", "o", 5, "sequence concat:\nall as tokens"),
        "released": ("#d4940a", "s", 8, "ACE++ as released:\nedit picture as channels,\nreferences as tokens"),
        "channel": ("#1f5fa8", "o", 4, "channel concat:\nall as channels"),
    }
    dashed = (0, (4, 2.5))
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (measured, closed) = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
        base = report["measured"]["sequence"][0]["ms"]["median"]
        for layout, (color, marker, size, label) in styles.items():
            table = report["measured"][layout]
            times = [row["time_ratio"] for row in table]
            spread = [[abs(row["ms"][end] / base - ratio) for row, ratio in zip(table, times, strict=True)]
                      for end in ("min", "max")]
            points = {"color": color, "marker": marker, "markersize": size, "markerfacecolor": "white"}
            measured.errorbar(CONDITIONS, times, spread, linewidth=1.8, elinewidth=1, capsize=3, **points)
            own = [row["flop_ratio"] for row in table]
            measured.plot(CONDITIONS, own, color=color, linestyle=dashed, linewidth=1.2)
            large = [row["flop_ratio"] for row in report["closed_form_12b"]["4096"][layout]]
            closed.plot(CONDITIONS, large, linestyle=dashed, linewidth=1.4, **points)
            for axes, last, text in ((measured, times[-1], ""), (closed, large[-1], f"  {label}")):
                axes.annotate(f"×{last:.2f}{text}", (CONDITIONS[-1], last), (9, 0), textcoords="offset points",
                              color=color, va="center", annotation_clip=False)
        measured.plot([], [], color="#444444", linewidth=1.8, label="time (median; bars: min to max)")
        measured.plot([], [], color="#444444", linewidth=1.2, linestyle=dashed, label="FLOPs (closed form)")
        measured.legend(frameon=False, loc="upper left")
        name = {"tiny": "Tiny", "12b": "12B"}[report["model"]]
        for axes, title in ((measured, f"{name} model, measured: {report['tokens']:,} tokens a picture"),
                            (closed, "12B model, FLOPs: 4,096 tokens a picture")):
            axes.set_title(title, loc="left", pad=12)
        measured.set_ylabel("cost of a denoiser step\nrelative to no condition")
        for axes in (measured, closed):
            axes.set_xlabel("conditions")
            axes.set_xticks(CONDITIONS)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
            axes.set_axisbelow(True)
        figure.text(0.065, 0.025, f"{textwrap.fill(CAVEAT, 150)}\n"
                    f"{report['machine']['device']}, {report['dtype']}, {report['attention']} attention, "
                    f"{report['repeats']} interleaved rounds. More than one condition in the channels is hypothetical.",
                    fontsize=8.5, color="#444444")
        figure.subplots_adjust(left=0.065, right=0.8, top=0.92, bottom=0.24, wspace=0.13)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def main(argv: list[str]) -> int:
    """`acejax bench concat`.

    Raises:
      UserError: a canvas, model or output file that cannot be.
    """
    parser = argparse.ArgumentParser(prog="acejax bench concat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU even where there is an accelerator")
    parser.add_argument("--model", choices=MODELS, default="tiny", help="which model is measured (default: tiny)")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of a square picture (tiny 256, 12b 4096)")
    parser.add_argument("--text", type=int, metavar="N", help=f"text tokens (default: tokens / {PER_TEXT})")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="measured rounds (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios, as PNG")
    args = parser.parse_args(argv)
    tokens = TOKENS[args.model] if args.tokens is None else args.tokens
    text = max(1, tokens // PER_TEXT) if args.text is None else args.text

    if not 1 <= tokens <= max(TOKENS.values()) or math.isqrt(tokens) ** 2 != tokens:
        raise UserError(f"--tokens is {tokens}; it must be a square up to 4096, such as 64, 256 or 1024")
    for name, value in (("--text", text), ("--repeats", args.repeats)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    for name, path in (("--json", args.json), ("--plot", args.plot)):
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{name} {path}: not a file in an existing folder")
    if args.plot and args.plot.suffix != ".png":
        raise UserError(f"--plot {args.plot}: the name must end in .png")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    if args.cpu:
        jax.config.update("jax_platforms", "cpu")
    backend = jax.default_backend()
    if backend == "cpu" and args.model == "12b":
        raise UserError("--model 12b is measured on an accelerator; its closed form is part of every run")

    # One attention for every shape: "auto" would change over at 1,024 tokens, and chunks pad the shorter ones.
    execution = acejax.Execution.for_platform(backend, **({"attention": "xla"} if backend == "cpu" else {}))
    report = run(args.model, tokens, text, args.repeats, execution)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        plot(report, args.plot)
    show(report)
    return 0
