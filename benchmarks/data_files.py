"""Pictures and a manifest to measure the data path with: noise at five scales, so that JPEGs get sizes of photos."""

import json
import pathlib

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

QUALITY = 88
SCALES = ((256, 60), (64, 30), (16, 16), (4, 9), (1, 5))  # of the noise: pixels, standard deviation
PROMPTS = 50


def generate(folder: pathlib.Path, files: int, samples: int, megapixels: tuple[float, float], seed: int = 0
             ) -> pathlib.Path:
    """Write `files` distinct JPEGs, as many masks, and a manifest; what is there already is kept.

    Pictures come in pairs of one size, one to edit and one wanted. Half of the samples have a reference, and half,
    independently of it, a picture to edit with a mask.

    Returns:
      The manifest.
    """
    manifest = folder / f"bench-{files}-{samples}-{megapixels[0]:g}-{megapixels[1]:g}-{seed}.jsonl"
    if manifest.exists():
        return manifest
    rng = np.random.default_rng(seed)
    places = folder / manifest.stem
    places.mkdir(exist_ok=True)
    longest = int(np.sqrt(2e6 * megapixels[1])) + 1
    pool = [photo(rng, longest) for _ in range(6)]
    for i in tqdm(range(files), "pictures"):
        if i % 2 == 0:
            area, aspect = 1e6 * rng.uniform(*megapixels), 2 ** rng.uniform(-1, 1)
            size = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        top, left = (int(rng.integers(longest - side + 1)) for side in size)
        picture = pool[rng.integers(len(pool))][top:top + size[0], left:left + size[1]]
        picture = np.ascontiguousarray(np.flip(picture, [axis for axis in (0, 1) if rng.random() < 0.5]))
        Image.fromarray(picture[..., rng.permutation(3)]).save(places / f"{i}.jpg", quality=QUALITY)
        Image.fromarray(mask(rng, size)).save(places / f"{i}.png")
    with manifest.with_suffix(".part").open("w") as out:
        for i in range(samples):
            target = i % files
            row = {"task": "bench", "target": f"{target}.jpg",
                   "prompt": f"prompt {rng.integers(PROMPTS)}: let the picture look as in the reference"}
            if rng.random() < 0.5:
                row |= {"image": f"{target ^ 1 if target ^ 1 < files else target}.jpg", "mask": f"{target}.png"}
            if rng.random() < 0.5:
                row["references"] = [f"{rng.integers(files)}.jpg"]
            out.write(json.dumps(_placed(row, places.name)) + "\n")
    return manifest.with_suffix(".part").rename(manifest)


def photo(rng: np.random.Generator, side: int) -> np.ndarray:
    """A picture [side, side, 3] uint8, as rough at every scale as a photo."""
    picture = np.full((side, side, 3), 128, np.float32)
    for scale, deviation in SCALES:
        small = rng.standard_normal((-(-side // scale),) * 2 + (3,), np.float32)
        small = deviation * (0.7 * small[..., :1] + 0.5 * small)  # colours go together
        for channel in range(3):
            image = Image.fromarray(np.ascontiguousarray(small[..., channel]))
            picture[..., channel] += np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    return np.clip(picture, 0, 255).astype(np.uint8)


def mask(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A white ellipse [h, w] uint8 somewhere."""
    image = Image.new("L", size[::-1])
    extent = rng.uniform(0.2, 0.6, 2) * size
    top, left = rng.uniform(0, 1, 2) * (size - extent)
    ImageDraw.Draw(image).ellipse([left, top, left + extent[1], top + extent[0]], fill=255)
    return np.asarray(image)


def _placed(row: dict, folder: str) -> dict:
    place = {field: f"{folder}/{row[field]}" for field in ("target", "image", "mask") if field in row}
    if "references" in row:
        place["references"] = [f"{folder}/{name}" for name in row["references"]]
    return row | place
