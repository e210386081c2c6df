"""Samples in memory and manifests on disk for the tests of data: small pictures of several formats."""

import io
import json

import numpy as np
from PIL import Image

from acejax.data.sample import Sample


def picture(rng, height=32, width=40, kind="JPEG", mode="RGB"):
    """Encoded noise."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def samples(count, seed=0):
    """Samples with and without a picture to edit, and with none to two references."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        edit = number % 2 == 1
        yield Sample(
            task=("text", "insert")[edit], prompt=f"Ersetze {number} durch ein rotes Herz ❤️ 日本", detail=f"d{number}",
            target=picture(rng, kind=("JPEG", "PNG", "WEBP")[number % 3]), image=picture(rng) if edit else None,
            mask=picture(rng, kind="PNG", mode="L") if edit else None, name=f"pairs:{number + 1}",
            references=tuple(picture(rng, 16 + 8 * extra, 24) for extra in range(number % 3)))


def write(folder, rows):
    """The samples as files and a JSONL manifest beside them; returns its path."""
    folder.mkdir(exist_ok=True)
    with (folder / "pairs.jsonl").open("w") as lines:
        for number, row in enumerate(rows):
            line = {"task": row.task, "prompt": row.prompt, "detail": row.detail, "references": []}
            named = [("target", row.target), ("image", row.image), ("mask", row.mask),
                     *((f"reference{place}", data) for place, data in enumerate(row.references))]
            for field, data in named:
                if data is None:
                    continue
                (folder / f"{number}.{field}").write_bytes(data)
                if field.startswith("reference"):
                    line["references"].append(f"{number}.{field}")
                else:
                    line[field] = f"{number}.{field}"
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    return folder / "pairs.jsonl"
