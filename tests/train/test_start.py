"""Weights to start from: every kind of source, grown without a change of the velocity."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import acejax
from acejax import UserError, checkpoint
from acejax.cli import convert
from acejax.parallel.mesh import make_mesh
from acejax.train.loop import train
from acejax.train.start import check_start, load_start
from tests.train.small import MODEL, losses, make_config, make_stream


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory):
    """A workdir in which a model of 64 channels was trained, and it as safetensors."""
    folder = tmp_path_factory.mktemp("text_to_image")
    config = make_config()
    config.model.in_channels = 64
    train(config, folder / "run", make_stream(), until=3)
    assert convert.main([str(folder / "run"), str(folder / "dev.safetensors"), "--to", "bfl"]) == 0
    checkpoint.save_weights(folder / "orbax", *checkpoint.load_weights(folder / "run"))
    return folder


def velocity(config, params):
    """Of random tokens; what the smaller model does not see is random too."""
    wide = acejax.model.mmdit.example(acejax.MMDiTConfig(**MODEL), batch=2, image=8, text=3)
    rng = np.random.default_rng(0)
    tokens = jax.tree.map(lambda x: jnp.asarray(np.abs(rng.standard_normal(x.shape)), x.dtype), wide)
    tokens = dataclasses.replace(tokens, image=tokens.image[..., :config.in_channels], sigma=jnp.array([0.3, 0.8]),
                                 lengths=jnp.array([8, 6]))
    return jax.jit(acejax.apply, static_argnums=0)(config, params, tokens)


@pytest.mark.parametrize("source", ["run", "dev.safetensors", "orbax"])
@pytest.mark.parametrize("channels", [384, 448])
def test_growth_leaves_the_first_velocity(text_to_image, source, channels):
    small, trained = checkpoint.load_weights(text_to_image / "run")
    config = dataclasses.replace(small, in_channels=channels)
    grown = load_start(str(text_to_image / source), config, make_mesh({"data": -1}))
    before, after = velocity(small, trained), velocity(config, grown)
    assert np.abs(before).max() > 0.01
    np.testing.assert_allclose(after, before, atol=1e-6 * float(np.std(before)))
    assert grown["img_in"]["kernel"].dtype == jnp.float32


def test_a_run_starts_from_it(text_to_image, tmp_path):
    """Its first loss is the small model's; then it learns from what only the grown one sees."""
    config, small, weights = make_config(), make_config(), tmp_path / "dev.safetensors"
    shutil.copy(text_to_image / "dev.safetensors", weights)
    small.model.in_channels = 64
    for one in (config, small):
        one.init_from = str(weights)
    state, _ = train(config, tmp_path / "grown", make_stream(), until=2)
    train(small, tmp_path / "small", make_stream(), until=2)
    grown, before = losses(tmp_path / "grown"), losses(tmp_path / "small")
    np.testing.assert_allclose(grown[0], before[0], rtol=1e-6)
    assert grown[1] != before[1] and np.asarray(state.params["img_in"]["kernel"][64:]).any()
    weights.unlink()  # a run that goes on has its own
    train(config, tmp_path / "grown", make_stream(), until=3)
    assert losses(tmp_path / "grown")[:2] == grown


def test_what_does_not_fit_is_told_before_the_start(text_to_image, tmp_path):
    small, _ = checkpoint.load_weights(text_to_image / "run")
    for source, changes, message in (
            ("run", {"depth": 2}, "found MMDiTConfig.*depth=1.*only in_channels may grow"),
            ("dev.safetensors", {"depth": 2}, "double_blocks.1.* missing"),
            ("dev.safetensors", {"in_channels": 100}, "has shape .32, 64.; expected .32, 100."),
            ("run", {"in_channels": 100}, "reads 64 channels, which do not grow to 100"),
            ("nosuch.safetensors", {}, "nosuch.safetensors")):
        with pytest.raises(UserError, match=message):
            check_start(str(text_to_image / source), dataclasses.replace(small, **{"in_channels": 448} | changes))
    config = make_config()
    config.init_from = str(text_to_image / "nosuch")
    with pytest.raises(UserError, match="nosuch"):
        train(config, tmp_path / "run", make_stream())
    assert not (tmp_path / "run").exists()
