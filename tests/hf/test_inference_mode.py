"""A cache goes on in any gradient mode, whichever it was filled in."""

import copy

import pytest
import torch

VARIANTS = {
    "merge": {},
    "neuron": {"decision_source": "neuron"},
    "truncated": {"window_size": 3},
    "window": {"local_window": 4},
    "evict": {"local_window": 4, "operation": "evict"},
    "absorb": {"local_window": 4, "operation": "absorb"},
}
MODES = {"inference": torch.inference_mode, "no-grad": torch.no_grad, "grad": torch.enable_grad}
OPTIONS = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def frozen(request, make_model):
    return make_model(request.param).requires_grad_(False)


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_prefix_and_then_more(frozen, prompt, first, second):
    """Cut into calls of several modes, the logits are those of one mode, to the last bit."""

    def logits(modes):
        cache, out = None, []
        for mode, (start, stop) in zip(modes, [(0, 20), (20, 21), (21, 30), (30, 31), (31, 41)], strict=True):
            with MODES[mode]():
                step = frozen(prompt[:, start:stop], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            out.append(step.logits.clone())
        return torch.cat(out, dim=1)

    expected = logits(["no-grad"] * 5)
    assert torch.equal(logits([first, second, second, first, second]), expected)


def test_generate_after_a_prefix(frozen, prompt):
    question = torch.cat([prompt, prompt[:, :3]], dim=1)
    options = OPTIONS | {"attention_mask": torch.ones_like(question)}
    with torch.inference_mode():
        past = frozen(prompt, use_cache=True).past_key_values
    copied = copy.deepcopy(past)
    expected = frozen.generate(question, **options)
    for cache in (past, copied):
        assert torch.equal(frozen.generate(question, past_key_values=cache, **options), expected)


def test_sequences_chosen_outside(frozen, prompt):
    with torch.inference_mode():
        past = frozen(prompt, use_cache=True).past_key_values
    past.batch_select_indices(torch.tensor([2, 0]))
    with torch.no_grad():
        found = frozen(prompt[[2, 0], :3], past_key_values=past).logits
        again = frozen(prompt, use_cache=True).past_key_values
        expected = frozen(prompt[:, :3], past_key_values=again).logits[[2, 0]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_gradients_are_refused_in_one_line(projection_model, prompt):
    with torch.inference_mode():
        past = projection_model(prompt, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the compressed cache gives no gradients"):
        projection_model(prompt[:, :3], past_key_values=past)
