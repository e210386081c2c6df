"""Which linear layers an adaptation concerns: regular expressions over the module paths of our tree."""

import re
from typing import Any

from flax.traverse_util import flatten_dict

from acejax.errors import UserError

# every linear layer of every block, as ACE++ trains and publishes its LoRAs: 304 modules in BFL's terms, where a single
# block's qkv and mlp_in are one module, its proj and mlp_out another (ACE_plus `ace_plus_lora.yaml`)
ACE_PLUS = "(double|single)_blocks/.*"


def select(params: Any, targets: str | tuple[str, ...] = ACE_PLUS) -> tuple[str, ...]:
    """The modules of `params` with a kernel, such as "double_blocks/img/qkv", whose path a target matches whole.

    Args:
      params: as by `acejax.init`; shapes suffice.
      targets: names or regular expressions.

    Raises:
      UserError: a target that matches no module, or is no regular expression.
    """
    modules = sorted("/".join(path[:-1]) for path in flatten_dict(params) if path[-1] == "kernel")
    chosen = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        try:
            found = [module for module in modules if re.fullmatch(target, module)]
        except re.error as error:
            raise UserError(f"target {target!r} is no regular expression: {error}") from None
        if not found:
            raise UserError(f"target {target!r} matches no linear layer; they are {', '.join(modules)}")
        chosen.update(found)
    return tuple(module for module in modules if module in chosen)


def stacked(path: str) -> bool:
    """Whether a path's leaves have a leading axis of layers."""
    return path.startswith(("double_blocks/", "single_blocks/"))
