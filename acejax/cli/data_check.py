"""`acejax data check MANIFEST`: what is wrong with a manifest and its pictures, and what a run on it will cost."""

import argparse
import json
import logging
import warnings

import numpy as np
from etils import epath

from acejax.data import buckets, manifest, sheet, written
from acejax.data.check import Report, check, kinds, spread, stages
from acejax.data.dataset_folder import is_dataset
from acejax.data.layout import CanvasConfig
from acejax.data.manifest import Fault
from acejax.data.progress import Progress
from acejax.errors import UserError

LISTED = 50  # faults on the terminal; all are in the JSON
BARS = 16  # of the histogram
_BAR = 40  # letters


def main(argv: list[str]) -> int:
    """Print the report.

    Raises:
      UserError: the manifest has faults (the report is printed, and written), or cannot be read.
    """
    args = _parser().parse_args(argv)
    written.check_place(args.json)
    written.check_place(args.sheet, "--sheet")
    if args.sheet and epath.Path(args.sheet).suffix.lower() != ".png":
        raise UserError(f"--sheet={args.sheet}: expected the name of a .png file")
    if any(batch is not None and batch < 1 for batch in (args.batch_size, args.batch_tokens)):
        raise UserError("--batch_size and --batch_tokens: expected at least 1")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed}: expected 0 or more")
    make = CanvasConfig if args.split else CanvasConfig.lora
    config = make(max_tokens=args.max_tokens, budget=args.budget, parity=args.parity)
    if is_dataset(args.manifest):
        raise UserError(f"{args.manifest}: found a TFDS dataset; expected a manifest or a folder of pictures")
    found = manifest.read(args.manifest, args.fields, args.prefix)
    warnings.simplefilter("ignore")  # Pillow speaks of metadata; what matters is in the report
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    files = len({path for row in found.rows for _, path in row.files})
    with Progress(files, "checking", "files") as progress:
        report = check(found, config, args.decode, args.seed, progress.update)
    steps = {}
    if args.batch_size or args.batch_tokens:
        steps["steps_per_epoch"] = report.steps(args.batch_size, args.batch_tokens)
    if args.json:
        written.write(args.json, (json.dumps(report.to_json(**steps), indent=2) + "\n").encode())
    if args.sheet:
        written.write(args.sheet, sheet.sheet(found, sheet.pick(report.rows), config, args.seed))
    print(table(report, config, **steps))
    if report.faults:
        lines = len({fault.line for fault in report.faults})
        raise UserError(f"{found.path}: {_many(len(report.faults), 'fault')} in {lines} of "
                        f"{_many(report.samples, 'sample')}")
    if not report.rows:
        raise UserError(f"{found.path}: found no sample")
    return 0


def table(report: Report, config: CanvasConfig, steps_per_epoch: int | None = None) -> str:
    """The report for people; `--json` has every fault."""
    lines = [f"{report.manifest.path}: {_many(report.samples, 'sample')}, {_many(report.files, 'file')}, "
             f"{'all pixels' if report.decoded else 'headers and ends'} read"]
    if report.rows:
        lines += ["", f"{'task':<24}{'samples':>9}  references"]
        for task, counts in report.tasks().items():
            by_count = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            lines.append(f"{ascii(task)[1:-1][:23]:<24}{sum(counts.values()):>9,}  {by_count}")
        stage = stages(report.rows)
        lines += ["", f"stage 1 trains on the {stage['0-ref']:,} without references (0-ref), stage 2 on all, "
                      f"{stage['N-ref']:,} of them with (N-ref)"]
        lines += ["", f"{'width x height':<16}{'smallest':>14}{'median':>14}{'largest':>14}"]
        for field, sizes in report.sizes.items():
            lines.append(f"{field:<16}" + "".join(f"{f'{width} x {height}':>14}" for height, width in spread(sizes)))
        lines += ["", *_histogram(report.tokens)]
        lengths = report.buckets
        padding = buckets.waste(report.tokens, lengths)
        lines += ["", f"buckets         {', '.join(map(str, lengths))} tokens; {padding:.1%} padding"]
        together = config.parity or config.budget == "canvas"
        whose = "all units together" if together else "the target and each reference"
        lines += [f"tokens          {int(report.tokens.sum()):,} an epoch, {report.tokens.mean():.0f} a sample; at "
                  f"most {config.max_tokens} for {whose}, {448 if config.split else 384} channels"]
        if steps_per_epoch is not None:
            lines += [f"steps           {steps_per_epoch:,} an epoch"]
    for name, found in (("warning", report.warnings), ("fault", report.faults)):
        if found:
            lines += ["", f"{_many(len(found), name)}:"]
            lines += [f"{len(group):>8,} x {_short(text)}" for text, group in kinds(found)[:20]]
    lines += _listed(report, report.warnings[:5], "warnings", len(report.warnings))
    lines += _listed(report, report.faults[:LISTED], "faults", len(report.faults))
    return "\n".join(lines)


def _listed(report: Report, faults: tuple[Fault, ...], name: str, total: int) -> list[str]:
    if not faults:
        return []
    more = f" (the first {len(faults)} of {total:,}; --json=FILE has all)" if total > len(faults) else ""
    return ["", f"{name}{more}:", *(f"  {_short(report.manifest.told(fault))}" for fault in faults)]


def _short(text: str) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= 300 else text[:297] + "..."


def _histogram(tokens: np.ndarray) -> list[str]:
    """Token counts as bars, in steps of a multiple of 256."""
    step = 256 * max(1, -(-int(tokens.max() - tokens.min()) // (256 * BARS)))
    first = int(tokens.min() - 1) // step
    counts = np.bincount((tokens - 1) // step - first)
    lines = [f"{'tokens':<16}{'samples':>9}"]
    for place, count in enumerate(counts, first):
        bar = "#" * -(-int(count) * _BAR // int(counts.max()))
        lines.append(f"{f'{place * step + 1}-{(place + 1) * step}':<16}{count:>9,}  {bar}".rstrip())
    return lines


def _many(count: int, name: str) -> str:
    return f"{count:,} {name}{'s' * (count != 1)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="acejax data check", description="Check every line of a manifest and open each of its pictures once. "
        "Faults end in exit code 2.")
    parser.add_argument("manifest", metavar="MANIFEST", help="JSONL, ACE's #;# text, or a folder of pictures; see "
                        "docs/data.md")
    parser.add_argument("--fields", default=",".join(manifest.FIELDS), help="the order of the fields in #;# text "
                        "(%(default)s)")
    parser.add_argument("--prefix", metavar="DIR", help="where relative paths start; the manifest's folder by default")
    parser.add_argument("--decode", action="store_true", help="decode every picture, and look for white in masks")
    parser.add_argument("--json", metavar="FILE", help="write the report there, with every fault")
    parser.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet of what the model will see")
    parser.add_argument("--max_tokens", type=int, default=CanvasConfig.max_tokens, metavar="N",
                        help="16 x 16 pixels each (%(default)s)")
    parser.add_argument("--budget", choices=("picture", "canvas"), default=CanvasConfig.budget,
                        help="whose they are: the target's and each reference's, or all together's (%(default)s)")
    parser.add_argument("--split", action=argparse.BooleanOptionalAction, default=True, help="448 channels, what is to "
                        "be changed apart; --nosplit: 384, as a LoRA")
    parser.add_argument("--nosplit", dest="split", action="store_false", help=argparse.SUPPRESS)
    parser.add_argument("--parity", choices=("reference",), help="canvases as the released code makes them")
    parser.add_argument("--seed", type=int, default=0, help="of the references' heights (%(default)s)")
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--batch_size", type=int, metavar="N", help="samples a step, for the steps of an epoch")
    batch.add_argument("--batch_tokens", type=int, metavar="N", help="padded tokens a step, likewise")
    return parser
