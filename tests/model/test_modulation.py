"""The modulation of all steps beforehand is that of each step, whatever makes it, and the rest computes with it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import acejax
from acejax.adapt import lora as adapt
from acejax.adapt import quantize
from acejax.model import modulation
from tests import judges, loras
from tests.goldens import cases

CONFIG = loras.CONFIG
SIGMAS = np.array([[1.0, 0.3], [0.7, 0.7]], np.float32)  # [N, B]


@functools.cache
def adapted():
    """A LoRA that changes every layer, those of the modulation included."""
    lora = adapt.init(CONFIG, jax.random.key(1), 4, targets=(".*_blocks/.*", "final_layer/modulation", "time_in/.*"))
    draw = np.random.default_rng(0).standard_normal
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 0.2 * draw(x.shape, np.float32) if path[-1].key == "b" else x, lora)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_it_is_what_each_step_makes(with_adapters):
    params, quant, lora = loras.params(), None, None
    if with_adapters:
        lora = adapted()
        params, quant = quantize.quantize(params, "int8", (".*_blocks/.*", "final_layer/modulation", "vector_in/.*"))
    tokens = cases.inputs(CONFIG)
    first, rest = zip(*map(modulation.split, (params, lora or {}, quant or {})), strict=True)
    trees = [dict(zip(("params", "lora", "quant"), (part or None for part in parts), strict=True))
             for parts in (first, rest)]

    @jax.jit
    def all_steps(trees):
        return modulation.modulations(CONFIG, sigma=SIGMAS, pooled=tokens.pooled, guidance=tokens.guidance, **trees)

    @jax.jit
    def with_it(trees, one):
        return acejax.apply(CONFIG, tokens=tokens, modulation=one, **trees)

    made = all_steps(trees[0])
    for step, sigma in enumerate(SIGMAS):
        plain = loras.velocity(CONFIG, params, dataclasses.replace(tokens, sigma=sigma), lora, quant)
        assert judges.difference(with_it(trees[1], jax.tree.map(lambda x, s=step: x[s], made)), plain) < 1e-5


def test_the_parts_are_apart_and_whole():
    params = loras.params()
    first, rest = (flatten_dict(part, sep="/") for part in modulation.split(params))
    assert first.keys().isdisjoint(rest) and first | rest == flatten_dict(params, sep="/")
    shapes = jax.eval_shape(acejax.init, acejax.MMDiTConfig.ace_plus_fft(), jax.random.key(0))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in modulation.split(shapes)]
    assert sizes == [3_247_448_064 + 2 * 10_229_760 + 11_802_624, 11_902_587_968 - 3_279_710_208]


def test_it_is_pinned():
    kinds = []
    execution = acejax.Execution(constrain=lambda x, kind: kinds.append(kind) or x)
    make = functools.partial(modulation.modulations, CONFIG, execution=execution)
    jax.eval_shape(make, loras.params(), SIGMAS, np.zeros((2, CONFIG.vec_in_dim)), np.zeros(2))
    assert kinds == ["row"] * 6 + ["modulation"] * 4  # three embedders of two layers each, then the layers
