"""`python -m tests.train.killed WORKDIR STEPS FSDP [FAULT]`: the small run as a command would run it, to be killed.

Prints a line as a save begins and as a step is done. FAULT: "disk" fills up with the second save, "nan" puts NaN into
a batch.
"""

import os
import resource
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
from absl import logging  # noqa: E402

from acejax.checkpoint import Checkpoints  # noqa: E402
from acejax.data.schedule import Stage  # noqa: E402
from acejax.data.stream import Stream  # noqa: E402
from acejax.errors import UserError  # noqa: E402
from acejax.train.loop import train  # noqa: E402
from acejax.workdir import lock  # noqa: E402
from tests.train.small import Table, make_config  # noqa: E402

SIZES = ((4, 8), (8, 8), (12, 8))


class Loud(Checkpoints):
    """Tells when it saves."""


def main(workdir: str, steps: str, fsdp: str, fault: str = "") -> int:
    logging.set_verbosity(logging.FATAL)
    config = make_config(SIZES)
    config.update({"steps": int(steps), "checkpoint": {"every": 5}, "mesh": {"data": -1, "fsdp": int(fsdp)}})
    stages = [Stage(int(steps) // 2, {"a": 1, "b": 1}, 0), Stage(int(steps) // 2, {"a": 1, "r": 1, "s": 1})]
    stream = Stream(Table(), stages, [tokens for tokens, _ in SIZES], dict(SIZES), seed=3)
    save = Checkpoints.save

    def told(self, step, state, *args, **kwargs):
        print(f"saving {step}", flush=True)
        if fault == "disk" and step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        save(self, step, state, *args, **kwargs)
        print(f"handed over {step}", flush=True)

    Checkpoints.save = told
    try:
        with lock(workdir):
            train(config, workdir, stream)
    except UserError as error:
        print(f"acejax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
