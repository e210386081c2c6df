import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax import flow, lcu
from acejax.data.subset import hold_out
from acejax.model.mmdit import Tokens, apply
from acejax.parallel.mesh import make_mesh
from acejax.train import grid, samples
from acejax.train.held import Held
from acejax.train.samples import Samples
from tests.train.small import SIZES, Table
from tests.train.test_validate import parameters, setting


def decode(latents: np.ndarray) -> np.ndarray:
    """Three channels of the latents, eight times as large."""
    picture = np.clip(128 + 16 * np.asarray(latents)[..., :3], 0, 255).astype(np.uint8)
    return picture.repeat(8, 0).repeat(8, 1)


@functools.cache
def table():
    return hold_out(Table(), 3, 0)[1]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 1}, jax.devices()[:1])


def test_psnr_by_hand():
    target, picture = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    picture[0, 0] = 30, 40, 0  # mean square (900 + 1600) / 3 in one of the two pixels inside
    picture[1, 1] = 255
    mask = np.array([[255, 128], [127, 0]], np.uint8)
    found = samples.psnr(target, picture, mask)
    assert found["inside"] == pytest.approx(10 * np.log10(255**2 / (2500 / 3 / 2)))
    assert found["outside"] == pytest.approx(10 * np.log10(2))
    assert samples.psnr(target, target, mask) == {"inside": 100, "outside": 100}
    assert samples.psnr(target, picture, mask | 255).keys() == {"inside"}  # everything is generated


def test_the_target_unit_is_cut_out_of_the_canvas():
    """Of two units, 2 x 3 tokens and 2 x 2 ones: latents and mask come back as they were before they were folded."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 4, 10, 16)).astype(np.float32)
    mask = rng.integers(0, 256, (1, 32, 80, 1)).astype(np.uint8)
    row = {"unit": np.tile(np.repeat(np.array([0, -1], np.int8), [3, 2]), 2),
           "positions": np.asarray(lcu.positions(4, 10)), "target": np.asarray(lcu.patchify(latents)[0]),
           "edit": np.asarray(lcu.patchify(-latents)[0]), "mask": np.asarray(lcu.patchify(lcu.fold_mask(mask))[0])}
    np.testing.assert_array_equal(samples.target_unit(row, row["target"]), latents[0, :, 6:])
    reference, edit, modify, shown, target = samples.given(row, decode)
    np.testing.assert_array_equal(reference, decode(latents[0, :, :6]))
    np.testing.assert_array_equal(shown, mask[0, :, 48:, 0])
    np.testing.assert_array_equal(edit, decode(-latents[0, :, 6:]))
    assert modify is None and target.shape == (32, 32, 3)


@pytest.mark.parametrize("in_channels", (64, 384, 448))
def test_samples_are_eulers(in_channels, mesh):
    """Against a loop over one sample with a reference alone, without padding."""
    step = setting(mesh, in_channels)
    params = parameters(step.config)
    held = Held(table(), mesh, {12: 16}, 7)
    seen = []
    make = Samples(step, held, 2, 3, 1.0, mesh, lambda latents: seen.append(np.asarray(latents)) or decode(latents))
    values, _ = make(params)
    assert values.keys() == {f"validation/psnr_{part}/{task}" for task in "abrs" for part in ("inside", "outside")}

    sample = 7
    row = held.row(sample)
    names = {64: (), 384: ("edit", "mask"), 448: ("edit", "mask", "modify")}[in_channels]
    given = {name: row[name][None].astype(np.float32) / (255 if name == "mask" else 1) for name in names}
    x, sigmas = row["noise"][None], np.asarray(flow.schedule(3, len(row["unit"])))
    run = jax.jit(lambda tokens: apply(step.config, params, tokens, execution=step.execution))
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        tokens = Tokens(lcu.channels(jnp.asarray(x), **given), row["positions"][None], row["text"][None],
                        row["pooled"][None], jnp.full((1,), sigma))
        x = x + (following - sigma) * np.asarray(run(tokens))
    expected = samples.target_unit(row, x[0])
    assert any(one.shape == expected.shape and np.allclose(expected, one, atol=1e-4) for one in seen)


def test_a_model_that_knows_the_target_is_scored_best(mesh, monkeypatch):
    """The velocity of the sample itself, (x - x0) / sigma, ends at x0; prompts are found by the whole table's index."""
    step = setting(mesh)

    def perfect(config, *, tokens, execution, params):
        noisy, x0, sigma = tokens
        return (noisy - x0) / sigma[:, None, None]

    monkeypatch.setattr(samples, "tokens", lambda config, batch, noisy, sigma, _: (noisy, batch["target"], sigma))
    monkeypatch.setattr(samples, "apply", perfect)
    asked = []
    make = Samples(step, Held(table(), mesh, dict(SIZES), 7), 2, 4, 1.0, mesh, decode,
                   lambda index: asked.append(index) or f"sample {index}")
    values, picture = make({})
    assert len(values) == 8 and min(values.values()) > 50
    assert asked == [int(table().indices[sample]) for sample in (0, 1, 3, 4, 6, 7, 9, 10)]
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    again, same = make({})
    assert again == values and (same == picture).all()


def test_a_grid_has_a_column_for_what_there_is():
    red, mask = np.full((16, 32, 3), [255, 0, 0], np.uint8), np.zeros((16, 32), np.uint8)
    narrow = grid.draw([grid.Line([None, None, None, mask, red, red], "task", "a prompt " * 100)])
    wide = grid.draw([grid.Line([red, red, None, mask, red, red], "task", "")])
    assert 0 < narrow.shape[1] < wide.shape[1]
    assert (wide == [255, 0, 0]).all(-1).mean() > 0.4 and (wide == 255).all(-1).any()
