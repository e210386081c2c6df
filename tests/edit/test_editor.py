"""The editor around a model that answers at once: results come back at the picture's size and place."""

import numpy as np
import pytest

from acejax.data.layout import CanvasConfig
from acejax.edit.editor import Editor

RNG = np.random.default_rng(0)


class White(Editor):
    """Everything becomes white; `canvases` is what the model would have been given."""

    def __init__(self, canvas: CanvasConfig | None = None):
        super().__init__(None, None, None, None, None, **({} if canvas is None else {"canvas": canvas}))
        self.canvases = []

    def generate(self, canvases, prompts, seed=0):
        self.canvases += canvases
        return [np.full((len(canvas.mask), canvas.widths[-1], 3), 255, np.uint8) for canvas in canvases]


@pytest.mark.parametrize("size, middle", [
    ((100, 100), np.s_[:, :]), ((64, 48), np.s_[:, :]), ((40, 320), np.s_[:, 80:240]), ((320, 40), np.s_[80:240, :])])
def test_an_edit_of_any_size(size, middle):
    image = RNG.integers(0, 200, (*size, 3)).astype(np.uint8)
    mask = RNG.integers(0, 2, size).astype(np.uint8) * 255
    before, expected = image.copy(), image.copy()
    expected[middle] = np.where(mask[middle][..., None] > 0, 255, image[middle])
    np.testing.assert_array_equal(White()("x", image, mask), expected)
    expected[middle] = 255
    np.testing.assert_array_equal(White()("x", image), expected)
    np.testing.assert_array_equal(image, before)


def test_a_result_without_a_picture_has_the_size_that_was_asked_for():
    assert White()("x", size=(100, 90)).shape == (100, 90, 3)
    assert White()("x", size=(40, 320)).shape == (40, 160, 3)


def test_the_canvas_is_the_one_that_was_given():
    image = np.zeros((256, 256, 3), np.uint8)
    editor = White(CanvasConfig(max_tokens=64, editing_height=0.5))
    assert editor("x", image, None, [image]).shape == (256, 256, 3)
    assert editor.canvases[0].mask.shape == (128, 64 + 128)
    plain = White()
    plain("x", image, None, [image])
    assert plain.canvases[0].mask.shape == (256, 512)
