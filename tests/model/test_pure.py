"""`apply`, `flow.loss` and `flow.euler` are pure functions: every jax transformation works on them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import acejax
from acejax import flow, lcu
from acejax.model.mmdit import example
from tests.model.small import jit, random_params

CONFIG = acejax.MMDiTConfig.tiny(depth=1, depth_single_blocks=1, hidden_size=64, num_heads=2, mlp_ratio=2)
HEIGHT, WIDTH = 4, 6  # latent pixels: 6 tokens
PARTS = ("latents", "edit", "mask", "text", "pooled")
DEFAULT = acejax.Execution()


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def sample():
    """Every input of a batch of two, by its name."""
    random = np.random.default_rng(2)
    shapes = dict(zip(PARTS, [(HEIGHT, WIDTH, 16), (HEIGHT, WIDTH, 16), (8 * HEIGHT, 8 * WIDTH, 1),
                              (3, CONFIG.context_in_dim), (CONFIG.vec_in_dim,)], strict=True))
    drawn = {name: random.normal(size=(2, *shape)).astype(np.float32) for name, shape in shapes.items()}
    return drawn | {"mask": (drawn["mask"] > 0).astype(np.float32)}


def velocity(params, latents, sigma, sample, execution=DEFAULT):
    """The velocity of a 448-channel canvas, [B, S, 64]."""
    image, positions = lcu.pack(latents, sample["edit"], sample["mask"], sample["edit"])
    batch = len(image)
    tokens = acejax.Tokens(image, positions, sample["text"], sample["pooled"], jnp.broadcast_to(sigma, batch),
                           jnp.ones(batch), jnp.full(batch, image.shape[1]))
    return acejax.apply(CONFIG, params, tokens, execution=execution)


def loss(params, sample, execution=DEFAULT):
    """The training loss of the batch, its noise and noise levels fixed."""
    x0 = sample["latents"]
    noise, sigma = jnp.cos(jnp.arange(x0.size)).reshape(x0.shape), jnp.array([0.3, 0.7])
    units = jnp.broadcast_to(lcu.membership(HEIGHT, [2, 4]), (len(x0), 6, 1, 2))
    found = velocity(params, flow.interpolate(x0, noise, sigma), sigma, sample, execution)
    return flow.loss(found, lcu.patchify(flow.target(x0, noise)), units)[0]


@pytest.fixture(scope="module")
def gradients(params, sample):
    """The loss's gradient by every parameter and by every input."""
    return jit(jax.grad(loss, argnums=(0, 1)))(params, sample)


@pytest.fixture(scope="module")
def slopes(params, sample, gradients):
    """For each input, the loss's slope along its gradient: by central differences, and by that gradient."""
    step, value = 1e-2, jit(loss)
    along = {}
    for part, gradient in gradients[1].items():
        size = float(jnp.linalg.norm(gradient))
        up, down = (value(params, sample | {part: sample[part] + sign * step / size * gradient}) for sign in (1, -1))
        along[part] = (float(up - down) / (2 * step), size)
    return along


@pytest.mark.parametrize("part", PARTS)
def test_grad_by_each_input(sample, gradients, slopes, part):
    assert gradients[1][part].shape == sample[part].shape
    differences, gradient = slopes[part]
    assert gradient > 0
    np.testing.assert_allclose(differences, gradient, rtol=2e-2)


def test_grad_by_params_reaches_every_leaf(gradients):
    blind = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradients[0])
             if not jnp.any(leaf != 0)]
    assert blind == []


def test_jvp_is_the_gradient_s_transpose(params, sample, gradients):
    direction = np.cos(np.arange(sample["text"].size, dtype=np.float32)).reshape(sample["text"].shape)

    @jit
    def slope_along(direction):
        return jax.jvp(lambda text: loss(params, sample | {"text": text}), (sample["text"],), (direction,))[1]

    slope = slope_along(direction)
    np.testing.assert_allclose(slope, jnp.vdot(gradients[1]["text"], direction), rtol=1e-3)


def test_jvp_by_params_is_the_gradient_s_transpose(params, sample, gradients):
    """Along all of them, biases among them, with the attention named."""
    direction = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), params)

    @jit
    def slope_along(direction):
        def by_params(params):
            return loss(params, sample, acejax.Execution(attention="xla"))

        return jax.jvp(by_params, (params,), (direction,))[1]

    parts = jax.tree.leaves(jax.tree.map(jnp.vdot, gradients[0], direction))
    np.testing.assert_allclose(slope_along(direction), sum(parts), rtol=1e-3)


def edit(params, sample, seed):
    """The latents of an edit from its seed: the whole sampler."""
    noise = jax.random.normal(jax.random.key(seed), sample["latents"].shape)
    return flow.euler(lambda x, sigma: lcu.unpack(velocity(params, x, sigma, sample), HEIGHT, WIDTH), noise,
                      flow.schedule(3, 6))


def test_vmap_over_seeds(params, sample):
    together = jit(jax.vmap(edit, in_axes=(None, None, 0)))(params, sample, np.arange(3))
    alone = jnp.stack([*map(functools.partial(jit(edit), params, sample), range(3))])
    np.testing.assert_allclose(together, alone, atol=1e-4 * float(alone.std()))
    assert jnp.abs(together[0] - together[1]).max() > 0.1


def test_jvp_and_eval_shape_through_the_sampler(params, sample):
    def by_text(text):
        return edit(params, sample | {"text": text}, 0)

    assert jax.eval_shape(by_text, sample["text"]).shape == sample["latents"].shape
    _, tangent = jit(lambda text: jax.jvp(by_text, (text,), (jnp.ones_like(text),)))(sample["text"])
    assert jnp.isfinite(tangent).all() and jnp.abs(tangent).max() > 0


def test_grad_through_the_sampler(params, sample):
    """An edit can be optimised by its text."""
    by_text = jit(jax.grad(lambda text: jnp.sum(jnp.square(edit(params, sample | {"text": text}, 0)))))
    gradient = by_text(sample["text"])
    assert jnp.isfinite(gradient).all() and jnp.any(gradient != 0)


def test_config_and_execution_are_static_and_compile_once(params):
    tokens = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), example(CONFIG, batch=2, image=6, text=3))
    apply = jit(acejax.apply, static_argnums=0, static_argnames="execution")
    apply(CONFIG, params, tokens, execution=acejax.Execution())
    apply(dataclasses.replace(CONFIG), params, dataclasses.replace(tokens, lengths=jnp.array([5, 6])),
          execution=acejax.Execution())
    assert apply._cache_size() == 1
    half = functools.partial(acejax.apply, CONFIG, execution=acejax.Execution(dtype=jnp.bfloat16))
    assert jax.eval_shape(half, params, tokens).dtype == jnp.bfloat16


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_remat_changes_no_gradient(params, sample, gradients, remat):
    found = jit(jax.grad(loss), static_argnums=2)(params, sample, acejax.Execution(remat=remat))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(found)), "every parameter takes part"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())), found,
                 gradients[0])


def test_constrain_sees_every_activation(params, sample):
    """The hook for shardings is called on [B, S, D] and [B, S, heads * head_dim] of both stacks, and on vectors."""
    seen = set()

    def constrain(x, kind):
        seen.add((kind, x.shape))
        return x

    jax.eval_shape(lambda: loss(params, sample, acejax.Execution(constrain=constrain)))
    assert seen == {("hidden", (2, size, 64)) for size in (3, 6, 9)} | {  # text, image, both
        (kind, (2, size, 64)) for size in (3, 6, 9) for kind in ("heads", "tokens")} | {
        ("modulation", (2, vectors, 64)) for vectors in (6, 3, 2)} | {  # double, single, final
        ("row", (2, 64)), ("vector", (2, 64))}


def test_eval_shape_and_init():
    """Abstract values suffice, and a key decides the parameters."""
    tokens = example(CONFIG, batch=2, image=8, text=3)
    shapes = jax.eval_shape(acejax.init, CONFIG, jax.random.key(0))
    assert jax.eval_shape(functools.partial(acejax.apply, CONFIG), shapes, tokens).shape == (2, 8, 64)
    assert isinstance(shapes, dict)
    first, again, other = (acejax.init(CONFIG, jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert jnp.any(first["img_in"]["kernel"] != other["img_in"]["kernel"])


@pytest.mark.parametrize("field, channels, message", [
    ("image", 384, "tokens.image has 384 channels, the config expects 448"),
    ("text", 32, "tokens.text has 32 channels, the config expects 64"),
    ("pooled", 7, "tokens.pooled has 7 channels, the config expects 64"),
    ("guidance", None, "tokens.guidance is None"),
])
def test_wrong_tokens_are_named(params, field, channels, message):
    tokens = example(CONFIG)
    shape = None if channels is None else jax.ShapeDtypeStruct((*getattr(tokens, field).shape[:-1], channels),
                                                               jnp.float32)
    with pytest.raises(ValueError, match=message):
        acejax.apply(CONFIG, params, dataclasses.replace(tokens, **{field: shape}))


@pytest.mark.parametrize("make, message", [
    (lambda: acejax.MMDiTConfig(num_heads=23), "hidden_size 3072 is not a multiple of num_heads 23"),
    (lambda: acejax.MMDiTConfig(axes_dim=(16, 56, 54)), "add up to the head size 128"),
    (lambda: acejax.MMDiTConfig(axes_dim=(17, 55, 56)), "must be even numbers"),
    (lambda: acejax.Execution(attention="fast"), "Execution.attention is 'fast'; known: auto, xla"),
    (lambda: acejax.Execution(remat="some"), "Execution.remat is 'some'; known: none, full, or with commas"),
])
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_few_blocks_one_by_one_are_the_same_as_a_loop(monkeypatch):
    config = dataclasses.replace(CONFIG, depth=2, depth_single_blocks=3)
    random = np.random.default_rng(3)

    def drawn(shapes):
        return jax.tree.map(lambda leaf: (0.2 * random.normal(size=leaf.shape)).astype(leaf.dtype), shapes)

    params, tokens = drawn(jax.eval_shape(acejax.init, config, jax.random.key(0))), drawn(example(config, 2))
    found = []
    for few in (0, 3):
        monkeypatch.setattr("acejax.model.mmdit.FEW", few)
        lowered = jit(jax.value_and_grad(lambda params: jnp.square(acejax.apply(config, params, tokens)).mean())
                      ).lower(params)
        assert ("while" in lowered.as_text()) == (few == 0)
        found.append(lowered.compile()(params))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), *found)
