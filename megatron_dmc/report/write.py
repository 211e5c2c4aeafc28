"""Makes the report of a run and writes it into the run's folder."""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_dmc.config import ConfigError
from megatron_dmc.errors import DMCError
from megatron_dmc.files import why_in_a_checkpoint, why_no_folder, write_whole
from megatron_dmc.report.curves import read_curve
from megatron_dmc.report.fates import Decisions
from megatron_dmc.report.readers import read_run
from megatron_dmc.report.run import Curve, Run
from megatron_dmc.report.text import MARK

PAGE, IMAGES = "report.html", "report"
MISSING = "plotly is not installed; run pip install 'plotly>=7,<8'"
# MARK stands in a page's first bytes.
_HEAD = 4096
_IMAGE = re.compile(r"(quality|heads|training|serving|text)-\d{2,}-[a-z0-9-]*\.png")


@dataclass(frozen=True)
class Written:
    """page: its path. images: how many lie beside it. left_out: sentences."""

    page: Path
    images: int
    left_out: list[str]


def has_plotly() -> bool:
    return importlib.util.find_spec("plotly") is not None


def check(folder: Path) -> None:
    """Raises ConfigError for what cannot have a report; before anything is read."""
    if (problem := why_no_folder(folder)) is not None:
        raise ConfigError(f"{folder} {problem}; name the folder of a run, such as runs/quickstart")
    page, images = folder / PAGE, folder / IMAGES
    if (problem := why_in_a_checkpoint(page)) is not None:
        raise ConfigError(f"{problem}; name the folder of the run")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise ConfigError(f"{folder} may not be written to; copy the run to another folder")
    if os.path.lexists(page) and not _is_ours(page):
        raise ConfigError(f"{page} is not a report of this command; move it away")
    if os.path.lexists(images) and (images.is_symlink() or not images.is_dir()):
        raise ConfigError(f"{images} is not a folder, and the figures go there; move it away")
    if not has_plotly():
        raise ConfigError(MISSING)


def write_report(folder: Path, *, with_text: bool = True) -> Written:
    """Reads a run, and writes ``report.html`` and ``report/*.png`` into its folder.

    Args:
        with_text: loads one of the run's models for what it does with each token of a text.

    Raises:
        ConfigError: no such run, a damaged file of it, or a folder that cannot be written to.
    """
    check(folder)
    run = read_run(folder)
    columns = TextColumn("{task.description:12}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("curves", total=None)
        curves, left_out = _curves(run)
        decisions = None
        if with_text:
            progress.update(bar, description="decisions")
            decisions, why = _decisions(run)
            left_out += [why] if why else []
        # They import plotly and matplotlib.
        from megatron_dmc.report.figures import figures
        from megatron_dmc.report.images import choice_image, decisions_image
        from megatron_dmc.report.page import page

        found = figures(run, curves, decisions)
        made = page(run, found, decisions, left_out)
        images = {}
        total = sum(len(figure.choices) for figure in found)
        progress.update(bar, description="figures", total=total)
        for figure in found:
            for number, choice in enumerate(figure.choices, start=1):
                images[_image_name(figure.key, number, choice.name)] = choice_image(figure.title, choice)
                progress.advance(bar)
        if decisions is not None:
            images[_image_name("text", 1, "decisions")] = decisions_image(decisions)
    _write_images(folder / IMAGES, images)
    write_whole(folder / PAGE, made)
    return Written(folder / PAGE, len(images), left_out)


def _curves(run: Run) -> tuple[list[Curve], list[str]]:
    found, left_out = [], []
    for name, place in run.curves.items():
        try:
            curve = read_curve(name, place)
        # Its reader raises whatever it meets in a damaged file.
        except Exception as error:
            left_out.append(f"The curves in {place} are left out: they cannot be read ({type(error).__name__}).")
        else:
            found += [curve] if curve is not None else []
    return found, left_out


def _decisions(run: Run) -> tuple[Decisions | None, str]:
    """Of the first model that can be read; or why there are none."""
    why = "The text, token by token, is left out: there is no exported model in the folder."
    for folder in run.models:
        if not folder.is_dir():
            continue
        from megatron_dmc.report.decisions import read_decisions

        try:
            return read_decisions(folder, run.text), ""
        except DMCError as error:
            why = f"The text, token by token, is left out: {error}."
    return None, why


def _image_name(key: str, number: int, name: str) -> str:
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return f"{key}-{number:02d}-{short}.png"


def _write_images(folder: Path, images: dict[str, bytes]) -> None:
    """Each whole or not at all; of an earlier report none is left."""
    folder.mkdir(exist_ok=True)
    for name, content in images.items():
        write_whole(folder / name, content)
    for old in folder.iterdir():
        if _IMAGE.fullmatch(old.name) and old.name not in images:
            old.unlink()


def _is_ours(page: Path) -> bool:
    if page.is_symlink() or not page.is_file():
        return False
    with page.open("rb") as file:
        return MARK.encode() in file.read(_HEAD)
