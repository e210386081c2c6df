"""The recorded figures of `acejax bench plan` hold, and its plans are those of today."""

import json
from pathlib import Path

import pytest

from acejax.parallel.mesh import abstract_mesh
from acejax.train.plan_memory import memory
from benchmarks import plan
from tests.train.test_plan import CHUNKED

REPORT = json.loads((Path(plan.__file__).parent / "results" / "plan.json").read_text())


@pytest.mark.parametrize("row", REPORT["rows"], ids=lambda row: str(row["devices"]))
def test_recorded_figures(row):
    held = memory(CHUNKED, abstract_mesh({"fsdp": -1}, row["devices"]), row["devices"], 4096, 512, "cpu")
    found = sum(row["xla"].values())
    assert held.total / 1e9 == pytest.approx(found, rel=0.05)
    assert held.total / found / 1e9 - 1 == pytest.approx(row["off"], abs=1e-3)
    assert not row["gathers of a whole stack"] and not row["gradients reduced more than once"]


def test_256_devices_need_little():
    assert [row["devices"] for row in REPORT["rows"]] == [8, 64, 256] and REPORT["holds"]
    assert REPORT["rows"][-1]["xla"]["temporaries GB"] < 5
