"""``make test PYTEST_ARGS=...``: a line that has none of the chosen tests is no failure; a line that should have some is."""

import shutil
import subprocess

import pytest

from tests.support.processes import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def after_pytest(*words: str) -> list[str]:
    """What follows the word pytest in the commands of the target, continued lines joined."""
    shown = subprocess.run(["make", "-n", "test", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [line.partition(" -m pytest ")[2] for line in shown.replace("\\\n", " ").splitlines()]
    return [each for each in found if each]


@pytest.mark.parametrize(("words", "passing"), [([], {0}), (["PYTEST_ARGS=tests/ops -k none"], {0, 5})])
def test_nothing_may_be_collected_where_tests_were_chosen(words: list[str], passing: set[int]) -> None:
    lines = after_pytest(*words)
    assert len(lines) == 7
    for line in lines:
        ends = line[line.index("||") :] if "||" in line else ""
        codes = [subprocess.run(["bash", "-c", f"(exit {code}) {ends}"], check=False).returncode for code in range(6)]
        assert {code for code, found in enumerate(codes) if found == 0} == passing
