"""Who is found by which launcher; a process started alone asks for nobody."""

import pytest

from acejax import UserError
from acejax.parallel.processes import given, joined, launched

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize("environment, tpu", [
    ({}, False), ({"TPU_SKIP_MDS_QUERY": "1"}, True),  # libtpu without chips
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}, True),
    (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, False),  # the shell that salloc opens, in a job of two tasks
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False), ({"OMPI_COMM_WORLD_SIZE": "1"}, False)])
def test_alone(environment, tpu):
    assert launched(environment, tpu) == {}
    with joined():
        pass


@pytest.mark.parametrize("environment, tpu, expected", [
    (SRUN, False, {"cluster_detection_method": "slurm", "num_processes": 2}),
    (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"}, False,
     {"cluster_detection_method": "slurm", "num_processes": 2, "local_device_ids": [0, 1, 2, 3]}),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, False, {"cluster_detection_method": "ompi"}),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, True, {"cluster_detection_method": "gketpu"}),
    ({}, True, {"cluster_detection_method": "gcetpu"})])
def test_launchers(environment, tpu, expected):
    assert launched(environment, tpu) == expected


@pytest.mark.parametrize("flags", [("a:1", 2, None), (None, 2, 0), ("a", 2, 0), ("a:1", 2, 2), ("a:1", 2, -1)])
def test_flags_that_can_not_be(flags):
    with pytest.raises(UserError, match="--coordinator"):
        given(*flags)
