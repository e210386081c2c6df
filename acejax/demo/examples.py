"""What the page shows of the small weights: what they know, and an edit of each kind on the photo kept for tests."""

import numpy as np

from acejax.data import resize
from acejax.demo.pictures import COLORS, PHOTOS, SHAPES, TEST_PHOTO, Thing, paint, photo
from acejax.edit.web import Example

PLACES = [name for name in PHOTOS if name != TEST_PHOTO]
ABOUT = (f"These are acejax's own **small weights**. They draw {len(SHAPES)} symbols ({', '.join(SHAPES)}) in "
         f"{len(COLORS)} colours ({', '.join(COLORS)}), and know no other things: "
         f"“a red heart”, “make it blue”, “remove it”, “this star” of a reference, “a yellow star on grass” "
         f"(or on {', '.join(name for name in PLACES if name != 'grass')}).")


def examples() -> list[Example]:
    """One edit for each task."""
    size, scales = 96, (2.5, 4.0)  # about what the weights were trained on: symbols of half a window
    fine, coarse = photo(TEST_PHOTO, size, scales)[1], photo(TEST_PHOTO, size, scales)[0]
    mask, pair = np.zeros(fine.shape[:2], np.uint8), np.zeros(fine.shape[:2], np.uint8)
    mask[136:232, 208:304] = pair[136:216, 168:248] = pair[136:216, 264:344] = 255
    marked = paint(fine, Thing("heart", "yellow", (136, 208, 96)))

    def close(picture: np.ndarray, thing: Thing) -> np.ndarray:
        return resize.antialiased(paint(picture[:size, :size], thing), (3 * size, 3 * size))

    star, heart = (close(photo(place, size, scales)[0], Thing(shape, color, (16, 24, 56)))
                   for place, shape, color in (("bricks", "star", "yellow"), ("grass", "heart", "purple")))
    whole = close(coarse[24:, 48:], Thing("heart", "blue", (24, 24, 48)))
    return [
        Example("insert", "a red heart", fine, mask),
        Example("recolor", "make it blue", marked, mask),
        Example("remove", "remove it", marked, mask),
        Example("instruct", "make the heart green", whole),
        Example("reference", "this star", fine, mask, (star,)),
        Example("two_references", "this star and this heart", fine, pair, (star, heart)),
        Example("text", "a yellow star on grass"),
    ]
