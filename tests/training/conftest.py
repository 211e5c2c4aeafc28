"""The toy text of a module's runs."""

from pathlib import Path

import pytest

from tests.support.toy import write_text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_text(folder)
    return folder
