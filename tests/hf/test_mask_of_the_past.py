"""An attention_mask that speaks of columns which the cache took in before: as it was then, or refused in one line."""

import copy
import re

import pytest
import torch

CLOSE = {"rtol": 0, "atol": 1e-4}
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def mask(left_padded):
    """Padding at the left, at the right, and inside."""
    mask = torch.ones_like(left_padded[1])
    mask[0, :5] = mask[1, 36:] = mask[2, 7:11] = 0
    return mask


@pytest.fixture
def past(projection_model, prompt, mask):
    with torch.no_grad():
        return projection_model(prompt, attention_mask=mask).past_key_values


def with_new(mask, width=3):
    return torch.nn.functional.pad(mask, (0, width), value=1)


@torch.no_grad()
def test_the_mask_that_it_had_is_what_it_was(projection_model, prompt, mask, past):
    question = torch.cat([prompt, prompt[:, :3]], dim=1)
    whole = projection_model(question, attention_mask=with_new(mask)).logits[:, -3:]
    for form in (with_new(mask), with_new(mask).bool(), with_new(mask).float(), torch.ones(3, 3), None):
        cache = copy.deepcopy(past)
        logits = projection_model(prompt[:, :3], attention_mask=form, past_key_values=cache).logits
        torch.testing.assert_close(logits, whole, **CLOSE)
        assert torch.equal(cache.real, with_new(mask).bool())


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[41], [20, 21], [40, 1]], ids=str)
def test_it_is_remembered_over_calls(projection_model, prompt, mask, pieces):
    cache, start = None, 0
    for size in pieces:
        stop = start + size
        out = projection_model(prompt[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        cache, start = out.past_key_values, stop
    refuses(projection_model, prompt, cache, changed(mask, 1, 38, 1), "is 1 at row 1, column 38, .*took in padding")
    refuses(projection_model, prompt, cache, changed(mask, 2, 30, 0), "is 0 at row 2, column 30, .*took in a token")


def changed(mask, row, column, value):
    mask = mask.clone()
    mask[row, column] = value
    return mask


def refuses(model, prompt, cache, mask, message):
    columns, tokens = cache.columns, cache.tokens
    with torch.no_grad(), pytest.raises(ValueError, match=message) as error:
        model(prompt[:, :3], attention_mask=with_new(mask), past_key_values=cache)
    assert "\n" not in str(error.value) and "start anew without past_key_values" in str(error.value)
    assert cache.columns == columns and torch.equal(cache.tokens, tokens)


def test_another_mask_is_refused(projection_model, prompt, mask, past):
    refuses(projection_model, prompt, past, torch.ones_like(mask), "is 1 at row 0, column 0, .*no token to attend to")
    refuses(projection_model, prompt, past, changed(mask, 0, 40, 0), "is 0 at row 0, column 40, .*cannot be hidden")
    with torch.no_grad():
        unpadded = projection_model(prompt).past_key_values
    refuses(projection_model, prompt, unpadded, mask, "is 0 at row 0, column 0, where past_key_values took in a token")


@torch.no_grad()
def test_a_step_counts_as_well(projection_model, prompt, mask):
    cache = projection_model(prompt).past_key_values
    step = with_new(torch.ones_like(mask), 1)
    projection_model(prompt[:, :1], attention_mask=step, past_key_values=cache)
    with pytest.raises(ValueError, match="is 0 at row 2, column 40"):
        again = changed(with_new(step, 1), 2, 40, 0)
        projection_model(prompt[:, :1], attention_mask=again, past_key_values=cache)


@torch.no_grad()
def test_a_length_that_fits_neither_is_refused(projection_model, prompt, mask, past):
    message = (
        r"must have 3 rows and 44 columns \(past and new tokens\) or 3 \(only the new ones\), zero at padding, got "
    )
    for shape in ((3, 2), (3, 20), (3, 43), (3, 45), (1, 44), (3, 1, 3, 44)):
        with pytest.raises(ValueError, match=message + re.escape(str(list(shape)))):
            projection_model(prompt[:, :3], attention_mask=torch.ones(shape), past_key_values=past)
    with pytest.raises(ValueError, match=r"must have 3 rows and 41 columns, .*got \[3, 45\]"):  # plain Llama's too
        projection_model(prompt, attention_mask=torch.ones(3, 45))


def test_it_moves_with_the_sequences(projection_model, prompt, mask, past):
    past.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(past.real, mask[[2, 0]].bool())
    past.batch_repeat_interleave(2)
    order = [2, 2, 0, 0]
    with torch.no_grad():
        projection_model(prompt[order, :3], attention_mask=with_new(mask[order]), past_key_values=past)
    past.reset()
    assert past.real is None and past.nbytes == 0


def test_a_second_turn_of_generate(projection_model, prompt, mask):
    """Over the kept cache as without it; what a row was fed after its end cannot be hidden."""
    first = projection_model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **OPTIONS)
    columns = with_new(mask, first.sequences.shape[1] - 41)
    question, asked = torch.cat([first.sequences, prompt[:, :3]], dim=1), with_new(columns)
    expected = projection_model.generate(question, attention_mask=asked, **OPTIONS)
    kept = copy.deepcopy(first.past_key_values)
    found = projection_model.generate(question, attention_mask=asked, past_key_values=kept, **OPTIONS)
    assert torch.equal(found, expected)
    asked[0, 43] = 0
    with pytest.raises(ValueError, match="is 0 at row 0, column 43, where past_key_values took in a token"):
        cache = first.past_key_values
        projection_model.generate(question, attention_mask=asked, past_key_values=cache, **OPTIONS)
