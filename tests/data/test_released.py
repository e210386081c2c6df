"""`parity="reference"` against an independent statement of the released code (tests/data/statement.py)."""

import dataclasses

import numpy as np
import pytest

from acejax import UserError
from acejax.data import resize
from acejax.data.canvas import Canvas, contents, editing, training
from acejax.data.layout import CanvasConfig, lay
from tests.counts import count
from tests.data import statement
from tests.data.random_pictures import mask, picture, sizes
from tests.judges import needs

CASES = count(60, 600)
MASKS = ("none", "empty", "full", "box", "soft", "faint")
NEAR = 1e-5  # in values of [-1, 1]
# Small pictures with small budgets, and pictures of real size (a tenth of the full run) with the released budgets.
SMALL = (40, 200, 6.0), (64, 100, 300, 2048)
REAL = (400, 1600, 5.0), (2048, 4096)


@dataclasses.dataclass(frozen=True)
class Case:
    target: np.ndarray
    image: np.ndarray | None
    mask: np.ndarray | None
    references: list[np.ndarray]
    heights: list[int]
    max_tokens: int
    scale: float
    split: bool


def training_case(rng: np.random.Generator, real: bool) -> Case:
    """A sample that the released code can take: no side under a token, the target's own neither, each reference at
    least a pixel wide."""
    bounds, budgets = REAL if real else SMALL
    while True:
        target = sizes(rng, *bounds)
        size = target if rng.random() < 0.5 else sizes(rng, *bounds)
        references = [sizes(rng, *bounds) for _ in range(rng.choice(4, p=(0.4, 0.4, 0.1, 0.1)))]
        heights = [int(rng.integers(int(target[0] / 3), target[0] + 1)) for _ in references]
        widths = [int(w * (tall / h)) for (h, w), tall in zip(references, heights, strict=True)]
        budget = int(rng.choice(budgets))
        whole = target[0], sum(widths) + target[1], budget
        seam = int(sum(widths) * statement.ratio(*whole)) // 16 * 16
        height, width = statement.budget(*whole)
        if height and seam < width and all(widths):
            break
    image = picture(rng, size) if rng.random() < 0.75 else None
    return Case(picture(rng, target), image, mask(rng, target if image is None else size, rng.choice(MASKS)),
                [picture(rng, size) for size in references], heights, budget, float(rng.choice([0, 0.5, 1])),
                rng.random() < 0.5)


def editing_case(rng: np.random.Generator, real: bool) -> Case:
    """An edit: `target` is only its size. A picture beyond 4:1 comes without a mask, where the released code fails."""
    case = training_case(rng, real)
    size = case.target.shape[:2] if case.image is None else case.image.shape[:2]
    if max(size) > 4 * min(size) and case.image is not None:
        case = dataclasses.replace(case, mask=None)
    try:
        said_of_edit(case)
    except ZeroDivisionError:  # a side without a pixel
        return editing_case(rng, real)
    return case


def said_of_edit(case: Case) -> statement.Item:
    return statement.editing(case.image, case.mask, case.references, case.target.shape[:2], case.scale,
                             case.max_tokens, keep_pixels=case.split, use_change=case.split)


def config(case: Case) -> CanvasConfig:
    own = CanvasConfig if case.split else CanvasConfig.lora
    return own(max_tokens=case.max_tokens, scale=case.scale, parity="reference")


def laid(case: Case) -> Canvas:
    sizes = [reference.shape[:2] for reference in case.references]
    shares = [tall / case.target.shape[0] for tall in case.heights]
    layout = lay(config(case), case.target.shape[:2], sizes, shares)
    return training(config(case), layout, "subject", case.target, case.image, case.mask, case.references)


def assert_same(canvas: Canvas, said: statement.Item) -> None:
    found = contents(canvas)
    for name in ("edit", "modify", "mask", "target"):
        ours, theirs = getattr(found, name), getattr(said, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.shape == theirs.shape and ours.dtype == np.float32, name
            assert np.abs(ours - theirs).max() <= NEAR, name
    assert sum(canvas.widths) == canvas.mask.shape[1]


def reals(number: int) -> bool:
    return number % 10 == 9 and CASES >= 600


@pytest.mark.parametrize("first", range(0, CASES, 20))
def test_training_items_are_those_of_the_released_code(first):
    for number in range(first, first + 20):
        case = training_case(np.random.default_rng((1, number)), reals(number))
        said = statement.training(case.target, case.image, case.mask, case.references, case.heights, case.max_tokens,
                                  case.scale, case.split)
        assert_same(laid(case), said)


@pytest.mark.parametrize("first", range(0, CASES, 20))
def test_edits_are_prepared_as_by_the_released_code(first):
    for number in range(first, first + 20):
        case = editing_case(np.random.default_rng((2, number)), reals(number))
        size = case.target.shape[:2] if case.image is None else None
        canvas = editing(config(case), case.image, case.mask, case.references, size, case.scale)
        said = said_of_edit(case)
        assert_same(canvas, said)
        assert sum(canvas.widths[:-1]) == said.seam


def test_the_cases_cover_what_they_should():
    """Each kind that the released code treats apart comes up in the small count already."""
    training_cases = [training_case(np.random.default_rng((1, number)), False) for number in range(60)]
    edits = [editing_case(np.random.default_rng((2, number)), False) for number in range(60)]
    for cases in (training_cases, edits):
        assert {case.image is None for case in cases} == {case.mask is None for case in cases} == {False, True}
        assert {case.split for case in cases} == {False, True} and {case.scale for case in cases} == {0, 0.5, 1}
        assert {len(case.references) for case in cases} == {0, 1, 2, 3}
        assert any(case.image is None and not case.references for case in cases)
        shapes = [size.shape[:2] for case in cases for size in (case.target, *case.references)]
        assert any(h > 4 * w for h, w in shapes) and any(w > 4 * h for h, w in shapes)
    kept = [reference.shape[0] < 0.8 * (case.target if case.image is None else case.image).shape[0]
            for case in edits if case.split for reference in case.references]
    assert any(kept) and not all(kept), "references smaller and greater than the share that keeps their pixels"


# The sizes that the released code was seen to give: height, width, budget -> height, width, tokens.
@pytest.mark.parametrize("size, max_tokens, expected, tokens", [
    ((1024, 2048), 4096, (720, 1440), 4050), ((1024, 2048), 2048, (512, 1024), 2048),
    ((1024, 1024), 4096, (1024, 1024), 4096), ((1024, 1024), 2048, (720, 720), 2025),
    ((768, 1360), 4096, (768, 1360), 4080), ((768, 1360), 2048, (544, 960), 2040),
    ((1536, 1024), 4096, (1248, 832), 4056), ((333, 777), 4096, (320, 768), 960),
    ((2160, 3840), 4096, (768, 1360), 4080), ((1000, 4000), 2048, (352, 1440), 1980),
    ((160, 272), 1024, (160, 272), 170), ((500, 333), 256, (304, 208), 247),
])
def test_canvas_sizes(size, max_tokens, expected, tokens):
    parity = CanvasConfig(max_tokens=max_tokens, parity="reference")
    layout = lay(parity, size)
    assert (layout.height, layout.widths, layout.tokens) == (expected[0], (expected[1],), tokens)
    assert statement.budget(*size, max_tokens) == expected
    # a reference of half the canvas takes part in the same budget
    half = lay(parity, (size[0], size[1] - size[1] // 2), [(size[0], size[1] // 2)], [1.0])
    assert (half.height, sum(half.widths)) == expected


def test_a_mask_beside_a_picture_beyond_4_to_1_is_refused_where_the_released_code_fails():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="up to 4:1"):
        editing(CanvasConfig(parity="reference"), picture(rng, (32, 200)), mask(rng, (32, 200), "box"))


@needs("torch")
@pytest.mark.parametrize("first", range(0, count(200, 4000), 100))
def test_torch_agrees_on_nearest_exact(first):
    import torch

    rng = np.random.default_rng((3, first))
    for _ in range(100):
        length, wanted = (int(n) for n in rng.integers(1, 2500, 2))
        rows = torch.arange(length, dtype=torch.float32)[None, None, :, None].expand(1, 3, length, 2)
        judged = torch.nn.functional.interpolate(rows, size=(wanted, 2), mode="nearest-exact")[0, 0, :, 0].numpy()
        np.testing.assert_array_equal(resize.nearest_exact(length, wanted), judged, f"{length} -> {wanted}")
        np.testing.assert_array_equal(statement.indices(length, wanted), judged, f"{length} -> {wanted}")


@needs("torch")
def test_torch_agrees_on_resizing_pictures():
    import torch

    rng = np.random.default_rng(4)
    for number in range(count(30, 300)):
        shown = statement.normalise(picture(rng, sizes(rng, 20, 200, 6)))
        size = sizes(rng, 20, 200, 6)
        tensor = torch.from_numpy(np.ascontiguousarray(shown.transpose(2, 0, 1)[None], np.float32))
        for name in ("bilinear", "nearest_exact"):
            judged = torch.nn.functional.interpolate(tensor, size=size, mode=name.replace("_", "-"),
                                                     antialias=name == "bilinear")
            said = getattr(statement, name)(shown, *size)
            np.testing.assert_allclose(said, judged[0].numpy().transpose(1, 2, 0), rtol=0, atol=NEAR,
                                       err_msg=f"{name} {number}: {shown.shape} -> {size}")
