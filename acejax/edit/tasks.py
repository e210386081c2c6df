"""Task presets: what each edit takes, what is done to its picture first, and how much of it the model may see.

Annotators and repainting scales: ACE_plus `config/ace_plus_fft.yaml` and its LoRA model zoo; names of the first seven
are the released ones. The others are the applications that ACE++ is shown with.
"""

import dataclasses
from collections.abc import Mapping

from acejax.errors import UserError

NEEDED, OPTIONAL, NONE = "needed", "optional", "none"


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of edit.

    Attributes:
      about: what it does, in a line.
      image, mask: whether a picture to edit and its mask are "needed", "optional" or "none".
      references: least and greatest number of references; None: any number.
      annotator: what the model sees of the area to change (`acejax.edit.annotators`).
      scale: repainting scale of a 448-channel model: how much of that area is hidden (1 = all).
      lora_scale: the same for a 384-channel model with LoRA.
      lora: the released LoRA that is made for it: "portrait", "subject" or "local_editing".
      prompt: what is said where the user says nothing; None: a prompt is needed.
      form: how the user's words are put to the model ({prompt}); `{image}` stands for the picture to edit. Words with
        an `{image}` of their own are taken as they are.
      size: what a size asked for means where there is a picture: "image", none can be, it has the picture's;
        "around", the picture lies in the middle of it; "enlarged", the picture is made so large.
      starts: where no task is asked for, words that a prompt for this one starts with.
      share: of its window's side that the mask takes, where the picture is cropped around the mask.
      square: the model is told of the largest square in the middle of the mask's box, as it has learnt to fill squares.
    """

    about: str
    image: str = OPTIONAL
    mask: str = OPTIONAL
    references: tuple[int, int | None] = (0, None)
    annotator: str = "none"
    scale: float = 1.0
    lora_scale: float = 1.0
    lora: str | None = None
    prompt: str | None = None
    form: str = "{prompt}"
    size: str = "image"
    starts: str = ""
    share: float = 0.5
    square: bool = False


_LOCAL = 'By referencing the mask, restore a partial image from the doodle {image} that aligns with the textual ' \
         'explanation: "{prompt}".'


def _control(about: str, annotator: str) -> Task:
    return Task(about, NEEDED, OPTIONAL, annotator=annotator, scale=0.0, lora_scale=0.5, lora="local_editing")


TASKS: Mapping[str, Task] = {
    "repainting": Task("paint something new inside the mask", NEEDED, NEEDED),
    "no_preprocess": Task("edit by instruction, or follow a ready control map", NEEDED, OPTIONAL, scale=0.0,
                          lora_scale=0.0),
    "mosaic_repainting": _control("paint inside the mask by its rough colours", "mosaic"),
    "contour_repainting": _control("paint inside the mask along its contours", "contour"),
    "depth_repainting": _control("paint inside the mask by its depth", "depth"),
    "recolorizing": _control("give the area new colours", "grey"),
    "canny_repainting": _control("paint inside the mask along its edges", "canny"),
    "super_resolution": Task("make the picture larger and sharper", NEEDED, NONE, (0, 0), "none", 0.0, 0.0,
                             prompt="{image} in high resolution, sharp and detailed", size="enlarged"),
    "outpaint": Task("go on beyond the picture's edges", NEEDED, NONE, (0, None), prompt="", size="around"),
    "subject": Task("the thing of the reference in a new picture", NONE, NONE, (1, None), lora="subject"),
    "portrait": Task("the person of the reference in a new picture", NONE, NONE, (1, None), lora="portrait",
                     form="Maintain the facial features. {prompt}"),
    "try_on": Task("the person of the picture wears the reference's clothes", NEEDED, NEEDED, (1, None),
                   lora="subject", prompt="The person wears these clothes."),
    "logo": Task("the reference's logo inside the mask", NEEDED, NEEDED, (1, None), lora="subject",
                 prompt="The logo is printed on it."),
    "face_swap": Task("the reference's face inside the mask", NEEDED, NEEDED, (1, None), lora="portrait",
                      prompt="The face faces the camera.", form="Maintain the facial features. {prompt}"),
    "local_editing": Task("change what is inside the mask, keeping its rough form", NEEDED, NEEDED, scale=0.5,
                          lora_scale=0.5, lora="local_editing", form=_LOCAL),
    "text": Task("a picture from words alone", NONE, NONE, (0, 0)),
}


def find(tasks: Mapping[str, Task], name: str) -> Task:
    """The preset of a name.

    Raises:
      UserError: an unknown one.
    """
    if name not in tasks:
        raise UserError(f"unknown task {name!r}; the tasks are {', '.join(tasks)}")
    return tasks[name]


def infer(tasks: Mapping[str, Task], prompt: str, image: bool, mask: bool, references: int) -> str:
    """The first task that takes these inputs and words.

    Raises:
      UserError: there is none.
    """
    for name, task in tasks.items():
        if prompt.strip().lower().startswith(task.starts) and not _faults(task, image, mask, references):
            return name
    fitting = [f"{name} ({task.about})" for name, task in tasks.items() if not _faults(task, image, mask, references)]
    if fitting:
        raise UserError(f"the prompt {prompt!r} is for none of the tasks that take {_listed(image, mask, references)}: "
                        f"{'; '.join(fitting)}")
    raise UserError(f"no task takes {_listed(image, mask, references)}; the tasks are {', '.join(tasks)}")


def check(name: str, task: Task, image: bool, mask: bool, references: int) -> None:
    """Raises:
      UserError: inputs that the task lacks or does not take.
    """
    if faults := _faults(task, image, mask, references):
        raise UserError(f"task {name} ({task.about}): {'; '.join(faults)}; given: {_listed(image, mask, references)}")


def phrase(name: str, task: Task, prompt: str, raw: bool = False) -> str:
    """What the model is told; `raw` (parity) leaves the user's words alone.

    Raises:
      UserError: no words where the task needs some.
    """
    said = prompt.strip() or task.prompt
    if said is None:
        raise UserError(f"task {name} ({task.about}): the prompt is empty; expected what to make")
    if raw or "{image}" in said:
        return said
    return task.form.replace("{prompt}", said)


def _faults(task: Task, image: bool, mask: bool, references: int) -> list[str]:
    found = []
    for what, there, wanted in (("a picture to edit", image, task.image), ("a mask", mask, task.mask)):
        if wanted == NEEDED and not there:
            found.append(f"it needs {what}")
        if wanted == NONE and there:
            found.append(f"it takes no {what.removeprefix('a ')}")
    least, most = task.references
    if references < least:
        found.append(f"it needs {least} reference{'s' * (least > 1)}")
    if most is not None and references > most:
        found.append(f"it takes {f'at most {most}' if most else 'no'} references")
    return found


def _listed(image: bool, mask: bool, references: int) -> str:
    parts = [name for name, there in (("a picture", image), ("a mask", mask)) if there]
    return ", ".join([*parts, *([f"{references} reference(s)"] if references else [])]) or "no picture"
