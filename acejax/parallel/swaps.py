"""Rows of a batch that XLA has swapped, told from the text of a compiled program.

XLA (for CPU and TPU; jax 0.4.30 to 0.12) computes x @ w wrongly, without a word, where x's rows lie over (data, fsdp)
and its inputs over `tensor`, w over (tensor, fsdp), and the result over (data, fsdp) and `tensor`, with fsdp = tensor
and data > 1: it sends rows from the place that they have in the order (data, fsdp) to the one that they would have in
the order (fsdp, data), and never back. With batches over (fsdp, data), as `rules.BATCH_AXES` has them, it does not.
On TPU its windowed products hide it: without them (`xla_jf_spmd_threshold_for_windowed_einsum_mib`) it comes out.
"""

import re
from collections.abc import Mapping

import numpy as np

from acejax.parallel.mesh import AXES


def swaps(hlo: str, shape: Mapping[str, int]) -> tuple[str, ...]:
    """The collective-permutes that exchange the batch orders (data, fsdp) and (fsdp, data); there should be none.

    Where `tensor` is 1 XLA swaps nothing, and has permutes like these that are right: of a gather's indices, of a
    convolution's channels that it has split over the batch axes.

    Args:
      hlo: a compiled program, of any backend (`jax.stages.Compiled.as_text`).
      shape: the mesh's axes, in the order of `acejax.make_mesh`; an axis not named is 1.

    Returns:
      Their lines. Empty for a mesh on which both orders are one, or `tensor` is 1.
    """
    sizes = [shape.get(axis, 1) for axis in AXES]
    data, fsdp, tensor, _ = sizes
    if min(data, fsdp, tensor) == 1:
        return ()
    places = np.arange(np.prod(sizes)).reshape(data, fsdp, -1)
    order = places.swapaxes(0, 1).reshape(data * fsdp, -1)  # of the same rows in (fsdp, data)
    pairs = zip(places.ravel().tolist(), order.ravel().tolist(), strict=True)
    there = frozenset((source, target) for source, target in pairs if source != target)
    back = frozenset((target, source) for source, target in there)
    return tuple(line.strip() for line in hlo.splitlines() if _moved(line) in (there, back))


def _moved(line: str) -> frozenset[tuple[int, int]] | None:
    """(source, target) of each device that sends, in a line with a collective-permute; some name those that keep."""
    found = re.search(r"collective-permute(?:-start)?\(.*source_target_pairs=\{([{}\d, ]*)\}", line)
    if found is None:
        return None
    pairs = re.findall(r"\{(\d+), ?(\d+)\}", found[1])
    return frozenset((int(source), int(target)) for source, target in pairs if source != target)
