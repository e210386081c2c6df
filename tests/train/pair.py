"""`python -m tests.train.pair WORKDIR PORT PROCESS ORDER`: one of two processes that count together, and save.

ORDER "count": the state is a sharded array that grows by one a step. "restore" takes up what is there. "export" writes
weights.
"""

import functools
import os
import pathlib
import sys
import time

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import logging  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

from acejax.checkpoint import Checkpoints  # noqa: E402
from acejax.errors import UserError  # noqa: E402
from acejax.model.config import MMDiTConfig  # noqa: E402
from acejax.model.mmdit import init  # noqa: E402
from acejax.parallel import rules  # noqa: E402
from acejax.parallel.mesh import make_mesh  # noqa: E402
from acejax.train.export import Exports  # noqa: E402
from acejax.train.preemption import Preempted, Preemption  # noqa: E402
from acejax.workdir import lock  # noqa: E402
from tests.train.small import make_config  # noqa: E402

STEPS = 2000


def begin(axis: str, dtype: str) -> dict[str, jax.Array]:
    place = NamedSharding(make_mesh({axis: 4}), jax.P(axis))
    return jax.jit(lambda: {"x": jnp.arange(2**16, dtype=jnp.float32).astype(dtype)}, out_shardings={"x": place})()


def count(workdir: pathlib.Path) -> None:
    """Count, saving every tenth step, until all are asked to leave."""
    checkpoints = Checkpoints(workdir)
    state = begin("fsdp", "float32")
    grow = jax.jit(lambda state: {"x": state["x"] + 1}, donate_argnums=0)
    with Preemption() as preemption:
        for step in range(1, STEPS):
            state = grow(state)
            time.sleep(0.01 * (1 + jax.process_index()))  # one of them is slower
            print(f"step {step}", flush=True)
            leaving = preemption.reached(step)
            if leaving or step % 10 == 0:
                checkpoints.save(step, state)
            if leaving:
                checkpoints.close()
                raise Preempted(step)


def restore(workdir: pathlib.Path) -> None:
    """On another mesh, in another dtype; says what it found."""
    step, state = Checkpoints(workdir).restore(begin("data", "bfloat16"))
    expected = (begin("data", "float32")["x"] + step).astype("bfloat16")
    right = all(np.array_equal(found.data, wanted.data) for found, wanted in zip(
        state["x"].addressable_shards, expected.addressable_shards, strict=True))
    print(f"restored {step} {state['x'].dtype} {'right' if right else 'wrong'}", flush=True)


def export(workdir: pathlib.Path) -> None:
    """The small model's weights, of which each process has a part."""
    config = MMDiTConfig(**make_config().model)
    begin = functools.partial(init, config, jax.random.key(0))
    place = rules.shardings(jax.eval_shape(begin), make_mesh({"fsdp": 4}))
    exports = Exports(workdir, config)
    exports.save(1, jax.jit(begin, out_shardings=place)())
    exports.close()


def main(workdir: str, port: str, process: str, order: str) -> int:
    logging.set_verbosity(logging.FATAL)
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    try:
        with lock(workdir):
            {"count": count, "restore": restore, "export": export}[order](pathlib.Path(workdir))
    except Preempted as leaving:
        print(f"left after {leaving.step}", flush=True)
        raise
    except UserError as error:
        print(error, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
