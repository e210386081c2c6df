import numpy as np
import pytest

from acejax.edit.crop import Crop, around, cut, middle, square, whole_square, working_size
from acejax.edit.paste import blend, changes, drift, feather, place

RNG = np.random.default_rng(0)


def picture(height, width):
    return RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)


def mask_of(size, top, left, bottom, right):
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def some_masks(number):
    rng = np.random.default_rng(1)
    for _ in range(number):
        size = tuple(rng.integers(1, 200, 2))
        (top, bottom), (left, right) = (sorted(rng.choice(limit + 1, 2, replace=False)) for limit in size)
        if rng.random() < 0.5:  # at an edge
            bottom, right = size
        yield size, (top, left, bottom, right), rng.choice([0.3, 0.5, 0.75, 1.0])


def test_the_mask_takes_its_share_of_the_window():
    assert square(mask_of((400, 600), 150, 250, 250, 350), 0.5) == Crop(100, 200, 200, 200)
    assert around(mask_of((400, 600), 150, 250, 250, 350), 0.5) == Crop(100, 200, 200, 200)


@pytest.mark.parametrize("box, expected", [
    ((0, 0, 100, 100), Crop(0, 0, 200, 200)), ((300, 500, 400, 600), Crop(200, 400, 200, 200))])
def test_the_window_is_moved_inside_the_picture(box, expected):
    assert square(mask_of((400, 600), *box), 0.5) == expected
    assert around(mask_of((400, 600), *box), 0.5) == expected


def test_a_square_holds_the_whole_mask_wherever_it_is():
    for size, (top, left, bottom, right), share in some_masks(2000):
        window = square(mask_of(size, top, left, bottom, right), share)
        for low, high, start, limit in ((top, bottom, window.top, size[0]), (left, right, window.left, size[1])):
            assert start <= low and high <= start + window.height
            if window.height <= limit:  # less than an eighth looks beyond the picture
                assert -window.height / 8 <= start + 1 and start + window.height <= limit + window.height / 8 + 1


def test_a_window_is_inside_the_picture_and_not_too_long():
    for size, (top, left, bottom, right), share in some_masks(2000):
        window = around(mask_of(size, top, left, bottom, right), share)
        assert 0 <= window.top <= top and bottom <= window.top + window.height <= size[0]
        assert 0 <= window.left <= left and right <= window.left + window.width <= size[1]
        assert max(window.height, window.width) <= 2 * min(window.height, window.width) + 2 or (
            window.height == size[0] or window.width == size[1])


def test_a_small_window_is_enlarged_and_a_big_one_kept():
    assert working_size(Crop(0, 0, 100, 100), 4096) == (400, 400)
    assert working_size(Crop(0, 0, 500, 500), 4096) == (1024, 1024)
    assert working_size(Crop(0, 0, 3000, 1500), 4096) == (2992, 1488)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 64), (333, 20), (500, 777)])
def test_any_size_is_cut_and_put_back_exactly_outside_the_mask(size):
    image = picture(*size)
    mask = mask_of(size, 0, 0, size[0] // 2 + 1, size[1] // 2 + 1)
    for window in (square(mask, 0.5), around(mask, 0.5), whole_square(size), middle(size)):
        assert cut(image, window, (64, 48)).shape == (64, 48, 3)
        assert set(np.unique(cut(mask, window, (64, 48)))) <= {0, 255}
        result = feather(image, place(image, picture(64, 48), window), mask, window, 3)
        assert result.shape == image.shape and result.dtype == np.uint8
        np.testing.assert_array_equal(result[mask == 0], image[mask == 0])


def test_the_window_goes_back_where_it_was():
    image = np.zeros((200, 300, 3), np.uint8)
    image[80:120, 130:170] = 255
    mask = mask_of((200, 300), 60, 110, 140, 190)
    window = square(mask, 0.5)
    back = place(image, cut(image, window, (64, 64)), window)
    assert np.abs(back.astype(int) - image).mean() < 2, "cut and place change next to nothing"
    assert drift(image, back, mask, window) < 0.5
    inverted = place(image, 255 - cut(image, window, (64, 64)), window)
    assert drift(image, inverted, mask, window) == 255
    pasted = feather(image, inverted, mask, window, window.height / 64)
    assert pasted[100, 150].max() < 40 and pasted[70, 150].min() > 200, "inside the mask the result stands"


@pytest.mark.parametrize("width", [1, 3, 10, 20])
def test_a_thin_mask_is_not_lost_in_its_feather(width):
    image = np.zeros((400, 400, 3), np.uint8)
    for top, bottom in ((200, 200 + width), (0, 120)):  # alone, and beside a broad one
        mask = mask_of((400, 400), 200, 50, 200 + width, 350)
        mask[top:bottom, 50:170] = 255
        pasted = feather(image, 255 - image, mask, middle((400, 400)), 16)
        assert pasted[200:200 + width, 60:340].max(0).min() > 180 and not pasted[mask == 0].any()


def test_a_change_is_told_from_speckle_and_from_what_the_autoencoder_loses():
    again = picture(64, 64)
    made = np.clip(again + RNG.normal(0, 6, again.shape), 0, 255).astype(np.uint8)
    assert changes(again, again).max() == 0 and changes(made, again).mean() < 0.01
    made[16:32, 16:32] = 255
    weight = changes(made, again)
    assert weight[17:31, 17:31].min() > 0.95 and weight[:12].max() < 0.2 and weight[40:].max() < 0.2


@pytest.mark.parametrize("size", [(64, 64), (37, 301)])
def test_what_has_not_changed_is_the_pictures_own(size):
    image, mask = picture(*size), mask_of(size, 8, 8, 30, 30)
    window = square(mask, 0.5)
    placed = place(image, picture(32, 32), window)
    np.testing.assert_array_equal(blend(image, placed, mask, window, np.zeros((32, 32))), image)
    whole = blend(image, placed, mask, window, np.ones((32, 32)))
    inner = mask_of(size, 10, 10, 28, 28) > 0
    np.testing.assert_array_equal(whole[inner], placed[inner])
    np.testing.assert_array_equal(whole[mask == 0], image[mask == 0])
    low, high = np.minimum(image, placed), np.maximum(image, placed)
    assert ((low <= whole) & (whole <= high)).all(), "at the edge it is between the two"
    np.testing.assert_array_equal(blend(image, placed, None, window, np.ones((32, 32))), placed)


def test_drift_needs_something_to_keep():
    image = picture(20, 20)
    assert drift(image, 255 - image, np.full((20, 20), 255, np.uint8), middle((20, 20))) is None


def test_beyond_the_edges_pixels_are_mirrored():
    image = picture(10, 10)
    window = cut(image, Crop(-10, -10, 30, 30), (30, 30))
    np.testing.assert_array_equal(window[10:20, 10:20], image)
    for where in (Crop(-10, -10, 30, 30), Crop(-4, 2, 30, 5), Crop(5, -7, 5, 30)):
        seen = cut(np.full((10, 10), 255, np.uint8), where, (where.height, where.width))
        rows, columns = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
        assert seen.sum() == 255 * len(rows) * len(columns), "a mask is not"
        assert (rows[0], rows[-1] + 1) == (max(0, -where.top), min(where.height, 10 - where.top))
        assert (columns[0], columns[-1] + 1) == (max(0, -where.left), min(where.width, 10 - where.left))
    np.testing.assert_array_equal(window[10:20, 9], image[:, 1])
