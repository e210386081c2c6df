"""What every source of training data hands on: one sample, its pictures still encoded."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training sample, pictures as encoded bytes (JPEG, PNG, WebP ...).

    A source is any `Sequence[Sample]` with random access that is cheap to pickle: it reopens its files elsewhere.

    Attributes:
      task: what the sample teaches, a free name.
      prompt: the instruction.
      target: the picture wanted.
      image: the picture to edit; None: generated from nothing.
      mask: grey, white = generate; None: everywhere.
      references: pictures to look at, in the order that the prompt numbers them.
      name: where it is from, for messages: "pairs.jsonl:12", "folder/split[37]".
      detail: free text.
    """

    task: str
    prompt: str
    target: bytes
    image: bytes | None = None
    mask: bytes | None = None
    references: tuple[bytes, ...] = ()
    name: str = ""
    detail: str = ""
