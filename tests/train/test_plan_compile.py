"""What is read from a compiled step's HLO, on lines as XLA writes them."""

import jax
import jax.numpy as jnp
import pytest

from acejax.train.plan_compile import repeated_reductions, stack_gathers

PARAMS = {
    "double_blocks": {"img": {"mlp_in": {"kernel": (19, 3072, 12288), "bias": (19, 12288)}}},
    "single_blocks": {"mlp_in": {"kernel": (38, 3072, 12288)}, "qkv": {"kernel": (38, 3072, 3, 24, 128)}},
    "img_in": {"kernel": (448, 3072)},
}
PARAMS = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), PARAMS,
                      is_leaf=lambda leaf: isinstance(leaf, tuple))
LAYER = "  %g.1 = f32[3072,12288]{1,0} all-gather(%copy), channel_id=3, dimensions={0}\n"


@pytest.mark.parametrize(("line", "found"), [
    (LAYER, ()),
    ("  %g = bf16[38,3072,12288]{2,1,0} all-gather(%p), dimensions={1}", ("bf16[38,3072,12288]",)),
    ("  %g = (f32[8]{0}, f32[19,3072,12288]{2,1,0}) all-gather(%a, %b)", ("f32[19,3072,12288]",)),
    ("  %g = bf16[19,3072,12288]{2,1,0:T(8,128)} all-gather-start(%p)", ("bf16[19,3072,12288]",)),
    ("  %s = f32[38,3072,12288]{2,1,0} dynamic-slice(%p)", ()),
])
def test_a_whole_stack_is_seen(line, found):
    assert stack_gathers(LAYER + line, PARAMS) == found


@pytest.mark.parametrize(("lines", "found"), [
    (["(f32[3072,12288]{1,0}, f32[3072]{0}) all-reduce(%a, %b)", "f32[12288,3072]{0,1} all-reduce(%c)"], ()),
    (["(f32[3072,12288]{1,0}, f32[12288,3072]{0,1}, f32[1,3072,12288]{2,1,0}) all-reduce(%a, %b, %c)"],
     ("[3072,12288]: 3 for 2",)),
    (["bf16[3072,3,24,128]{3,2,1,0} reduce-scatter(%a)", "bf16[3,24,128,3072]{3,2,1,0} all-reduce-start(%a)"],
     ("[3,24,128,3072]: 2 for 1",)),
    (["f32[448,3072]{1,0} all-reduce(%a)"] * 2, ()),  # img_in lies in no stack
])
def test_a_gradient_reduced_twice_is_seen(lines, found):
    hlo = "\n".join(f"  %r.{number} = {line}" for number, line in enumerate(lines))
    assert repeated_reductions(hlo, PARAMS, {64}) == found
    assert repeated_reductions(hlo, PARAMS, {3072}) == ()  # as long as the batch: can't be told
