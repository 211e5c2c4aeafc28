"""What became of a token: as the oracle of decoding has it, and as many slots as the model's own cache holds."""

from pathlib import Path

import pytest
import torch

from megatron_dmc.evaluation.exported.model import extend, load
from megatron_dmc.ops.decode.naive import decode
from megatron_dmc.report.decisions import decide, read_decisions
from megatron_dmc.report.fates import fates, slots
from tests.support.runs import POSITIONS, write_export

OPERATIONS = ("merge", "evict", "absorb")


@pytest.mark.parametrize(
    ("operation", "window"), [("merge", 0), *((name, window) for name in OPERATIONS for window in (1, 5, 40))]
)
@pytest.mark.parametrize("tokens", [1, 7, 37])
def test_fates_are_what_the_oracle_does(operation: str, window: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens + window)
    alpha = torch.rand(tokens, generator=generator) < 0.6
    numbers = torch.arange(tokens, dtype=torch.float64)[:, None]
    _, held = decode(
        torch.zeros(tokens, 1, 1, dtype=torch.float64),
        torch.zeros_like(numbers),
        numbers,
        alpha,
        torch.ones(tokens, dtype=torch.float64),
        lambda vector, position: vector,
        local_window=window,
        operation=operation,
    )
    found = fates(alpha.tolist(), window, operation)
    assert [fate.kind.isupper() for fate in found] == alpha.tolist()
    inside = [[int(value) for _, value, _ in slot.tokens] for slot in held]
    residual = inside.pop() if any(fate.kind in "aA" for fate in found) else []
    assert [token for token, fate in enumerate(found) if fate.kind in "aA"] == residual
    assert inside == [
        [token for token, fate in enumerate(found) if fate.slot == number] for number in range(1, len(inside) + 1)
    ]
    waiting = [token for token, fate in enumerate(found) if fate.kind in "wW"]
    assert waiting == list(range(max(0, tokens - window), tokens))
    gone = {token for token, fate in enumerate(found) if fate.kind in "eE"}
    assert gone == set(range(tokens)) - set(waiting) - set(residual) - {token for slot in inside for token in slot}
    assert slots(found) == len(inside) + len(waiting) + bool(residual)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_head_has_as_many_slots_as_the_cache(tmp_path: Path, operation: str) -> None:
    write_export(tmp_path / "hf", operation=operation, local_window=5)
    decisions = read_decisions(tmp_path / "hf", [])
    assert decisions.source == "the sources of Python's standard library" and len(decisions.tokens) == 200
    model = load(tmp_path / "hf")
    ids = torch.arange(3, 66)
    with torch.inference_mode():
        _, cache = extend(model, ids)
    alpha = decide(model, ids)
    assert alpha.shape == (3, 63, 2) and 0.1 < alpha.double().mean() < 0.9
    counted = [[slots(fates(head, 5, operation)) for head in layer.T.tolist()] for layer in alpha]
    assert counted == cache.slots[:, 0].tolist()


def test_held_out_text_is_read_where_it_is(tmp_path: Path) -> None:
    write_export(tmp_path / "hf", tmp_path / "valid")
    decisions = read_decisions(tmp_path / "hf", [tmp_path / "absent", tmp_path / "valid"])
    assert decisions.source == "held-out text"
    assert "".join(decisions.tokens).startswith('Document 0 </script> "quoted"')
    assert len(decisions.tokens) == 200 < POSITIONS and decisions.window == 16
    assert [len(layer) for layer in decisions.fates] == [2, 2, 2]
    for layer, ratios in zip(decisions.fates, decisions.heads, strict=True):
        assert ratios == [200 / slots(head) for head in layer]
