"""Edit a photo from Python with the small weights: insert, then recolour. `python examples/edit_photo.py out.png`"""

import sys

import numpy as np
from PIL import Image
from skimage import data

from acejax.demo.weights import load_editor

photo = data.coffee()                                    # [400, 600, 3] uint8; a picture of any size will do
mask = np.zeros(photo.shape[:2], np.uint8)
mask[120:220, 380:480] = 255                             # white: generate here

editor = load_editor()
heart = editor("insert", "a red heart", image=photo, mask=mask, seed=1)
blue = editor("recolor", "make it blue", image=heart, mask=mask, seed=1)
Image.fromarray(np.concatenate([photo, heart, blue], 1)).save(sys.argv[1])

kept = mask == 0
assert (heart[kept] == photo[kept]).all() and (blue[kept] == photo[kept]).all(), "outside the mask nothing changes"
