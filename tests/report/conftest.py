"""Made-up runs, each with its report."""

import pytest

from megatron_dmc.report.write import Written, write_report
from tests.support.runs import write_comparison, write_quickstart, write_real_model


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Of a comparison, with all that a report can show."""
    return write_report(write_comparison(tmp_path_factory.mktemp("runs") / "a <b>run"))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[Written]:
    """Of the results of a quickstart and of a real model that this project has published."""
    folder = tmp_path_factory.mktemp("published")
    writers = {"quickstart": write_quickstart, "real": write_real_model}
    return [write_report(write(folder / name)) for name, write in writers.items()]
