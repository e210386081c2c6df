"""Token buckets: the best there are, and how much padding they leave on sizes as they come."""

import itertools

import numpy as np
import pytest

from acejax.data import buckets
from acejax.data.layout import CanvasConfig, lay
from tests.counts import count


def least_padded(tokens: np.ndarray, multiple: int, most: int) -> int:
    """What the best choice of lengths computes, by trying them all."""
    lengths = np.unique(-(-tokens // multiple) * multiple)
    choices = (chosen + (lengths[-1],) for number in range(min(most, len(lengths)))
               for chosen in itertools.combinations(lengths[:-1], number))
    return min(sum(min(length for length in chosen if length >= token) for token in tokens) for chosen in choices)


def test_no_choice_of_lengths_pads_less():
    rng = np.random.default_rng(0)
    for _ in range(count(40, 500)):
        multiple, most = int(rng.choice([16, 100, 256])), int(rng.integers(1, 6))
        tokens = rng.integers(1, multiple * rng.integers(1, 11), rng.integers(1, 30), endpoint=True)
        chosen = buckets.choose(tokens, multiple, most)
        assert 1 <= len(chosen) <= most and list(chosen) == sorted(set(chosen))
        assert all(type(length) is int and length % multiple == 0 for length in chosen)
        padded = buckets.assign(tokens, chosen)
        assert padded.sum() == least_padded(tokens, multiple, most)
        assert buckets.waste(tokens, chosen) == pytest.approx(1 - tokens.sum() / padded.sum())


def test_each_count_goes_to_the_least_bucket_that_holds_it():
    np.testing.assert_array_equal(buckets.assign([1, 256, 257, 512, 700], (256, 512, 768)), [256, 256, 512, 512, 768])
    assert buckets.waste([128, 384], (256, 512)) == pytest.approx(1 / 3)
    assert buckets.choose([4096, 4000, 4090]) == (4096,)
    with pytest.raises(ValueError, match="769 tokens are more than the greatest bucket, 768"):
        buckets.assign([1, 769], (256, 768))


def draw_sizes(rng: np.random.Generator, number: int) -> np.ndarray:
    """Heights and widths [N, 2]: 0.3 to 4 megapixels, half log-normal about one and half uniform; square to 4:1."""
    pixels = np.where(rng.random(number) < 0.5, np.exp(rng.normal(0, 0.5, number)), rng.uniform(0.3, 4, number))
    pixels = np.clip(pixels, 0.3, 4) * 1e6
    aspect = np.exp(rng.uniform(-np.log(4), np.log(4), number))
    return np.stack([np.sqrt(pixels * aspect), np.sqrt(pixels / aspect)], 1).round().astype(int)


def draw_tokens(budget: str, multiple: int = 16) -> list[int]:
    """Of 20,000 samples, every second one with a reference of any size."""
    rng = np.random.default_rng(20)
    config = CanvasConfig(budget=budget, multiple=multiple)
    targets, references = (draw_sizes(rng, 20_000).tolist() for _ in range(2))
    shares = rng.uniform(*config.reference_height, 20_000)
    return [lay(config, tuple(target), *([] if number % 2 else ([tuple(reference)], [share]))).tokens
            for number, (target, reference, share) in enumerate(zip(targets, references, shares, strict=True))]


@pytest.mark.parametrize("budget, most", [("canvas", 0.02), ("picture", 0.04)])
def test_little_is_padded_in_few_shapes(budget, most):
    tokens = draw_tokens(budget)
    chosen = buckets.choose(tokens)
    waste = buckets.waste(tokens, chosen)
    print(f"budget {budget}: {waste:.2%} of what is computed is padding, in {len(chosen)} shapes: {chosen}")
    assert len(chosen) <= buckets.MOST == 14
    assert max(tokens) <= (4096 if budget == "canvas" else 8192)
    assert waste <= most
