"""The closed form against the traced program, against XLA and against the 12B figures."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import jaxprs_in_params

import acejax
from acejax.adapt import lora
from acejax.model import flops
from acejax.model.mmdit import TIME_CHANNELS, example

TEXT, IMAGE, BATCH = 5, 12, 2
CONFIGS = {
    "tiny": acejax.MMDiTConfig.tiny(),
    "no guidance": acejax.MMDiTConfig.tiny(guidance_embed=False, depth=2, depth_single_blocks=1, in_channels=64),
    "wider mlp": acejax.MMDiTConfig.tiny(mlp_ratio=6.0, vec_in_dim=48, context_in_dim=96, out_channels=32),
}


def counted(jaxpr) -> int:
    """FLOPs of every dot_general in a jaxpr; a scan's body as often as it runs, of what goes by platform the default
    (a TPU adds up a bias's gradient by a product of ones)."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        bodies = list(jaxprs_in_params(eqn.params))
        if eqn.params.get("branches_platforms"):
            bodies = [bodies[eqn.params["branches_platforms"].index(None)]]
        total += trips * sum(counted(inner) for inner in bodies)
    return total


def abstract(config, text=TEXT, image=IMAGE, batch=BATCH):
    """Shapes of parameters and tokens, every token valid."""
    tokens = dataclasses.replace(example(config, batch, image, text), lengths=None)
    return jax.eval_shape(lambda key: acejax.init(config, key), jax.random.key(0)), tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_the_traced_program(name):
    config = CONFIGS[name]
    traced = jax.make_jaxpr(lambda params, tokens: acejax.apply(config, params, tokens))(*abstract(config))
    assert flops.forward(config, TEXT, IMAGE, BATCH).total == counted(traced.jaxpr)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_step_is_the_traced_gradient_and_the_input_gradients_nobody_needs(name):
    config = CONFIGS[name]
    traced = jax.make_jaxpr(jax.grad(lambda params, tokens: acejax.apply(config, params, tokens).sum()))(
        *abstract(config))
    features = TIME_CHANNELS * (1 + config.guidance_embed) + config.vec_in_dim
    unneeded = 2 * BATCH * config.hidden_size * (
        IMAGE * config.in_channels + TEXT * config.context_in_dim + features)
    assert flops.training_step(config, TEXT, IMAGE, BATCH) == counted(traced.jaxpr) + unneeded


def test_training_step_of_a_lora_is_the_traced_gradient_of_its_factors():
    """But for the input gradients of the modulations' pairs, which nobody needs."""
    config = CONFIGS["wider mlp"]
    params, tokens = abstract(config)
    tree = jax.eval_shape(lambda: lora.init(config, jax.random.key(0), 3))
    leaves = flatten_dict(tree, sep="/")
    pairs = {path[:-2]: leaf.size + leaves[f"{path[:-2]}/b"].size for path, leaf in leaves.items()
             if path.endswith("/a")}

    def loss(factors, rest, params, tokens):
        return acejax.apply(config, params, tokens, lora=unflatten_dict(factors | rest, sep="/")).sum()

    traced = jax.make_jaxpr(jax.grad(loss))(*({path: leaf for path, leaf in leaves.items()
                                               if path.endswith("/scale") == scale} for scale in (False, True)),
                                            params, tokens)
    unneeded = 2 * BATCH * sum(leaf.size for path, leaf in leaves.items() if path.endswith("modulation/a"))
    assert flops.training_step(config, TEXT, IMAGE, BATCH, pairs) == counted(traced.jaxpr) + unneeded
    forward = counted(jax.make_jaxpr(lambda *trees: acejax.apply(config, *trees[:2], lora=trees[2]))(
        params, tokens, tree).jaxpr)
    assert flops.low_rank(pairs, TEXT, IMAGE, BATCH) == forward - flops.forward(config, TEXT, IMAGE, BATCH).total


def test_forward_is_what_xla_counts_at_full_width():
    """One block of each kind, since XLA counts a scan's body once; it adds the element-wise work, about 1 %."""
    config = acejax.MMDiTConfig(depth=1, depth_single_blocks=1)
    execution = acejax.Execution(dtype=jnp.bfloat16, attention="xla")
    lowered = jax.jit(lambda params, tokens: acejax.apply(config, params, tokens, execution=execution)).lower(
        *abstract(config, 512, 4096, 1))
    assert 1 <= lowered.cost_analysis()["flops"] / flops.forward(config, 512, 4096).total < 1.02


@pytest.mark.parametrize("image, expected", [(1024, 21.505), (2048, 37.666), (4096, 74.394), (8192, 165.478),
                                             (12288, 280.063), (16384, 418.151)])
def test_the_12b_model_in_tflop(image, expected):
    total = flops.forward(acejax.MMDiTConfig.ace_plus_fft(), 512, image).total
    assert total / 1e12 == pytest.approx(expected, abs=1e-3)


def test_the_12b_parts_in_tflop():
    parts = dataclasses.asdict(flops.forward(acejax.MMDiTConfig.ace_plus_fft(), 512, 4096))
    rounded = {name: round(value / 1e12, 3) for name, value in parts.items()}
    assert rounded == {"linear": 59.490, "attention": 14.872, "modulation": 0.006, "embedding": 0.0, "io": 0.026}


def test_training_step_scales_with_the_batch():
    config = acejax.MMDiTConfig.ace_plus_fft()
    assert flops.training_step(config, 512, 2048) / 1e12 == pytest.approx(112.998, abs=1e-3)
    assert flops.training_step(config, 512, 2048, batch=6) == 6 * flops.training_step(config, 512, 2048)
