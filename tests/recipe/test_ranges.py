"""Every number of a recipe has a range: what is beyond it is one line, and its ends are read."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from megatron_dmc.config import MOST, ConfigError, DMCConfig, Range, ranges
from megatron_dmc.recipe import check_batch, load_recipe
from tests.support.settings import EVERYTHING, numbers

BEYOND = ("1e200", "1e308", "-1e308", "1" + "0" * 18, "1" + "0" * 400, ".nan", ".inf", "-.inf")
NUMBERS = [name for name, _, _ in numbers()]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(EVERYTHING)
    return path


def ends(name: str) -> Range:
    return next(dict(ranges(section))[field] for place, section, field in numbers() if place == name)


@pytest.mark.parametrize(("name", "section", "field"), numbers(), ids=NUMBERS)
def test_every_number_has_a_finite_range(name: str, section: type, field: str) -> None:
    found = dict(ranges(section))
    assert field in found, f"write {field}: Annotated[..., Range(least, most)]"
    allowed, hint = found[field], get_type_hints(section)[field]
    whole = int in (hint, *get_args(hint))
    # In float32, and in int32 or int64.
    assert math.isfinite(allowed.least) and abs(allowed.most) <= (2**63 - 1 if whole else 1e30)
    assert allowed.least < allowed.most and (allowed.least == 0 or abs(allowed.least) >= 1e-30)


@pytest.mark.parametrize("text", BEYOND)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_beyond_is_one_short_line(recipe: Path, name: str, text: str) -> None:
    if text == "1" + "0" * 18 and ends(name).most >= 1e18:
        # The widest ranges hold this one.
        text = str(2**63) if name == "dmc.seed" else "1e31"
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [f"{name}={text}"])
    said = str(caught.value).removeprefix(f"recipe {recipe}: ")
    shown = re.sub(r"\.0\.", "[0].", name)
    assert said.startswith(f"{shown} must be ") and ", got " in said and "\n" not in said and len(said) < 160


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["5e-324", "-0.0", "0"])
def test_what_is_next_to_nothing_is_nothing_or_refused(recipe: Path, name: str, text: str) -> None:
    """Not a traceback, and not a number that float32 rounds to nothing where nothing is not allowed."""
    try:
        read: Any = load_recipe(recipe, [f"{name}={text}"])
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        allowed = ends(name)
        assert allowed.least == 0 or (allowed.or_zero and float(text) == 0), f"{name} took {text}: {read}"


@pytest.mark.parametrize(
    ("override", "least"),
    [
        *(
            (f"phases.0.lr={text}", "phases[0].lr must be >= 1e-12,")
            for text in ("1e-320", "1e-30", "9e-13", "0", "-1")
        ),
        *(
            (f"training.clip_grad={text}", "training.clip_grad must be >= 1e-06 or 0,")
            for text in ("1e-40", "9e-7", "-1")
        ),
    ],
)
def test_a_number_that_trains_nothing_is_refused(recipe: Path, override: str, least: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(least)):
        load_recipe(recipe, [override])
    for taken in ("phases.0.lr=1e-12", "phases.0.min_lr=0", "training.clip_grad=1e-6", "training.clip_grad=0"):
        load_recipe(recipe, [taken])


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_are_read_or_refused_for_another_reason(recipe: Path, name: str) -> None:
    allowed = ends(name)
    for value in (allowed.least, allowed.most):
        try:
            load_recipe(recipe, [f"{name}={value!r}"])
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 500


@pytest.mark.parametrize("field", [name for name, _ in ranges(DMCConfig)])
def test_a_config_checks_itself(field: str) -> None:
    """Exports build one without a recipe."""
    for value in (math.nan, math.inf, 10**400, -1, "1", True, [1]):
        with pytest.raises(ConfigError, match=f"^{field} must be "):
            DMCConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.micro_batch_size=65536", "model.max_position_embeddings=512", "data.sequence_length=512"],
            r"micro_batch_size \(65536\) x data.sequence_length \(512\) are more than 16777216 tokens",
        ),
        (
            ["phases.0.steps=500000000"],
            r"\(4\) x 500000005 steps are more than 268435456 samples, whose index would need 32 GB of the host's memory; "
            "give the phases fewer steps",
        ),
        (
            ["phases.0.steps=67108860"],
            r"x 67108865 steps .* would need 4 GB of the host's memory; at these steps it must be <= 3$",
        ),
        ([f"phases.0.steps={MOST}"], "samples, .* give the phases fewer steps"),
    ],
)
def test_products_that_fill_a_memory_are_refused(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, overrides)


def test_a_share_of_a_batch_fits_each_replica(recipe: Path) -> None:
    """A rank holds its whole share; more replicas have smaller ones."""
    read = load_recipe(recipe, ["training.global_batch_size=1048576", "phases=[{kind: compress, steps: 10}]"])
    check_batch(read, 2)
    longer = replace(read, data=replace(read.data, sequence_length=256))
    with pytest.raises(ConfigError, match=r"more than 134217728 tokens, which need 8 GB of each rank's memory at once"):
        check_batch(longer, 1)
    check_batch(longer, 2)
