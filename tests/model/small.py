"""What tests of small models share."""

import functools

import jax
import numpy as np

import acejax

# Compiling is nearly all that these tests cost, and how fast the tiny programs then run does not matter.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(config: acejax.MMDiTConfig):
    """Random everywhere: adaLN-zero would make the model blind to its input."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(acejax.init, config, jax.random.key(0)))
    random = np.random.default_rng(1)
    return tree.unflatten([0.2 * random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
