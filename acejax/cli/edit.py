"""`acejax edit`: edit a picture by instruction."""

from collections.abc import Sequence

from absl import flags

from acejax.cli.config import parse_flags
from acejax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Edit one picture and write the result."""
    values = parse_flags("edit", argv, _define)
    if values is None:
        return 0
    flag = {name: values[name].value for name in values}
    if not flag["demo"]:
        raise UserError("edit: add --demo to use the small weights that come with acejax")
    if not flag["out"]:
        raise UserError("edit: --out is missing")
    from acejax.demo.weights import SHIPPED, load_editor
    from acejax.edit.files import picture_format, read_mask, read_picture, write_picture
    from acejax.edit.request import Request

    picture_format(flag["out"])  # before the work
    if flag["mask"] and not flag["image"]:
        raise UserError("edit: --mask without --image")
    image = read_picture(flag["image"]) if flag["image"] else None
    mask = read_mask(flag["mask"], image.shape[:2]) if flag["mask"] else None
    references = tuple(read_picture(path) for path in flag["reference"] or ())
    editor = load_editor(flag["weights"] or SHIPPED)
    request = Request(flag["prompt"] or "", flag["task"], image, mask, references, seed=flag["seed"])
    write_picture(flag["out"], editor.edit([request])[0].picture)
    print(f"wrote {flag['out']}")
    return 0


def _define(values: flags.FlagValues) -> None:
    def text(name, about):
        flags.DEFINE_string(name, None, about, flag_values=values)

    flags.DEFINE_boolean("demo", False, "Use the small weights that come with acejax.", flag_values=values)
    text("prompt", "The instruction, e.g. 'a red heart' or 'make it blue'.")
    text("image", "The picture to edit, of any size; none: text to picture.")
    text("mask", "A mask of the picture's size, white where to generate.")
    flags.DEFINE_multi_string("reference", None, "A reference picture; may be given twice.", flag_values=values)
    text("task", "text, insert, recolor, instruct, reference, two_references or remove; by default what the inputs "
         "stand for.")
    flags.DEFINE_integer("seed", 0, "Fixes the result.", flag_values=values)
    text("weights", "A folder of demo weights (a demo's WORKDIR/weights) instead of those shipped.")
    text("out", "The file to write.")
