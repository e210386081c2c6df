import numpy as np
import pytest

from acejax.edit.crop import Crop, around, cut, paste, whole

RNG = np.random.default_rng(0)


def picture(height, width):
    return RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)


def mask_of(size, top, left, bottom, right):
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def test_the_mask_takes_its_share_of_the_window():
    assert around(mask_of((400, 600), 150, 250, 250, 350), 0.5) == Crop(100, 200, 200)


@pytest.mark.parametrize("box, expected", [
    ((0, 0, 100, 100), Crop(0, 0, 200)), ((300, 500, 400, 600), Crop(200, 400, 200))])
def test_the_window_is_moved_inside_the_picture(box, expected):
    assert around(mask_of((400, 600), *box), 0.5) == expected


def test_the_window_holds_the_whole_mask_wherever_it_is():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        size = tuple(rng.integers(1, 200, 2))
        (top, bottom), (left, right) = (sorted(rng.choice(limit + 1, 2, replace=False)) for limit in size)
        if rng.random() < 0.5:  # at an edge
            bottom, right = size
        window = around(mask_of(size, top, left, bottom, right), rng.choice([0.3, 0.5, 0.75, 1.0]))
        for low, high, start, limit in ((top, bottom, window.top, size[0]), (left, right, window.left, size[1])):
            assert start <= low and high <= start + window.side
            if window.side <= limit:  # less than an eighth looks beyond the picture
                assert -window.side / 8 <= start + 1 and start + window.side <= limit + window.side / 8 + 1


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 64), (333, 20), (500, 777)])
def test_any_size_is_cut_and_put_back_exactly_outside_the_mask(size):
    image = picture(*size)
    mask = mask_of(size, 0, 0, size[0] // 2 + 1, size[1] // 2 + 1)
    for window in (around(mask, 0.5), whole(size)):
        assert cut(image, window, 64).shape == (64, 64, 3)
        assert set(np.unique(cut(mask, window, 64))) <= {0, 255}
        result = paste(image, picture(64, 64), window, mask)
        assert result.shape == image.shape and result.dtype == np.uint8
        np.testing.assert_array_equal(result[mask == 0], image[mask == 0])


def test_the_window_goes_back_where_it_was():
    image = np.zeros((200, 300, 3), np.uint8)
    image[80:120, 130:170] = 255
    mask = mask_of((200, 300), 60, 110, 140, 190)
    window = around(mask, 0.5)
    back = paste(image, cut(image, window, 64), window, mask).astype(int)
    assert np.abs(back - image).mean() < 2, "cut and paste without an edit changes next to nothing"
    inverted = paste(image, 255 - cut(image, window, 64), window, mask)
    assert inverted[100, 150].max() < 40 and inverted[70, 150].min() > 200, "inside the mask the result stands"


def test_beyond_the_edges_pixels_are_mirrored():
    image = picture(10, 10)
    window = cut(image, Crop(-10, -10, 30), 30)
    np.testing.assert_array_equal(window[10:20, 10:20], image)
    np.testing.assert_array_equal(window[10:20, 9], image[:, 1])
