"""A whole checkpoint."""

from pathlib import Path

import pytest

from megatron_dmc.checkpoint import save_checkpoint
from tests.support.checkpoints import INFO, state


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of one whole checkpoint."""
    return save_checkpoint(tmp_path, "step_00000003", state(3.0), INFO)
