"""What the pages tell one to type, typed: the commands for a real model on a tiny one, and every whole Python snippet."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dmc.data.tokenizer import train_tokenizer
from tests.support.llamas import save_random_base
from tests.support.processes import ROOT, environment, run
from tests.support.toy import TEXT

PAGES = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"))
)
# Overrides of docs/choosing.md's trial that say where its base and its text are.
PLACES = (
    "checkpoint.load_base",
    "data.train",
    "data.valid",
    "data.tokenizer",
    "checkpoint.directory",
    "monitor.tensorboard",
)


def python(page: Path) -> Iterator[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for indent, body in re.findall(r"^( *)```python\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        yield textwrap.dedent(body) if indent else body


def commands(page: str, heading: str) -> list[str]:
    """Lines of the indented blocks of a page's section; a line that goes on in the next one is one with it."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", "")
    section = text.split(f"\n{heading}\n")[1].split("\n## ")[0]
    return [line[4:] for line in section.splitlines() if line.startswith("    ")]


def shell(script: str, folder: Path) -> str:
    """What a script prints; the commands of this environment are found."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-ec", script], cwd=folder, env=environment(PATH=path), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's section was followed, with a tiny Llama and few steps."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "examples").symlink_to(ROOT / "examples")
    save_random_base(folder / "Llama-2-7b-hf", max_position_embeddings=512)
    train_tokenizer(TEXT, 280, folder / "Llama-2-7b-hf")
    (folder / "text").mkdir()
    for number in range(60):
        (folder / "text" / f"{number}.txt").write_text(" ".join(TEXT))
    # Its text is small: the held-out part must hold a sample.
    typed = [
        line.replace("--valid-fraction 0.001", "--valid-fraction 0.1").replace(
            "--output base", "--amount smoke --output base"
        )
        for line in commands("README.md", "## A real model")
    ]
    (retrofit,) = [line for line in typed if line.startswith("torchrun")]
    *shrink, trial = commands("docs/choosing.md", "## A small trial first")
    small = " ".join(word for word in trial.split()[3:] if not word.startswith(PLACES))
    typed[typed.index(retrofit)] = "\n".join([*shrink, f"megatron-dmc retrofit runs/trial/recipe.yaml {small}"])
    shell("\n".join(line for line in typed if not line.startswith("source ")), folder)
    return folder


@pytest.mark.distributed
def test_the_readmes_commands_and_its_python(folder: Path) -> None:
    snippets = list(python(Path("README.md")))
    assert len(snippets) == 2
    for snippet in snippets:
        done = run("-c", snippet, folder=folder, HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr


@pytest.mark.distributed
def test_a_small_trial(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    smoke = tmp_path / "runs" / "quickstart-smoke"
    shutil.copytree(folder / "checkpoints" / "llama2_7b", smoke / "checkpoints" / "base" / "final")
    shutil.copytree(folder / "data", smoke / "data")
    for path in (smoke / "data").glob("text_*"):
        path.rename(path.with_name(path.name.removeprefix("text_")))
    shutil.copytree(folder / "Llama-2-7b-hf", smoke / "data" / "tokenizer")
    shell("\n".join(commands("docs/choosing.md", "## A small trial first")), tmp_path)
    assert (tmp_path / "runs" / "trial" / "checkpoints" / "final" / "dmc.json").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if list(python(page))], ids=str)
def test_python_is_python(page: Path) -> None:
    for snippet in python(page):
        compile(snippet, str(page), "exec")
