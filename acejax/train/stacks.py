"""The model's stacks [layers, ...]: one layer of a tree at a time, taken out and put back in place."""

from typing import Any

import jax

STACKS = ("double_blocks", "single_blocks")


def length(stack: Any) -> int:
    """How many layers a stack has."""
    return len(jax.tree.leaves(stack)[0])


def take(stack: Any, index: jax.Array | int) -> Any:
    """One layer of a stack."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


def put(stack: Any, layer: Any, index: jax.Array | int) -> Any:
    """The stack with another layer at `index`; in a loop that carries the stack, XLA writes it in place."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0), stack, layer)


def apart(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a model's tree the stacks, and all that lies in none."""
    return {name: tree[name] for name in STACKS}, {name: part for name, part in tree.items() if name not in STACKS}
