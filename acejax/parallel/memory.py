"""Memory that the devices do not have, told with what would need less."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from acejax.errors import UserError


@contextlib.contextmanager
def told(remedy: Callable[[], str]) -> Iterator[None]:
    """Turns XLA's RESOURCE_EXHAUSTED, from compiling, loading or running, into a message that ends in a remedy.

    Raises:
      UserError: the devices' memory is exhausted.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the memory of the devices is exhausted ({str(error).splitlines()[0]}); {remedy()}") from error
