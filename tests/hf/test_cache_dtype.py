"""A cache whose slots are codes: prefill, single steps, padding and no cache at all are one model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dmc.hf.cache import CACHE_NAME, DMCCache
from megatron_dmc.hf.families.llama import DMCLlamaConfig, DMCLlamaForCausalLM
from megatron_dmc.ops.decode.codes import CACHE_DTYPES

by_cache_dtype = pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
# A code that rounding turns over; without any, logits differ by less than 1e-4.
ONE_CODE: dict[str, float] = {"int8": 2e-2, "fp8": 0.2, "int4": 0.5}


def assert_near(found: torch.Tensor, expected: torch.Tensor, cache_dtype: str) -> None:
    error = (found - expected).abs()
    assert error.median() < 2e-4 and error.max() < ONE_CODE[cache_dtype]


@torch.no_grad()
@by_cache_dtype
@pytest.mark.parametrize("window", [0, 8])
def test_steps_chunks_and_no_cache_are_one_model(
    model: Any, make_model: Callable[..., Any], prompt: torch.Tensor, cache_dtype: str, window: int
) -> None:
    if window:
        model = make_model({**model.config.dmc, "local_window": window, "operation": "absorb", "window_size": None})
    whole = model(prompt, use_cache=True, cache_dtype=cache_dtype)
    without = model(prompt, use_cache=False, cache_dtype=cache_dtype)
    assert without.get(CACHE_NAME) is None
    assert torch.equal(without.logits, whole.logits)
    pieces, cache = [], None
    for piece in prompt.split([7, *[1] * 9, prompt.shape[1] - 16], dim=1):
        out = model(piece, use_cache=True, cache_dtype=cache_dtype, **{CACHE_NAME: cache})
        cache = out[CACHE_NAME]
        pieces.append(out.logits)
    assert cache.cache_dtype == cache_dtype
    assert_near(torch.cat(pieces, dim=1), whole.logits, cache_dtype)
    assert (whole.logits - model(prompt).logits).abs().max() > 1e-3


@torch.no_grad()
def test_the_configuration_says_it_for_all_and_survives_saving(model: Any, prompt: torch.Tensor, tmp_path: Any) -> None:
    expected = model(prompt, use_cache=True, cache_dtype="int4")
    model.config.cache_dtype = "int4"
    try:
        assert torch.equal(model(prompt).logits, expected.logits)
        model.config.save_pretrained(tmp_path)
        assert type(model.config).from_pretrained(tmp_path).cache_dtype == "int4"
    finally:
        model.config.cache_dtype = None
    state = expected[CACHE_NAME].state_dict()
    # A saved cache stays what it is, whatever the configuration says.
    restored = DMCCache.from_state_dict(model.config, state)
    assert restored.cache_dtype == "int4" and restored.nbytes > 0
    token = prompt[:, :1]
    found = model(token, use_cache=True, **{CACHE_NAME: restored})
    assert torch.equal(found.logits, model(token, use_cache=True, **{CACHE_NAME: expected[CACHE_NAME]}).logits)


def test_generate_takes_it_with_padding_and_beams(
    projection_model: Any, left_padded: tuple[torch.Tensor, torch.Tensor]
) -> None:
    padded, mask = left_padded
    others: list[dict[str, Any]] = [{}, {"num_beams": 2, "length_penalty": 0.0}]
    for options in others:
        settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_dtype": "int8"}
        together = projection_model.generate(padded, attention_mask=mask, **settings, **options)
        for row, (ids, real) in enumerate(zip(padded, mask, strict=True)):
            alone = projection_model.generate(ids[real.bool()][None], **settings, **options)
            assert torch.equal(alone[0, -6:], together[row, -6:])


def test_bytes_fall(projection_model: Any) -> None:
    prompt = torch.randint(0, 50, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        held = {
            name: projection_model(prompt, use_cache=True, cache_dtype=name)[CACHE_NAME].nbytes
            for name in (None, *CACHE_DTYPES)
        }
    assert held["int4"] < held["fp8"] <= held["int8"] < held[None]


def test_gradients_see_keys_as_they_are(projection_model: Any, prompt: torch.Tensor) -> None:
    plain = projection_model(prompt).logits
    assert plain.requires_grad
    assert torch.equal(projection_model(prompt, cache_dtype="int4").logits, plain)


@torch.no_grad()
def test_what_cannot_be_is_refused(model: Any, prompt: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match="cache_dtype must be int8, fp8, int4, or none for the model's own dtype, got 'int2'"
    ):
        model(prompt, cache_dtype="int2")
    with pytest.raises(ValueError, match="cache_dtype must be int8"):
        DMCLlamaConfig(cache_dtype="bf16")
    cache = model(prompt, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="cache_dtype is int4, that of past_key_values None"):
        model(prompt, cache_dtype="int4", **{CACHE_NAME: cache})


def test_a_config_without_it_has_none() -> None:
    assert DMCLlamaConfig().cache_dtype is None and DMCLlamaForCausalLM is not None
