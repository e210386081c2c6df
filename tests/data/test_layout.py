"""Where pictures lie by default: on the lines of the encoder, within the budget, as they are."""

import numpy as np
import pytest

from acejax import UserError
from acejax.data.canvas import contents, editing, training
from acejax.data.layout import TOKEN, CanvasConfig, Layout, lay, visible
from tests.counts import count
from tests.data.random_pictures import constant, sizes

DRAWS = count(1000, 20000)
PICTURES = count(60, 1000)
COLOURS = (250, 10, 20), (20, 240, 30), (10, 20, 230), (200, 200, 30), (30, 90, 150)


def draw(rng: np.random.Generator, longest: int, budgets: tuple[int, ...]):
    """A configuration, and the sizes of a target and up to four references with their shares."""
    config = CanvasConfig(multiple=int(rng.choice([16, 32, 64])), max_tokens=int(rng.choice(budgets)),
                          budget=str(rng.choice(["picture", "canvas"])), scales={"seen": 0.0})
    target, *references = (sizes(rng, 1, longest, longest if rng.random() < 0.2 else 6)
                           for _ in range(1 + rng.integers(5)))
    shares = [1.0 if rng.random() < 0.2 else rng.uniform(1 / 3, 1) for _ in references]
    return config, target, references, shares


def distortion(unit: tuple[int, int], size: tuple[int, int]) -> float:
    """How much wider a picture became than it is high."""
    return unit[1] / unit[0] / (size[1] / size[0])


def assert_laid_well(config: CanvasConfig, target, references, layout: Layout) -> None:
    step = config.multiple
    units = [layout.height, *layout.widths]
    assert all(unit >= step and unit % step == 0 for unit in units), "a seam or a side on no line, or an empty unit"
    assert len(layout.widths) == len(layout.contents) == len(references) + 1
    assert all(1 <= content <= layout.height for content in layout.contents) and layout.contents[-1] == layout.height

    if config.budget == "picture":
        assert all(layout.height * width <= config.max_tokens * TOKEN**2 for width in layout.widths)
    else:
        assert layout.tokens <= config.max_tokens or layout.height == step
    assert layout.tokens == layout.height * sum(layout.widths) // TOKEN**2

    seen = visible(target)[2:]
    assert layout.height <= max(seen[0], step) and layout.target_width <= max(seen[1], step), "a target is enlarged"

    # Each side is less than a step from where it should be, so each changes the shape by less than a step less.
    # Sides of one step are apart: what is shorter becomes a step, and nothing seen is beyond 4:1.
    for size, width, content in zip((*references, target), layout.widths, layout.contents, strict=True):
        bound = 4 * max(1, step / content)
        if min(width, layout.height) > step:
            bound = width / (width - step) * layout.height / (layout.height - step) * (1 + 1 / content)
        assert 1 / bound <= distortion((content, width), visible(size)[2:]) <= bound
    assert 1 / 4 <= distortion((layout.height, layout.target_width), seen) <= 4


@pytest.mark.parametrize("first", range(0, DRAWS, DRAWS // 4))
def test_layouts_of_any_sizes(first):
    for number in range(first, first + DRAWS // 4):
        config, target, references, shares = draw(np.random.default_rng((5, number)), 5000, (64, 256, 2048, 4096))
        layout = lay(config, target, references, shares)
        try:
            assert_laid_well(config, target, references, layout)
        except AssertionError as error:
            raise AssertionError(f"{number}: {config}, {target}, {references}, {shares} -> {layout}") from error


def test_the_budget_is_used():
    """A picture beyond the budget becomes as big as it may, but for the steps of its sides."""
    rng = np.random.default_rng(6)
    for _ in range(count(200, 2000)):
        target = sizes(rng, 2100, 5000, 4)
        for budget in ("picture", "canvas"):
            layout = lay(CanvasConfig(budget=budget), target)
            height, width = layout.height + TOKEN, layout.target_width + TOKEN
            if target[0] * target[1] > 4096 * TOKEN**2:
                assert height * width > 4096 * TOKEN**2
            else:
                assert height > target[0] and width > target[1]


@pytest.mark.parametrize("first", range(0, PICTURES, 20))
def test_each_unit_holds_its_own_picture_alone(first):
    """Pictures of one colour each: nothing of a reference is in the target's unit, nor the other way round."""
    for number in range(first, first + 20):
        config, target, references, shares = draw(np.random.default_rng((7, number)), 400, (64, 100, 300))
        shown = [constant(size, colour) for size, colour in zip(references, COLOURS, strict=False)]
        wanted = constant(target, COLOURS[4])
        image = constant(sizes(np.random.default_rng(number), 1, 300, 8), (9,) * 3)
        layout = lay(config, target, references, shares)
        canvases = [training(config, layout, "seen", wanted, image, None, shown),
                    editing(config, image, None, shown, scale=0.0)]
        for canvas in canvases:
            found = contents(canvas)
            # nothing is hidden: kept and to be changed are the pictures, and grey above and below them
            assert_colours(canvas.widths, found.edit + found.modify, COLOURS[:len(shown)], (9,) * 3)
        assert canvases[0].widths == layout.widths
        assert_colours(layout.widths, contents(canvases[0]).target, COLOURS[:len(shown)], COLOURS[4])
        tall = [(np.abs(contents(canvases[0]).edit[:, left]).max(-1) > 0).sum()
                for left in np.cumsum((0, *layout.widths))[:len(shown)]]
        assert tuple(tall) == layout.contents[:-1]


def assert_colours(widths, canvas, references, target) -> None:
    *units, last = np.split(canvas, np.cumsum(widths)[:-1], 1)
    for unit, colour in zip(units, references, strict=True):
        rows = np.flatnonzero(np.abs(unit[:, 0]).max(-1))
        assert len(rows) == rows[-1] - rows[0] + 1 and abs(rows[0] - (len(unit) - 1 - rows[-1])) <= 1, "not centred"
        np.testing.assert_allclose(unit[rows], np.broadcast_to(colour, unit[rows].shape) / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(last, np.broadcast_to(target, last.shape) / 127.5 - 1, atol=1e-6)


def test_sizes_that_are_none():
    for target, references in (((0, 5), []), ((5, 5), [(3, 0)])):
        with pytest.raises(UserError, match="at least one pixel"):
            lay(CanvasConfig(), target, references, [1.0] * len(references))
    with pytest.raises(ValueError, match="1 references and 0 shares"):
        lay(CanvasConfig(), (5, 5), [(5, 5)])


@pytest.mark.parametrize("changes", [
    {"multiple": 24}, {"multiple": 0}, {"max_tokens": 3}, {"multiple": 64, "max_tokens": 63}, {"budget": "unit"},
    {"scale": 1.5}, {"scales": {"edit": -1}}, {"reference_height": (0.0, 1.0)}, {"reference_height": (0.9, 0.5)},
    {"editing_height": 0.0}, {"parity": "released"},
])
def test_a_configuration_that_is_none_names_its_field(changes):
    with pytest.raises(UserError, match=f"canvas.{list(changes)[-1]} is"):
        CanvasConfig(**changes)
