"""generate() through the compressed cache against generate() that recomputes everything."""

import copy

import pytest
import torch
from transformers import DynamicCache

from megatron_dmc.hf.cache import DMCCache

OPTIONS = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}


def assert_same_generation(cached, recomputed):
    assert torch.equal(cached.sequences, recomputed.sequences)
    for a, b in zip(cached.scores, recomputed.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_greedy(model, left_padded):
    padded, mask = left_padded
    cached = model.generate(padded, attention_mask=mask, **OPTIONS)
    assert_same_generation(cached, model.generate(padded, attention_mask=mask, use_cache=False, **OPTIONS))
    cache = cached.past_key_values
    assert isinstance(cache, DMCCache) and cache.tokens.tolist() == [64, 53, 25]
    assert 1.5 < cache.compression_ratio < 4
    with torch.no_grad():
        for row in range(3):  # padded = unpadded = one forward over what was generated
            ids = cached.sequences[row, 41 - mask[row].sum() :]
            logits = model(ids[None, :-1], use_cache=False).logits[0, -24:]
            torch.testing.assert_close(torch.stack(cached.scores)[:, row], logits, rtol=0, atol=1e-4)


def test_sampling(model, left_padded):
    padded, mask = left_padded
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = OPTIONS | {"do_sample": True, "top_k": 20, "num_return_sequences": 2, "use_cache": use_cache}
        results.append(model.generate(padded, attention_mask=mask, **options))
    assert_same_generation(*results)


def test_beam_search_reorders(model, left_padded):
    padded, mask = left_padded
    options = OPTIONS | {"num_beams": 4, "num_return_sequences": 2}
    cached = model.generate(padded, attention_mask=mask, **options)
    recomputed = model.generate(padded, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached.sequences, recomputed.sequences)
    torch.testing.assert_close(cached.sequences_scores, recomputed.sequences_scores, rtol=0, atol=1e-4)
    assert (cached.beam_indices.diff(dim=1) != 0).any()  # beams did change places


def test_finished_rows_do_not_disturb(projection_model, left_padded):
    """Rows that end early are fed padding from then on; the others must not notice."""
    padded, mask = left_padded
    free = projection_model.generate(padded, attention_mask=mask, **OPTIONS).sequences
    end = int(free[0, 41 + 5])
    ended = projection_model.generate(padded, attention_mask=mask, eos_token_id=end, **OPTIONS).sequences
    for row in range(3):
        stop = (free[row, 41:] == end).nonzero()
        length = 41 + int(stop[0]) + 1 if len(stop) else ended.shape[1]
        assert torch.equal(ended[row, :length], free[row, :length])


def test_generates_on_from_a_cache(projection_model, prompt):
    first = projection_model.generate(prompt, **OPTIONS)
    question = torch.cat([first.sequences, prompt[:, :7]], dim=1)
    cache = copy.deepcopy(first.past_key_values)
    options = OPTIONS | {"attention_mask": torch.ones_like(question)}
    continued = projection_model.generate(question, past_key_values=cache, **options)
    assert_same_generation(continued, projection_model.generate(question, **options))
    assert continued.past_key_values is cache
    assert first.past_key_values.columns == 64  # the copy was another one


def test_several_continuations_of_one_cache(projection_model, prompt):
    first = projection_model.generate(prompt, **OPTIONS)
    question = torch.cat([first.sequences, prompt[:, :7]], dim=1)
    options = OPTIONS | {"num_beams": 3, "attention_mask": torch.ones_like(question)}
    cached = options | {"past_key_values": first.past_key_values}
    with pytest.raises(
        ValueError, match="past_key_values holds 3 sequences, got 9; give it as many with its batch_repeat"
    ):
        projection_model.generate(question, **cached)
    first.past_key_values.batch_repeat_interleave(3)
    continued = projection_model.generate(question, **cached).sequences
    assert torch.equal(continued, projection_model.generate(question, **options).sequences)


def test_chunked_prefill_by_generate(projection_model, left_padded):
    padded, mask = left_padded
    whole = projection_model.generate(padded, attention_mask=mask, **OPTIONS)
    chunked = projection_model.generate(padded, attention_mask=mask, prefill_chunk_size=7, **OPTIONS)
    assert_same_generation(chunked, whole)


def test_inputs_embeds(projection_model, prompt):
    embeds = projection_model.get_input_embeddings()(prompt)
    expected = projection_model.generate(prompt, **OPTIONS).sequences[:, 41:]
    assert torch.equal(projection_model.generate(inputs_embeds=embeds, **OPTIONS).sequences, expected)


def test_cache_is_smaller_and_is_freed(projection_model, prompt):
    out = projection_model.generate(
        prompt.repeat(1, 5), max_new_tokens=40, do_sample=False, return_dict_in_generate=True
    )
    cache = out.past_key_values
    plain = int(cache.tokens.sum()) * 3 * 2 * 2 * 16 * 4  # layers, kv_heads, k and v, head_dim, bytes
    assert cache.nbytes < 1.3 / cache.compression_ratio * plain  # short rows: a page's slack weighs more
    before = cache.nbytes
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.nbytes < 0.4 * before and cache.batch_size == 1
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 3
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0


def test_another_kind_of_empty_cache_is_replaced(projection_model, prompt):
    out = projection_model.generate(prompt, past_key_values=DynamicCache(), **OPTIONS)
    assert isinstance(out.past_key_values, DMCCache)


@pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized"])
def test_other_cache_implementations_are_refused(projection_model, prompt, implementation):
    with pytest.raises(ValueError, match=f"cache_implementation='{implementation}' is not supported"):
        projection_model.generate(prompt, cache_implementation=implementation, **OPTIONS)


def test_assisted_generation_is_refused(projection_model, base_model, prompt):
    message = "assisted generation is not supported: a rejected token"
    options = {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match=message):
        projection_model.generate(prompt[:1], assistant_model=base_model, **options)
    with pytest.raises(ValueError, match=message):
        projection_model.generate(prompt[:1], prompt_lookup_num_tokens=3, **options)
    with pytest.raises(ValueError, match=message):
        base_model.generate(prompt[:1], assistant_model=projection_model, **options)
