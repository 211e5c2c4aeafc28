"""docs/settings.md says what the sources say, of every setting."""

from dataclasses import dataclass, fields, is_dataclass
from typing import get_args, get_type_hints

import pytest

from megatron_dmc.recipe import Recipe
from megatron_dmc.recipe.settings import meanings_of, settings_page
from tests.support.processes import ROOT

PAGE = ROOT / "docs" / "settings.md"


@dataclass
class Described:
    """A section.

    Attributes:
        first: of the attributes,
            on two lines.
    """

    first: int = 1
    # Above it.
    second: dict[str, int] | None = None  # After it, with ``code``.
    third: str = "# no comment"  # third's

    @property
    def other(self) -> int:
        return self.first  # no field


@dataclass
class Undescribed:
    """A section."""

    first: int = 1  # first's
    second: int = 2


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == settings_page(), "run make settings"


def test_every_setting_is_on_the_page() -> None:
    lines = PAGE.read_text().splitlines()
    for name, kind in get_type_hints(Recipe).items():
        section = kind if is_dataclass(kind) else get_args(kind)[0]
        start = lines.index(f"## {name}")
        end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
        rows = [line.split(" | ") for line in lines[start:end] if line.startswith("| `")]
        assert [row[0] for row in rows] == [f"| `{field.name}`" for field in fields(section)]
        assert all(len(row) == 4 and len(row[3]) > 3 for row in rows)


def test_a_meaning_is_read_from_the_source() -> None:
    assert meanings_of(Described) == {
        "first": "of the attributes, on two lines.",
        "second": "Above it. After it, with `code`.",
        "third": "third's",
    }
    with pytest.raises(ValueError, match=r"Undescribed.second has no meaning; write a comment after it or above it"):
        meanings_of(Undescribed)
