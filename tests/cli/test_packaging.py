"""What a wheel holds beside the code: the marker of type hints, and the small model's recipes."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_dmc.experiments import places
from tests.support.processes import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: setuptools writes beside setup.py."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "megatron_dmc", "examples"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_a_wheel_is_complete(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "megatron_dmc/py.typed" in names and "megatron_dmc/cli/command.py" in names
    assert "megatron_dmc/experiments/quickstart/run.py" in names
    tasks = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_dmc").rglob("*.yaml")}
    assert tasks and tasks <= names
    assert {"megatron_dmc/report/page.css", "megatron_dmc/report/page.js"} <= names
    for folder in ("quickstart", "smollm2"):
        recipes = {path.name for path in (ROOT / "examples" / folder).glob("*.yaml")}
        inside = {name.rsplit("/", 1)[1] for name in names if f"/data/share/megatron-dmc/examples/{folder}/" in name}
        assert inside == recipes
    (points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "megatron-dmc = megatron_dmc.cli:main" in wheel.read(points).decode()


def test_an_installed_package_finds_its_recipes_or_says_so(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    (data,) = (tmp_path / "site").glob("*.data/data")
    program = (
        "import sys, sysconfig; sysconfig.get_path = lambda name: sys.argv[1]\n"
        "from megatron_dmc.experiments import places\n"
        "print(places.checkout(), places.small_recipes(), places.real_model_recipes())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", program]
    done = subprocess.run([*command, str(data)], cwd=tmp_path, capture_output=True, text=True, env=environment)
    examples = f"{data}/share/megatron-dmc/examples"
    assert done.stdout == f"None {examples}/quickstart {examples}/smollm2\n", done.stderr
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert "examples/quickstart is neither beside the package nor in" in done.stderr.splitlines()[-1]


def test_a_checkout_finds_its_own() -> None:
    assert places.checkout() == ROOT
    assert places.small_recipes() == ROOT / "examples" / "quickstart"
    assert places.real_model_recipes() == ROOT / "examples" / "smollm2"
