"""LoRA beside the parameters: it computes what merged weights compute, and trains as the reference trains it."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import acejax
from acejax.adapt import lora as adapt
from acejax.adapt.quantize import quantize
from acejax.model.dense import Dense, _each, _together, add_bias
from acejax.weights import keymaps, lora_pairs
from acejax.weights.layout import IN, OUT, Joined, split
from acejax.weights.lora_formats import bfl_targets
from tests import loras
from tests.goldens import cases
from tests.loras import CONFIG, velocity
from tests.model.test_parity import difference

TOKENS = cases.inputs(CONFIG)
FULL = acejax.MMDiTConfig.ace_plus_lora()


def randomized(lora, seed=0):
    """The same LoRA with random factors; shared ones stay shared."""
    factors, scales = adapt.tie(lora)
    leaves, tree = jax.tree.flatten(factors)
    normal = np.random.default_rng(seed).standard_normal
    return adapt.spread(tree.unflatten([0.2 * normal(leaf.shape, np.float32) for leaf in leaves]), scales)


@pytest.fixture(scope="module")
def fresh():
    return jax.device_get(adapt.init(CONFIG, jax.random.key(0), rank=loras.RANK, alpha=loras.ALPHA))


@pytest.fixture(scope="module")
def base():
    return velocity(CONFIG, loras.params(), TOKENS)


def test_attached_equals_merged(fresh, base):
    lora = randomized(fresh)
    attached = velocity(CONFIG, loras.params(), TOKENS, lora=lora)
    assert difference(attached, velocity(CONFIG, adapt.merge(loras.params(), lora), TOKENS)) < 1e-5
    assert difference(attached, base) > 0.1


def test_fresh_lora_changes_nothing(fresh, base):
    np.testing.assert_array_equal(velocity(CONFIG, loras.params(), TOKENS, lora=fresh), base)
    assert difference(velocity(CONFIG, loras.params(), TOKENS, lora=randomized(fresh)), base) > 0.1


def test_without_lora_the_program_is_the_plain_one(monkeypatch):
    """The lowered text is that of a Dense that never heard of other collections."""
    def lowered():
        return jax.jit(acejax.apply, static_argnums=0).lower(CONFIG, loras.params(), TOKENS).as_text()

    class Plain(nn.Module):
        features: tuple[int, ...]
        dtype: Any
        use_bias: bool = True
        zero: bool = False
        parts: bool = False
        gather: Any = None
        reduce_dtype: Any = None
        int8_products: bool = False

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], *self.features), jnp.float32)
            x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
            if self.parts:
                kernel = kernel.reshape(*kernel.shape[:2], -1)
                y = list(jax.lax.platform_dependent(x, kernel, tpu=_each, default=_together))
            else:
                y = [jnp.tensordot(x, kernel, axes=1)]
            if self.use_bias:
                bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32).astype(self.dtype)
                biases = list(bias.reshape(len(bias), -1)) if self.parts else [bias]
                y = [add_bias(*pair) for pair in zip(y, biases, strict=True)]
            return y if self.parts else y[0]

    found = lowered()
    jax.clear_caches()
    monkeypatch.setattr("acejax.model.mmdit.Dense", Plain)
    assert found == lowered()


def test_merge_keeps_dtype_and_rounds_once(fresh):
    kernel = loras.params()["single_blocks"]["mlp_in"]["kernel"].astype(jnp.bfloat16)
    lora = {"single_blocks": {"mlp_in": randomized(fresh)["single_blocks"]["mlp_in"]}}
    found = adapt.merge({"single_blocks": {"mlp_in": {"kernel": kernel}}}, lora)["single_blocks"]["mlp_in"]["kernel"]
    exact = kernel.astype(np.float32) + loras.deltas(lora)["single_blocks/mlp_in"]
    assert found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found, np.float32) - exact).max() <= 2 ** -8 * np.abs(exact).max()


def test_several_loras_add_up(fresh):
    """Other ranks, strengths, alphas and targets; what only one of them has, and slices of one scale."""
    first = randomized(fresh)
    second = randomized(adapt.init(CONFIG, jax.random.key(1), loras.RANK, None, (".*qkv", "final_layer/.*tion")), 1)
    qkv = second["double_blocks"]["img"]["qkv"]
    qkv["scale"] = jnp.broadcast_to(jnp.array([1.0, 0.0, 2.0]), (*qkv["scale"].shape[:-1], 3))
    both = adapt.combine([(first, 0.5), (second, -2.0)])
    one, two = loras.deltas(first), loras.deltas(second)
    assert two.keys() - one.keys() == {"final_layer/modulation"}
    for module, found in loras.deltas(both).items():
        np.testing.assert_allclose(found, 0.5 * one.get(module, 0) - 2 * two.get(module, 0), atol=1e-5)


def test_init_is_peft_s(fresh):
    """Uniform within 1 / sqrt(in): FLUX's linear2 has the inputs of proj and mlp_out together."""
    leaves = flatten_dict(fresh, sep="/")
    for path, leaf in leaves.items():
        if path.endswith("/a"):
            joined = path in ("single_blocks/proj/a", "single_blocks/mlp_out/a")
            bound = (CONFIG.hidden_size + CONFIG.mlp_size if joined else leaf.shape[1]) ** -0.5
            assert 0.97 * bound < np.abs(leaf).max() <= bound, path
            assert math.isclose(leaf.std(), bound / 3 ** 0.5, rel_tol=0.1), path
        elif path.endswith("/b"):
            assert not leaf.any()
        else:
            assert (leaf == 1.5).all()
    np.testing.assert_array_equal(leaves["single_blocks/qkv/a"], leaves["single_blocks/mlp_in/a"])
    assert np.any(leaves["double_blocks/img/qkv/a"] != leaves["double_blocks/txt/qkv/a"])


def test_full_size_counts():
    """What is exported: 304 modules of BFL's, 494 of diffusers', 4,786,176 numbers per rank, as many as are trained."""
    shapes = jax.eval_shape(lambda: adapt.init(FULL, jax.random.key(0), 1))
    factors = jax.eval_shape(lambda: adapt.tie(adapt.init(FULL, jax.random.key(0), 1))[0])
    assert sum(leaf.size for leaf in jax.tree.leaves(factors)) == 4_786_176
    lora = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    pairs = [(down, up) for _, (down, up, _) in lora_pairs.to_foreign(FULL, "bfl", lora)]
    assert len(pairs) == 304
    assert sum(down.size + up.size for down, up in pairs) == 4_786_176
    assert len(list(lora_pairs.to_foreign(FULL, "diffusers", lora))) == 494


def test_shared_factors_are_those_of_the_joined_modules():
    joined = [(ours.axis, [split(module)[0] for module in ours.modules]) for ours in keymaps.BFL.modules.values()
              if isinstance(ours, Joined)]
    shared = {OUT: "a", IN: "b"}
    assert {f"{rest}/{shared[axis]}": f"{first}/{shared[axis]}"
            for axis, (first, *others) in joined for rest in others if "blocks" in rest} == adapt.SHARED


def test_tie_and_spread_are_inverse(fresh):
    lora = randomized(fresh)
    factors, scales = adapt.tie(lora)
    flat = flatten_dict(factors, sep="/")
    assert not flat.keys() & adapt.SHARED.keys()
    assert not any(path.endswith("scale") for path in flat)
    jax.tree.map(np.testing.assert_array_equal, adapt.spread(factors, scales), lora)
    other = randomized(fresh, 5)["single_blocks"]["mlp_in"]
    apart = lora | {"single_blocks": lora["single_blocks"] | {"mlp_in": other}}
    factors, scales = adapt.tie(apart)
    assert "a" in factors["single_blocks"]["mlp_in"]
    jax.tree.map(np.testing.assert_array_equal, adapt.spread(factors, scales), apart)
    alone = adapt.init(CONFIG, jax.random.key(0), loras.RANK, targets="single_blocks/mlp_.*")
    jax.tree.map(np.testing.assert_array_equal, adapt.spread(*adapt.tie(alone)), alone)


@pytest.mark.soak
def test_training_in_bfloat16_with_remat(fresh, tmp_path):
    """By the tied factors alone, the single blocks on a quantised base: b moves first, then everything."""
    params, quant = quantize(loras.params(), targets="single_blocks/.*")
    execution = acejax.Execution(dtype=jnp.bfloat16, remat="full")

    @loras.jit
    def gradient(factors, scales, params, quant):
        def loss(factors):
            lora = adapt.spread(factors, scales)
            out = acejax.apply(CONFIG, params, TOKENS, lora=lora, quant=quant, execution=execution)
            return jnp.square(out.astype(jnp.float32) - 1).mean()
        return jax.grad(loss)(factors)

    for lora, names in ((fresh, "b"), (randomized(fresh), "ab")):
        factors, scales = adapt.tie(lora)
        gradients = jax.device_get(gradient(factors, scales, params, quant))
        for path, leaf in flatten_dict(gradients, sep="/").items():
            assert np.isfinite(leaf).all(), path
            assert all(bool(layer.any()) == (path[-1] in names) for layer in leaf), path

    trained = adapt.spread(jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, factors, gradients), scales)
    acejax.save_lora(tmp_path / "trained.safetensors", CONFIG, trained)
    back = acejax.load_lora(tmp_path / "trained.safetensors", CONFIG)
    jax.tree.map(np.testing.assert_array_equal, back, trained)  # at the same rank


def test_gradient_of_a_pair_is_the_product_s(fresh):
    """One Dense by hand: scale is constant, and a slice of scale 0 takes no gradient."""
    random = np.random.default_rng(0)
    x, a, b = (random.standard_normal(shape, np.float32) for shape in ((5, 4), (4, 2), (2, 3, 6)))
    scale = np.array([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0]], np.float32)
    dense = Dense((3, 6), jnp.float32, use_bias=False)

    def loss(pair):
        return dense.apply({"params": {"kernel": jnp.zeros((4, 3, 6))}, "lora": pair}, x).sum()

    slopes = jax.grad(loss)({"a": a, "b": b, "scale": scale})
    assert not slopes["scale"].any()
    hidden = (x @ a).sum(0)
    np.testing.assert_allclose(slopes["b"], np.broadcast_to((hidden[:, None] * scale)[..., None], b.shape), rtol=1e-5)
    np.testing.assert_allclose(slopes["a"], np.outer(x.sum(0), (b * scale[..., None]).sum((1, 2))), rtol=1e-4)


@pytest.mark.parametrize("pattern, modules", [
    (r"single_blocks\..*\.linear1", ("single_blocks/qkv", "single_blocks/mlp_in")),
    (r"model.double_blocks.*(img_attn.qkv|txt_mlp.2)", ("double_blocks/img/qkv", "double_blocks/txt/mlp_out")),
    (r"final_layer\.linear", ("final_layer/linear",)),
])
def test_targets_in_bfl_s_names(pattern, modules):
    assert bfl_targets(CONFIG, pattern) == modules
    assert set(flatten_dict(adapt.init(CONFIG, jax.random.key(0), loras.RANK, targets=modules), sep="/")) == {
        f"{module}/{name}" for module in modules for name in ("a", "b", "scale")}


@pytest.mark.parametrize("act, message", [
    (lambda: bfl_targets(CONFIG, "nothing"), "'nothing' matches no module"),
    (lambda: bfl_targets(CONFIG, "single_blocks.1.linear1"), "some layers of single_blocks/qkv only"),
    (lambda: adapt.init(CONFIG, jax.random.key(0), 1, targets="qkv"), "'qkv' matches no linear layer; they are double"),
    (lambda: adapt.init(CONFIG, jax.random.key(0), 1, targets="("), "no regular expression"),
    (lambda: adapt.init(CONFIG, jax.random.key(0), 0), "rank is 0"),
])
def test_wrong_targets_are_named(act, message):
    with pytest.raises(acejax.UserError, match=message):
        act()


def test_lora_of_another_model_is_named(fresh):
    wrong = {"double_blocks": fresh["double_blocks"], "blocks": fresh["single_blocks"]}
    with pytest.raises(ValueError, match="lora has 'blocks/mlp_in', which is no linear layer"):
        acejax.apply(CONFIG, loras.params(), TOKENS, lora=wrong)
    with pytest.raises(ValueError, match="lora has 'blocks/mlp_in', but params has no"):
        adapt.merge(loras.params(), wrong)


def test_merge_is_public():
    assert acejax.merge_lora is adapt.merge
