"""A DMCCache as a thing of its own: one prefix serves many requests; it is copied, saved, loaded and moved."""

import copy
from typing import Any

import pytest
import torch

from megatron_dmc.hf.cache import DMCCache

VARIANTS: dict[str, dict[str, Any]] = {
    "merge": {},
    "neuron, window": {"decision_source": "neuron", "local_window": 4},
    "truncated": {"window_size": 3},
    "evict": {"local_window": 4, "operation": "evict"},
    "absorb": {"local_window": 4, "operation": "absorb"},
}
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def model(request, make_model):
    return make_model(request.param)


def through_a_file(cache, config, path):
    torch.save(cache.state_dict(), path)
    return DMCCache.from_state_dict(config, torch.load(path, weights_only=True))


def test_one_prefix_serves_many_requests(model, prompt, tmp_path):
    prefix, questions = prompt[:1], [prompt[1:2, :5], prompt[2:, 7:9], prompt[1:2, 30:]]
    with torch.no_grad():
        cache = model(prefix, use_cache=True).past_key_values
    saved = through_a_file(cache, model.config, tmp_path / "prefix.pt")
    assert saved.nbytes == cache.nbytes and torch.equal(saved.slots, cache.slots)
    for question in questions:
        whole = torch.cat([prefix, question], dim=1)
        expected = model.generate(whole, **OPTIONS)
        for each in (cache, saved):
            assert torch.equal(model.generate(whole, past_key_values=copy.deepcopy(each), **OPTIONS), expected)


def test_one_prefix_serves_a_batch(model, prompt):
    whole = torch.cat([prompt[:1].expand(3, -1), prompt[:, 5:9]], dim=1)
    with torch.no_grad():
        cache = model(prompt[:1], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    assert torch.equal(model.generate(whole, past_key_values=cache, **OPTIONS), model.generate(whole, **OPTIONS))


def test_padding_is_remembered_in_a_file(model, left_padded, tmp_path):
    padded, mask = left_padded
    more, mask_of_more = padded[:, -3:], torch.ones(3, 3, dtype=torch.long)
    with torch.no_grad():
        cache = model(padded, attention_mask=mask, use_cache=True).past_key_values
        again = through_a_file(cache, model.config, tmp_path / "padded.pt").to("cpu")
        assert again.columns == cache.columns and torch.equal(again.real, cache.real)
        everything = torch.cat([mask, mask_of_more], dim=1)
        logits = [model(more, attention_mask=everything, past_key_values=x).logits for x in (cache, again)]
    assert torch.equal(*logits)


def test_an_empty_cache_and_an_emptied_one(model, prompt, tmp_path):
    empty = through_a_file(DMCCache(model.config), model.config, tmp_path / "empty.pt")
    with torch.no_grad():
        expected = model(prompt, use_cache=True).logits
        used = model(prompt, past_key_values=empty).past_key_values
        used.batch_select_indices(torch.zeros(0, dtype=torch.long))
        assert used.nbytes == 0 and used.columns == 0 and len(used.tokens) == 0
        assert torch.equal(model(prompt, past_key_values=used).logits, expected)


@pytest.mark.parametrize("size", [1, 5], ids=["step", "chunk"])
@pytest.mark.parametrize("layer", [0, 2], ids=["first", "last"])
def test_a_call_that_was_interrupted_is_noticed(model, prompt, layer, size):
    """Also after the last layer's attention, when all layers have taken the tokens in."""

    def interrupts(*args):
        raise KeyboardInterrupt

    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        hook = model.model.layers[layer].mlp.register_forward_pre_hook(interrupts)
        with pytest.raises(KeyboardInterrupt):
            model(prompt[:, :size], past_key_values=cache)
        hook.remove()
        copied, moved = copy.deepcopy(cache), copy.deepcopy(cache).to("cpu")
        for each in (cache, copied, moved):
            with pytest.raises(ValueError, match="reset it"):
                model(prompt[:, :1], past_key_values=each)
            with pytest.raises(ValueError, match="reset it"):
                each.state_dict()
        cache.reset()
        assert torch.equal(model(prompt, past_key_values=cache).logits, model(prompt, use_cache=True).logits)


def test_a_call_that_was_refused_changes_nothing(model, prompt):
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        expected = model(prompt[:, :1], past_key_values=copy.deepcopy(cache)).logits
    with pytest.raises(ValueError, match="no gradients"):
        model(prompt[:, :1], past_key_values=cache)
    with torch.no_grad():
        assert torch.equal(model(prompt[:, :1], past_key_values=cache).logits, expected)


def test_one_state_makes_many_caches(model, prompt):
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        state = cache.state_dict()
        caches = [cache, *(DMCCache.from_state_dict(model.config, state) for _ in range(2))]
        steps = [[model(prompt[:, at : at + 1], past_key_values=x).logits for x in caches] for at in range(3)]
    assert all(torch.equal(step[0], other) for step in steps for other in step)


@pytest.mark.parametrize("chosen", [[True, True, True], [True, False, True]], ids=str)
def test_sequences_may_be_chosen_by_a_mask(model, prompt, chosen):
    mask = torch.tensor(chosen)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        cache.batch_select_indices(mask)
        other.batch_select_indices(mask.nonzero()[:, 0])
        logits = [model(prompt[mask, :1], past_key_values=x).logits for x in (cache, other)]
    assert torch.equal(*logits)


def test_layers_of_different_calls_are_refused(make_model, prompt):
    model = make_model({"local_window": 4})
    with torch.no_grad():
        states = [model(x, use_cache=True).past_key_values.state_dict() for x in (prompt, prompt[:, :20], prompt[:2])]
    empty = DMCCache(model.config).state_dict()
    for other in (*states[1:], empty):
        for mixed in ((states[0], other), (other, states[0])):
            layers = [mixed[0]["layers"][0], *mixed[1]["layers"][1:]]
            with pytest.raises(ValueError, match=r"different tokens|do not fit"):
                DMCCache.from_state_dict(model.config, states[0] | {"layers": layers})


def test_what_is_no_cache_of_this_model_is_refused(make_model, prompt):
    model, other = make_model({}), make_model({"local_window": 4})
    with torch.no_grad():
        state = model(prompt, use_cache=True).past_key_values.state_dict()
    with pytest.raises(ValueError, match="has another layout"):
        DMCCache.from_state_dict(other.config, state)
    with pytest.raises(ValueError, match="the saved cache has 1 layers, the model 3"):
        DMCCache.from_state_dict(model.config, state | {"layers": state["layers"][:1]})
    for damage in (
        {"layers": None},
        {"columns": "many"},
        {"layers": [{}, {}, {}]},
        {"real": "yes"},
        {"columns": -3},
        {"columns": 9},
        {"columns": 1e99},
        {"layers": [None] * 3},
    ):
        with pytest.raises(ValueError, match=r"no saved DMCCache|no saved cache|damaged|another layout"):
            DMCCache.from_state_dict(model.config, state | damage)
    with pytest.raises(ValueError, match="no saved DMCCache"):
        DMCCache.from_state_dict(model.config, {})
    narrower = [layer | {"kv_heads": 1} for layer in state["layers"]]
    with pytest.raises(ValueError, match="damaged"):
        DMCCache.from_state_dict(model.config, state | {"layers": narrower})
