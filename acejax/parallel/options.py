"""XLA's options for the programs of training and editing, by platform; docs/chips.md has what each is worth.

They are given to each program (`jax.jit(compiler_options=...)`), so that no environment variable decides a run.
"""

from collections.abc import Mapping

# A product over a kernel that lies over `fsdp` is to be a gather and a product, and its gradient a product and a
# reduce-scatter. XLA makes a loop of partial products of either, which add into memory, from this many MiB on.
WINDOWED = "xla_jf_spmd_threshold_for_windowed_einsum_mib"

OPTIONS: Mapping[str, Mapping[str, str]] = {"tpu": {WINDOWED: "1000000"}}


def options(platform: str, given: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """What a program is compiled with on a platform: the table, and what a run's config gives over it.

    An option that is given as "" is left to XLA.
    """
    chosen = dict(OPTIONS.get(platform, {})) | dict(given or {})
    return {name: value for name, value in chosen.items() if value != ""} or None
