"""Random pictures, masks and sizes for the tests."""

import numpy as np


def picture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return rng.integers(0, 256, (*size, 3), np.uint8)


def constant(size: tuple[int, int], colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((*size, 3), colour, np.uint8)


def mask(rng: np.random.Generator, size: tuple[int, int], kind: str) -> np.ndarray | None:
    """`kind`: none, empty, full, box, soft (any value) or faint (nothing above 128)."""
    match kind:
        case "none":
            return None
        case "empty" | "full":
            return np.full(size, 255 * (kind == "full"), np.uint8)
        case "soft" | "faint":
            return rng.integers(0, 256 if kind == "soft" else 129, size, np.uint8)
    drawn = np.zeros(size, np.uint8)
    drawn[size[0] // 4:-(-size[0] * 2 // 3), size[1] // 3:-(-size[1] * 3 // 4)] = 255
    return drawn


def sizes(rng: np.random.Generator, least: int, most: int, aspect: float) -> tuple[int, int]:
    """Height and width: the longer side `least` to `most` pixels, the sides up to `aspect`:1, either way round."""
    long = int(np.exp(rng.uniform(np.log(least), np.log(most))))
    short = max(1, round(long / np.exp(rng.uniform(0, np.log(aspect)))))
    return (long, short) if rng.random() < 0.5 else (short, long)
