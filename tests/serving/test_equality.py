"""Token for token what the export's own generate() gives, in every form of a model, and all blocks free afterwards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import engine, params
from tests.support.served import Served, random_prompts, save, served_model

# Family, its DMC settings, other values of its configuration.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "window-0": ("llama", {}, {}),
    "window-4": ("llama", {"local_window": 4}, {}),
    "window-16": ("llama", {"local_window": 16}, {}),
    "neuron": ("llama", {"decision_source": "neuron"}, {}),
    "neuron-window-4": ("llama", {"decision_source": "neuron", "local_window": 4}, {}),
    "multi-head": ("llama", {"local_window": 4}, {"num_key_value_heads": 4}),
    "one-kv-head": ("llama", {"decision_source": "neuron"}, {"num_key_value_heads": 1}),
    "per-layer-tied": ("llama", {"per_layer": True}, {"tie_word_embeddings": True}),
    "other-numbers": (
        "llama",
        {"local_window": 4, "decision_scale": 2.0, "decision_bias": 9.0, "omega_floor": 2.0**-3},
        {"head_dim": 32},
    ),
    "scaled-rotary": (
        "llama",
        {"local_window": 4},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "evict": ("llama", {"operation": "evict", "local_window": 4}, {}),
    "evict-neuron-window-16": ("llama", {"operation": "evict", "local_window": 16, "decision_source": "neuron"}, {}),
    "absorb": ("llama", {"operation": "absorb", "local_window": 4, "decision_source": "neuron"}, {}),
    "absorb-neuron-window-16": ("qwen3", {"operation": "absorb", "local_window": 16, "decision_source": "neuron"}, {}),
    "window-size-12": ("llama", {"window_size": 12}, {}),
    "window-4-window-size-3": ("llama", {"local_window": 4, "window_size": 3}, {}),
    "window-size-longer-than-requests": ("llama", {"local_window": 4, "window_size": 4000}, {}),
    "fp8": ("llama", {"local_window": 4}, {"cache_dtype": "fp8"}),
    "fp8-absorb-window-16": (
        "qwen3",
        {"operation": "absorb", "local_window": 16, "decision_source": "neuron"},
        {"cache_dtype": "fp8"},
    ),
    "int8-evict": ("llama", {"operation": "evict", "local_window": 4}, {"cache_dtype": "int8"}),
    "int4-window-0": ("llama", {}, {"cache_dtype": "int4"}),
    "mistral": ("mistral", {"local_window": 4}, {"head_dim": 32}),
    "qwen2": ("qwen2", {"local_window": 4}, {"head_dim": 32}),
    "qwen2-neuron": ("qwen2", {"decision_source": "neuron"}, {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"local_window": 4}, {}),
    "qwen3-neuron": ("qwen3", {"decision_source": "neuron", "local_window": 4}, {"head_dim": 32}),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_outputs_are_the_exports_own(export: Callable[..., Served], case: str) -> None:
    family, dmc, config = CASES[case]
    expected = export(dmc, family, **config)
    assert min(expected.ratios[1:]) > 1.3 and min(len(set(x)) for x in expected.outputs) > 5
    with engine(expected) as running:
        assert running.generate(expected.prompts) == expected.outputs
        assert running.is_as_at_first()


@pytest.mark.parametrize(
    "case", ["window-0", "window-16", "absorb", "evict", "fp8", "window-4-window-size-3", "qwen2-neuron"]
)
def test_without_kernels(export: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Where there is no compiler, or they cannot serve a model."""
    from megatron_dmc.serving import kernels

    monkeypatch.setattr(kernels, "OF_DEVICES", {})
    family, dmc, config = CASES[case]
    expected = export(dmc, family, **config)
    with engine(expected) as running:
        assert not running.manager.spec.by_kernels
        assert running.generate(expected.prompts) == expected.outputs
        assert running.is_as_at_first()


def test_the_command_line_asks_for_fp8(export: Callable[..., Served], tmp_path: Path) -> None:
    family, dmc, config = CASES["fp8"]
    expected = export(dmc, family, **config)
    shutil.copytree(expected.folder, tmp_path, dirs_exist_ok=True)
    own = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**own, "cache_dtype": None}))
    with engine(expected._replace(folder=tmp_path), kv_cache_dtype="fp8") as running:
        assert running.manager.spec.page_size_bytes == 16 * 2 * 2 * 16
        assert running.generate(expected.prompts) == expected.outputs
        assert running.is_as_at_first()


@pytest.mark.parametrize(
    ("block_size", "most_tokens", "case"),
    [
        (8, 8, "window-4"),
        (8, 100, "window-16"),
        (24, 11, "neuron"),
        (128, 48, "window-0"),
        (1, 48, "window-4"),
        (8, 11, "absorb"),
        (1, 20, "window-4-window-size-3"),
        (8, 11, "fp8-absorb-window-16"),
    ],
    ids=lambda value: str(value),
)
def test_pages_and_chunks_of_any_size(
    export: Callable[..., Served], block_size: int, most_tokens: int, case: str
) -> None:
    """Chunks smaller than a page and larger; of one token, a page is full at once and headers are many blocks."""
    family, dmc, config = CASES[case]
    expected = export(dmc, family, **config)
    options = {"block_size": block_size, "max_num_batched_tokens": most_tokens, "num_gpu_blocks_override": 5000}
    with engine(expected, **options) as running:
        assert running.manager.spec.header_blocks > 1 or block_size > 1
        assert running.generate(expected.prompts) == expected.outputs
        assert running.is_as_at_first()


@pytest.mark.parametrize(
    ("dtype", "close", "eager"),
    [(torch.bfloat16, 0.08, True), (torch.bfloat16, 0.08, False), (torch.float16, 0.01, True)],
    ids=str,
)
@pytest.mark.parametrize("source", ["projection", "neuron"])
def test_half_precision_gives_the_exports_probabilities(
    tmp_path: Path, source: str, dtype: torch.dtype, close: float, eager: bool
) -> None:
    """With decisions that rounding cannot turn: one head merges every token, the other none. In bfloat16 a decision
    lies in two channels; compiled, it gets there by torch.compile's own code."""
    model = served_model({"decision_source": source, "local_window": 4}, "qwen2", merge_bias=0.0)
    for layer in model.model.layers:
        attention = layer.self_attn
        if source == "projection":
            attention.decision.weight.data.zero_()
            attention.decision.bias.data = torch.tensor([1000.0, 0.5, -1000.0, 0.5])
        else:
            attention.k_proj.weight.data.view(2, 16, -1)[:, -1] = 0
            attention.k_proj.bias.data.view(2, 16)[:, -1] = torch.tensor([1000.0, -1000.0])
    model = model.to(dtype)
    save(model, tmp_path)
    (prompt,) = random_prompts((70,))
    with torch.no_grad():
        logits = model(torch.tensor([prompt]), use_cache=False).logits[0].float()
    expected = logits.log_softmax(-1)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    options = {"dtype": str(dtype).removeprefix("torch."), "enforce_eager": eager}
    with engine(Served(tmp_path, [], [], []), **options) as running:
        (out,) = running.outputs([prompt], max_tokens=1, prompt_logprobs=0)
    pairs = zip(prompt[1:], out.prompt_logprobs[1:], strict=True)
    found = torch.tensor([each[token].logprob for token, each in pairs])
    assert float((found - expected).abs().mean()) < close and float(expected.std()) > 1


def test_without_eager_mode_outputs_are_the_same(export: Callable[..., Served]) -> None:
    """torch.compile over the model, split at the attention operator."""
    expected = export({"local_window": 4})
    with engine(expected, enforce_eager=False) as running:
        assert running.generate(expected.prompts[:4]) == expected.outputs[:4]
        assert running.is_as_at_first()


def test_each_request_is_compressed_as_it_asks_for(export: Callable[..., Served], tmp_path: Path) -> None:
    """In one batch: as the model was trained, by a threshold, and by a ratio of the measured curve."""
    case = export({"local_window": 4})
    curve = {"tokens": 100, "ratios": [1.5, 3.0, 6.0], "thresholds": [130.0, 60.0, -90.0]}
    folder = tmp_path / "with-curve"
    shutil.copytree(case.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"compression_curve": curve, "merge_threshold": 10.0}))
    asked = [None, {"merge_threshold": 100.0}, {"compression_ratio": 3.0}, {"compression_ratio": 6}, {}]
    thresholds = [10.0, 100.0, 60.0, -90.0, 10.0]
    model = type(served_model({"local_window": 4})).from_pretrained(folder)
    expected, ratios = [], []
    for prompt, threshold in zip(case.prompts, thresholds, strict=True):
        made = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=len(case.outputs[0]),
            do_sample=False,
            merge_threshold=threshold,
            return_dict_in_generate=True,
        )
        expected.append(made.sequences[0, len(prompt) :].tolist())
        ratios.append(next(made[name] for name in ("cache", "past_key_values") if name in made).compression_ratio)
    assert len(set(ratios)) == len(ratios)
    with engine(case._replace(folder=folder)) as running:
        given = [params(max_tokens=len(expected[0]), extra_args=extra) for extra in asked]
        outputs = running.llm.generate([{"prompt_token_ids": x} for x in case.prompts], given, use_tqdm=False)
        assert [list(out.outputs[0].token_ids) for out in outputs] == expected
        # The last token was never taken in.
        for out, extra, ratio, threshold in zip(outputs, asked, ratios, thresholds, strict=True):
            if not extra:
                assert out.kv_transfer_params is None
            else:
                had = out.kv_transfer_params
                assert had["merge_threshold"] == threshold
                # All but the last step's.
                assert had["compressed_tokens"] == len(out.prompt_token_ids) + len(expected[0]) - 2
                assert abs(had["compression_ratio"] / ratio - 1) < 0.05
        (short,) = running.outputs(case.prompts[:1], max_tokens=1, extra_args={"merge_threshold": 100.0})
        assert short.kv_transfer_params == {"merge_threshold": 100.0}
        assert running.is_as_at_first()
        running.generate(case.prompts[:1], 2)
        assert not running.scheduler.connector.thresholds.asked
