"""What the pages about the code name is there: files, the classes and functions in them, folders, links.

Notation: ``room/file.py: Name`` or ``room/file.py: Class.member``, from the repository's root or from ``megatron_dmc/``. What
is yet to be written carries angle brackets: ``ops/<op>/naive.py``.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT

DOCS = ROOT / "docs"
PAGES = (DOCS / "architecture.md", DOCS / "glossary.md", *sorted((DOCS / "extending").glob("*.md")))
BASES = (ROOT, ROOT / "megatron_dmc")
# A page without a folder is named beside a link, which is checked itself.
FILE = re.compile(
    r"(?<![\w/.>-])((?:[\w-]+/)*[\w-]+\.(?:py|yaml|toml|sh)|(?:[\w-]+/)+[\w-]+\.md)\b(?:: ([A-Za-z_][\w.]*\w|[A-Za-z_]))?"
)
FOLDER = re.compile(r"`((?:[\w-]+/)+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def problems(page: Path, text: str) -> Iterator[str]:
    """One line for each thing that ``text`` names and that is not there; links count from ``page``'s folder."""
    for match in FILE.finditer(LINK.sub("]", text)):
        name, member = match.groups()
        path = found(name)
        if path is None:
            yield f"{name} does not exist"
        elif member is not None and member not in members(path):
            yield f"{name} has no {member}"
    for (name,) in (match.groups() for match in FOLDER.finditer(text)):
        if found(name) is None:
            yield f"{name} does not exist"
    for (target,) in (match.groups() for match in LINK.finditer(text)):
        if not (page.parent / target).exists():
            yield f"the link {target} leads nowhere"


def found(name: str) -> Path | None:
    return next((base / name for base in BASES if (base / name).exists()), None)


def members(path: Path) -> set[str]:
    """Names that a module defines at its top, and ``Class.member`` of its classes."""
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.suffix == ".py" else ast.Module([], [])
    names = set(defined(tree))
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for name in defined(node)}
    return names


def defined(scope: ast.Module | ast.ClassDef) -> Iterator[str]:
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_what_a_page_names_is_there(page: Path) -> None:
    missing = list(problems(page, page.read_text(encoding="utf-8")))
    assert not missing, "\n".join(missing)


def test_every_room_is_in_the_table_of_rooms() -> None:
    named = set(re.findall(r"^\| `(\w+)/` \|", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {path.parent.name for path in (ROOT / "megatron_dmc").glob("*/__init__.py")}


@pytest.mark.parametrize("folder", ["docs", "examples", "megatron_dmc"])
def test_a_command_has_one_name(folder: str) -> None:
    """``megatron-dmc preprocess`` and its like; only the README says which scripts do the same, and one docstring."""
    texts = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".md", ".yaml", ".py")
    }
    named = {name for name, text in texts.items() if re.search(r"\btools/\w+\.py", text)}
    assert named <= {"megatron_dmc/cli/command.py"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`ops/pooling/apy.py`", "ops/pooling/apy.py does not exist"),
        ("`ops/pooling/api.py: poll`", "ops/pooling/api.py has no poll"),
        ("`data/tokenizer.py: Tokenizer.tokenise`", "data/tokenizer.py has no Tokenizer.tokenise"),
        ("a picture:\n\n    text -> data/samples.py: gobal_batch", "data/samples.py has no gobal_batch"),
        ("`tests/test_nothing.py`", "tests/test_nothing.py does not exist"),
        ("`cofig.py: DMCConfig`", "cofig.py does not exist"),
        ("`receipe/`", "receipe/ does not exist"),
        ("`docs/nowhere.md`", "docs/nowhere.md does not exist"),
        ("[the page](nowhere.md#section)", "the link nowhere.md leads nowhere"),
        ("[`ops/nothing.py`](algorithm.md)", "ops/nothing.py does not exist"),
    ],
)
def test_what_is_not_there_is_found(text: str, problem: str) -> None:
    assert list(problems(DOCS / "page.md", text)) == [problem]


def test_what_is_there_is_let_be() -> None:
    text = (
        "`ops/pooling/api.py: pool`, `config.py: DMCConfig.merges`, `recipe/sections.py: DataConfig.seed`, "
        "`ops/<op>/naive.py`, `tests/support/oracle.py: Shape`, `recipe/`, [algorithm](algorithm.md), `docs/settings.md`, https://x.org/a/b.md"
    )
    assert list(problems(DOCS / "page.md", text)) == []
