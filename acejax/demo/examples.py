"""What the page shows of the small weights: what they know, and an edit of each kind on the photo kept for tests."""

import numpy as np

from acejax.data import resize
from acejax.demo.pictures import COLORS, PHOTOS, SHAPES, TEST_PHOTO, Thing, paint, photo
from acejax.edit.web import Example

PLACES = [name for name in PHOTOS if name != TEST_PHOTO]
ABOUT = (f"These are acejax's own **small weights**. They draw {len(SHAPES)} symbols ({', '.join(SHAPES)}) in "
         f"{len(COLORS)} colours ({', '.join(COLORS)}), and know no other things: "
         f"“a red heart”, “make it blue”, “this star” of a reference, “a yellow star on grass” "
         f"(or on {', '.join(name for name in PLACES if name != 'grass')}).")


def examples() -> list[Example]:
    """One edit for each task."""
    cup = photo(TEST_PHOTO)[2]
    box = (72, 112, 80)
    height, width = cup.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    mask[box[0]:box[0] + box[2], box[1]:box[1] + box[2]] = 255
    pair = np.zeros_like(mask)
    pair[72:136, 72:136] = pair[72:136, 168:232] = 255

    def reference(place: str, shape: str, color: str) -> np.ndarray:
        return resize.antialiased(paint(photo(place)[0][:64, :64], Thing(shape, color, (12, 12, 40))), (256, 256))

    star, heart = reference("bricks", "star", "yellow"), reference("grass", "heart", "purple")
    marked = paint(cup, Thing("heart", "yellow", box))
    whole = resize.antialiased(paint(photo(TEST_PHOTO)[0][16:80, 32:96], Thing("heart", "blue", (16, 16, 32))),
                               (256, 256))
    return [
        Example("insert", "a red heart", cup, mask),
        Example("recolor", "make it blue", marked, mask),
        Example("instruct", "make the heart green", whole),
        Example("reference", "this star", cup, mask, (star,)),
        Example("two_references", "this star and this heart", cup, pair, (star, heart)),
        Example("text", "a yellow star on grass"),
    ]
