"""What the small weights can do, as presets of the editor: the tasks of the built-in pictures."""

from collections.abc import Mapping

from acejax.demo.pictures import REPAINTING
from acejax.edit.tasks import NEEDED, NONE, OPTIONAL, Task


def _task(about: str, name: str, image: str, mask: str, references: int = 0, **more) -> Task:
    return Task(about, image, mask, (references, references), scale=REPAINTING.get(name, 1.0), **more)


TASKS: Mapping[str, Task] = {
    "remove": _task("take a symbol away, with a mask or without: 'remove it', 'remove the heart'", "remove", NEEDED,
                    OPTIONAL, starts="remove "),
    "recolor": _task("give what is inside the mask another colour: 'make it blue'", "recolor", NEEDED, NEEDED,
                     starts="make "),
    "insert": _task("paint a symbol inside the mask: 'a red heart'", "insert", NEEDED, NEEDED),
    "instruct": _task("recolour what is named, without a mask: 'make the heart green'", "instruct", NEEDED, NONE),
    "reference": _task("the reference's symbol inside the mask: 'this star'", "reference", NEEDED, NEEDED, 1),
    "two_references": _task("two references' symbols: 'this star and this heart'", "two_references", NEEDED, NEEDED, 2,
                            share=1.0),
    "text": _task("a picture from words: 'a yellow star on grass'", "text", NONE, NONE),
}
