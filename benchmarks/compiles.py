"""A command in a process that counts what XLA compiled: `python -m benchmarks.compiles REPORT.json edit --demo ...`."""

import collections
import json
import pathlib
import sys

import jax

from acejax.cli.main import main as command

REQUEST = "/jax/core/compile/backend_compile_duration"  # of each program, be it compiled or read
HIT = "/jax/compilation_cache/cache_hits"


def main(path: str, *argv: str) -> int:
    """Run `acejax ARGV`; its exit code. The report has `programs`, and how many of them were `compiled`."""
    seen = collections.Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **about: seen.update([name]))
    jax.monitoring.register_event_listener(lambda name, **about: seen.update([name]))
    code = command(list(argv))
    pathlib.Path(path).write_text(json.dumps({"programs": seen[REQUEST], "compiled": seen[REQUEST] - seen[HIT]}))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
