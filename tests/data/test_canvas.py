"""Pictures as a canvas by default; where they lie is tested in test_layout, parity in test_released."""

import numpy as np
import pytest

from acejax import UserError
from acejax.data.canvas import contents, denormalize, editing, normalize, training
from acejax.data.layout import CanvasConfig, lay
from tests.data import random_pictures

RNG = np.random.default_rng(0)
WHOLE = CanvasConfig(editing_height=1.0)  # references as high as the canvas
BOX = random_pictures.mask(RNG, (32, 32), "box")


def picture(height=32, width=32):
    return random_pictures.picture(RNG, (height, width))


def train(config, target, image=None, mask=None, references=(), shares=None, task="subject"):
    layout = lay(config, target.shape[:2], [reference.shape[:2] for reference in references],
                 shares or [1.0] * len(references))
    return training(config, layout, task, target, image, mask, references)


def test_units_lie_side_by_side_references_first():
    references, image, target = (picture(32, 48), picture()), picture(), picture()
    canvas = train(WHOLE, target, image, BOX, references)
    found = contents(canvas)
    assert canvas.widths == (48, 32, 32) and canvas.scale == 1.0 and not canvas.joined
    assert found.edit.shape == found.modify.shape == found.target.shape == (32, 112, 3)
    shown = np.concatenate([normalize(reference) for reference in references], axis=1)
    np.testing.assert_array_equal(found.edit[:, :80], shown)
    np.testing.assert_array_equal(found.target, np.concatenate([shown, normalize(target)], axis=1))
    assert not found.mask[:, :80].any() and not found.modify[:, :80].any()
    np.testing.assert_array_equal(found.mask[:, 80:, 0] * 255, BOX)

    edited = contents(editing(WHOLE, image, BOX, references))
    assert edited.target is None
    for name in ("edit", "modify", "mask"):
        np.testing.assert_array_equal(getattr(edited, name), getattr(found, name))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_the_repainting_scale_moves_the_masked_part_into_modify(scale):
    image, inside = picture(), BOX[..., None] > 0
    shown = np.where(inside, (1 - scale) * normalize(image), normalize(image))
    for canvas in (editing(WHOLE, image, BOX, scale=scale), train(CanvasConfig(scale=scale), picture(), image, BOX)):
        found = contents(canvas)
        np.testing.assert_allclose(found.edit, np.where(inside, 0, shown), atol=1e-6)
        np.testing.assert_allclose(found.modify, np.where(inside, shown, 0), atol=1e-6)
    one = contents(editing(CanvasConfig.lora(), image, BOX, scale=scale))
    assert one.modify is None, "384 channels: one picture"
    np.testing.assert_allclose(one.edit, shown, atol=1e-6)


def test_the_scale_of_a_sample():
    config = CanvasConfig(scale=0.5, scales={"repainting": 1.0, "subject": 0.25})
    for task, references, expected in (("local", 0, 0.5), ("local", 1, 1.0), ("repainting", 0, 1.0),
                                       ("subject", 2, 0.25)):
        assert train(config, picture(), picture(), None, [picture()] * references, task=task).scale == expected


def test_without_a_picture_all_is_grey_and_generated():
    for canvas in (editing(CanvasConfig(), size=(16, 32)), train(CanvasConfig(), picture(16, 32)),
                   train(CanvasConfig(), picture(16, 32), None, BOX[:16])):
        found = contents(canvas)
        assert not found.edit.any() and not found.modify.any() and found.mask.all()
        assert found.mask.shape == (16, 32, 1)
    assert editing(CanvasConfig(), picture()).mask.all()
    for mask in (None, np.zeros((32, 32), np.uint8)):
        assert editing(CanvasConfig(), picture(), mask).mask.all(), "an empty mask is no mask"
        assert train(CanvasConfig(), picture(), picture(), mask).mask.all()


def test_a_mask_lies_on_its_picture_whatever_their_size():
    """Black on the left, white and masked on the right: of another size than the target, and beyond 4:1."""
    for height, width in ((32, 48), (100, 60), (17, 200), (300, 31)):
        image = np.zeros((height, width, 3), np.uint8)
        image[:, width // 2:] = 255
        mask = image[..., 0]
        for canvas in (train(CanvasConfig(), picture(48, 64), image, mask), editing(CanvasConfig(), image, mask)):
            white = canvas.source[..., 0] > 127
            assert (white != (canvas.mask > 0)).mean() <= 1 / canvas.mask.shape[1], "more than a column apart"
            assert 0.4 < white.mean() < 0.6 and set(np.unique(canvas.mask)) == {0, 255}


def test_pictures_decoded_smaller_make_the_same_canvas():
    """Smooth pictures: the layout is of the files' sizes, the pixels may be fewer."""
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    big = np.stack([np.tile(ramp, (256, 1)), np.tile(ramp[::2, None], (1, 512)), np.full((256, 512), 7)], -1)
    big = big.astype(np.uint8)
    small = big.reshape(128, 2, 256, 2, 3).mean((1, 3)).round().astype(np.uint8)
    layout = lay(CanvasConfig(max_tokens=64), big.shape[:2], [big.shape[:2]], [0.5])
    one, other = (training(CanvasConfig(max_tokens=64), layout, "", shown, shown, None, [shown])
                  for shown in (big, small))
    assert np.abs(one.source.astype(int) - other.source).max() <= 4
    assert np.abs(one.target.astype(int) - other.target).max() <= 4


def test_a_reference_is_not_enlarged_for_an_edit():
    for tall, expected in ((200, 80), (60, 60), (20, 33)):  # 0.8 of 100, its own, the least that training shows
        canvas = editing(CanvasConfig(), picture(100, 100), references=[picture(tall, tall)])
        assert canvas.present[:, 0].sum() == pytest.approx(expected * 96 / 100, abs=1)


def test_uint8_goes_there_and_back():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(denormalize(normalize(values)), values)
    np.testing.assert_array_equal(denormalize(np.array([-3.0, 3.0])), [0, 255])


@pytest.mark.parametrize("call, message", [
    (lambda: editing(CanvasConfig()), r"found no picture to edit and size None"),
    (lambda: editing(CanvasConfig(), picture(), size=(16, 16)), r"found a picture to edit and size \(16, 16\)"),
    (lambda: editing(CanvasConfig(), picture(), BOX[:16]),
     r"mask is 16 x 32 pixels \(height x width\); its picture is 32 x 32"),
])
def test_pictures_that_do_not_fit_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
