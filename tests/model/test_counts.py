"""The released models' exact sizes, from abstract values: no memory is needed."""

import math

import jax
import pytest

import acejax


def size(config):
    params = jax.eval_shape(acejax.init, config, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("config, parameters", [
    (acejax.MMDiTConfig.flux_dev(), 11_901_408_320),
    (acejax.MMDiTConfig.flux_fill(), 11_902_391_360),
    (acejax.MMDiTConfig.ace_plus_lora(), 11_902_391_360),
    (acejax.MMDiTConfig.ace_plus_fft(), 11_902_587_968),
], ids=["dev", "fill", "lora", "fft"])
def test_parameter_counts(config, parameters):
    assert size(config) == parameters


def test_tiny_is_tiny():
    assert 1_000_000 < size(acejax.MMDiTConfig.tiny()) < 2_000_000
