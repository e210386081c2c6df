"""The plan against numbers worked out by hand, and what it says of runs that do not fit."""

import dataclasses

import pytest

from acejax import MMDiTConfig
from acejax.errors import UserError
from acejax.parallel.chips import topology
from acejax.parallel.mesh import abstract_mesh
from acejax.train.config import ExecutionConfig, LoraConfig, OptimizerConfig, TrainConfig
from acejax.train.plan import ONE_CARD, plan
from acejax.train.plan_memory import memory

PARAMETERS = 11_902_587_968  # FLUX with 448 channels
RUN = TrainConfig(seed=0, steps=10, model=MMDiTConfig(), optimizer=OptimizerConfig(learning_rate=1e-5),
                  mesh={"fsdp": -1}, execution=ExecutionConfig(attention="flash"))
LORA = dataclasses.replace(RUN, lora=LoraConfig(64))
CUDNN = dataclasses.replace(RUN, execution=ExecutionConfig(attention="cudnn"))
CHUNKED = dataclasses.replace(RUN, execution=ExecutionConfig(attention="xla_chunked"))


def change(run: TrainConfig, part: str, **fields) -> TrainConfig:
    return dataclasses.replace(run, **{part: dataclasses.replace(getattr(run, part), **fields)})


def of(run: TrainConfig, name: str, samples: int = 1, image: int = 4096, efficiency: float = 0.5):
    """The plan of one bucket of so many samples a device."""
    there = topology(name)
    return plan(run, {image: samples * there.devices}, 512, there.chip, there.devices, efficiency, there.slices)


@pytest.mark.parametrize(("name", "efficiency", "samples", "image", "compute", "links", "mfu"), [
    # compute = FLOPs with recomputation / (peak x efficiency); links = 3 x 2 bytes x parameters x (n - 1) / n / link;
    # the step is compute and 1/57 of links, the part of one block of 57
    ("v5e-256", 0.50, 1, 4096, 3.10, 0.71, 36.4),
    ("v5e-256", 0.50, 1, 2048, 1.55, 0.71, 36.6),
    ("v5e-256", 0.50, 2, 4096, 6.19, 0.71, 36.5),
    ("v5p-128", 0.55, 1, 4096, 1.21, 0.23, 40.1),
    ("v5p-128", 0.55, 4, 4096, 4.83, 0.23, 40.2),
    ("h100x8", 0.55, 1, 4096, 0.56, 0.17, 40.0),
    ("h100x8", 0.55, 4, 4096, 2.24, 0.17, 40.2),
    ("h100x8", 0.55, 4, 2048, 1.13, 0.17, 40.5),
    ("v7x-64", 0.50, 1, 4096, 0.53, 0.47, 36.0),
])
def test_time_is_that_of_the_table_worked_out_before(name, efficiency, samples, image, compute, links, mfu):
    step = of(RUN, name, samples, image, efficiency).largest
    assert step.compute == pytest.approx(compute, abs=0.0055)
    assert step.links == pytest.approx(links, abs=0.0051)
    assert step.network == 0
    assert step.exposed == pytest.approx(step.links / 57, rel=1e-9)
    assert step.seconds == step.compute + step.exposed
    assert 100 * step.mfu == pytest.approx(mfu, abs=0.051)


def test_flops_of_a_sample():
    step = of(RUN, "h100x1").largest
    assert step.flops / 1e12 == pytest.approx(223.2, abs=0.05)
    assert step.hardware_flops / 1e12 == pytest.approx(305.0, abs=0.05)
    for remat, recomputed in (("none", 7.4), ("attention", 7.4 + 59.5)):  # half of attention, and all else
        step = of(change(RUN, "execution", remat=remat), "h100x1").largest
        assert (step.hardware_flops - step.flops) / 1e12 == pytest.approx(recomputed, abs=0.1)


def test_memory_by_hand():
    held = memory(CHUNKED, abstract_mesh({"fsdp": 8}, 8), 8, 4096, 512, "cpu")
    assert held.parameters == pytest.approx(4 * PARAMETERS / 8, rel=2e-3)  # biases are on every device
    assert held.optimizer == pytest.approx(2 * held.parameters, rel=1e-6)
    assert held.gradients == held.parameters
    assert held.saved == 57 * 4608 * 3072 * 2
    assert held.batch == 4096 * (3 * 64 * 2 + 256 + 1 + 12) + 512 * 4096 * 2 + 768 * 2 + 8
    assert held.working == 14 * 4608 * 3072 * 2 + 3 * 4 * 24 * 512 * 4608
    kernel = memory(RUN, abstract_mesh({"fsdp": 8}, 8), 8, 4096, 512, "tpu")
    assert kernel.working == 28 * 4608 * 3072 * 2 + 8 * 24 * 4608


# XLA's bytes for the 12B step in GB, given and beside, found once by `acejax plan --compile`: too long to repeat here.
# `.ci/run` compiles the first two anew; the others tell that the form holds away from them.
@pytest.mark.parametrize(("devices", "samples", "image", "mesh", "execution", "optimizer", "given", "beside"), [
    (8, 8, 4096, {"fsdp": 8}, {}, {}, 17.893, 9.167),
    (64, 64, 4096, {"fsdp": 64}, {}, {}, 2.275, 4.192),
    (256, 256, 4096, {"fsdp": 256}, {}, {}, 0.618, 3.949),
    (64, 64, 2048, {"fsdp": 64}, {}, {}, 2.274, 3.032),
    (8, 32, 4096, {"fsdp": 8}, {}, {}, 17.914, 17.017),
    (64, 64, 4096, {"fsdp": 64}, {"remat": "attention"}, {}, 2.275, 5.773),
    (64, 64, 4096, {"fsdp": 64}, {"remat": "none"}, {}, 2.275, 80.554),
    (64, 128, 4096, {"fsdp": 64}, {}, {"accumulate": 2}, 2.282, 5.007),
    (8, 8, 4096, {"fsdp": 8}, {}, {"ema": 0.99}, 23.855, 9.167),
    (8, 8, 4096, {"data": 2, "fsdp": 2, "tensor": 2}, {}, {}, 35.733, 15.473),
    (8, 8, 4096, {"fsdp": 4, "seq": 2}, {}, {}, 35.749, 15.772),
    (8, 8, 4096, {"fsdp": 8}, {}, {"name": "muon"}, 11.976, 15.930),
    (16, 16, 4096, {"fsdp": 16}, {}, {"name": "muon"}, 6.010, 8.201),
    (64, 64, 4096, {"fsdp": 64}, {}, {"name": "muon"}, 1.535, 4.192),
    (1, 1, 4096, {}, {}, {"name": "adafactor", "param_dtype": "bfloat16"}, 23.915, 27.061),
    (1, 1, 4096, {}, {}, ONE_CARD, 23.915, 4.460),
])
def test_memory_is_what_xla_found(devices, samples, image, mesh, execution, optimizer, given, beside):
    run = change(change(CHUNKED, "execution", **execution), "optimizer", **optimizer)
    held = memory(run, abstract_mesh(mesh, devices), samples, image, 512, "cpu")
    assert held.arguments == pytest.approx(given * 1e9, rel=1e-3)
    assert held.total == pytest.approx((given + beside) * 1e9, rel=0.025)  # the goal is 5 %


@pytest.mark.parametrize(("base", "given", "beside"), [("bfloat16", 27.487, 4.740), ("int8", 15.665, 4.683)])
def test_memory_of_a_lora_is_what_xla_found(base, given, beside):
    """Rank 64 on Fill, one device; found as the others."""
    run = dataclasses.replace(CHUNKED, model=MMDiTConfig.flux_fill(), lora=LoraConfig(64, base=base))
    held = memory(run, abstract_mesh({"data": 1}, 1), 1, 4096, 512, "cpu")
    assert held.arguments == pytest.approx(given * 1e9, rel=1e-3)
    assert held.total == pytest.approx((given + beside) * 1e9, rel=0.025)
    assert held.parameters == pytest.approx(4 * 306_315_264, rel=1e-6) and held.optimizer < 2.01 * held.parameters


@pytest.mark.parametrize(("run", "name", "samples", "advice"), [
    (change(RUN, "execution", remat="none"), "h100x8", 1, "config.execution.remat=attention makes it fit"),
    (change(RUN, "execution", remat="none"), "v5e-64", 1, "config.execution.remat=attention makes it fit"),
    (RUN, "v5e-64", 9, "config.optimizer.accumulate=3 makes it fit"),
    (dataclasses.replace(RUN, mesh={"data": -1}), "h100x8", 1, "config.mesh of fsdp alone makes it fit"),
    (change(RUN, "optimizer", ema=0.999), "v6e-8", 1, "config.optimizer.ema=0 makes it fit"),
    (LORA, "v6e-1", 1, "config.lora.base=int8 makes it fit"),
    (RUN, "h100x1", 1, "config.optimizer of name=adafactor, param_dtype=bfloat16, fused=True, clip=0.0, accumulate=1 "
                       "makes it fit"),
    (change(CUDNN, "optimizer", **ONE_CARD), "a100-40x1", 9, "a batch 1/3 as large makes it fit"),
    (RUN, "v5e-1", 1, "v5e-32, sharded over fsdp, makes it fit"),
    (CUDNN, "h100x2", 1, "h100x3, sharded over fsdp, makes it fit"),
    (RUN, "h100x2", 1, "h100x3, sharded over fsdp with config.execution.attention=cudnn, makes it fit"),
    (CUDNN, "h100x5", 1, "h100x4 or h100x6, sharded over fsdp, makes it fit"),  # fsdp 5 does not divide 3072
    (CUDNN, "a100-40x7", 3, "a100-40x8, sharded over fsdp with config.optimizer.accumulate=3, makes it fit"),
    (CUDNN, "a100-40x9", 1, "a100-40x8 or a100-40x16, sharded over fsdp, makes it fit"),  # beyond one, whole machines
    (RUN, "v6e-4", 1, "v6e-8, sharded over fsdp, makes it fit"),
    (dataclasses.replace(RUN, mesh={"data": 2, "fsdp": -1}), "v5e-8x2", 1,
     "v5e-32x2, sharded over fsdp, makes it fit"),
])
def test_what_does_not_fit_is_told_what_would(run, name, samples, advice):
    found = of(run, name, samples)
    assert not found.fits and found.advice == advice
    assert found.line().endswith(f"does not fit: {advice}")


def test_what_fits_needs_no_advice():
    found = of(RUN, "v5e-256")
    assert found.fits and not found.advice
    assert found.line().startswith("plan: 256 v5e (fsdp 256); 256 samples of 4096+512 tokens; ")
    assert "\n" not in found.line() and found.line() in found.table()


def test_what_is_advised_fits():
    for name, advised in (("h100x2", "h100x3"), ("h100x5", "h100x4"), ("h100x5", "h100x6"),
                          ("a100-40x9", "a100-40x16")):
        assert advised in of(CUDNN, name).advice
        assert of(CUDNN, advised).fits


def test_a_tpu_holds_what_its_compiler_takes_and_a_gpu_a_share():
    assert of(RUN, "v5e-256").capacity == 15.75 * 2**30
    assert of(RUN, "h100x8").capacity == 0.95 * 79.1 * 2**30


def test_slices_are_told_and_the_network_between_them_counts():
    found = of(dataclasses.replace(RUN, mesh={"data": 2, "fsdp": -1}), "v5e-256x2")
    assert found.line().startswith("plan: 512 v5e (2 slices, data 2 x fsdp 256); 512 samples of 4096+512 tokens; ")
    step = found.largest  # each device sends half of twice its 1/256 of the gradients, at 25 Gbit/s
    assert step.network == pytest.approx(2 * 2 * PARAMETERS / 256 / 2 / 3.125e9, rel=2e-3)
    assert step.links == pytest.approx(of(RUN, "v5e-256").largest.links, rel=1e-9)
    assert of(RUN, "v7x-64").line().startswith("plan: 64 v7x (32 chips, fsdp 64); ")


@pytest.mark.parametrize(("mesh", "name", "message"), [
    ({"fsdp": -1}, "v5e-256x2", "config.mesh: data is 1 over 2 slices, and fsdp, tensor and seq must not go over the "
     "slow network between them; expected data a multiple of 2: --config.mesh.data=2 with --config.mesh.fsdp=256 or "
     "-1"),
    ({"data": 2, "fsdp": -1, "tensor": 2}, "v5e-64x4", "config.mesh: data is 2 over 4 slices, and fsdp, tensor and seq "
     "must not go over the slow network between them; expected data a multiple of 4: --config.mesh.data=4 with "
     "--config.mesh.fsdp=32 or -1"),
])
def test_gradients_alone_go_from_slice_to_slice(mesh, name, message):
    with pytest.raises(UserError) as error:
        of(dataclasses.replace(RUN, mesh=mesh), name)
    assert str(error.value) == message


def test_a_cpu_has_no_time_and_the_largest_bucket_counts():
    found = plan(CHUNKED, {1024: 64, 4096: 8}, 512, None, 8)
    assert found.largest.image == 1024  # twice the tokens in all
    assert found.backend == "cpu" and found.largest.seconds is None and found.fits


@pytest.mark.parametrize(("mesh", "accumulate", "efficiency", "message"), [
    ({"fsdp": 3}, 1, 0.5, "does not make up the 8 devices"),
    ({"fsdp": 8}, 3, 0.5, "batch size 8 is not a multiple"),
    ({"fsdp": 8}, 1, 1.5, "efficiency is 1.5; expected a share"),
    ({"rows": 8}, 1, 0.5, "unknown axis rows"),
])
def test_what_cannot_be_planned(mesh, accumulate, efficiency, message):
    run = dataclasses.replace(change(RUN, "optimizer", accumulate=accumulate), mesh=mesh)
    with pytest.raises(UserError, match=message):
        of(run, "h100x8", efficiency=efficiency)
