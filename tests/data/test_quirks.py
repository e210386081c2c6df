"""What is odd in the released code, one by one: kept with parity="reference", repaired by default."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from acejax import UserError
from acejax.data import latents
from acejax.data.augment import AugmentConfig
from acejax.data.canvas import Canvas, contents, editing, training
from acejax.data.layout import CanvasConfig, lay
from acejax.data.prepare import plan
from acejax.data.sample import Sample
from acejax.edit.prepare import finish, prepare
from acejax.edit.profile import Profile
from acejax.edit.request import Options, Request
from acejax.edit.tasks import TASKS
from tests.data.random_pictures import constant, mask, picture

RNG = np.random.default_rng(0)
DEFAULT = CanvasConfig()
RED, BLUE = (255, 0, 0), (0, 0, 255)


def both(config: CanvasConfig = DEFAULT) -> tuple[CanvasConfig, CanvasConfig]:
    """With parity, and by default."""
    return dataclasses.replace(config, parity="reference"), config


def train(config: CanvasConfig, target, image=None, mask=None, references=(), share=1.0) -> Canvas:
    layout = lay(config, target.shape[:2], [reference.shape[:2] for reference in references],
                 [share] * len(references))
    return training(config, layout, "", target, image, mask, references)


def test_a_lora_sees_what_is_to_be_changed():
    """Released: training splits by default (MODIFY_MODE), so that the one picture of 384 channels is grey there."""
    image, inside = constant((32, 32), RED), mask(RNG, (32, 32), "box")
    within = inside > 0
    for config in both():  # 448 channels: what is to be changed is in `modify`
        found = contents(train(config, image, image, inside))
        assert not found.edit[within].any()
        np.testing.assert_array_equal(found.modify[within][:, 0], 0.5)
    for config in both(CanvasConfig.lora()):  # 384: in the one picture, as when editing
        for canvas in (train(config, image, image, inside), editing(config, image, inside, scale=0.5)):
            assert contents(canvas).modify is None
            np.testing.assert_array_equal(contents(canvas).edit[within][:, 0], 0.5)


def test_pictures_are_antialiased():
    """Stripes of one pixel, made half as big: nearest-exact picks some, antialiasing makes them grey."""
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    released, default = (contents(train(config, stripes, references=[stripes])) for config in
                         both(CanvasConfig(max_tokens=8, budget="canvas")))
    columns = np.s_[:, 2:14]  # within the reference, and as many from the right: within the target
    for shown in (released.target, released.target[:, ::-1]):
        np.testing.assert_array_equal(np.abs(shown[columns]), 1)
    for shown in (default.target, default.target[:, ::-1]):
        assert np.abs(shown[columns]).max() < 0.1


def test_references_are_as_high_in_training_as_in_editing():
    """Released: a third to all of the canvas in training, all of it in a LoRA's editing."""
    encoded = io.BytesIO()
    Image.fromarray(picture(RNG, (96, 96))).save(encoded, "PNG")
    sample = Sample("subject", "a prompt", encoded.getvalue(), references=(encoded.getvalue(),))
    reference = picture(RNG, (96, 96))

    def heights(config: CanvasConfig) -> set[int]:
        rng = np.random.default_rng(1)
        return {plan(sample, config, AugmentConfig(), rng).layout.contents[0] for _ in range(300)}

    released, default = both(CanvasConfig.lora())
    assert len(heights(released)) > 50 and (min(heights(released)), max(heights(released))) == (32, 96)
    assert heights(default) == {96}
    for config in (released, default):
        assert editing(config, size=(96, 96), references=[reference]).present.all(0)[:96].all()
    for config in both():  # 448 channels: within what training shows
        assert len(heights(config)) > 50 and min(heights(config)) >= 32 and max(heights(config)) <= 96
        canvas = editing(config, picture(RNG, (96, 96)), references=[reference])
        assert canvas.present[:, 0].sum() == pytest.approx(0.8 * 96, abs=1)


def test_nothing_to_edit_is_grey():
    """Released: white, half hidden, which is light grey in training; when editing it is grey."""
    target = picture(RNG, (32, 48))
    released, default = (contents(train(config, target)) for config in both())
    np.testing.assert_array_equal(released.modify, 0.5)
    assert not released.edit.any() and not default.edit.any() and not default.modify.any()
    assert released.mask.all() and default.mask.all()
    for config in both():
        found = contents(editing(config, size=(32, 48)))
        assert not found.edit.any() and not found.modify.any() and found.mask.all()


def test_masks_are_black_and_white():
    """Released: grey in training, where both pictures show some of it; black and white when editing."""
    image, grey = constant((32, 32), RED), np.full((32, 32), 51, np.uint8)
    grey[:16] = 204
    released, default = (contents(train(config, image, image, grey)) for config in both())
    np.testing.assert_allclose(released.mask[..., 0], grey / 255, atol=1e-6)
    np.testing.assert_allclose(released.modify[:16, :, 0], (1 - 0.5 * 0.8) * 0.8, atol=1e-6)
    np.testing.assert_allclose(released.edit[16:, :, 0], (1 - 0.5 * 0.2) * 0.8, atol=1e-6)
    for found in (default, *(contents(editing(config, image, grey)) for config in both())):
        np.testing.assert_array_equal(found.mask[..., 0], grey > 127)
        assert not found.edit[:16].any() and not found.modify[16:].any()


def test_a_mask_takes_its_pictures_size():
    """Released: the mask joined to a reference's at its own height, which fails unless that is the target's."""
    image, half = picture(RNG, (20, 30)), np.zeros((20, 30), np.uint8)
    half[:, :15] = 255
    for config in both():
        canvas = train(config, picture(RNG, (64, 96)), image, half, [picture(RNG, (64, 64))])
        assert canvas.mask.shape == (64, 160) and not canvas.mask[:, :64].any()
        assert (canvas.mask[:, 64:112] == 255).all() and not canvas.mask[:, 112:].any()


def test_a_picture_beyond_4_to_1_shows_its_middle():
    """Released: only when editing, and not the mask."""
    target, banner = picture(RNG, (32, 32)), picture(RNG, (16, 320))
    released, default = (train(config, target, references=[banner]) for config in both())
    assert released.widths == (640, 32) and default.widths == (128, 32)
    released, default = (train(config, banner) for config in both())
    assert released.widths == (320,) and default.widths == (64,)
    np.testing.assert_array_equal(default.target, banner[:, 128:192])

    masked = np.zeros((16, 320), np.uint8)
    masked[:, 160:] = 255
    released, default = both()
    np.testing.assert_array_equal(editing(released, banner).source, banner[:, 128:192])
    with pytest.raises(UserError, match="up to 4:1"):
        editing(released, banner, masked)
    canvas = editing(default, banner, masked)
    np.testing.assert_array_equal(canvas.source, banner[:, 128:192])
    np.testing.assert_array_equal(canvas.mask, masked[:, 128:192])


def test_a_wide_reference_does_not_shrink_the_target():
    """Released: the budget is of the whole canvas. That is a choice by default."""
    target, wide = picture(RNG, (64, 64)), picture(RNG, (32, 128))
    released, default = both(CanvasConfig(max_tokens=16))
    together = dataclasses.replace(default, budget="canvas")
    layouts = [train(config, target, references=[wide]) for config in (released, default, together)]
    assert [layout.mask.size // 256 <= 16 for layout in layouts] == [True, False, True]
    assert layouts[0].mask.shape[0] < 64 and layouts[2].mask.shape[0] < 64
    assert layouts[1].mask.shape[0] == 64 and layouts[1].widths == (64, 64), "16 tokens each"


def test_several_references():
    """Released: one. Beyond that parity is our reading: they lie side by side."""
    for config in both():
        canvas = train(config, constant((32, 32), BLUE), references=[constant((32, 32), (n, n, n)) for n in (10, 20)])
        assert canvas.widths == (32, 32, 32)
        assert canvas.target[0, ::32, 0].tolist() == [10, 20, 0]


def test_a_reference_is_encoded_once():
    """Released: up to three times, within three canvases."""
    calls = []

    def encode(pictures: np.ndarray) -> np.ndarray:
        calls.append(bool((pictures == 1).any()))
        return np.zeros((len(pictures), pictures.shape[1] // 8, pictures.shape[2] // 8, 16), np.float32)

    for config, expected in zip(both(), (2, 1), strict=True):
        calls.clear()
        image = constant((32, 32), (9, 9, 9))
        latents.encode([train(config, image, image, None, [constant((32, 32), RED)])], encode)
        assert sum(calls) == expected, "in what is kept, and in the target"


def test_the_seam_is_where_the_target_begins():
    """Released: both are brought to a 16-pixel line apart, so that columns of the reference are right of the seam."""
    target, reference = constant((64, 64), BLUE), constant((64, 37), RED)
    for config, clean in zip(both(CanvasConfig.lora()), (False, True), strict=True):
        for canvas in (train(config, target, references=[reference]),
                       editing(config, target, references=[reference], scale=0.0)):
            found = contents(canvas)
            seam = sum(canvas.widths[:-1])
            assert seam % 16 == 0 and found.edit.shape[1] == sum(canvas.widths)
            shown = [part for part in (found.target, found.edit if canvas.scale == 0 else None) if part is not None]
            assert all(((part[:, seam:, 0] > 0).any() != clean) for part in shown)


def test_a_result_has_the_pictures_size_with_and_without_a_reference():
    """Released: without a reference it stays as small as the canvas; with one, 30 columns are lost to the seam."""
    image = picture(RNG, (100, 150))
    for references in ((), (picture(RNG, (60, 50)),)):
        for parity, size in ((None, (100, 150)), ("reference", (100, 150) if references else (64, 96))):
            profile = Profile("few tokens", TASKS, CanvasConfig(max_tokens=24, parity=parity), 1, None)
            prepared = prepare(profile, Request("x", image=image, references=references), Options(), None)
            widths = prepared.canvas.widths if parity else prepared.canvas.widths[-1:]
            made = np.zeros((len(prepared.canvas.mask), sum(widths), 3), np.uint8)
            assert finish(prepared, made, Options()).picture.shape[:2] == size
