"""PyTorch's side of `acejax bench data`: three data sets, read by a DataLoader one sample at a time.

`Antialiased` does what acejax does, in float32; `AntialiasedBytes` in uint8, for which torch has a vectorised kernel
that Pillow has not; `Released` is the recipe of ACE_plus `modules/ace_plus_dataset.py`, nearest-exact and whole canvas.
"""

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from acejax.data.layout import Layout, visible
from acejax.data.manifest import Row

SCALE = 0.5


def samples(dataset: torch.utils.data.Dataset, workers: int) -> Iterator:
    """Its samples in order; a process that reads itself uses one thread, as workers do."""
    torch.set_num_threads(1)
    context = "spawn" if workers else None
    yield from torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=list,
                                           multiprocessing_context=context)


class Antialiased(torch.utils.data.Dataset):
    """source, target [3, h, W] float32 in [-1, 1] and mask [1, h, W], made to the layouts given."""

    def __init__(self, rows: Sequence[Row], layouts: Sequence[Layout]):
        self._rows, self._layouts = rows, layouts

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row, layout = self._rows[index], self._layouts[index]
        size = layout.height, layout.target_width
        target = self._fitted(row.target, size)
        source = torch.zeros_like(target) if row.image is None else self._fitted(row.image, size)
        mask = self._mask(row.mask, size, target)
        shown = []
        for path, content, unit in zip(row.references, layout.contents, layout.widths, strict=False):
            top = (layout.height - content) // 2
            rows = (top, layout.height - content - top)
            shown.append(F.pad(self._fitted(path, (content, unit)), (0, 0, *rows)))
        kept = [mask.new_zeros(1, layout.height, unit) for unit in layout.widths[:-1]]
        return {"source": torch.cat([*shown, source], -1), "target": torch.cat([*shown, target], -1),
                "mask": torch.cat([*kept, mask], -1)}

    def _picture(self, path: str) -> torch.Tensor:
        return pixels(path).float().div_(127.5).sub_(1)

    def _fitted(self, path: str, size: tuple[int, int]) -> torch.Tensor:
        picture = cropped(self._picture(path))
        return F.interpolate(picture[None], size, mode="bicubic", antialias=True)[0].clamp_(-1, 1)

    def _mask(self, path: str | None, size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        if path is None:
            return like.new_ones(1, *size)
        return (F.interpolate(cropped(pixels(path, "L").float() / 255)[None], size, mode="area")[0] > 0.5).float()


class AntialiasedBytes(Antialiased):
    """The same in uint8; a canvas' grey is 0."""

    def _picture(self, path: str) -> torch.Tensor:
        return pixels(path)

    def _fitted(self, path: str, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(cropped(self._picture(path))[None], size, mode="bicubic", antialias=True)[0]

    def _mask(self, path: str | None, size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        return super()._mask(path, size, like.new_ones(0, dtype=torch.float32)).to(torch.uint8)


class Released(torch.utils.data.Dataset):
    """src, modify, target [3, h, W] and masks [1, h, W]: random reference height, repainting scale, modify apart."""

    def __init__(self, rows: Sequence[Row], max_tokens: int):
        self._rows, self._max_tokens = rows, max_tokens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self._rows[index]
        target = self._picture(row.target)
        height, width = target.shape[1:]
        edit = torch.ones_like(target) if row.image is None else self._picture(row.image)
        mask = torch.ones_like(edit[:1]) if row.mask is None else pixels(row.mask, "L").float() / 255
        edit = edit * (1 - (1.0 if row.references else SCALE) * mask)
        edit, mask = nearest(edit, (height, width)), nearest(mask, (height, width))
        canvases = [edit], [mask], [target], [mask]
        for path in row.references:
            reference = self._picture(path)
            tall = random.randint(height // 3, height)
            wide = int(reference.shape[2] * tall / reference.shape[1])
            top = (height - tall) // 2
            shown = F.pad(nearest(reference, (tall, wide)), (0, 0, top, height - tall - top))
            for canvas in canvases:
                canvas.insert(0, shown if canvas[0].shape[0] == 3 else torch.zeros_like(shown[:1]))
        source, mask, target, target_mask = (self._limited(torch.cat(canvas, -1)) for canvas in canvases)
        return {"src": source * (1 - mask), "modify": source * mask, "mask": mask, "target": target,
                "target_mask": target_mask}

    @staticmethod
    def _picture(path: str) -> torch.Tensor:
        return pixels(path).contiguous().float().div(255).sub(0.5).div(0.5)  # torchvision's ToTensor and Normalize

    def _limited(self, canvas: torch.Tensor) -> torch.Tensor:
        height, width = canvas.shape[1:]
        k = min(1, math.sqrt(self._max_tokens / ((height / 16) * (width / 16))))
        return nearest(canvas, (int(height * k) // 16 * 16, int(width * k) // 16 * 16))


def pixels(path: str, mode: str = "RGB") -> torch.Tensor:
    """A file as [channels, h, w] uint8."""
    array = np.array(Image.open(path).convert(mode))
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def cropped(picture: torch.Tensor) -> torch.Tensor:
    """Its middle, at most 4:1."""
    top, left, height, width = visible(tuple(picture.shape[1:]))
    return picture[:, top:top + height, left:left + width]


def nearest(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[channels, *size]."""
    return F.interpolate(picture[None], size, mode="nearest-exact")[0]
