"""What becomes of a block that fails, on one rank."""

import traceback

import pytest
from torch.distributed.checkpoint import CheckpointException

from megatron_dmc.checkpoint import CheckpointError
from megatron_dmc.checkpoint.agreement import on_all_ranks

pytestmark = pytest.mark.usefixtures("one_process")


def failed_in_torch(error: BaseException) -> CheckpointException:
    """As torch.distributed.checkpoint reports what its ranks have met."""
    return CheckpointException("write", {0: (error, traceback.StackSummary())})


def test_an_interruption_inside_torch_is_one() -> None:
    with pytest.raises(KeyboardInterrupt), on_all_ranks("cannot save x"):
        raise failed_in_torch(KeyboardInterrupt())


def test_a_failure_inside_torch_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="cannot save x: Input/output error"), on_all_ranks("cannot save x"):
        raise failed_in_torch(OSError(5, "Input/output error"))
