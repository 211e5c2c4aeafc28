"""The plugin in vLLM itself, which has an environment of its own (make vllm); elsewhere these tests are skipped."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Decode's kernels run in Triton's interpreter, which reads this when it is imported. Elsewhere they may not be installed.
if importlib.util.find_spec("vllm") is not None:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from tests.support.engines import ENVIRONMENT
from tests.support.served import Served, served, served_model

HERE = Path(__file__).parent
HAS_VLLM = importlib.util.find_spec("vllm") is not None
if HAS_VLLM:
    os.environ.update(ENVIRONMENT)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_VLLM:
        return
    reason = "vLLM is not installed here: make vllm, then .venv-vllm/bin/python -m pytest tests/serving"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Served]:
    """An export and its own outputs; the same one for the same settings."""
    made: dict[str, Served] = {}

    def make(
        dmc: dict[str, Any], family: str = "llama", lengths: tuple[int, ...] | None = None, **config: Any
    ) -> Served:
        key = repr((dmc, family, lengths, config))
        if key not in made:
            model = served_model(dmc, family, **config)
            folder = tmp_path_factory.mktemp(family)
            made[key] = served(model, folder) if lengths is None else served(model, folder, lengths)
        return made[key]

    return make
