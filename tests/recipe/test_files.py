"""What a recipe's path may name: a file, or a pipe that somebody writes into; anything else is said to be what it is."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_dmc.config import ConfigError
from megatron_dmc.recipe import load_recipe, reading
from tests.support.processes import ROOT, environment
from tests.support.settings import EVERYTHING


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder; name the YAML file in it"),
        ("other.yaml", "does not exist; examples/ holds recipes to start from"),
        ("file/recipe.yaml", "does not exist; examples/ holds recipes to start from"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("x" * 300, "cannot be read: File name too long"),
        ("/dev/null", "is a device or a socket; name a YAML file"),
        ("/dev/zero", "is a device or a socket; name a YAML file"),
        ("pipe", "is a pipe, and nobody wrote into it within 0 s; name a YAML file"),
    ],
)
def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(reading, "SECONDS_TO_WRITE", 0)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / name)
    assert str(caught.value) == f"recipe {tmp_path / name} {message}"


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # More than a pipe holds at once.
    text = EVERYTHING + "# a comment\n" * 10_000

    def write() -> None:
        pipe.write_text(text)

    writer = threading.Thread(target=write)
    writer.start()
    assert load_recipe(pipe).data.sequence_length == 128
    writer.join()


def test_a_shells_process_substitution_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(EVERYTHING)
    said = {}
    for edited in ("", "s/vocab_size: 128/vocab_size: one/"):
        line = f"{sys.executable} -m megatron_dmc plan <(sleep 0.2; sed '{edited}' recipe.yaml) --nodes 1 --gpus-per-node 1"
        said[edited] = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True
        )
    fits, refused = said.values()
    assert fits.returncode == 0 and fits.stdout.splitlines()[-1].startswith("fits: "), fits.stderr
    assert refused.returncode == 2 and "model.vocab_size must be a whole number" in refused.stderr
