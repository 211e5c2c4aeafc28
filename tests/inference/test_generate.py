"""Generation with megatron-core's model: the text that is printed, and what a long prompt costs."""

from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models

from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.evaluation.cache_size import measure_cache
from megatron_dmc.inference.context import DMCInferenceContext
from megatron_dmc.inference.generate import forward, generate, new_text
from megatron_dmc.inference.loading import LoadedModel
from megatron_dmc.recipe import Recipe
from tests.support.models import SIZES, random_model, tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Like Llama 2's: every word begins with a space, the first one's is dropped, unknown characters are bytes."""
    words = ["<unk>", "</s>", "▁The", "▁cache", "▁is", "▁small", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, eod=1, folder=Path())


def test_new_text_goes_on_where_the_prompt_ends(tokenizer: Tokenizer) -> None:
    assert list(new_text(tokenizer, [2, 3], [4, 5, 1, 2])) == [" is", " small", ""]


def test_new_text_waits_for_whole_characters_and_hides_none(tokenizer: Tokenizer) -> None:
    first, second = (6 + byte for byte in "é".encode())
    assert list(new_text(tokenizer, [2], [first, second, 4])) == ["é", " is", ""]
    assert "".join(new_text(tokenizer, [2], [4, first])) == " is\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def loaded(one_process: None, tokenizer: Tokenizer) -> LoadedModel:
    dmc = DMCConfig(decision_source="projection", decision_bias=0.5)
    return LoadedModel(random_model(dmc), Recipe(model=SIZES, dmc=dmc), tokenizer, merges=True)


def test_generates_what_the_whole_text_predicts(loaded: LoadedModel) -> None:
    prompt = tokens(2, 20)
    made = torch.stack(list(generate(loaded, prompt, 9)), dim=1)
    text = torch.cat([prompt, made], dim=1)
    logits = forward(loaded, text, DMCInferenceContext(loaded.recipe.dmc, text.shape[1]))
    assert torch.equal(logits[:, 19:-1].argmax(-1), made)


def test_only_the_last_logits(loaded: LoadedModel) -> None:
    text = tokens(2, 20)
    whole = forward(loaded, text, DMCInferenceContext(loaded.recipe.dmc, 20))
    last = forward(loaded, text, DMCInferenceContext(loaded.recipe.dmc, 20, only_last_logits=True))
    torch.testing.assert_close(last, whole[:, -1:])


def test_more_than_the_context_holds(loaded: LoadedModel) -> None:
    context = DMCInferenceContext(loaded.recipe.dmc, 5)
    forward(loaded, tokens(1, 5), context)
    with pytest.raises(ValueError, match=r"max_sequence_length \(5\)"):
        forward(loaded, tokens(1, 1), context)


def test_measured_cache(loaded: LoadedModel) -> None:
    size = measure_cache(loaded, tokens(1, 200)[0])
    assert size.slots.shape == (SIZES.num_layers, SIZES.num_query_groups)
    assert 1.5 < size.compression_ratio < 3
    assert 1 / size.compression_ratio < size.cache_bytes / size.plain_cache_bytes < 1.5 / size.compression_ratio
    with pytest.raises(ConfigError, match="257 tokens exceed the model's 256 positions"):
        measure_cache(loaded, tokens(1, 257)[0])
