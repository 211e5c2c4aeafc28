"""tools/preprocess_data.py as a script: from any folder, where the package is not installed."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from megatron_dmc.data.indexed_dataset import read_index
from tests.support.processes import ROOT

TOOL = ROOT / "tools" / "preprocess_data.py"


def test_from_another_folder_without_the_package(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one small text")
    # -S leaves out what .pth files name, such as an editable installation
    words = [sys.executable, "-S", str(TOOL), "--input", "text.txt", "--train-tokenizer", "300", "--output", "data"]
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_index(str(tmp_path / "data")).documents == 1
    assert done.stdout.splitlines()[1].startswith("data: 1 documents, ") and done.stderr == ""
