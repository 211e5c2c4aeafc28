"""What this package spares a process when it imports megatron-core."""

import pytest

from tests.support.processes import run

_SEEN = """
import sys
import torch
compiles = torch.compile
{first}
import megatron_dmc.training.trainer
from megatron.core.fusions import fused_bias_geglu
geglu, finders = fused_bias_geglu.geglu, [type(x).__module__ for x in sys.meta_path]
print("torch._inductor.compile_fx" in sys.modules, torch.compile is compiles, hasattr(geglu, "__wrapped__"))
print("megatron_dmc.megatron_import" not in finders)
"""


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("", "False True False"),
        # Where it may be of use, and where somebody else was first, megatron-core is as it was.
        ("torch.cuda.is_available = lambda: True", "True True True"),
        ("import megatron.core", "True True True"),
    ],
    ids=["cpu", "gpu", "imported before"],
)
def test_its_compiler_is_loaded_only_where_it_may_be_used(first: str, expected: str) -> None:
    done = run("-W", "ignore", "-c", _SEEN.format(first=first))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [expected, "True"]
