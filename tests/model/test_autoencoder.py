"""The autoencoder computes what FLUX's computes; its tiles and its memory.

"Within x of std" is the greatest difference over the standard deviation of the expected output.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import acejax
from acejax.model import autoencoder
from acejax.weights import keymaps
from tests import judges
from tests.goldens import cases, make

MODEL = cases.autoencoder()
TINY = acejax.AutoencoderConfig.tiny(ch_mult=(1, 2))  # two levels: 2 pixels a cell
QUICK = {"xla_backend_optimization_level": 0}  # most of the time here goes into compiling


def difference(found, expected) -> float:
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())


@pytest.fixture(scope="module")
def params():
    return keymaps.from_foreign(MODEL, cases.state(MODEL).__getitem__, "bfl")


@pytest.fixture(scope="module")
def tiny():
    return keymaps.from_foreign(TINY, cases.state(TINY).__getitem__, "bfl")


def compiled(function):
    return jax.jit(function, static_argnums=0, static_argnames=("tile", "dtype"), compiler_options=QUICK)


moments, encode, decode = map(compiled, (autoencoder.moments, autoencoder.encode, autoencoder.decode))


def run(model, params, pictures, latents, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Each half with its own parameters alone: it needs no others."""
    mean, logvar = moments(model, {"encoder": params["encoder"]}, pictures, dtype=dtype)
    return {"mean": mean, "logvar": logvar,
            "picture": decode(model, {"decoder": params["decoder"]}, latents, dtype=dtype)}


def test_equals_the_recorded_autoencoder(params):
    found = run(MODEL, params, *cases.pictures_and_latents())
    assert np.abs(found["picture"]).max() > 1.5  # decode does not clamp
    with np.load(make.AUTOENCODER) as recorded:
        assert recorded.keys() == found.keys()
        for name, expected in recorded.items():
            assert difference(found[name], expected) < 1e-4, name


@judges.needs_diffusers
@pytest.mark.parametrize("size", [(3, 5), (41, 25)])  # 1,025 cells: attention goes by chunks of queries
def test_equals_diffusers(params, size):
    pictures, latents = cases.pictures_and_latents(*size, seed=2)
    found = run(MODEL, params, pictures, latents)
    for name, expected in judges.autoencoder(MODEL, cases.state(MODEL), pictures, latents).items():
        assert difference(found[name], expected) < 1e-4, name


@judges.needs_diffusers
def test_recorded_autoencoder_is_current():
    made = make.autoencoder()
    with np.load(make.AUTOENCODER) as recorded:
        assert recorded.keys() == made.keys()
        for name, array in made.items():
            assert difference(recorded[name], array) < 1e-5, name


def test_encode_is_the_scaled_mean(tiny):
    pictures = cases.pictures_and_latents(1, 2)[0]
    mean, _ = moments(TINY, {"encoder": tiny["encoder"]}, pictures)
    assert difference(encode(TINY, tiny, pictures), 0.3611 * (mean - 0.1159)) < 1e-5


def test_with_a_key_encode_draws_from_the_posterior(monkeypatch):
    mean, logvar = np.linspace(-3, 3, 16), np.linspace(-4, 1, 16)
    pictures = np.zeros((2, 100, 100, 3), np.float32)
    monkeypatch.setattr(autoencoder, "moments", lambda config, params, pictures, **how: tuple(
        np.broadcast_to(x.astype(np.float32), (*pictures.shape[:3], 16)) for x in (mean, logvar)))
    samples = np.asarray(autoencoder.encode(TINY, {}, pictures, jax.random.key(0))).reshape(20_000, 16)
    noise = (samples / 0.3611 + 0.1159 - mean) / np.exp(logvar / 2)
    np.testing.assert_allclose(noise.mean(0), 0, atol=5 * 20_000**-0.5)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(16), atol=7 * 20_000**-0.5)
    assert (samples != np.asarray(autoencoder.encode(TINY, {}, pictures, jax.random.key(1))).reshape(-1, 16)).any()


def test_log_variance_is_clamped(tiny):
    bias = np.zeros(32, np.float32)
    bias[16:18] = 100, -100
    changed = {"encoder": tiny["encoder"] | {"conv_out": tiny["encoder"]["conv_out"] | {"bias": bias}}}
    _, logvar = moments(TINY, changed, cases.pictures_and_latents(1, 2)[0])
    assert (np.asarray(logvar[..., 0]) == 20).all()
    assert (np.asarray(logvar[..., 1]) == -30).all()
    assert (np.abs(logvar[..., 2:]) < 20).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_takes_two_passes_in_float32(dtype):
    """One pass would lose the variance of a nearly constant input, bfloat16 its mean over many pixels."""
    x = jnp.asarray(256 + 2 * np.random.default_rng(0).integers(0, 2, (1, 64, 64, 8)), dtype)  # exact in bfloat16
    affine = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    found = autoencoder.norm(TINY, None).apply({"params": affine}, x)
    assert found.dtype == jnp.float32
    groups = np.asarray(x, np.float64).reshape(-1, TINY.num_groups, 8 // TINY.num_groups)
    expected = (groups - groups.mean((0, 2), keepdims=True)) / np.sqrt(groups.var((0, 2), keepdims=True) + 1e-6)
    assert difference(found, expected.reshape(x.shape)) < 1e-3


def test_bfloat16_is_close(tiny):
    """Also with the weights stored so; what comes out is float32."""
    inputs = cases.pictures_and_latents(1, 2)
    exact = run(TINY, tiny, *inputs)
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny)
    for name, found in run(TINY, stored, *inputs, dtype=jnp.bfloat16).items():
        assert found.dtype == jnp.float32
        assert 0 < (found - exact[name]).std() < 0.03 * exact[name].std(), name


def test_gradient_is_the_slope():
    """From picture to sampled latents to picture, with respect to every parameter."""
    model = acejax.AutoencoderConfig.tiny(ch_mult=(1,))
    params = keymaps.from_foreign(model, cases.state(model).__getitem__, "bfl")
    pictures = cases.pictures_and_latents(1, 1)[0]

    def loss(params):
        latents = autoencoder.encode(model, params, pictures, jax.random.key(0))
        return jnp.square(autoencoder.decode(model, params, latents) - pictures).mean()

    run = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    _, gradient = run(params)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
    size = sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)) ** 0.5
    step = jax.tree.map(lambda leaf: 1e-2 / size * leaf, gradient)
    above, below = (run(jax.tree.map(move, params, step))[0] for move in (np.add, np.subtract))
    np.testing.assert_allclose(above - below, 2e-2 * size, rtol=1e-2)


def test_vmap_gives_what_the_batch_gives(tiny):
    pictures = cases.pictures_and_latents(1, 2)[0]
    mapped = jax.vmap(lambda picture: encode(TINY, tiny, picture[None])[0])(pictures)
    assert difference(mapped, encode(TINY, tiny, pictures)) < 1e-5


def test_one_tile_is_the_whole(tiny):
    """A tile as large as the longer side is the very program without tiles; a smaller one is not."""
    pictures, latents = cases.pictures_and_latents(3, 5)  # 12 x 20 cells of TINY
    for function, x, longer in ((encode, pictures, 20), (decode, latents, 5)):
        whole, one, more = (function.lower(TINY, tiny, x, tile=tile).as_text() for tile in (None, longer, longer - 1))
        assert one == whole
        assert more != whole


@pytest.mark.parametrize("tile", [4, 7, 16])
def test_tiles_of_a_local_function_are_its_whole(tile):
    """The cutting and blending alone: a function that looks at no neighbour shows no seam anywhere, both ways."""
    x = np.random.default_rng(0).standard_normal((2, 18, 10, 1)).astype(np.float32)

    def grow(x):
        return x.repeat(4, axis=1).repeat(4, axis=2) * jnp.arange(1.0, 4)

    def shrink(x):
        return x.reshape(x.shape[0], x.shape[1] // 4, 4, x.shape[2] // 4, 4, x.shape[3]).mean((2, 4))

    grown = autoencoder._by_tiles(grow, x, 3, tile, 1, 4)
    np.testing.assert_allclose(grown, grow(x), atol=1e-5)
    np.testing.assert_allclose(autoencoder._by_tiles(shrink, grown, 3, tile, 4, 1), shrink(grow(x)), atol=1e-5)


def test_tiles_come_close_to_the_whole(tiny):
    """Four tiles. Norms and attention see one tile alone: near is all that can be asked."""
    latents = cases.pictures_and_latents(40, 44)[1]
    whole, tiled = (np.asarray(decode(TINY, tiny, latents, tile=tile)) for tile in (None, 32))
    assert 1e-4 < (tiled - whole).std() / whole.std() < 0.05
    back = jax.eval_shape(functools.partial(autoencoder.encode, TINY, tile=32), tiny, tiled)
    assert back.shape == latents.shape


def test_weights_add_up_and_change_slowly():
    for size in (5, 31, 32, 33, 57, 128):
        for tile in (4, 9, 32):
            starts, weights = autoencoder._cover(size, tile, 8)
            points = starts[:, None] * 8 + np.arange(weights.shape[1])
            total = np.zeros(8 * size)
            np.add.at(total, points, weights)  # every point lies in the picture, or this raises
            np.testing.assert_allclose(total, 1, atol=1e-6)
            assert np.abs(np.diff(weights)).max() < np.pi / (tile // 4 * 8)  # no jump, inside of a tile
            for start, weight in zip(starts, weights, strict=True):  # nor where one begins or ends
                assert start == 0 or weight[0] < 0.01
                assert start == size - min(tile, size) or weight[-1] < 0.01


@pytest.mark.parametrize("function, x, kind, message", [
    (encode, (1, 16, 12, 3), "float32", r"pictures: found float32 \(1, 16, 12, 3\), expected floats \[B, h, w, 3\] "
                                        "with h and w multiples of 8"),
    (encode, (1, 16, 16, 4), "float32", r"expected floats \[B, h, w, 3\]"),
    (encode, (16, 16, 3), "float32", r"found float32 \(16, 16, 3\)"),
    (encode, (1, 0, 16, 3), "float32", r"found float32 \(1, 0, 16, 3\)"),
    (encode, (1, 16, 16, 3), "uint8", "found uint8"),
    (decode, (1, 2, 2, 3), "float32", r"latents: found float32 \(1, 2, 2, 3\), expected floats \[B, h, w, 16\]"),
])
def test_wrong_inputs_are_named(params, function, x, kind, message):
    with pytest.raises(ValueError, match=message):
        function(MODEL, params, np.zeros(x, kind))


@pytest.mark.parametrize("tile", [3, 0, -8])
def test_a_tile_that_cannot_be_is_named(params, tile):
    """Also where the picture would fit into one."""
    pictures, latents = cases.pictures_and_latents(1, 1)
    for function, x in ((encode, pictures), (decode, latents)):
        with pytest.raises(ValueError, match=f"tile is {tile}; expected at least 4 latent cells"):
            function(MODEL, params, x, tile=tile)


@pytest.mark.parametrize("changes, message", [
    (dict(ch=100), "100 channels are not a multiple of num_groups 32"), (dict(z_channels=0), "z_channels is 0"),
    (dict(scale_factor=-1.0), "scale_factor is -1.0"), (dict(ch_mult=()), r"ch_mult is \(\)"),
    (dict(ch_mult=(1, 0)), r"ch_mult is \(1, 0\)")])
def test_wrong_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(acejax.AutoencoderConfig.flux(), **changes)


def test_init_makes_a_model_that_runs():
    params = autoencoder.init(TINY, jax.random.key(0))
    for name, found in run(TINY, params, *cases.pictures_and_latents(1, 2)).items():
        assert 0.1 < found.std() < 10, name


@pytest.mark.parametrize("tile, gibibytes", [(None, 4), (64, 1)])
def test_full_size_memory(tile, gibibytes):
    """Temporaries of decoding 1024 x 1024 pixels; attention never holds all 16,384 x 16,384 logits."""
    flux = acejax.AutoencoderConfig.flux()
    params = jax.eval_shape(autoencoder.init, flux, jax.random.key(0))
    latents = jax.ShapeDtypeStruct((1, 128, 128, 16), jnp.float32)
    lowered = jax.jit(functools.partial(autoencoder.decode, flux, tile=tile)).lower(params, latents)
    assert "16384x16384" not in lowered.as_text()
    assert lowered.out_info.shape == (1, 1024, 1024, 3)
    assert lowered.compile(QUICK).memory_analysis().temp_size_in_bytes < gibibytes * 2**30


@pytest.mark.parametrize("strides, padding", [((1, 1), ((1, 1), (1, 1))), ((2, 2), ((0, 1), (0, 1)))])
def test_a_convolution_by_rows(strides, padding):
    """What a TPU computes."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 5, 7))
    whole = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    found = autoencoder.by_rows(x, kernel, strides, padding)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)  # float32's rounding of sums of 45
