"""Nested dicts of arrays by paths ("img_in/kernel"): flax has the same, and imports all of jax with it."""

from collections.abc import Mapping
from typing import Any


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> leaf."""
    leaves = {}
    for name, value in tree.items():
        leaves |= {f"{name}/{path}": leaf for path, leaf in flat(value).items()} if isinstance(value, Mapping) else {
            name: value}
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree
