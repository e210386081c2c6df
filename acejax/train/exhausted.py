"""Memory that a run's devices do not have, told with the plan and the setting that would fit."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import jax

from acejax.errors import UserError
from acejax.train.config import TrainConfig
from acejax.train.plan import Plan, remedy


@contextlib.contextmanager
def explained(run: TrainConfig, buckets: Mapping[int, int], planned: Callable[[], Plan]) -> Iterator[None]:
    """Turns XLA's RESOURCE_EXHAUSTED, from compiling, loading or a step, into a message.

    Args:
      run: its config.
      buckets: samples of a batch by image tokens.
      planned: the run's plan, asked for when it is needed.

    Raises:
      UserError: the devices' memory is exhausted.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = planned()
        raise UserError(f"the memory of the devices is exhausted ({str(error).splitlines()[0]})\n{found.table()}\n"
                        f"{remedy(run, found, buckets)}") from error
