"""The whole way of every family: from Hugging Face through calibration and training to an export that computes the same."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.to_hf import export_adapter, export_hf
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.inference.loading import load_model
from tests.support.family_tokenizers import save_tokenizer
from tests.support.llamas import TOKENS, megatron_logits, save_random_base
from tests.support.tensors import assert_same_tensors, hugging_face_tensors
from tests.support.toy import LR, TEXT, recipe_values, train, write_recipe

pytestmark = pytest.mark.usefixtures("one_process")

OPERATIONS = {"llama": "merge", "mistral": "evict", "qwen2": "absorb", "qwen3": "absorb"}


@pytest.fixture(scope="module", params=FAMILIES)
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Any:
    """The base in ``hf``, as a checkpoint in ``base``, and datasets of its own tokenizer."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    save_random_base(folder / "hf", family=family, vocab_size=301, tie_word_embeddings=family == "qwen3")
    save_tokenizer(family, folder / "hf")
    import_hf(folder / "hf", folder / "base")
    tokenizer = load_tokenizer(folder / "base" / "tokenizer")
    for name, documents in (("train", TEXT[:50]), ("valid", TEXT[50:])):
        build_indexed_dataset(documents, tokenizer, str(folder / name))
    return family, folder


def retrofit(folder: Path, name: str, load_base: Path, phases: list[dict[str, Any]], **dmc: Any) -> Path:
    values = recipe_values(folder, folder / name, phases, **dmc)
    del values["model"]
    values["data"]["tokenizer"] = str(folder / "base" / "tokenizer")
    values["checkpoint"]["load_base"] = str(load_base)
    values["training"]["train"] = "full" if dmc["decision_source"] == "neuron" else "adapter"
    train(write_recipe(folder / name, values))
    return folder / name / "checkpoints" / "final"


@torch.no_grad()
def assert_export_computes_the_same(checkpoint: Path, exported: Any) -> None:
    """Training form, prefill and decoding."""
    expected = megatron_logits(load_model(checkpoint, must_merge=True).model)
    torch.testing.assert_close(exported(TOKENS, use_cache=False).logits, expected, rtol=0, atol=2e-5)
    cache, logits = None, []
    for begin, end in itertools.pairwise((0, 20, *range(21, TOKENS.shape[1] + 1))):
        out = exported(TOKENS[:, begin:end], past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, [*logits, out.logits]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=2e-5)
    assert cache.compression_ratio > 1


def test_calibrated_and_trained(way: Any, tmp_path: Path) -> None:
    family, folder = way
    dmc = {"decision_source": "projection", "operation": OPERATIONS[family], "local_window": 4, "decision_bias": 5.0}
    dmc |= {"decision_scale": 1.0, "target_compression_ratio": 2.0, "ratio_control": "offset"}
    calibrated = retrofit(folder, "calibrated", folder / "base", [{"kind": "calibrate", "steps": 10}], **dmc)
    trained = retrofit(folder, "trained", calibrated, [{"kind": "solidify", "steps": 2, "lr": LR}], **dmc)
    export_hf(trained, tmp_path / "export")
    export_adapter(trained, tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert type(whole).__name__ == f"DMC{FAMILIES[family].architecture}"
    assert_export_computes_the_same(trained, whole)
    adapter = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", base=folder / "hf", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(adapter(TOKENS).logits, whole(TOKENS).logits)
    # The base's weights have not moved by a bit; what is added are the decisions.
    found = hugging_face_tensors(tmp_path / "export")
    assert_same_tensors({k: v for k, v in found.items() if ".decision." not in k}, hugging_face_tensors(folder / "hf"))
    of_base, tokenizer = (AutoTokenizer.from_pretrained(path) for path in (folder / "hf", tmp_path / "export"))
    assert type(tokenizer) is type(of_base)
    for text in ("The cat  sat", " on\nthe mat; Zebra 7 é", "the</s><|endoftext|>"):
        assert tokenizer(text).input_ids == of_base(text).input_ids
    said = tokenizer("The cat sat", return_tensors="pt", return_token_type_ids=False)
    assert whole.generate(**said, max_new_tokens=4, do_sample=False).shape == (1, said.input_ids.shape[1] + 4)


def test_the_papers_way(way: Any, tmp_path: Path) -> None:
    """Decisions in a channel of query and key that is cleared first; all weights learn."""
    _, folder = way
    phases = [
        {"kind": "zero_out", "steps": 2, "lr": LR},
        {"kind": "compress", "steps": 6, "lr": LR, "start_compression_ratio": 1.0},
    ]
    dmc = {"decision_source": "neuron", "target_compression_ratio": 2.0, "decision_bias": 0.3}
    trained = retrofit(folder, "neuron", folder / "base", phases, **dmc)
    export_hf(trained, tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert_export_computes_the_same(trained, exported)
