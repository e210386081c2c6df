"""`acejax data build MANIFEST --data_dir DIR`: a manifest or a folder of pictures becomes a TFDS dataset."""

import argparse
import json
import os
import sys
import time
from typing import Any

from acejax.data import manifest, written
from acejax.data.build import NAME, build, record
from acejax.data.progress import Progress
from acejax.errors import UserError

SHOWN = 10  # skipped samples that are named


def main(argv: list[str]) -> int:
    """Build, and print what was written and how to use it.

    Raises:
      UserError: whatever is wrong with the manifest, its pictures, the flags or the place.
    """
    args = _parser().parse_args(argv)
    written.check_place(args.json)
    if args.workers < 1 or (args.shards is not None and args.shards < 1):
        raise UserError(f"--workers={args.workers}, --shards={args.shards}: expected at least 1")
    found = manifest.read(args.manifest, args.fields, args.prefix)
    source = manifest.Source(found, args.skip_broken)
    start = time.time()
    try:
        with _Told() as progress:
            folder = build(args.data_dir, {args.split: source}, name=args.name, version=args.version,
                           workers=args.workers, shards=args.shards, skip_broken=args.skip_broken,
                           overwrite=args.overwrite, progress=progress)
    except KeyboardInterrupt:
        print("\nthe same command goes on with the files that are missing", file=sys.stderr)
        raise
    entry = record(folder)[args.split]
    report = {"folder": str(folder), "split": args.split, "seconds": round(time.time() - start, 2),
              "wrote_samples": progress.samples, "faulty_lines": len({fault.line for fault in found.faults}),
              "faults": [found.told(fault) for fault in found.faults],
              **{name: value for name, value in entry.items() if name != "fingerprints"},
              "files": len(entry["fingerprints"])}
    print(told(report))
    if args.json:
        written.write(args.json, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    return 0


def told(report: dict) -> str:
    """The report for people."""
    lines = [f"{report['folder']}, split {report['split']}: {report['records']:,} samples in {report['files']} files, "
             f"{_size(report['bytes'])} of which the pictures are {_size(report['pictures'])}"]
    if report["wrote_samples"]:
        lines.append(f"read {report['wrote_samples']:,} samples in {report['seconds']:,.1f} s, "
                     f"{report['wrote_samples'] / max(report['seconds'], 1e-9):,.0f} a second")
    else:
        lines.append("was there already; nothing to do")
    why = [*report["faults"], *report["skipped"]]
    if why:
        lines.append(f"left out {report['faulty_lines'] + len(report['skipped']):,} samples:")
        lines += [f"  {message}" for message in why[:SHOWN]]
        lines += [f"  and {len(why) - SHOWN:,} more (--json=FILE has all)"] if len(why) > SHOWN else []
    return "\n".join([*lines, "use it, with configs/ace_plus.py or in Python, as:",
                      f"  --config.data.sources.mine.path={report['folder']} "
                      f"--config.data.sources.mine.split={report['split']}",
                      f"  acejax.data.sources.open_source({report['folder']!r}, {report['split']!r})",
                      f"  tfds.builder_from_directory({report['folder']!r}).as_data_source({report['split']!r})"])


class _Told:
    """Progress of the split; counts what this run writes."""

    def __init__(self):
        self.samples = 0
        self._there, self._bar = 0, None

    def __enter__(self) -> "_Told":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def __call__(self, split: str, done: int, total: int, size: int) -> None:
        if self._bar is None:
            self._there, self._bar = done, Progress(total - done, split, "samples")
            if done:
                print(f"{done:,} of {total:,} samples are there already", file=sys.stderr)
        if new := done - self._there - self.samples:
            self.samples += new
            self._bar.update(new)


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
