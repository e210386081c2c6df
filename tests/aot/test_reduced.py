"""What the check of the reduced model calls a difference."""

import pytest

from tests.aot import reduced

RECORDED = {"forward": 1000, "step": 4000, "kernels": {"norm": 100, "rotate": 50}}


@pytest.mark.parametrize("changes, told", [
    ({}, []),
    ({"forward": 1049, "step": 3801}, []),
    ({"forward": 1051}, ["forward: 1,051 cycles, recorded 1,000 (+5.1%)"]),
    ({"step": 3790}, ["step: 3,790 cycles, recorded 4,000 (-5.2%)"]),
    ({"kernels": {"norm": 110, "rotate": 50}}, ["norm: 110 cycles, recorded 100 (+10.0%)"]),
    ({"kernels": {"norm": 100}}, ["rotate: gone"]),
    ({"kernels": {"norm": 100, "rotate": 50, "new": 1}}, ["new: not recorded"]),
])
def test_differences(changes, told):
    assert reduced.differences(RECORDED, RECORDED | changes) == told
