"""Settings that must stand before jax is imported; subprocesses of the tests inherit them.

JAX_PLATFORMS can be set from outside, to run the same tests on an accelerator.
"""

import os
import pathlib
from importlib.metadata import version

from tests.bucket import bucket  # noqa: F401 - a fixture

_CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Tests compile many programs and run each a few times: LLVM need not try hard. A test may set its own. jax 0.10 can
# leave out the fusion emitters, with which a training step compiles twice as long; later ones refuse the flag.
_FLAGS = ["--xla_backend_optimization_level=0",
          *["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10.")]
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

# First, so that no process is left alone with them at the end.
LONGEST = ("train/test_loop.py", "demo/test_job.py", "train/test_meshes.py", "train/test_validate.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
