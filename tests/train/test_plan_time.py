"""What a step sends inside a domain and out of it, and what of that is not hidden, by hand."""

import dataclasses

import pytest

from acejax import MMDiTConfig
from acejax.parallel.chips import CHIPS
from acejax.parallel.mesh import abstract_mesh
from acejax.train.config import ExecutionConfig, OptimizerConfig, TrainConfig
from acejax.train.plan_time import Sending, sendings, split, times

RUN = TrainConfig(seed=0, steps=10, model=MMDiTConfig(), optimizer=OptimizerConfig(learning_rate=1e-5),
                  execution=ExecutionConfig(attention="flash"))
MESH = abstract_mesh({"data": 2, "fsdp": 4, "tensor": 2}, 16)
WEIGHTS, OTHERS = 2 * 11_902_587_968, 57 * 4608 * 3072 * 2


@pytest.mark.parametrize(("axis", "domain", "inside", "outside"), [
    ("fsdp", 16, 3 / 4, 0),  # neighbours are 2 devices apart: all 4 within 16
    ("fsdp", 8, 3 / 4, 0),
    ("fsdp", 4, 1 / 2, 1 / 2 / 2),  # two of them in a domain, which share what is outside
    ("fsdp", 2, 0, 3 / 4),  # each alone
    ("data", 16, 1 / 2, 0),
    ("data", 8, 0, 1 / 2),
    ("tensor", 2, 1 / 2, 0),
    ("tensor", 1, 0, 1 / 2),
    ("seq", 8, 0, 0),
])
def test_a_gather_is_shared_by_the_devices_of_a_domain(axis, domain, inside, outside):
    assert split(Sending(axis, 1.0, waits=False), MESH, domain) == pytest.approx((inside, outside))


def test_an_exchange_is_not_shared():
    mesh = abstract_mesh({"seq": 8}, 8)
    assert split(Sending("seq", 1.0, True, shared=False), mesh, 8) == pytest.approx((7 / 8, 0))
    assert split(Sending("seq", 1.0, True, shared=False), mesh, 4) == pytest.approx((3 / 8, 1 / 2))


def test_what_is_sent():
    sent = {one.axis: one for one in sendings(RUN, MESH, 16, 4608)}
    assert sent["fsdp"].nbytes == pytest.approx(3 * WEIGHTS / 2)  # a half over tensor
    assert sent["data"].nbytes == pytest.approx(2 * WEIGHTS / 2 / 4)
    assert sent["tensor"].nbytes == pytest.approx(2 * 2 * 3 * OTHERS * 2)  # two samples a device
    assert {axis for axis, one in sent.items() if one.waits} == {"tensor", "seq"}


def of(mesh, chip: str, domain: int, flops: float, run: TrainConfig = RUN):
    return times(run, mesh, mesh.size, 4608, flops, CHIPS[chip], 0.5, domain)


def test_weights_hide_behind_products_but_for_those_of_a_block():
    mesh = abstract_mesh({"fsdp": 8}, 8)
    found = of(mesh, "h100", 8, 8 * 989e12)  # 2 s
    assert found.compute == 2
    assert found.links == pytest.approx(3 * WEIGHTS * 7 / 8 / 370e9)
    assert found.network == 0 and found.exposed == pytest.approx(found.links / 57)


def test_weights_that_take_longer_than_products_are_exposed():
    mesh = abstract_mesh({"fsdp": 8}, 8)
    found = of(mesh, "l40s", 8, 8 * 362e12 / 2)  # 1 s
    assert found.links == pytest.approx(3 * WEIGHTS * 7 / 8 / 26e9) and found.links > 2
    assert found.exposed == pytest.approx(found.links - found.compute)


def test_activations_are_exposed():
    mesh = abstract_mesh({"tensor": 8}, 8)
    found = of(mesh, "h100", 8, 8 * 989e12)
    assert found.exposed == found.links == pytest.approx(8 * 2 * 2 * 3 * OTHERS * 7 / 8 / 370e9)


def test_two_machines_are_no_domain():
    mesh = abstract_mesh({"fsdp": 16}, 16)
    found = of(mesh, "h100", 8, 16 * 989e12)
    assert found.links == pytest.approx(3 * WEIGHTS * 7 / 8 / 370e9)
    assert found.network == pytest.approx(3 * WEIGHTS / 2 / 8 / 50e9)  # half comes from outside, an eighth by each
    assert of(mesh, "gb200", 72, 1e15).network == 0


def test_a_tensor_axis_over_two_machines_is_told_what_it_costs():
    slow = of(abstract_mesh({"tensor": 16}, 16), "h100", 8, 1e15)
    fast = of(abstract_mesh({"fsdp": 2, "tensor": 8}, 16), "h100", 8, 1e15)
    assert slow.network > 0.3 and slow.exposed > fast.exposed


def test_accumulation_gathers_for_each_part():
    run = dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, accumulate=4))
    mesh = abstract_mesh({"fsdp": 8}, 8)
    assert of(mesh, "h100", 8, 1e18, run).links == pytest.approx(4 * of(mesh, "h100", 8, 1e18).links)
