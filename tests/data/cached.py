"""Samples, encoders that count and a build around them, for the tests of the cache.

`python -m tests.data.cached FOLDER KILLS SEED`: builds that are killed at random moments, then one to the end.
"""

import concurrent.futures
import io
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import xxhash
from PIL import Image

from acejax.data.augment import AugmentConfig
from acejax.data.cache import build as cache
from acejax.data.cache import chunks, store
from acejax.data.cache.build import CacheConfig
from acejax.data.cache.features import Features
from acejax.data.cache.team import Team
from acejax.data.encoders import Encoders
from acejax.data.layout import CanvasConfig
from acejax.data.sample import Sample

CANVAS, AUGMENT = CanvasConfig(max_tokens=16), AugmentConfig()


def png(seed: int, height: int, width: int, channels: int = 3) -> bytes:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(1, height // 8), max(1, width // 8), channels), np.uint8)
    image = Image.fromarray(small.squeeze(-1) if channels == 1 else small).resize((width, height))
    if channels == 1:
        image = image.point(lambda value: 255 * (value > 127))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int = 6) -> list[Sample]:
    """Of every kind: nothing to edit, masks, the target itself, shared references, two of them."""
    shared = png(1000, 48, 40)
    made = []
    for i in range(count):
        target, image = png(i, 64, 48 + 16 * (i % 2)), png(100 + i, 64, 48 + 16 * (i % 2))
        mask = png(200 + i, 64, 48 + 16 * (i % 2), 1)
        kind = i % 6
        made.append(Sample(
            task=("text", "edit", "local", "free", "subject", "pair")[kind], prompt=f"prompt {kind}", target=target,
            image=(None, image, image, target, image, None)[kind], mask=mask if kind in (2, 4) else None,
            references=((), (), (), (), (shared,), (shared, png(300 + i, 40, 80)))[kind], name=f"list.jsonl:{i + 1}"))
    return made


class Counting:
    """Encoders that cost nothing: what they were asked, and what they give for it."""

    def __init__(self, slow: float = 0.0, width: int = 8):
        self.tiles, self.batches, self.prompts, self.slow, self.width = 0, 0, [], slow, width

    def pictures(self, pictures: np.ndarray) -> np.ndarray:
        """Means over 8 x 8 pixels, in 16 channels of which each is another mixture."""
        time.sleep(self.slow)
        self.batches += 1
        batch, height, width, _ = pictures.shape
        means = pictures.reshape(batch, height // 8, 8, width // 8, 8, 3).mean((2, 4), dtype=np.float64)
        return (means @ np.random.default_rng(0).standard_normal((3, 16))).astype(np.float32)

    def texts(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(self.slow)
        self.prompts += prompts
        rngs = [np.random.default_rng(list(prompt.encode())) for prompt in prompts]
        return (np.stack([rng.standard_normal((4, self.width), np.float32) for rng in rngs]),
                np.stack([rng.standard_normal(3, np.float32) for rng in rngs]))

    def encoders(self, name: str = "counting", clean=str.strip) -> Encoders:
        return Encoders(self.pictures, self.texts, name, lambda prompt: xxhash.xxh3_128_digest(clean(prompt).encode()),
                        text_id=clean(" prompt 3"))


def build(folder, source, counting: Counting | None = None, canvas: CanvasConfig = CANVAS,
          augment: AugmentConfig = AUGMENT, name: str = "counting", clean=str.strip, seed: int = 0, **config
          ) -> tuple[cache.Report, Features]:
    """A build and its features; further fields are CacheConfig's and those of `build`."""
    more = {field: config.pop(field) for field in ("max_broken", "team", "threads", "recheck") if field in config}
    counting = counting or Counting()
    config = CacheConfig(str(folder), **({"dtype": "float32", "batch": 3} | config))
    encoders = counting.encoders(name, clean)
    settings = cache.settings("list", {"path": "list.jsonl"}, canvas, augment, encoders, config, seed)
    report = cache.build(source, settings, canvas, augment, encoders, config, **({"threads": 2} | more))
    return report, Features(folder, [report.index])


def rng():
    return np.random.default_rng(0)


def two(folder, source, **more):
    """Two threads stand for two processes, of which the second is late whenever it looks at the store."""
    barrier = threading.Barrier(2, timeout=60)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda i: build(folder, source, team=Team(i, 2, lambda name: barrier.wait()), **more),
                             range(2)))


def files(folder) -> dict[str, bytes]:
    """Every file of a cache, by its place in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shards_of(nbytes: int) -> None:
    """Small ones, so that a build has several."""
    chunks.SHARD, chunks.PROMPTS = nbytes, 2


def killed(folder: str, kills: int, seed: int) -> int:
    """Builds in child processes, each killed after a random part of the time that one takes; how many were."""
    shards_of(20_000)
    store.OLD = 0.0  # of these none is another run's
    source, moments, hit = samples(24), random.Random(seed), 0
    slow = 0.02 + 0.01 * kills  # so that there is work left for the last of them
    for _ in range(kills):
        child = os.fork()
        if not child:
            os.fsync = lambda descriptor: time.sleep(slow)  # some are hit between writing and renaming
            build(folder, source, Counting(slow))
            os._exit(0)
        time.sleep(moments.uniform(0.02, 0.6))
        os.kill(child, signal.SIGKILL)
        hit += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    build(folder, source)
    return hit


if __name__ == "__main__":
    print(killed(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
