"""docs/settings.md: every setting of a recipe. ``python -m megatron_dmc.recipe.settings > docs/settings.md`` writes it.

A setting's meaning is what stands in the source: its entry under ``Attributes:`` of the class, else the comment after it or
above it.
"""

import inspect
import re
import textwrap
import tokenize
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from io import StringIO
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_dmc.model.model_config import MISSING
from megatron_dmc.recipe.sections import Recipe
from megatron_dmc.recipe.values import shown

BAR = "\\|"
_HEAD = """\
# Settings of a recipe

Written by `make settings` from the sources of the sections; change it there.

A recipe is a YAML file with the sections below. Any setting can also be given on the command line, after the recipe:
`section.field=value`; phases are counted from 0: `phases.0.steps=100`. An override of a section (`dmc={...}`) changes only the
settings that it names, `dmc=null` gives it its defaults; an override of a list replaces the list.

- The type of a setting decides what a word means. Where the type says *or null*, `null`, `none`, `~` or nothing at all mean
  null. A folder that has such a name is written `./none`.
- `true`, `yes` and `on` are true; `false`, `no` and `off` are false. Numbers may be written as `100`, `1_000`, `1e-4`.
- `${oc.env:NAME}` is the environment variable NAME, `${oc.env:NAME,DEFAULT}` gives a default, `${training.seed}` names another
  setting.
- *required*: the setting has no default. Ranges include both ends.
"""
_NOTES = {
    "model": "With `checkpoint.load_base`, this section may be left out: what it does not give is taken from the base's "
    "`dmc.json`. What it gives must be the base's, up to rounding to float32; only `max_position_embeddings` and "
    "`init_method_std` may differ. `megatron-dmc plan` on a machine without the base needs the section.",
    "phases": "A list; phases run one after the other.",
}


def settings_page() -> str:
    """The page as Markdown; raises ValueError for a setting without a meaning."""
    parts = [_HEAD]
    for name, kind in get_type_hints(Recipe).items():
        section: Any = kind if is_dataclass(kind) else get_args(kind)[0]
        what = (inspect.getdoc(section) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
        parts.append("\n".join([f"## {name}", "", *_wrapped(what), ""]))
        if name in _NOTES:
            parts.append("\n".join([*_wrapped(_NOTES[name]), ""]))
        rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([*rows, *_rows(section)]) + "\n")
    return "\n".join(parts)


def _rows(section: Any) -> Iterator[str]:
    hints, defaults = get_type_hints(section, include_extras=True), vars(section())
    for name, meaning in meanings_of(section).items():
        default = "*required*" if defaults[name] == MISSING else f"`{_plain(defaults[name])}`"
        yield f"| {' | '.join((f'`{name}`', _type_name(hints[name]), default, meaning.replace('|', BAR)))} |"


def meanings_of(section: Any) -> dict[str, str]:
    """The meaning of every field of a dataclass, from its source; raises ValueError for a field that has none."""
    described = _comments(textwrap.dedent(inspect.getsource(section))) | _attributes(inspect.getdoc(section) or "")
    names = [field.name for field in fields(section)]
    without = [name for name in names if not described.get(name)]
    if without:
        raise ValueError(f"{section.__name__}.{without[0]} has no meaning; write a comment after it or above it")
    return {name: described[name].replace("``", "`") for name in names}


def _attributes(doc: str) -> dict[str, str]:
    """The entries below ``Attributes:``."""
    _, _, below = doc.partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", below, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}


def _comments(source: str) -> dict[str, str]:
    """The comments of fields: those above one, then the one after it."""
    found: dict[str, str] = {}
    above: list[str] = []
    name = None
    for token in tokenize.generate_tokens(StringIO(source).readline):
        first = token.line.split(":")[0].strip()
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if name is None:
                above.append(text)
            else:
                found[name] = " ".join([found[name], text]).strip()
        elif token.type == tokenize.NAME and name is None and token.string == first:
            name, found[first], above = first, " ".join(above), []
        elif token.type == tokenize.NEWLINE:
            name, above = None, []
    return found


def _type_name(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is Annotated:
        number, allowed = get_args(kind)
        zero = "0, or " if allowed.or_zero else ""
        return f"{_type_name(number)}, {zero}{_limit(allowed.least)} to {_limit(allowed.most)}"
    if get_origin(kind) is list:
        return f"list of {_type_name(get_args(kind)[0])}s"
    names = {bool: "true or false", int: "whole number", float: "number", str: "path", types.NoneType: "null"}
    return names[kind]


def _limit(number: float) -> str:
    """A limit for a reader: a large power of two as one, a large round number with its exponent."""
    for less in (0, 1):
        power = int(number).bit_length() - 1 + less
        if power >= 20 and number == 2**power - less:
            return f"2^{power}" + (f" - {less}" if less else "")
    return str(number) if isinstance(number, int) and number <= 1_000_000 else f"{number:g}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 130, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(settings_page(), end="")
