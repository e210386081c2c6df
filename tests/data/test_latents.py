"""Canvases to latents, unit by unit, with encoders that can be followed by hand."""

import numpy as np
import pytest

from acejax.data import latents
from acejax.data.canvas import contents, training
from acejax.data.layout import CanvasConfig, lay
from tests.data.random_pictures import mask, picture

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(3, 16))


def pointwise(pictures: np.ndarray) -> np.ndarray:
    """Each 8 x 8 cell by itself: [B, 8h, 8w, 3] -> [B, h, w, 16]."""
    batch, height, width, _ = pictures.shape
    cells = pictures.reshape(batch, height // 8, 8, width // 8, 8, 3)
    return np.tanh(cells.mean((2, 4)) @ MIX) + cells.std((2, 4)) @ MIX


def global_(pictures: np.ndarray) -> np.ndarray:
    """With a part of the whole picture in each latent, as the autoencoder's attention has."""
    return pointwise(pictures) + pictures.mean((1, 2))[:, None, None, :1]


def canvases(config: CanvasConfig, references: int, number: int = 3):
    """Several of one layout."""
    sizes = [(40, 50), (64, 30), (20, 90)][:references]
    layout = lay(config, (64, 80), sizes, [0.5, 1.0, 0.7][:references])
    return [training(config, layout, "", picture(RNG, (64, 80)), picture(RNG, (64, 80)), mask(RNG, (64, 80), "box"),
                     [picture(RNG, size) for size in sizes]) for _ in range(number)]


@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("encode", [pointwise, global_])
def test_units_are_encoded_by_themselves(references, split, encode):
    """As each unit of each of the contents by hand; references are the same latents everywhere."""
    made = canvases(CanvasConfig(split=split, scales={"": 0.5}), references)
    found = latents.encode(made, encode)
    assert set(found) == {"edit", "target", "mask"} | ({"modify"} if split else set())
    seams = np.cumsum(made[0].widths)[:-1]
    for number, canvas in enumerate(made):
        shown = contents(canvas)
        for name in set(found) - {"mask"}:
            by_hand = [encode(unit[None])[0] for unit in np.split(getattr(shown, name), seams, 1)]
            np.testing.assert_allclose(found[name][number], np.concatenate(by_hand, 1), atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(found["mask"][number], shown.mask)
    left = seams[-1] // 8 if references else 0
    np.testing.assert_array_equal(found["edit"][:, :, :left], found["target"][:, :, :left])


@pytest.mark.parametrize("references", [0, 1, 3])
def test_a_reference_goes_through_the_encoder_once(references):
    made = canvases(CanvasConfig(scales={"": 0.5}), references)
    seen = []

    def encode(pictures: np.ndarray) -> np.ndarray:
        seen.append(pictures)
        return pointwise(pictures)

    latents.encode(made, encode)
    shown = [unit for unit in seen if unit.any()]
    # the references, what is kept, what is to be changed, the target; and grey in each reference's size, once
    assert len(shown) == references + 3 and all(len(unit) == 3 for unit in shown)
    grey = [unit for unit in seen if not unit.any()]
    assert [unit.shape[:3] for unit in grey] == [(1, 64, width) for width in made[0].widths[:-1]]


@pytest.mark.parametrize("split", [True, False])
def test_with_parity_a_canvas_is_encoded_whole(split):
    made = canvases(CanvasConfig(split=split, scales={"": 0.5}, parity="reference"), 2)
    calls = []

    def encode(pictures: np.ndarray) -> np.ndarray:
        calls.append(pictures.shape)
        return global_(pictures)

    found = latents.encode(made, encode)
    shown = [contents(canvas) for canvas in made]
    assert calls == [(3, *shown[0].mask.shape[:2], 3)] * (2 + split)
    for name in set(found) - {"mask"}:
        whole = global_(np.stack([getattr(part, name) for part in shown]))
        np.testing.assert_allclose(found[name], whole, atol=1e-6, err_msg=name)
