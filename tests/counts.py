"""How much of the tests runs comes from one variable: ACEJAX_TEST_COUNTS = small (the default) or full."""

import os
from typing import TypeVar

T = TypeVar("T")
COUNTS = os.environ.get("ACEJAX_TEST_COUNTS", "small")
if COUNTS not in ("small", "full"):
    raise ValueError(f"ACEJAX_TEST_COUNTS is {COUNTS!r}; known: small, full")


def count(small: T, full: T) -> T:
    """What this run uses: a number of cases, a list of shapes, a model's size."""
    return full if COUNTS == "full" else small
