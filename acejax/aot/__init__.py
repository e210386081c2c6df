"""Programs compiled ahead of time for TPUs that are not here, and what their compiler says of them.

libtpu (`pip install 'acejax[aot]'`, Python 3.12 or newer) compiles for a named slice on any machine. Nothing runs: all
figures are the compiler's own.
"""

# What libtpu asks of a machine that has no TPU, before jax starts. Two programs may compile at a time.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v6e-1"}
