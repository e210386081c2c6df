import numpy as np
import pytest

from acejax import UserError
from acejax.data.canvas import compose, denormalize, normalize

RNG = np.random.default_rng(0)


def picture(height=32, width=32):
    return RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)


def box(height=32, width=32):
    mask = np.zeros((height, width), np.uint8)
    mask[8:24, 8:24] = 255
    return mask


def test_units_lie_side_by_side_references_first():
    references, image, target = (picture(32, 48), picture()), picture(), picture()
    canvas = compose((32, 32), image, box(), references, target, scale=1.0)
    assert canvas.widths == (48, 32, 32)
    assert canvas.edit.shape == canvas.modify.shape == canvas.target.shape == (32, 112, 3)
    shown = np.concatenate([normalize(reference) for reference in references], axis=1)
    np.testing.assert_array_equal(canvas.edit[:, :80], shown)
    np.testing.assert_array_equal(canvas.target, np.concatenate([shown, normalize(target)], axis=1))
    assert not canvas.mask[:, :80].any() and not canvas.modify[:, :80].any()
    np.testing.assert_array_equal(canvas.mask[:, 80:, 0] * 255, box())


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_the_repainting_scale_moves_the_masked_part_into_modify(scale):
    image, inside = picture(), box()[..., None] > 0
    canvas = compose((32, 32), image, box(), scale=scale)
    np.testing.assert_array_equal(canvas.edit, np.where(inside, 0, normalize(image)))
    np.testing.assert_allclose(canvas.modify, np.where(inside, (1 - scale) * normalize(image), 0), atol=1e-6)


def test_without_a_picture_all_is_grey_and_generated():
    canvas = compose((16, 32))
    assert not canvas.edit.any() and not canvas.modify.any() and canvas.mask.all() and canvas.target is None
    assert compose((32, 32), picture(), None).mask.all()
    assert compose((32, 32), None, box()).mask.all(), "a mask without a picture is discarded"


def test_uint8_goes_there_and_back():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(denormalize(normalize(values)), values)
    np.testing.assert_array_equal(denormalize(np.array([-3.0, 3.0])), [0, 255])


@pytest.mark.parametrize("call, message", [
    (lambda: compose((32, 32), picture(32, 48)), r"picture is 32 x 48 pixels \(height x width\); expected 32 x 32"),
    (lambda: compose((32, 32), picture(), box(16, 32)), "mask is 16 x 32"),
    (lambda: compose((32, 32), picture(), box(), [picture(16, 16)]), "reference 1 is 16 x 16"),
    (lambda: compose((32, 32), picture(), box(), [picture(32, 20)]), "reference 1 is 32 x 20 .* multiples of 16"),
    (lambda: compose((20, 32)), "target is 20 x 32"),
])
def test_sizes_that_do_not_fit_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
