"""Workers of the cluster check that lie here."""

from collections.abc import Iterator

import pytest

from tests.support.processes import environment


@pytest.fixture(scope="module", autouse=True)
def workers_find_tests() -> Iterator[None]:
    """The cluster check starts its workers with this process's variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        yield
