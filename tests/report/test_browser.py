"""The pages in a real browser: drawn, without a complaint, at any width, in light and dark, and by the keyboard alone."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dmc.report.write import Written
from tests.support.browser import Browser, browser, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no {' and no '.join(missing())}: make chromium installs both")

DRAWN = """
return [...document.querySelectorAll("section.figure")].map((section) => [...section.querySelectorAll(".plot")].map((plot) => {
  const picture = plot.querySelector("svg.main-svg");
  const box = picture.getBoundingClientRect();
  const traces = plot.querySelectorAll(".scatterlayer .trace, .heatmaplayer image").length;
  return [box.width, box.height, plot.clientWidth, traces];
}));
"""
COLOURS = """
const label = document.querySelector(".plot .xtick text");
return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, getComputedStyle(label).fill];
"""
CHOOSE = """
const select = document.querySelector(arguments[0]);
select.selectedIndex = arguments[1];
select.dispatchEvent(new Event("change"));
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(compared: Written, published: list[Written]) -> list[Path]:
    return [written.page for written in (compared, *published)]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_every_figure_is_drawn(window: Browser, pages: list[Path], width: int, dark: bool) -> None:
    for page in pages:
        window.open(page, width=width, dark=dark)
        figures = window.run(DRAWN)
        assert figures and all(figures)
        for drawn_width, height, place, traces in (plot for plots in figures for plot in plots):
            # One beside another would lie over it.
            assert 250 < drawn_width <= place + 1 and place <= width and height > 200 and traces > 0
        assert window.complaints() == []
        # Whatever is asked for is in the page itself.
        asked = window.requests()
        assert asked[0] == page.as_uri()
        assert all(address.startswith("data:") or address == page.as_uri() for address in asked)
        assert window.run("return document.documentElement.scrollWidth") <= width


def test_the_page_and_its_figures_follow_the_scheme(window: Browser, pages: list[Path]) -> None:
    window.open(pages[0], dark=False)
    light = window.run(COLOURS)
    window.scheme(dark=True)
    dark = window.run(COLOURS)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    for back, *fronts in (light, dark):
        assert all(contrast(back, front) > 4.5 for front in fronts)
    # On paper it is light, whatever the screen is.
    window.run("dispatchEvent(new Event('beforeprint'))")
    assert window.run(COLOURS) == light
    window.run("dispatchEvent(new Event('afterprint'))")
    assert window.run(COLOURS) == dark


def test_what_is_chosen_is_shown(window: Browser, pages: list[Path]) -> None:
    window.open(pages[0])
    names = window.run("return [...document.querySelectorAll('#quality option')].map((each) => each.textContent)")
    assert "recall over the base's" in names
    axis = "return document.querySelector('#quality .ytitle').textContent"
    before = window.run(axis)
    window.run(CHOOSE, "#quality select", names.index("recall over the base's"))
    assert (before, window.run(axis)) == ("KL(base || model), nats/token", "right answers over the base's")
    for section, count in (("quality", len(names)), ("heads", 5), ("serving", 3)):
        for number in range(count):
            window.run(CHOOSE, f"#{section} select", number)
            assert window.run(f"return document.querySelectorAll('#{section} .plot svg.main-svg').length") > 0
    assert window.complaints() == []


def test_a_hostile_name_is_shown_as_it_is(window: Browser, pages: list[Path]) -> None:
    window.open(pages[0])
    assert window.run("return document.title") == "a <b>run: a report"
    legend = window.run("return [...document.querySelectorAll('#quality .legendtext')].map((each) => each.textContent)")
    assert any(name.startswith("</script><script>document.title='broken'</script>\"'&") for name in legend)
    # A script that got into the page in spite of everything would not be run.
    window.run(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
    )
    assert window.run("return document.title") == "a <b>run: a report"
    assert "Content Security Policy" in " ".join(window.complaints())


def test_a_text_by_the_keyboard(window: Browser, pages: list[Path]) -> None:
    window.open(pages[0])
    tokens = "return document.querySelectorAll('#tokens button').length"
    assert window.run(tokens) == 200
    window.run("document.querySelector('#tokens button').focus()")
    said = "return document.getElementById('fate').textContent"
    assert re.fullmatch(
        "token 1, “.+”: alpha [01], kept in a slot of its own, number 1( \\(nothing is before it\\))?", window.run(said)
    )
    for key in ("ArrowRight", "End"):
        window.run(
            "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))",
            key,
        )
    assert re.fullmatch("token 200, “.+”: alpha [01], still in the window.+", window.run(said))
    assert window.run("return document.querySelectorAll('#tokens button[tabindex=\"0\"]').length") == 1
    # All that is in one slot is marked together.
    merged = window.run(
        "const token = document.querySelector('#tokens .fate-m'); token.focus();"
        "return [token.title, document.querySelectorAll('#tokens .together').length]"
    )
    assert "alpha 1, merged into slot " in merged[0] and merged[1] >= 2
    kinds = "return [...document.querySelectorAll('#tokens button')].map((each) => each.className).join()"
    before = window.run(kinds)
    window.run(CHOOSE, "#layer", 2)
    assert window.run(kinds) != before and window.complaints() == []


def test_a_table_is_sorted(window: Browser, pages: list[Path]) -> None:
    window.open(pages[2])
    column = """
        document.querySelectorAll("#numbers th button")[3].click();
        return [...document.querySelectorAll("#numbers tbody tr")].map((row) => row.cells[3].textContent);
    """
    up, down = window.run(column), window.run(column)
    assert up == sorted(up, key=float) and down == up[::-1] and len(up) == 5


def contrast(first: str, second: str) -> float:
    """WCAG's, of two rgb(r, g, b)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
