"""The presets against the released table (spec 8.4), by what the autoencoder and the mask's channels are given."""

import numpy as np
import pytest

from acejax import MMDiTConfig, UserError
from acejax.data.canvas import contents
from acejax.edit import tasks
from acejax.edit.prepare import prepare
from acejax.edit.profile import Profile
from acejax.edit.request import Options, Request

# name: annotator, scale of the 448-channel model, scale of the 384-channel one (None: not offered there)
RELEASED = {"repainting": ("none", 1.0, 1.0), "no_preprocess": ("none", 0.0, None),
            "mosaic_repainting": ("mosaic", 0.0, 0.5), "contour_repainting": ("contour", 0.0, 0.5),
            "depth_repainting": ("depth", 0.0, 0.5), "recolorizing": ("grey", 0.0, 0.5),
            "canny_repainting": ("canny", None, 0.5)}
RNG = np.random.default_rng(0)
DRAWN = {name: RNG.integers(0, 256, (64, 96, 3)).astype(np.uint8)
         for name in ("mosaic", "contour", "depth", "grey", "canny")}


@pytest.mark.parametrize("parity", [None, "reference"])
@pytest.mark.parametrize("channels", [448, 384])
@pytest.mark.parametrize("name", RELEASED)
def test_the_model_sees_what_the_table_says(name, channels, parity):
    annotator, *scales = RELEASED[name]
    scale = scales[channels == 384]
    config = MMDiTConfig.ace_plus_fft() if channels == 448 else MMDiTConfig.ace_plus_lora()
    image, mask = RNG.integers(0, 256, (64, 96, 3)).astype(np.uint8), np.zeros((64, 96), np.uint8)
    mask[16:48, 32:80] = 255
    request = Request("a thing", name, image, mask, scale=1.0 if scale is None else None)
    prepared = prepare(Profile.of(config, parity), request, Options(), lambda asked, picture: DRAWN[asked])

    inside = (mask > 127)[..., None]
    shown = image if annotator == "none" else np.where(inside, DRAWN[annotator], image)
    shown = (shown / 127.5 - 1) * (1 - inside * (1.0 if scale is None else scale))
    found = contents(prepared.canvas)
    np.testing.assert_array_equal(found.mask, inside)
    if channels == 448:
        np.testing.assert_allclose(found.edit, shown * ~inside, atol=1e-6)
        np.testing.assert_allclose(found.modify, shown * inside, atol=1e-6)
    else:
        np.testing.assert_allclose(found.edit, shown, atol=1e-6)
        assert found.modify is None


def test_a_ready_map_takes_the_annotators_place():
    image, control = (RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(2))
    profile = Profile.of(MMDiTConfig.ace_plus_fft())
    prepared = prepare(profile, Request("a thing", "depth_repainting", image, control=control), Options(), None)
    np.testing.assert_array_equal(prepared.canvas.source, control)
    with pytest.raises(UserError, match=r"the control is 64 x 32 pixels \(width x height\); its picture is 64 x 64"):
        prepare(profile, Request("x", image=image, control=control[:32]), Options(), None)


def test_words_are_put_in_the_form_that_a_task_was_trained_with():
    local = tasks.TASKS["local_editing"]
    assert tasks.phrase("local_editing", local, "a hat").endswith('explanation: "a hat".')
    assert tasks.phrase("local_editing", local, "a hat", raw=True) == "a hat"
    assert tasks.phrase("local_editing", local, "a hat on {image}") == "a hat on {image}"
    assert tasks.phrase("try_on", tasks.TASKS["try_on"], " ") == "The person wears these clothes."
    assert tasks.phrase("face_swap", tasks.TASKS["face_swap"], "") == (
        "Maintain the facial features. The face faces the camera.")
    with pytest.raises(UserError, match="the prompt is empty"):
        tasks.phrase("portrait", tasks.TASKS["portrait"], "")


def test_text_to_picture_weights_know_nothing_else():
    profile = Profile.of(MMDiTConfig.flux_dev())
    assert list(profile.tasks) == ["text"] and profile.guidance == 3.5
    with pytest.raises(UserError, match="no task takes a picture; the tasks are text"):
        prepare(profile, Request("x", image=np.zeros((64, 64, 3), np.uint8)), Options(), None)
