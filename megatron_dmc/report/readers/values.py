"""Values of a JSON file that somebody may have damaged: each is checked when it is taken."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.files import why_no_file

# Of a matrix of heads: more than any model has.
_MOST_CELLS = 2**20


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Raises ConfigError for a file that holds no JSON object."""
    if (problem := why_no_file(path)) is not None:
        raise ConfigError(f"{path} {problem}; {remedy}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged, it holds no JSON object; {remedy}")
    return found


@contextmanager
def taken_from(path: Path, remedy: str) -> Iterator[None]:
    """What goes wrong in the block is a damaged file: raises ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"{path} is damaged, {error.args[0]} is missing; {remedy}") from None
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ConfigError(f"{path} is damaged, {' '.join(str(error).split())[:200]}; {remedy}") from None


def number(values: dict[str, Any], name: str) -> float:
    """Raises KeyError where there is none of that name, and ValueError for anything but a finite number."""
    value = values[name]
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is no number")
    return float(value)


def positive(values: dict[str, Any], name: str) -> float:
    if (value := number(values, name)) <= 0:
        raise ValueError(f"{name} is not above 0")
    return value


def count(values: dict[str, Any], name: str) -> int:
    value = values[name]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is no whole number")
    return value


def optional(read: Any, values: dict[str, Any], name: str) -> Any:
    """What ``read`` takes, or None where the value is null or absent."""
    return None if values.get(name) is None else read(values, name)


def text(values: dict[str, Any], name: str) -> str:
    if not isinstance(value := values[name], str):
        raise ValueError(f"{name} is no text")
    return value


def an_object(values: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(value := values[name], dict):
        raise ValueError(f"{name} is no object")
    return value


def objects(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = values[name]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{name} is no list of objects")
    return value


def heads(values: dict[str, Any], name: str) -> Sequence[Sequence[float]]:
    """Tokens per slot, [layers][kv_heads]."""
    table = values[name]
    if not isinstance(table, list) or not table or not all(isinstance(row, list) and row for row in table):
        raise ValueError(f"{name} is no table")
    if len({len(row) for row in table}) > 1 or len(table) * len(table[0]) > _MOST_CELLS:
        raise ValueError(f"{name} is no table with equal rows")
    return [[positive({name: value}, name) for value in row] for row in table]


def facts(values: dict[str, Any], *names: str) -> list[tuple[str, str]]:
    """Those that are there and are plain, as texts: numbers with commas, underscores as spaces."""
    found = []
    for name in names or values:
        if isinstance(value := values.get(name), int | float | str) and not isinstance(value, bool):
            shown = value if isinstance(value, str) else f"{value:,}"
            found.append(("model" if name == "name" else name.replace("_", " "), shown))
    return found
