"""docs/weights.md says what the tests show."""

import pathlib

import pytest

from tests.weights.formats import PAGE, SECTIONS, page

CHECKS = sorted({(file, test) for rows in SECTIONS.values() for row in rows for _, file, test in row.checks})


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run: python -m tests.weights.formats"


@pytest.mark.parametrize(("file", "test"), CHECKS)
def test_every_named_test_is_there(file, test):
    assert f"\ndef {test}(" in (pathlib.Path(__file__).parents[1] / file).read_text()
