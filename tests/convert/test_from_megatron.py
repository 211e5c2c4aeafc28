"""Checkpoints of Megatron-LM's form, as the authors released theirs: the same model here and in transformers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.cli import main
from megatron_dmc.convert.from_megatron import import_megatron
from megatron_dmc.convert.single_process import empty_model
from megatron_dmc.convert.to_hf import export_hf
from tests.support.llamas import TOKENS, load_megatron, megatron_logits
from tests.support.megatron_files import AUTHORS, SIZES, fused, legacy, random_parameters, save
from tests.support.tensors import assert_same_tensors

FORMS: dict[str, Callable[..., dict[str, Any]]] = {"fused": fused, "plain": dict, "legacy": legacy}


def parameters_of(checkpoint: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in load_megatron(checkpoint, dtype).named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2], ids=["TP1", "TP2"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_bit_comes_through(tmp_path: Path, form: Callable[..., dict[str, Any]], ranks: int) -> None:
    parameters = random_parameters()
    save(tmp_path / "release", parameters, form=form, ranks=ranks)
    written = import_megatron(tmp_path / "release", tmp_path / "checkpoint")
    assert_same_tensors(parameters_of(tmp_path / "checkpoint"), parameters)
    assert written.tensors == len(parameters)


def test_it_computes_what_was_trained_and_so_does_its_export(tmp_path: Path) -> None:
    parameters = random_parameters(dtype=torch.float32)
    save(tmp_path / "release", parameters)
    import_megatron(tmp_path / "release", tmp_path / "checkpoint")
    saved = SavedModel.open(tmp_path / "checkpoint")
    assert saved.dmc == replace(AUTHORS, target_compression_ratio=8.0)
    trained = empty_model(SIZES, AUTHORS, torch.float32).eval()
    trained.load_state_dict(parameters, strict=False)
    expected = megatron_logits(trained)
    assert torch.equal(megatron_logits(load_megatron(tmp_path / "checkpoint")), expected)
    export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert exported.config.dmc["window_size"] == 12 and exported.config.dmc["local_window"] == 0
    with torch.no_grad():
        torch.testing.assert_close(exported(TOKENS).logits, expected, rtol=0, atol=1e-5)
    # It merges, and the window of 12 matters: without either the logits are others.
    for other in (None, replace(AUTHORS, window_size=None)):
        different = empty_model(SIZES, other, torch.float32).eval()
        different.load_state_dict(parameters, strict=False)
        assert not torch.allclose(megatron_logits(different), expected, atol=1e-4)


def test_settings_that_are_not_the_defaults(tmp_path: Path) -> None:
    save(tmp_path / "release", dmc_init_val=3.0, dmc_window_size=0, dmc_cr=2.0, dmc_temp=0.2)
    import_megatron(tmp_path / "release", tmp_path / "checkpoint")
    expected = replace(AUTHORS, target_compression_ratio=2.0, decision_bias=3.0, window_size=None, temperature=0.2)
    assert SavedModel.open(tmp_path / "checkpoint").dmc == expected


def test_a_model_without_compression_is_a_base(tmp_path: Path) -> None:
    model = replace(
        SIZES, num_query_groups=4, share_embeddings_and_output_weights=True, rotary_base=5e5, norm_epsilon=1e-6
    )
    parameters = random_parameters(model, torch.float32)
    path = save(
        tmp_path / "release",
        parameters,
        group_query_attention=False,
        num_query_groups=1,
        untie_embeddings_and_output_weights=False,
        rotary_base=500000,
        norm_epsilon=1e-6,
    )
    content = torch.load(path, weights_only=False)
    for name in [name for name in vars(content["args"]) if name.startswith("dmc_")]:
        delattr(content["args"], name)
    torch.save(content, path)
    import_megatron(tmp_path / "release", tmp_path / "checkpoint", pad_vocab_to_multiple_of=64)
    saved = SavedModel.open(tmp_path / "checkpoint")
    assert saved.dmc is None and saved.vocabulary == 304 and saved.recipe.model == replace(model, vocab_size=320)
    export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    expected = empty_model(model, None, torch.float32).eval()
    expected.load_state_dict(parameters, strict=False)
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(tmp_path / "hf")(TOKENS).logits
    torch.testing.assert_close(logits, megatron_logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", ["", "iter_0002000", "release"])
def test_where_the_weights_may_lie(tmp_path: Path, place: str) -> None:
    """The released folders hold mp_rank_00 beside the file that would name its iteration."""
    release = tmp_path / "release"
    save(release / place)
    if place:
        save(release / "iter_0001000", {name: value * 2 for name, value in random_parameters().items()})
    (release / "latest_checkpointed_iteration.txt").write_text("release" if place == "release" else "2000")
    import_megatron(release, tmp_path / "checkpoint")
    assert_same_tensors(parameters_of(tmp_path / "checkpoint"), random_parameters())


def test_the_command_and_the_tokenizer(
    save_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "release")
    llama = save_llama()
    source, output, exported = tmp_path / "release", tmp_path / "checkpoint", tmp_path / "hf"
    capsys.readouterr()
    assert main(["convert-from-megatron", str(source), str(output), "--tokenizer", str(llama)]) == 0
    said, errors = capsys.readouterr()
    assert said.startswith(f"{output}: converted from {source}; 15 tensors, ") and said.endswith("all values finite\n")
    assert (output / "tokenizer" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert main(["convert-to-hf", str(output), str(exported)]) == 0
    assert not errors and not capsys.readouterr().err
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == 2


def test_without_a_tokenizer_a_warning_names_the_flag(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "release")
    import_megatron(tmp_path / "release", tmp_path / "checkpoint")
    assert "there is no tokenizer (--tokenizer HF_FOLDER copies one)" in caplog.text
