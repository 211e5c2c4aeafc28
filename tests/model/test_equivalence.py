"""The property that carries the project: training form with binary alpha = prefill = chunked prefill = step-by-step decode
= the exported Hugging Face model, for every kind of decision."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.convert.hf_config import write_config
from megatron_dmc.convert.mapping import to_hugging_face
from megatron_dmc.hf.families import dmc_classes
from megatron_dmc.inference.context import DMCInferenceContext
from megatron_dmc.model.attention import StepContext
from megatron_dmc.model.gpt import dmc_layers, transformer_config
from megatron_dmc.model.layer_spec import get_dmc_layer_spec
from tests.support.models import FAMILY_SIZES, SIZES, positions, random_model, tokens

pytestmark = pytest.mark.usefixtures("one_process")

VARIANTS = {
    f"{source}-{'exact' if window is None else f'truncated{window}'}{'-per_layer' if per_layer else ''}": DMCConfig(
        decision_source=source, window_size=window, per_layer=per_layer, decision_bias=0.5
    )
    for source in ("projection", "neuron")
    for window in (None, 12)
    for per_layer in (False, True)
} | {
    f"{source}-{operation}-local{local_window}": DMCConfig(
        decision_source=source, operation=operation, local_window=local_window, decision_bias=0.5
    )
    for source in ("projection", "neuron")
    for operation in ("merge", "evict", "absorb")
    for local_window in (1, 16, 100)
}
# Further families, where their attention is another one.
FAMILY_VARIANTS = {
    f"{family}-{name}": (FAMILY_SIZES[family], VARIANTS[name])
    for family in ("mistral", "qwen2", "qwen3")
    for name in ("projection-exact", "neuron-exact", "projection-absorb-local16", "neuron-evict-local16")
}
CASES = {name: (SIZES, dmc, 0.0) for name, dmc in VARIANTS.items()}
CASES |= {name: (*case, 0.0) for name, case in FAMILY_VARIANTS.items()}
# Another ratio than the trained one: decisions above another threshold.
CASES |= {
    f"{name}-threshold{threshold}": (SIZES, VARIANTS[name], threshold)
    for name, threshold in (
        ("projection-exact-per_layer", 0.3),
        ("neuron-merge-local16", -0.3),
        ("projection-absorb-local16", 0.3),
    )
}
LENGTH = 61


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest, one_process: None) -> dict[str, Any]:
    """A model, a text, and the training form's logits with binary decisions."""
    sizes, dmc, threshold = request.param
    model, ids = random_model(dmc, sizes=sizes), tokens(2, LENGTH)
    for layer in dmc_layers(model):
        layer.statistics.reset()
        layer.step = StepContext(merge_threshold=threshold)
    with torch.no_grad():
        expected = model(ids, positions(ids), None)
    merged, _, seen, _ = torch.stack([layer.statistics.counts for layer in dmc_layers(model)]).unbind(1)
    share = (merged / seen).flatten()
    # A window of w leaves w tokens of the text undecided.
    share = share * LENGTH / max(LENGTH - dmc.local_window, 1)
    if dmc.local_window < LENGTH:
        assert share.min() > 0 and share.max() < 1 and 0.2 < share.mean() < 0.8, "decisions are not mixed"
    if threshold:
        as_trained = random_model(dmc, sizes=sizes)
        with torch.no_grad():
            assert not torch.allclose(as_trained(ids, positions(ids), None), expected), "the threshold changes nothing"
    return {"sizes": sizes, "dmc": dmc, "threshold": threshold, "model": model, "ids": ids, "expected": expected}


def through_cache(case: dict[str, Any], sizes: list[int]) -> tuple[Tensor, DMCInferenceContext]:
    """Logits of the text cut into calls of these sizes."""
    context = DMCInferenceContext(case["dmc"], LENGTH)
    with torch.no_grad():
        logits = [
            case["model"](part, torch.zeros_like(part), None, inference_context=context, runtime_gather_output=True)
            for part in case["ids"].split(sizes, dim=1)
        ]
    return torch.cat(logits, dim=1), context


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "sizes",
    [[LENGTH], [1] * LENGTH, [17, 1, 30, 1, 1, 11], [40, *[1] * 21]],
    ids=["prefill", "decode", "chunks", "both"],
)
def test_cache_equals_training_form(case: dict[str, Any], sizes: list[int]) -> None:
    logits, context = through_cache(case, sizes)
    assert_same(logits, case["expected"])
    merged = sum(int(layer.statistics.counts[1].sum()) for layer in dmc_layers(case["model"]))
    heads = 2 * SIZES.num_layers * SIZES.num_query_groups
    # What a head absorbed is one slot more.
    residual = heads if case["dmc"].absorbs and case["dmc"].local_window < LENGTH else 0
    assert int(context.slots.sum()) == LENGTH * heads - merged + residual


def hugging_face(case: dict[str, Any]) -> Any:
    parameters = case["model"].state_dict()
    weights = dict(to_hugging_face(parameters.__getitem__, case["sizes"], case["dmc"]))
    config = write_config(case["sizes"], case["dmc"], dtype=torch.float32, special_tokens={"pad_token_id": 0})
    config = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    config_class, model_class = dmc_classes(case["sizes"].family)
    model = model_class(config_class(**config, merge_threshold=case["threshold"])).eval()
    model.load_state_dict(weights)
    return model


def test_hugging_face_forward_equals_training_form(case: dict[str, Any]) -> None:
    model = hugging_face(case)
    with torch.no_grad():
        assert_same(model(case["ids"], use_cache=False).logits, case["expected"])
        assert_same(model(case["ids"], use_cache=True).logits, case["expected"])


def test_hugging_face_padded_equals_unpadded(case: dict[str, Any]) -> None:
    model, ids = hugging_face(case), case["ids"]
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 7, dtype=torch.long), torch.ones_like(ids)], dim=1)
    for use_cache in (False, True):
        with torch.no_grad():
            assert_same(model(padded, attention_mask=mask, use_cache=use_cache).logits[:, 7:], case["expected"])


def test_hugging_face_generate_equals_training_form(case: dict[str, Any]) -> None:
    model = hugging_face(case)
    made = model.generate(
        case["ids"][:, :40], max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ids = made.sequences
    with torch.no_grad():
        expected = case["model"](ids, positions(ids), None)[:, 39:-1]
    assert_same(torch.stack(made.logits, dim=1), expected)


def test_a_fresh_absorbing_projection_is_its_base_and_learns() -> None:
    """Its logits are constants at first; through noisy decisions both of them get a gradient, in every layer and head."""
    base, model = random_model(None), random_model(DMCConfig(operation="absorb", local_window=4, decision_bias=1.0))
    model.load_state_dict(base.state_dict(), strict=False)
    for layer in dmc_layers(model):
        for parameter in layer.decision.parameters():
            torch.nn.init.zeros_(parameter)
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        assert_same(model(ids, positions(ids), None), base(ids, positions(ids), None))
    model.train()(ids, positions(ids), torch.arange(2)).square().mean().backward()
    for layer in dmc_layers(model):
        gradient = layer.decision.bias.grad
        assert gradient.isfinite().all() and gradient.all()


def test_what_a_container_says_of_attention_is_not_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in "01":
        monkeypatch.setenv("NVTE_FLASH_ATTN", value)
        random_model(DMCConfig())


def test_fresh_projection_is_its_base_to_the_last_bit() -> None:
    base = random_model(None)
    patched = random_model(DMCConfig())
    with torch.no_grad():
        for layer in dmc_layers(patched):
            for parameter in layer.decision.parameters():
                parameter.zero_()
    missing = patched.load_state_dict(base.state_dict(), strict=False)
    assert all(".decision." in name for name in missing.missing_keys)
    ids = tokens(2, 200)
    with torch.no_grad():
        assert torch.equal(patched(ids, positions(ids), None), base(ids, positions(ids), None))


def test_a_layer_spec_without_the_norms_that_the_configuration_asks_for() -> None:
    sizes = FAMILY_SIZES["qwen3"]
    # Newer versions of megatron-core say it first.
    with pytest.raises(
        ValueError, match=r"qk_layernorm (is True in the configuration and False in the layer spec|requires)"
    ):
        GPTModel(transformer_config(sizes), get_dmc_layer_spec(DMCConfig()), sizes.vocab_size, 64)
