"""The editor around a model that answers at once: results come back at the picture's size and place."""

import dataclasses

import numpy as np
import pytest

from acejax import MMDiTConfig, UserError
from acejax.data.layout import CanvasConfig
from acejax.demo.tasks import TASKS as SMALL
from acejax.demo.weights import tasks_of
from acejax.edit.editor import Editor
from acejax.edit.masks import grown
from acejax.edit.prepare import prepare
from acejax.edit.profile import Profile
from acejax.edit.request import Options, Request
from tests.counts import count

RNG = np.random.default_rng(0)
FLUX = Profile.of(MMDiTConfig.ace_plus_fft())
FILL = Profile.of(MMDiTConfig.ace_plus_lora())
SMALLEST = Profile("small weights", tasks_of({"tasks": [*SMALL], "repainting": {"recolor": 0.0}}),
                   CanvasConfig(editing_height=1.0), 8, None, 64)


class White(Editor):
    """Everything becomes white; `canvases` is what the model would have been given."""

    def __init__(self, profile=FLUX, **more):
        super().__init__(profile, None, np.copy, np.copy, lambda prompts: (np.zeros((len(prompts), 1, 1)),) * 2, **more)
        self.canvases, self.batches = [], []

    def generate(self, canvases, text, seeds, steps, guidance, cache=None, say=None):
        self.canvases += canvases
        self.batches.append(list(seeds))
        assert len({(canvas.mask.shape, canvas.widths) for canvas in canvases}) == 1 and len(text[0]) == len(canvases)
        widths = (sum(canvas.widths) if canvas.joined else canvas.widths[-1] for canvas in canvases)
        return [np.full((len(canvas.mask), width, 3), 255, np.uint8)
                for canvas, width in zip(canvases, widths, strict=True)]


def picture(*size):
    return RNG.integers(0, 200, (*size, 3)).astype(np.uint8)


@pytest.mark.parametrize("size, middle", [
    ((100, 100), np.s_[:, :]), ((64, 48), np.s_[:, :]), ((40, 320), np.s_[:, 80:240]), ((320, 40), np.s_[80:240, :])])
def test_an_edit_without_a_mask_changes_what_is_seen(size, middle):
    image = picture(*size)
    expected = image.copy()
    expected[middle] = 255
    np.testing.assert_array_equal(White()(None, "x", image=image), expected)


def test_random_sizes_masks_and_references():
    """The result has the picture's size, pixels outside the mask are equal, and no reference is seen in it."""
    rng = np.random.default_rng(2)
    for _ in range(count(60, 500)):
        short = int(rng.integers(32, count(300, 1500)))
        size = (short, int(min(4000, short * rng.uniform(1, 8))))[::rng.choice([1, -1])]
        image, mask = picture(*size), np.zeros(size, np.uint8)
        top, left = (int(rng.integers(0, side - 1)) for side in size)
        mask[top:top + int(rng.integers(1, size[0])), left:left + int(rng.integers(1, size[1]))] = 255
        references = tuple(picture(*rng.integers(32, 300, 2)) // 2 for _ in range(rng.integers(0, 5)))
        profile = (FLUX, FILL)[rng.integers(2)]
        before = image.copy()
        editor = White(profile)
        crop = ("auto", "mask", "none")[rng.integers(3)]
        options = Options(crop=crop, paste=("auto", "feather", "changed")[rng.integers(3)])
        (result,) = editor.edit([Request("x", "repainting", image, mask, references)], options)
        assert result.picture.shape == image.shape
        np.testing.assert_array_equal(result.picture[mask == 0], image[mask == 0])
        np.testing.assert_array_equal(image, before)
        window = result.window
        seen = mask[window.top:window.top + window.height, window.left:window.left + window.width]
        assert (seen > 0).sum() == (mask > 0).sum(), "the window holds the whole mask"
        canvas = editor.canvases[0]
        assert sum(canvas.widths) == canvas.mask.shape[1] and all(width % 16 == 0 for width in canvas.widths)
        assert (result.picture[mask > 0] > image[mask > 0]).any(), "what is masked is made"
        assert len(canvas.widths) == 1 + len(references) and not canvas.mask[:, :-canvas.widths[-1]].any()


def test_raw_results_show_the_whole_window():
    image, mask = picture(100, 100), np.zeros((100, 100), np.uint8)
    mask[40:60, 40:60] = 255
    (result,) = White().edit([Request("x", None, image, mask)], Options(paste="off"))
    assert (result.picture == 255).all()
    assert result.drift == pytest.approx(np.abs(255.0 - image[mask == 0]).mean())


def test_equal_shapes_are_made_at_once_and_come_back_in_order():
    small, large = picture(64, 64), picture(96, 64)
    editor = White(batch=2)
    requests = [Request("x", None, image, seed=seed) for seed, image in enumerate((small, large, small, small, large))]
    results = editor.edit(requests)
    assert editor.batches == [[0, 2], [3], [1, 4]]
    assert [result.picture.shape[0] for result in results] == [64, 96, 64, 64, 96]


def test_what_the_step_cache_left_out_is_told_and_measured():
    class Cached(White):
        def generate(self, *given, cache=None, say=None):
            made = super().generate(*given)
            for done in range(2, 8, 2):
                say(done, done if cache is None else done // 2)
            return made if cache is None else [picture - 3 for picture in made]

    editor, told = Cached(), []
    requests = [Request(prompt, None, picture(64, 64)) for prompt in "xyx"]
    options = Options(steps=6, step_cache=0.3, measure_cache=True)
    results = editor.edit(requests, options, lambda *now: told.append(now))
    assert [(result.skipped, result.cache_error) for result in results] == [(3, 3.0)] * 3
    assert editor.batches == [[0, 0], [0, 0], [0], [0]], "prompts apart, whole steps and cached ones"
    shares = [share for what, share in told if what == "step 6 of 6"]
    assert shares == pytest.approx([0.7, 0.7, 1.0, 1.0])
    (plain,) = White().edit(requests[:1])
    assert (plain.skipped, plain.cache_error) == (0, None)


def test_a_picture_beyond_the_budget_is_worked_on_around_its_mask():
    image, mask = picture(1500, 2000), np.zeros((1500, 2000), np.uint8)
    mask[700:800, 900:1000] = 255
    editor = White()
    (result,) = editor.edit([Request("x", None, image, mask)])
    assert (result.window.height, result.window.width) == (200, 200) and editor.canvases[0].mask.shape == (768, 768)
    (result,) = editor.edit([Request("x", None, image, mask)], Options(crop="none"))
    assert (result.window.height, result.window.width) == (1500, 2000)
    assert editor.canvases[1].mask.size <= 1024 * 1024
    (result,) = editor.edit([Request("x", None, image[:600, :600], mask[200:800, 500:1100])])
    assert (result.window.height, result.window.width) == (600, 600), "what fits is seen whole"


def test_a_result_without_a_picture_has_the_size_that_was_asked_for():
    assert White()(None, "x", size=(100, 90)).shape == (100, 90, 3)
    assert White()(None, "x").shape == (1024, 1024, 3)


def test_a_control_that_is_hidden_is_told():
    image = picture(64, 64)
    request = Request("x", "repainting", image, np.full((64, 64), 255, np.uint8), control=255 - image)
    (result,) = White().edit([request])
    assert "the control is not seen" in result.notes[0]
    assert not White().edit([dataclasses.replace(request, scale=0.5)])[0].notes


def test_no_picture_is_continued_beyond_what_can_be_read(monkeypatch):
    monkeypatch.setattr("acejax.edit.prepare.MOST_PIXELS", 9000)
    with pytest.raises(UserError, match="size is 96 x 96 .* at most 0 megapixels"):
        White().check(Request("x", "outpaint", picture(64, 64)))


def test_small_weights_make_what_they_know_and_enlarge_it():
    editor = White(SMALLEST)
    (result,) = editor.edit([Request("a red heart on grass", size=(300, 600))])
    assert result.picture.shape == (300, 600, 3)
    assert editor.canvases[0].mask.shape == (48, 96), "as many pixels as 64 x 64 in the shape of the result"


@pytest.mark.parametrize("parity", [None, "reference"])
def test_grey_masks_are_read_at_half_and_by_the_released_code_as_it_does(parity):
    editor, image = White(Profile.of(MMDiTConfig.ace_plus_fft(), parity)), picture(64, 64)
    mask = np.repeat(np.array([0, 127, 128, 129], np.uint8), 16)[None].repeat(64, 0)
    control = 255 - image
    (result,) = editor.edit([Request("x", "depth_repainting", image, mask, control=control)])
    canvas = editor.canvases[0]
    edge = 48 if parity else 32
    assert not canvas.mask[:, :edge].any() and (canvas.mask[:, edge:] == 255).all()
    source = {None: lambda m: np.where(m > 127, 1, 0), "reference": lambda m: m / 255}[parity](mask)[..., None]
    assert np.abs(canvas.source - (source * control + (1 - source) * image)).max() <= 1


def test_a_mask_grows():
    image, mask = picture(100, 100), np.zeros((100, 100), np.uint8)
    mask[40:60, 98:] = 255
    (result,) = White().edit([Request("x", None, image, mask)], Options(grow=7))
    changed = np.argwhere((result.picture != image).any(-1))
    np.testing.assert_array_equal([changed.min(0), changed.max(0)], [[33, 91], [66, 99]])
    for pixels in (0, 1, 7, 30, 200):
        wide = np.zeros_like(mask)
        wide[max(0, 40 - pixels):60 + pixels, max(0, 98 - pixels):] = 255
        np.testing.assert_array_equal(grown(mask, pixels), wide)
    assert (grown(mask, 10**12) == 255).all()


def test_what_is_made_smaller_is_told():
    requests = [Request("x", None, picture(1500, 2000)), *(Request("x", size=(side, side)) for side in (2048, 1024))]
    assert [result.notes for result in White().edit(requests)] == [
        ("made at 1168 x 880 pixels, as the ACE++ weights see no more at once, and enlarged to 2000 x 1500",),
        ("made at 1024 x 1024 pixels, as the ACE++ weights see no more at once, and enlarged to 2048 x 2048",), ()]


def test_what_is_not_seen_is_told():
    long, mask = picture(40, 320), np.full((40, 320), 255, np.uint8)
    requests = [Request("x", None, long), Request("x", None, long, mask), Request("x", references=(long,)),
                Request("x", "outpaint", long, size=(60, 400))]
    found = [result.notes for result in White().edit(requests)]
    assert found == [("the picture is longer than 4:1 (320 x 40): only its middle, 160 x 40 pixels, is edited",), (),
                     ("reference 1 is longer than 4:1 (320 x 40): only its middle, 160 x 40 pixels, is looked at",), ()]


class Copy(White):
    """Makes what it is shown."""

    def generate(self, canvases, *arguments, **more):
        return [canvas.source[:, -canvas.widths[-1]:] for canvas in canvases]


@pytest.mark.parametrize("size", [(79, 316), (316, 79), (500, 2000), (70, 420)])
def test_nothing_is_moved_where_rounding_takes_a_picture_beyond_four_to_one(size):
    across = np.linspace(0, 255, max(size)).astype(np.uint8)
    image = np.broadcast_to(across[:, None] if size[0] > size[1] else across, size)
    image, mask = np.repeat(image[..., None], 3, 2), np.zeros(size, np.uint8)
    mask[:20, :20] = 255
    editor = Copy()
    (result,) = editor.edit([Request("x", None, image, mask)], Options(paste="off", crop="none"))
    assert np.abs(result.picture.astype(int) - image).max() <= 4
    shown = prepare(FLUX, Request("x", None, image, mask), Options(crop="none"), None).canvas
    assert (shown.mask[0, 0], shown.mask[-1, -1]) == (255, 0)


def test_nothing_of_a_thin_mask_is_lost():
    image, mask = np.zeros((3000, 4000, 3), np.uint8), np.zeros((3000, 4000), np.uint8)
    mask[1000, 100:3900] = 255
    mask[2000:2400, 300:700] = 255
    thin = prepare(FLUX, Request("x", None, image, mask), Options(crop="none"), None).canvas.mask > 0
    across = thin.shape[1] / 4000
    assert thin[int(1000 * thin.shape[0] / 3000)].sum() == pytest.approx(3800 * across, abs=3)
    assert thin.sum() == pytest.approx(3800 * across + (400 * across) ** 2, rel=0.05)


def test_outpainting_puts_the_picture_in_the_middle():
    image = picture(100, 80)
    editor = White()
    made = editor("outpaint", "", image=image, size=(200, 100))
    assert made.shape == (200, 100, 3)
    np.testing.assert_array_equal(made[50:150, 10:90], image)
    mask = editor.canvases[0].mask
    assert (made[0] == 255).all() and mask[:48].all() and not mask[64:128, 32:64].any()


def test_masks_of_many_sizes_share_few_programs():
    rng, editor = np.random.default_rng(3), White()
    image = np.zeros((1100, 1100, 3), np.uint8)
    for _ in range(12):
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[100:, 100:][tuple(map(slice, rng.integers(20, 500, 2)))] = 255
        height, width = editor.check(Request("x", None, image, mask)).kind[0]
        assert height % 64 == 0 and width % 64 == 0


def test_super_resolution_is_as_large_as_can_be():
    assert White()("super_resolution", "", image=picture(800, 800)).shape == (1024, 1024, 3)


def test_super_resolution_shows_the_enlarged_picture():
    image = picture(60, 80)
    editor = White()
    assert editor("super_resolution", "", image=image).shape == (120, 160, 3)
    assert editor.canvases[0].scale == 0 and editor.canvases[0].mask.all()
    assert editor.canvases[0].source.shape[:2] == (112, 160)


def test_the_small_weights_see_squares_and_boxes():
    image, mask = picture(300, 500), np.zeros((300, 500), np.uint8)
    mask[100:150, 200:250] = 255
    mask[100, 200] = 0
    editor = White(SMALLEST)
    result = editor(None, "a red heart", image=image, mask=mask)
    np.testing.assert_array_equal(result[mask == 0], image[mask == 0])
    canvas = editor.canvases[0]
    assert canvas.source.shape == (64, 64, 3) and canvas.mask.sum() == 255 * 32 * 32 and canvas.scale == 1
    editor(None, "make it blue", image=image, mask=mask)
    assert editor.canvases[1].scale == 0
    mask[100:150, 200:300] = 255
    for prompt, wide in (("a red heart", 1), ("make it blue", 2)):  # a symbol is square, what is there may be wider
        editor(None, prompt, image=image, mask=mask)
        rows, columns = (editor.canvases[-1].mask.any(axis).sum() for axis in (1, 0))
        assert columns == wide * rows
    editor(None, "this star", image=image, mask=mask, references=[picture(50, 90)])
    assert editor.canvases[-1].widths == (64, 64)


def test_what_fills_most_of_a_picture_is_seen_as_large_as_can_be():
    image, mask = picture(300, 500), np.zeros((300, 500), np.uint8)
    mask[:, 20:480] = 255
    for prompt, side in (("make it blue", 500), ("remove it", 500), ("a red heart", 600)):
        (result,) = White(SMALLEST).edit([Request(prompt, None, image, mask)])
        assert result.window.height == result.window.width == side


def test_words_that_need_a_mask_are_told_without_one():
    for prompt in ("a red heart", "make it blue"):
        with pytest.raises(UserError, match=f"prompt '{prompt}' is for none of the tasks that take a picture: remove"):
            White(SMALLEST)(None, prompt, image=picture(64, 64))


def test_a_mask_of_parts_is_told_as_it_is():
    image, mask = picture(300, 600), np.zeros((300, 600), np.uint8)
    mask[100:200, 20:120] = mask[100:200, 480:580] = 255  # in the middle of their box there is nothing of them
    result = White(SMALLEST)(None, "a red heart", image=image, mask=mask)
    assert (result[mask > 0] > image[mask > 0]).all() and (result[mask == 0] == image[mask == 0]).all()


def test_text_and_an_edit_are_made_at_once():
    image, mask = picture(64, 64), np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    editor = White(SMALLEST)
    results = editor.edit([Request("a red heart on grass"), Request("a red heart", None, image, mask)])
    assert editor.batches == [[0, 0]] and (results[0].picture == 255).all()
    np.testing.assert_array_equal(results[1].picture[mask == 0], image[mask == 0])
    assert (results[1].picture[20:44, 20:44] == 255).all()


@pytest.mark.parametrize("size", [(300, 500), (400, 300)])
def test_the_small_weights_see_a_square_of_half_the_window_in_masks_of_any_size(size):
    """Where the window is larger than the picture, too: of that it shows mirrored pixels, but no mirrored mask."""
    rng, editor = np.random.default_rng(3), White(SMALLEST)
    for _ in range(20):
        side = int(rng.integers(min(size) // 2 + 1, min(size)))
        top, left = (int(rng.integers(0, length - side + 1)) for length in size)
        mask = np.zeros(size, np.uint8)
        mask[top:top + side, left:left + side] = 255
        editor(None, "a red heart", image=picture(*size), mask=mask)
        assert [editor.canvases[-1].mask.any(axis).sum() for axis in (1, 0)] == [32, 32]


@pytest.mark.parametrize("profile, paste", [(FLUX, "changed"), (SMALLEST, "auto")])
@pytest.mark.parametrize("masked", [False, True])
def test_pixels_that_do_not_change_are_kept(profile, paste, masked):
    """Inside the mask, or without one: of what the model gives back as its autoencoder does, no pixel moves."""
    image, mask = np.zeros((128, 128, 3), np.uint8), np.zeros((128, 128), np.uint8)
    image[:] = 100 + 8 * (np.indices((128, 128)).sum(0) % 2)[..., None]  # finer than the autoencoder below can tell
    mask[32:96, 32:] = 255

    class Painter(White):
        def generate(self, canvases, *_, **__):
            made = [np.full((*canvas.mask.shape[:1], canvas.widths[-1], 3), 104, np.uint8) for canvas in canvases]
            for one in made:
                one[:, :len(one) // 2] = 200
            return made

    editor = Painter(profile)
    editor._decode = lambda latents: np.full_like(latents, 104 / 127.5 - 1)
    options = Options(crop="none", paste=paste)
    request = Request("make the star red", image=image, mask=mask if masked else None)
    result, raw = (editor.edit([request], one)[0].picture
                   for one in (options, dataclasses.replace(options, paste="off")))
    painted = np.zeros((128, 128), bool)
    painted[:, :64] = True
    near = np.zeros((128, 128), bool)
    near[:, 58:70] = True
    inside = mask > 127 if masked else np.ones((128, 128), bool)
    if masked:
        near |= (grown(mask, 2) > 0) & (grown(255 - mask, 2) > 0)  # its edge is soft
    np.testing.assert_array_equal(result[inside & painted & ~near], 200)
    np.testing.assert_array_equal(result[~(inside & painted) & ~near], image[~(inside & painted) & ~near])
    assert (raw[~painted & ~near] == 104).all()


def test_parity_hands_out_what_the_released_code_does():
    """Beside a reference the first 30 columns go and the rest is stretched; alone it stays on the 16-pixel grid."""
    editor = White(Profile.of(MMDiTConfig.ace_plus_lora(), "reference"))
    image = picture(100, 90)
    assert editor(None, "x", image=image).shape == (96, 80, 3)
    columns = np.arange(96 + 80)[None, :, None].repeat(96, 0).repeat(3, 2).astype(np.uint8)
    editor.generate = lambda canvases, *_, **__: [columns[:, :sum(canvas.widths)] for canvas in canvases]
    (result,) = editor.edit([Request("x", None, image, references=(picture(50, 50),))])
    assert result.picture.shape == (100, 90, 3) and result.tokens == 6 * 11
    assert result.picture[0, 0, 0] == pytest.approx(96 + 30, abs=1)
    (result,) = editor.edit([Request("x", None, picture(40, 320), references=(picture(50, 50),))])
    assert result.picture.shape == (40, 160, 3), "no more than 4:1 is seen"


@pytest.mark.parametrize("request_, message", [
    (dict(task="nosuch"), "unknown task 'nosuch'; the tasks are repainting"),
    (dict(task="repainting", image=1), r"repainting \(paint something new inside the mask\): it needs a mask; given"),
    (dict(task="portrait", prompt="x"), "it needs 1 reference; given: no picture"),
    (dict(image=1, mask=1), "task repainting .* the prompt is empty"),
    (dict(prompt="x", mask=1), "no task takes a mask"),
    (dict(prompt="x", image=1, scale=2.0), r"scale is 2.0; expected 0 to 1"),
    (dict(prompt="x", image=1, size=(9, 9)), "task no_preprocess gives the picture's own size"),
    (dict(prompt="x", size=(10, 100)), "at most 4:1"),
    (dict(task="super_resolution", image=1, size=(2000, 2000)), "at most 1.05 megapixels at once"),
    (dict(task="super_resolution", image=2), "can't make it larger"),
    (dict(task="outpaint", image=1, size=(20, 20)), "expects a larger one than the picture's, 64 x 64"),
    (dict(task="outpaint", image=1, control=1), "task outpaint takes no control"),
])
def test_mistakes(request_, message):
    side = 1000 if request_.get("image") == 2 else 64
    made = {"image": picture(side, side), "mask": np.full((64, 64), 255, np.uint8), "control": picture(side, side)}
    request_ = {name: made.get(name, value) for name, value in request_.items()}
    editor = White()
    with pytest.raises(UserError, match=message):
        editor.edit([Request("fine", image=picture(64, 64)), Request(**request_)])
    assert not editor.canvases, "nothing is begun"


@pytest.mark.parametrize("more, message", [
    (dict(image=np.zeros((64, 64, 3))), r"image is \[64, 64, 3\] float64; expected \[h, w, 3\] uint8"),
    (dict(image=np.zeros((64, 64, 4), np.uint8)), r"image is \[64, 64, 4\] uint8"),
    (dict(image=np.zeros((64, 64), np.uint8)), r"image is \[64, 64\] uint8"),
    (dict(image="photo.png"), r"image is str; expected \[h, w, 3\] uint8"),
    (dict(image=picture(64, 64), mask=np.ones((64, 64), bool)), r"mask is \[64, 64\] bool; expected \[h, w\] uint8"),
    (dict(image=picture(64, 64), references=[np.zeros((9, 9))]), r"reference 1 is \[9, 9\] float64"),
    (dict(image=picture(64, 64), references=[picture(64, 3)]), "reference 1 is 3 x 64 pixels"),
    (dict(size=(99_999, 99_999)), "at most 179 megapixels"), (dict(seed=2**32), "seed is 4294967296; expected 0 to"),
    (dict(image=picture(64, 64), options=Options(crop="mask")), "crop is 'mask', and there is no mask")])
def test_mistakes_from_python(more, message):
    with pytest.raises(UserError, match=message):
        White()(None, "x", **more)


def test_mistakes_in_how():
    for options, message in (({"steps": 0}, "steps is 0; expected 1 to 1000"),
                             ({"guidance": 101.0}, "expected 0 to 100")):
        with pytest.raises(UserError, match=message):
            White().edit([Request("x")], Options(**options))
    parity = Profile.of(MMDiTConfig.ace_plus_lora(), "reference")
    for profile, request in ((FLUX, Request(task="outpaint", image=picture(64, 64))),
                             (parity, Request("x", image=picture(64, 64)))):
        with pytest.raises(UserError, match="paste is 'changed', and (the result of task outpaint is|parity keeps no)"):
            White(profile).edit([request], Options(paste="changed"))
    with pytest.raises(UserError, match="the small weights take none"):
        White(SMALLEST).edit([Request("a red heart on grass")], Options(guidance=3.0))
    parity = White(Profile.of(MMDiTConfig.ace_plus_lora(), "reference"))
    with pytest.raises(UserError, match="result has 16 columns of the canvas, of which parity='reference' drops 30"):
        parity(None, "x", image=picture(64, 16), references=[picture(64, 64)])
    for options, message in (({"crop": "round"}, "crop is 'round'; expected auto, mask, none"),
                             ({"grow": -1}, "grow is -1; expected 0 pixels or more"),
                             ({"step_cache": -1.0}, "step_cache is -1.0; expected 0 or more"),
                             ({"measure_cache": True}, "measure_cache without step_cache")):
        with pytest.raises(UserError, match=message):
            Options(**options)
