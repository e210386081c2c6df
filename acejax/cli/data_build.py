"""`acejax data build MANIFEST --data_dir DIR`: a manifest or a folder of pictures becomes a TFDS dataset."""

import argparse
import json
import os
import sys
import time

from etils import epath
from tqdm import tqdm

from acejax.data import manifest
from acejax.data.build import NAME, build, record
from acejax.errors import UserError

EVERY = 10.0  # seconds between lines where there is no terminal
SHOWN = 10  # skipped samples that are named


def main(argv: list[str]) -> int:
    """Build, and print what was written and how to use it.

    Raises:
      UserError: whatever is wrong with the manifest, its pictures, the flags or the place.
    """
    args = _parser().parse_args(argv)
    if args.json and not epath.Path(args.json).parent.exists():
        raise UserError(f"--json={args.json}: its folder is not there")
    if args.workers < 1 or (args.shards is not None and args.shards < 1):
        raise UserError(f"--workers={args.workers}, --shards={args.shards}: expected at least 1")
    found = manifest.read(args.manifest, args.fields, args.prefix)
    faults = [found.told(fault) for fault in found.faults] if args.skip_broken else []
    source = manifest.Source(found, args.skip_broken)
    start = time.time()
    try:
        with _Bar() as bar:
            folder = build(args.data_dir, {args.split: source}, name=args.name, version=args.version,
                           workers=args.workers, shards=args.shards, skip_broken=args.skip_broken,
                           overwrite=args.overwrite, progress=bar)
    except KeyboardInterrupt:
        print("\nthe same command goes on with the files that are missing", file=sys.stderr)
        raise
    written = record(folder)[args.split]
    report = {"folder": str(folder), "split": args.split, "seconds": round(time.time() - start, 2),
              "wrote_samples": bar.samples, "faulty_lines": faults,
              **{name: value for name, value in written.items() if name != "fingerprints"},
              "files": len(written["fingerprints"])}
    print(told(report))
    if args.json:
        epath.Path(args.json).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 0


def told(report: dict) -> str:
    """The report for people."""
    lines = [f"{report['folder']}, split {report['split']}: {report['records']:,} samples in {report['files']} files, "
             f"{_size(report['bytes'])} of which the pictures are {_size(report['pictures'])}"]
    if report["wrote_samples"]:
        lines.append(f"wrote {report['wrote_samples']:,} samples in {report['seconds']:,.1f} s, "
                     f"{report['wrote_samples'] / max(report['seconds'], 1e-9):,.0f} a second")
    else:
        lines.append("was there already; nothing to do")
    skipped = [*report["faulty_lines"], *report["skipped"]]
    if skipped:
        lines.append(f"skipped {len(skipped):,} samples:")
        lines += [f"  {message}" for message in skipped[:SHOWN]]
        lines += [f"  and {len(skipped) - SHOWN:,} more (--json FILE has all)"] if len(skipped) > SHOWN else []
    return "\n".join([*lines, "read it with:",
                      f"  acejax.data.sources.open_source({report['folder']!r}, {report['split']!r})",
                      f"  tfds.builder_from_directory({report['folder']!r}).as_data_source({report['split']!r})"])


class _Bar:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self):
        self.samples = 0  # written by this run
        self._first = self._bar = None
        self._last = time.time()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, split: str, done: int, total: int, size: int) -> None:
        if self._bar is None:
            self._first = done
            self._bar = tqdm(total=total, initial=done, unit=" samples", desc=split, dynamic_ncols=True,
                             disable=not sys.stderr.isatty())
            if done:
                print(f"{done:,} of {total:,} samples are there already", file=sys.stderr)
        self.samples = done - self._first
        self._bar.update(done - self._bar.n)
        self._bar.set_postfix_str(_size(size), refresh=False)
        if self._bar.disable and (time.time() - self._last > EVERY):
            self._last = time.time()
            print(f"{split}: {done:,} of {total:,} samples, {_size(size)} read", file=sys.stderr, flush=True)


def _size(size: float) -> str:
    unit = next((unit for unit in (1e12, 1e9, 1e6) if size >= unit), 1e3)
    return f"{size / unit:.3g} {dict(zip((1e12, 1e9, 1e6, 1e3), ('TB', 'GB', 'MB', 'kB'), strict=True))[unit]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="acejax data build", description="Write a manifest's samples as a TFDS dataset (array_record, pictures as "
        "they are). The same command again goes on with a build that was cut off.")
    parser.add_argument("manifest", metavar="MANIFEST", help="an ACE text, a JSONL file or a folder of pictures")
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="where datasets are, a folder or gs://; this "
                        "one becomes DIR/NAME/VERSION")
    parser.add_argument("--split", default="train", help="which split this is (train); others there stay")
    parser.add_argument("--name", default=NAME, help=f"the dataset's ({NAME})")
    parser.add_argument("--version", default="1.0.0", help="the dataset's (1.0.0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one a processor)")
    parser.add_argument("--shards", type=int, help="files of the split; about 256 MB each by default")
    parser.add_argument("--fields", default=",".join(manifest.FIELDS), help="the order of the fields in an ACE text")
    parser.add_argument("--prefix", help="where relative paths start; the manifest's folder by default")
    parser.add_argument("--skip_broken", action="store_true", help="leave out lines with faults and samples whose "
                        "pictures are missing or broken, instead of stopping at the first")
    parser.add_argument("--overwrite", action="store_true", help="write the split anew where it stands already")
    parser.add_argument("--json", metavar="FILE", help="write the report there, with all that was skipped")
    return parser
