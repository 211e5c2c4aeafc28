"""What a layer shows of its tokens, against a float64 computation that reads like the definition."""

import math

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dmc.calibration.observation import Observation, StateNorm, observe
from megatron_dmc.config import DMCConfig
from megatron_dmc.model.attention import BaseAttention, StepContext
from megatron_dmc.model.documents import pack_documents
from megatron_dmc.model.gpt import dmc_layers
from tests.support.models import SIZES, positions, random_model, tokens

pytestmark = pytest.mark.usefixtures("one_process")

WINDOW, SEQ = 5, 43


def observed(model: GPTModel, ids: Tensor, starts: Tensor | None) -> list[tuple[Observation, BaseAttention, Tensor]]:
    """Of every layer: what is observed, what it was made of, and the states before the layer, [batch, seq, hidden]."""
    found: list[tuple[Observation, BaseAttention, Tensor]] = []
    states: list[Tensor] = []
    for module in model.decoder.layers:
        layer, norm = module.self_attention, StateNorm(module.input_layernorm)
        module.register_forward_pre_hook(
            lambda module, args, kwargs: states.append((args[0] if args else kwargs["hidden_states"]).transpose(0, 1)),
            with_kwargs=True,
        )
        layer.step = StepContext(merging=False)

        def watch(seen: BaseAttention, layer: object = layer, norm: StateNorm = norm) -> None:
            found.append((observe(layer, seen, norm.last), seen, states[-1]))  # type: ignore[arg-type]

        layer.observer = watch
    packed = None if starts is None else pack_documents(starts)
    with torch.no_grad():
        model(ids, positions(ids), torch.arange(len(ids)), packed_seq_params=packed)
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_scores_are_those_of_the_definition(packed: bool) -> None:
    model = random_model(DMCConfig(local_window=WINDOW, operation="evict"))
    ids = tokens(2, SEQ)
    starts = torch.zeros(2, SEQ, dtype=torch.bool)
    starts[:, 0] = True
    if packed:
        starts[0, 17] = starts[1, 6] = starts[1, 30] = True
    number = starts.cumsum(1)
    found = observed(model, ids, starts if packed else None)
    assert len(found) == SIZES.num_layers
    group, d = SIZES.num_attention_heads // SIZES.num_query_groups, SIZES.head_dim
    for (seen, attention, state), layer in zip(found, dmc_layers(model), strict=True):
        output = layer.linear_proj.weight.double().view(SIZES.hidden_size, SIZES.num_attention_heads, d)
        for b in range(2):
            norm = state[b].double().norm(dim=-1)
            for kv_head in range(SIZES.num_query_groups):
                key, value = (x[b, :, kv_head].double() for x in (attention.key, attention.value))
                expected = torch.zeros(SEQ, dtype=torch.float64)
                for h in range(kv_head * group, (kv_head + 1) * group):
                    scores = attention.query[b, :, h].double() @ key.T / math.sqrt(d)
                    hidden = torch.ones(SEQ, SEQ).triu(1).bool() | (number[b][:, None] != number[b])
                    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
                    brought = (value @ output[:, h].T).norm(dim=-1)
                    for j in range(SEQ):
                        for i in range(j + WINDOW, SEQ):
                            expected[j] = max(expected[j], weights[i, j] * brought[j] / norm[i])
                learns = seen.learns.expand(2, SEQ)[b]
                got = seen.scores[b, :, kv_head].double()
                torch.testing.assert_close(got[learns], expected.log()[learns], rtol=1e-4, atol=1e-4)
    for b in range(2):
        for j in range(SEQ):
            same = (number[b] == number[b, j]).nonzero()[:, 0]
            place, length = j - int(same[0]), len(same)
            later = length - 1 - place
            learned = place > 0 and later >= WINDOW and later >= length // 4
            assert bool(found[0][0].learns.expand(2, SEQ)[b, j]) == learned
            assert bool(found[0][0].in_effect.expand(2, SEQ)[b, j]) == (place > 0 and later >= WINDOW)


def test_the_inputs_are_those_of_the_decisions() -> None:
    model = random_model(DMCConfig(local_window=WINDOW, operation="evict"))
    (seen, attention, _), *_ = observed(model, tokens(1, SEQ), None)
    layer = dmc_layers(model)[0]
    logits, _ = layer.decision_logits(attention.hidden_states, attention.query, attention.key)
    weight, bias = layer.decision.effective_weight, layer.decision.bias
    torch.testing.assert_close(logits, (seen.hidden_states @ weight.T + bias)[..., 0::2] - 5.0, rtol=1e-4, atol=1e-4)
