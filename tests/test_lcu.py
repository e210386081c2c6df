"""LCU++: the order of every channel against formulas written out element by element, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax import lcu
from acejax.model.rope import MAX_POSITION
from tests.counts import count

CANVASES = count([(4, 6), (2, 2)], [(4, 6), (2, 2), (6, 4), (2, 16), (16, 2), (8, 8), (12, 20)])
canvases = pytest.mark.parametrize("height, width", CANVASES)


def random(*shape, seed=0):
    """Values all of which differ, so that equal means the same place."""
    return np.random.default_rng(seed).permutation(np.prod(shape)).reshape(shape).astype(np.float32)


@canvases
def test_every_mask_feature_reads_its_pixel(height, width):
    """ACE_plus `modules/flux.py`: feature k of token (i, j) is pixel (16 i + 8 qh + py, 16 j + 8 qw + px)."""
    mask = random(2, 8 * height, 8 * width, 1)
    tokens = np.asarray(lcu.patchify(lcu.fold_mask(mask)))
    assert tokens.shape == (2, height * width // 4, 256)
    for token in range(tokens.shape[1]):
        i, j = divmod(token, width // 2)
        for k in range(256):
            channel, qh, qw = k // 4, k % 4 // 2, k % 2
            py, px = divmod(channel, 8)
            np.testing.assert_array_equal(tokens[:, token, k], mask[:, 16 * i + 8 * qh + py, 16 * j + 8 * qw + px, 0])


@canvases
def test_patchify_is_row_major_with_the_channel_outermost(height, width):
    latents = random(2, height, width, 16)
    tokens = np.asarray(lcu.patchify(latents))
    assert tokens.shape == (2, height * width // 4, 64)
    for token in range(tokens.shape[1]):
        i, j = divmod(token, width // 2)
        for k in range(64):
            c, qh, qw = k // 4, k % 4 // 2, k % 2
            np.testing.assert_array_equal(tokens[:, token, k], latents[:, 2 * i + qh, 2 * j + qw, c])


@canvases
@pytest.mark.parametrize("padding", [0, 5])
def test_unpack_undoes_patchify_and_drops_padding(height, width, padding):
    latents = random(2, height, width, 16)
    tokens = lcu.patchify(latents)
    padded = jnp.pad(tokens, ((0, 0), (0, padding), (0, 0)), constant_values=jnp.nan)
    np.testing.assert_array_equal(lcu.unpack(padded, height, width), latents)


@pytest.mark.parametrize("given, order, channels", [
    ((), ("noisy",), 64),
    (("edit", "mask"), ("noisy", "edit", "mask"), 384),
    (("edit", "mask", "modify"), ("noisy", "edit", "modify", "mask"), 448),
])
def test_channels_of_the_three_variants(given, order, channels):
    parts = {name: random(2, 4, 6, 16, seed=seed) for seed, name in enumerate(("noisy", "edit", "modify"))}
    parts["mask"] = random(2, 32, 48, 1, seed=3)
    image, positions = lcu.pack(parts["noisy"], **{name: parts[name] for name in given})
    tokens = parts | {"mask": lcu.fold_mask(parts["mask"])}
    assert image.shape == (2, 6, channels)
    np.testing.assert_array_equal(image, np.concatenate([lcu.patchify(tokens[name]) for name in order], axis=-1))
    np.testing.assert_array_equal(positions, np.broadcast_to(lcu.positions(4, 6), (2, 6, 3)))


def test_pack_casts_the_mask_to_the_latents_dtype():
    noisy = jnp.zeros((1, 2, 2, 16), jnp.bfloat16)
    image, _ = lcu.pack(noisy, noisy, jnp.ones((1, 16, 16, 1)))
    assert image.dtype == jnp.bfloat16
    assert image[..., 128:].min() == 1


@canvases
def test_positions_count_over_the_whole_canvas(height, width):
    found = np.asarray(lcu.positions(height, width))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [(0, i, j) for i in range(height // 2) for j in range(width // 2)])


def test_units_share_one_grid():
    """A token of the target keeps its content and sits right of every reference."""
    units = [random(1, 4, width, 16, seed=width) for width in (2, 6, 4)]
    canvas = lcu.join(units)
    image, positions = lcu.pack(canvas)
    assert canvas.shape == (1, 4, 12, 16)
    unit = np.asarray(lcu.membership(4, [2, 6, 4]))
    assert unit.shape == (12, 1, 3)
    np.testing.assert_array_equal(unit.sum(-1), 1)
    columns = np.asarray(positions[0, :, 2])
    for index, (first, last) in enumerate([(0, 0), (1, 3), (4, 5)]):  # token columns of each unit
        mine = unit[:, 0, index] == 1
        np.testing.assert_array_equal(mine, (columns >= first) & (columns <= last))
        np.testing.assert_array_equal(image[:, mine], lcu.patchify(units[index]))


def test_masks_and_latents_join_alike():
    """Joining first and folding first are the same."""
    masks = [random(1, 16, 8 * width, 1, seed=width) for width in (2, 4)]
    np.testing.assert_array_equal(lcu.fold_mask(lcu.join(masks)), lcu.join([lcu.fold_mask(mask) for mask in masks]))


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3), (1, 3, 2, 4)])
def test_pad_adds_zeros_at_the_end(shape):
    tokens = random(*shape) + 1
    padded = np.asarray(lcu.pad(tokens, 7))
    assert padded.shape == (shape[0], 7, *shape[2:])
    np.testing.assert_array_equal(padded[:, :3], tokens)
    assert not padded[:, 3:].any()
    np.testing.assert_array_equal(lcu.pad(tokens, 3), tokens)


def latents(height=4, width=6, batch=1):
    return jnp.zeros((batch, height, width, 16))


def mask(height=32, width=48, channels=1):
    return jnp.zeros((1, height, width, channels))


@pytest.mark.parametrize("call, message", [
    (lambda: lcu.patchify(latents(3)), "3 x 6; both sides must be even"),
    (lambda: lcu.patchify(latents(4, 5)), "4 x 5; both sides must be even"),
    (lambda: lcu.pack(latents(3)), "both sides must be even"),
    (lambda: lcu.pack(latents(), edit=latents()), r"given: \('edit',\)"),
    (lambda: lcu.pack(latents(), mask=mask()), r"given: \('mask',\)"),
    (lambda: lcu.pack(latents(), modify=latents(), mask=mask()), r"given: \('modify', 'mask'\)"),
    (lambda: lcu.pack(latents(), latents(4, 4), mask()), "differ in size"),
    (lambda: lcu.pack(latents(), latents(), mask(), latents(2)), "differ in size"),
    (lambda: lcu.pack(latents(batch=2), latents(), mask()), "differ in size"),
    (lambda: lcu.pack(latents(), latents(), mask(4, 6)), "does not cover latents"),
    (lambda: lcu.pack(latents(), latents(), mask(channels=64)), "does not cover latents"),
    (lambda: lcu.join([latents(), latents(2)]), r"share one height; found \[4, 2\]"),
    (lambda: lcu.positions(2, 2 * MAX_POSITION + 2), f"beyond {MAX_POSITION} tokens a side"),
    (lambda: lcu.pad(jnp.zeros((1, 5, 3)), 4), "5 tokens do not fit into 4"),
])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_everything_traces():
    """pack and unpack under jit, vmap and eval_shape: no values are looked at."""
    image, _ = jax.eval_shape(lcu.pack, latents(), latents(), mask(), latents())
    assert image.shape == (1, 6, 448)
    stacked = random(3, 1, 4, 6, 16)
    tokens = jax.jit(jax.vmap(lambda x: lcu.pack(x)[0]))(stacked)
    np.testing.assert_array_equal(jax.vmap(lambda x: lcu.unpack(x, 4, 6))(tokens), stacked)
