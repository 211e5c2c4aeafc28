"""Every family's model in tensor- and pipeline-parallel ranks computes what transformers computes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.to_hf import export_hf
from tests.support.llamas import TOKENS, load_megatron, megatron_logits, save_random_base
from tests.support.processes import ROOT, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("one_process")]

VOCABULARY = 301  # odd: conversion pads it for two ranks
MODELS = [(family, tied) for family in FAMILIES for tied in (False, True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Path:
    """The models as transformers has them and as checkpoints; then their logits on four ranks."""
    folder = tmp_path_factory.mktemp("families")
    pairs = []
    for family, tied in MODELS:
        place = folder / f"{family}-{tied}"
        save_random_base(
            place / "hf", family=family, tie_word_embeddings=tied, vocab_size=VOCABULARY, num_hidden_layers=4
        )
        import_hf(place / "hf", place / "megatron", pad_vocab_to_multiple_of=2)
        pairs += [place / "megatron", place / "logits.pt"]
    for done in run_ranks(4, ROOT / "tests/distributed/logits_worker.py", 2, 2, *pairs):
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("family", "tied"), MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers(folder: Path, family: str, tied: bool) -> None:
    place = folder / f"{family}-{tied}"
    expected = AutoModelForCausalLM.from_pretrained(place / "hf")(TOKENS).logits
    assert expected.std() > 0.5
    one = megatron_logits(load_megatron(place / "megatron"))
    four = torch.load(place / "logits.pt", weights_only=True)
    for found in (one, four):
        torch.testing.assert_close(found[..., :VOCABULARY], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_what_four_ranks_save_is_exported_byte_by_byte(folder: Path, family: str, tied: bool, tmp_path: Path) -> None:
    place = folder / f"{family}-{tied}"
    export_hf(place / "again", tmp_path / "hf")
    expected = (place / "hf" / "model.safetensors").read_bytes()
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == expected
