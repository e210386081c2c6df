"""Token buckets: a few lengths that canvases are padded to, so that few shapes are compiled and little is padded.

Positions are inputs of the model, so a shape depends on the number of tokens and not on height and width.
"""

from collections.abc import Sequence

import numpy as np

MULTIPLE = 256
MOST = 14


def choose(tokens: Sequence[int], multiple: int = MULTIPLE, most: int = MOST) -> tuple[int, ...]:
    """The lengths, at most `most` multiples of `multiple`, that pad canvases of these token counts least."""
    rounded, counts = np.unique(-(-np.asarray(tokens, np.int64) // multiple) * multiple, return_counts=True)
    # cost[i]: padded tokens of the i shortest lengths, when the longest of them is a bucket; one bucket more each turn
    total = np.concatenate([[0], np.cumsum(counts)])
    cost, choices = np.where(np.arange(len(rounded) + 1) == 0, 0.0, np.inf), []
    for _ in range(min(most, len(rounded))):
        # grown[i, j]: a further bucket, rounded[j], takes what is longer than the i shortest lengths
        grown = cost[:, None] + (total[None, 1:] - total[:, None]) * rounded[None]
        grown[np.arange(len(cost))[:, None] > np.arange(len(rounded))[None]] = np.inf
        choices.append(grown.argmin(0))
        cost = np.concatenate([[np.inf], grown.min(0)])
    ends, end = [], len(rounded)
    for choice in reversed(choices):
        if end == 0:
            break
        ends.append(int(rounded[end - 1]))
        end = int(choice[end - 1])
    return tuple(reversed(ends))


def assign(tokens: Sequence[int], buckets: Sequence[int]) -> np.ndarray:
    """The least bucket that holds each token count, [N]; ValueError where none does."""
    place = np.searchsorted(buckets, tokens)
    if len(place) and place.max() == len(buckets):
        raise ValueError(f"{max(tokens)} tokens are more than the greatest bucket, {buckets[-1]}")
    return np.asarray(buckets)[place]


def waste(tokens: Sequence[int], buckets: Sequence[int]) -> float:
    """The share of padding in what is computed."""
    return 1 - float(np.sum(tokens)) / float(assign(tokens, buckets).sum())
