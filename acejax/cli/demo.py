"""`acejax demo`: the main job on the built-in pictures."""

import shlex
from collections.abc import Sequence

from absl import flags

from acejax.cli.config import CPU_DEVICES, parse_config


def main(argv: Sequence[str]) -> int:
    """Train, edit the test photo, print the scores; 1 when they miss the thresholds."""
    parsed = parse_config("demo", argv, _define, default="demo.py")
    if parsed is None:
        return 0
    values, config = parsed
    from acejax.demo.job import run, table
    from acejax.parallel.mesh import split_cpu
    from acejax.workdir import lock

    split_cpu(values["cpu_devices"].value)
    with lock(values["workdir"].value):
        report = run(config, values["workdir"].value, values["setup_seconds"].value, command(argv))
    print(f"\n{table(report)}\n\nseconds: {report['seconds']}")
    print(f"pictures: {values['workdir'].value}/edits.png   report: {values['workdir'].value}/report.json")
    for line in report["missed"]:
        print(f"missed: {line}")
    print("passed" if report["passed"] else "not passed")
    return 0 if report["passed"] else 1


def command(argv: Sequence[str]) -> str:
    """What decides the result of a command line: its config, as `--config=FILE` or in two words, and its changes."""
    return shlex.join(["acejax", "demo", *(word for before, word in zip(["", *argv], argv, strict=False) if (
        word.startswith("--config") or before.startswith("--config") and "=" not in before and word[:1] != "-"))])


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("cpu_devices", CPU_DEVICES, "Devices that a CPU stands for; a result is repeated with the "
                         "same number.", flag_values=values)
    flags.DEFINE_string("workdir", "runs/demo", "Where everything is written; the same command again resumes.",
                        flag_values=values)
    flags.DEFINE_float("setup_seconds", 0.0, "Seconds the installation took, for the report.", flag_values=values)
