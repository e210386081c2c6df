"""What small weights can do, as presets of the editor: the tasks of the built-in pictures.

How much of what lies under the mask they are shown is the weights' own (`acejax.demo.weights.tasks_of`).
"""

from collections.abc import Mapping

from acejax.edit.tasks import NEEDED, NONE, OPTIONAL, Task


def _task(about: str, image: str, mask: str, references: int = 0, **more) -> Task:
    return Task(about, image, mask, (references, references), **more)


TASKS: Mapping[str, Task] = {
    "remove": _task("take a symbol away, with a mask or without: 'remove it', 'remove the heart'", NEEDED, OPTIONAL,
                    starts="remove "),
    "recolor": _task("give what is inside the mask another colour: 'make it blue'", NEEDED, NEEDED, starts="make "),
    "insert": _task("paint a symbol inside the mask: 'a red heart'", NEEDED, NEEDED, square=True),
    "instruct": _task("recolour what is named, without a mask: 'make the heart green'", NEEDED, NONE,
                      starts="make the "),
    "reference": _task("the reference's symbol inside the mask: 'this star'", NEEDED, NEEDED, 1, square=True),
    "two_references": _task("two references' symbols: 'this star and this heart'", NEEDED, NEEDED, 2, share=1.0),
    "text": _task("a picture from words: 'a yellow star on grass'", NONE, NONE),
}
