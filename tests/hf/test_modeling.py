"""The Hugging Face model's forward: with and without a cache, in pieces, with padding, against plain Llama."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import DynamicCache, LlamaForCausalLM

from megatron_dmc.hf.cache import DMCCache
from megatron_dmc.hf.families.llama import DMCLlamaConfig, DMCLlamaForCausalLM
from megatron_dmc.hf.padding import Packing

CLOSE = {"rtol": 0, "atol": 2e-4}  # logits of size 10 in float32


@torch.no_grad()
def in_pieces(model, ids, sizes, mask=None):
    """Logits of ids fed in pieces of the given sizes, and the cache."""
    cache, logits, start = DMCCache(model.config), [], 0
    for size in sizes:
        stop = start + size
        past_mask = None if mask is None else mask[:, :stop]
        out = model(ids[:, start:stop], attention_mask=past_mask, past_key_values=cache)
        assert out.past_key_values is cache
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, dim=1), cache


@pytest.fixture(scope="module")
def patched(base_model):
    """A base model's weights in a DMC model: what a retrofit starts from."""
    model = DMCLlamaForCausalLM(DMCLlamaConfig(**base_model.config.to_diff_dict() | {"model_type": "dmc_llama"}))
    missing, unexpected = model.load_state_dict(base_model.state_dict(), strict=False)
    assert {name.split(".", 3)[3] for name in missing} == {"self_attn.decision.weight", "self_attn.decision.bias"}
    assert not unexpected
    return model.eval()


@torch.no_grad()
def test_freshly_patched_is_llama(patched, base_model, prompt, left_padded):
    padded, mask = left_padded
    expected = base_model(prompt).logits
    torch.testing.assert_close(patched(prompt, use_cache=False).logits, expected, **CLOSE)
    torch.testing.assert_close(in_pieces(patched, prompt, [20, 1, 1, 19])[0], expected, **CLOSE)
    real = mask.bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = base_model(padded, attention_mask=mask, position_ids=positions).logits[real]
    torch.testing.assert_close(patched(padded, attention_mask=mask).logits[real], expected, **CLOSE)


def test_freshly_patched_generates_as_llama(patched, base_model, left_padded):
    padded, mask = left_padded
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(patched.generate(padded, **options), base_model.generate(padded, **options))


@torch.no_grad()
def test_pieces_are_the_whole(model, prompt):
    whole = model(prompt, use_cache=False).logits
    for sizes in ([41], [1] * 41, [30] + [1] * 11, [5, 20, 1, 15]):
        logits, cache = in_pieces(model, prompt, sizes)
        torch.testing.assert_close(logits, whole, **CLOSE)
    assert 1.5 < cache.compression_ratio < 4
    assert cache.slots.shape == (3, 3, 2)
    expected = 41 * cache.slots.numel() / cache.slots.sum()
    assert cache.compression_ratio == pytest.approx(float(expected))


@torch.no_grad()
def test_long_prompts_go_in_chunks(model, left_padded):
    padded, mask = left_padded
    step = {"input_ids": padded[:, -1:], "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)}
    whole = model(padded, attention_mask=mask)
    model.config.prefill_chunk_tokens = 16
    try:
        chunked = model(padded, attention_mask=mask)
    finally:
        model.config.prefill_chunk_tokens = 4096
    torch.testing.assert_close(chunked.logits[mask.bool()], whole.logits[mask.bool()], **CLOSE)
    nexts = [model(**step, past_key_values=out.past_key_values).logits for out in (chunked, whole)]
    torch.testing.assert_close(*nexts, **CLOSE)


@torch.no_grad()
def test_padding_changes_nothing(model, left_padded):
    padded, mask = left_padded
    right, _ = padded.clone(), mask.clone()
    inside = mask.clone()
    inside[0, 7:11] = inside[1, 20] = 0
    right_mask = mask.flip(1)
    for ids, padding in ((padded, mask), (right, right_mask), (padded, inside)):
        outputs = [model(ids, attention_mask=padding, use_cache=False).logits]
        outputs.append(in_pieces(model, ids, [41], padding)[0])
        outputs.append(in_pieces(model, ids, [12, 1, 26, 1, 1], padding)[0])
        for logits in outputs:
            assert torch.isfinite(logits).all()
            for row in range(3):
                real = padding[row].bool()
                alone = model(ids[row, real][None], use_cache=False).logits[0]
                torch.testing.assert_close(logits[row, real], alone, **CLOSE)


def test_layers_on_several_devices(left_padded):
    """The mask is on the first layer's device, the states on the last one's. Fake tensors need no such devices."""
    packing = Packing(left_padded[1])
    with FakeTensorMode() as mode:
        packing.place = mode.from_tensor(packing.place)
        hidden = FakeTensor(mode, torch.empty(3, 41, 8, device="meta"), torch.device("cuda:1"))
        assert packing.unpack(hidden).device == torch.device("cuda:1")


@torch.no_grad()
def test_cache_holds_no_padding(projection_model, left_padded):
    padded, mask = left_padded
    _, cache = in_pieces(projection_model, padded, [20, 21], mask)
    assert cache.tokens.tolist() == [41, 30, 2]
    assert cache.get_seq_length() == 41
    assert (cache.slots[:, 2] <= 2).all()


@torch.no_grad()
def test_logits_to_keep_and_hidden_states(projection_model, left_padded):
    padded, mask = left_padded
    full = projection_model(padded, attention_mask=mask, output_hidden_states=True)
    last = projection_model(padded, attention_mask=mask, logits_to_keep=2)
    chosen = projection_model(padded, attention_mask=mask, logits_to_keep=torch.tensor([40]))
    torch.testing.assert_close(last.logits, full.logits[:, -2:], **CLOSE)
    torch.testing.assert_close(chosen.logits, full.logits[:, 40:], **CLOSE)
    assert [tuple(x.shape) for x in full.hidden_states] == [(3, 41, 64)] * 4
    torch.testing.assert_close(projection_model.lm_head(full.hidden_states[-1]), full.logits, **CLOSE)
    as_tuple = projection_model(padded, attention_mask=mask, return_dict=False, use_cache=False)
    torch.testing.assert_close(as_tuple[0], full.logits, **CLOSE)


def test_loss_and_gradients(projection_model, prompt, base_model):
    labels = prompt.clone()
    labels[:, :5] = -100
    loss = projection_model(prompt, labels=labels).loss
    with torch.no_grad():
        logits = projection_model(prompt).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    weight = projection_model.model.layers[0].self_attn.k_proj.weight
    gradient, weight.grad = weight.grad.clone(), None
    assert gradient.abs().max() > 0
    projection_model.gradient_checkpointing_enable()
    projection_model.train()
    try:
        projection_model(prompt, labels=labels).loss.backward()
    finally:
        projection_model.eval()
        projection_model.gradient_checkpointing_disable()
    torch.testing.assert_close(weight.grad, gradient)
    projection_model.zero_grad()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_a_cache_under_gradient_checkpointing(make_model, family, prompt):
    """As in a training loop's own evaluation: nothing is recorded, but the layers are set to be recomputed."""
    model = make_model({"decision_source": "projection"}, family)
    model.config.prefill_chunk_tokens = 8
    expected = model(prompt), model.generate(prompt, max_new_tokens=6, do_sample=False)
    model.gradient_checkpointing_enable()
    model.train()
    found = model(prompt)
    assert torch.equal(found.logits, expected[0].logits)
    assert found.past_key_values.nbytes == expected[0].past_key_values.nbytes > 0
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected[1])


@torch.no_grad()
def test_pieces_are_the_whole_to_the_last_digits_of_float64(make_model, prompt):
    model = make_model({"decision_source": "projection"}).double()
    logits, _ = in_pieces(model, prompt, [1] * 41)
    torch.testing.assert_close(logits, model(prompt, use_cache=False).logits, rtol=0, atol=1e-12)


def test_refusals(projection_model, prompt):
    with pytest.raises(ValueError, match="no gradients"):
        projection_model(prompt, use_cache=True)
    with torch.no_grad():
        refused = {
            "output_attentions": {"output_attentions": True},
            "attention_mask must have": {"attention_mask": torch.ones(3, 1, 41, 41)},
            r"attention_mask must have 3 rows and 41 columns, zero at padding, got \[1, 41\]": {
                "attention_mask": (torch.arange(41) > 0)[None]
            },
            "zero at padding, got dict": {"attention_mask": {"full_attention": None}},
            "position_ids must count": {"position_ids": torch.arange(41).remainder(20)[None]},
            "DMCCache, got DynamicCache": {"past_key_values": DynamicCache()},
            "either input_ids or inputs_embeds": {"inputs_embeds": torch.zeros(3, 41, 64)},
        }
        for message, arguments in refused.items():
            with pytest.raises(ValueError, match=message):
                projection_model(prompt, **arguments)
        with pytest.raises(ValueError, match="no new tokens"):
            projection_model(prompt[:, :0])
        cache = projection_model(prompt).past_key_values
        for positions in (None, torch.arange(41, 82).expand(2, 41)):
            with pytest.raises(ValueError, match="holds 3 sequences, got 2; give it as many with its batch_repeat"):
                projection_model(prompt[:2], past_key_values=cache, position_ids=positions)
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(-1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sliding_window": 128}, "sliding_window must be None"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"prefill_chunk_tokens": 0}, "prefill_chunk_tokens"),
        ({"dmc": {"window_size": 0}}, "window_size must be"),
        ({"dmc": {"colour": "red"}}, "unknown DMC setting colour"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_configuration_refuses(setting, message):
    with pytest.raises(ValueError, match=message):
        DMCLlamaConfig(**setting)


def test_patched_checkpoint_starts_at_zero(base_model: LlamaForCausalLM, tmp_path, prompt):
    """from_pretrained on a plain Llama's weights gives a projection of exactly 0, not a random one."""
    base_model.save_pretrained(tmp_path)
    config = DMCLlamaConfig(**base_model.config.to_diff_dict() | {"model_type": "dmc_llama"})
    model = DMCLlamaForCausalLM.from_pretrained(tmp_path, config=config)
    assert not any(
        parameter.any() for layer in model.model.layers for parameter in layer.self_attn.decision.parameters()
    )
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, base_model(prompt).logits, **CLOSE)
