"""The compressed cache against its oracle, however the tokens are cut into calls."""

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dmc.ops.attention import windowed_dmc_attention
from megatron_dmc.ops.decisions import hard_merge_logits
from megatron_dmc.ops.decode import LayerCache
from megatron_dmc.ops.decode.cells import Cells
from megatron_dmc.ops.decode.state import tensors
from megatron_dmc.ops.decode.torch import has_wide_products
from megatron_dmc.ops.states import attention_states
from megatron_dmc.ops.tokens import Tokens as KeysAndValues
from tests.support.decoding import KINDS, Kind, another, by_kind, oracle, rotation, through_cache
from tests.support.decoding import Stream as Tokens
from tests.support.oracle import Draw, Shape, draw_attention


def make_tokens(shape: Shape, merge: float = 0.6, dtype: torch.dtype = torch.float64) -> Tokens:
    drawn = draw_attention(shape, dtype=dtype, seed=shape.seq + shape.heads)
    draw, size = Draw(shape.seq), (shape.batch, shape.seq, shape.kv_heads)
    # Heads merge at different rates, so that their lengths part.
    rate = merge * torch.linspace(0.87, 1.13, shape.kv_heads)
    return Tokens(drawn["query"], drawn["key"], drawn["value"], draw.uniform(*size) < rate, draw.omega(shape).to(dtype))


@functools.cache
def tokens_and_oracle(shape: Shape, kind: Kind) -> tuple[Tokens, Tensor, Tensor]:
    tokens = make_tokens(shape, merge=0.6 if kind.window_size is None else 0.85)  # slots longer than what is summed
    return tokens, *oracle(tokens, kind)


SHAPES = [Shape(1, 37, 2, 2, 8), Shape(2, 63, 4, 2, 8), Shape(2, 70, 6, 1, 16)]
CUTS = {
    "prefill": lambda seq: [seq],
    "steps": lambda seq: [1] * seq,
    "chunks": lambda seq: [3, 17, 1, 1, 8, seq - 30],
    "prefill-then-steps": lambda seq: [seq - 5, 1, 1, 1, 1, 1],
}


class Form(NamedTuple):
    """What a cache runs on, in which dtype, and how near it comes to the oracle."""

    backend: str
    dtype: torch.dtype
    tolerance: float

    def cast(self, tokens: Tokens) -> Tokens:
        return Tokens(*(x.to(self.dtype) if x.is_floating_point() else x for x in tokens))

    def assert_close(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=self.tolerance)


FORMS = {"torch": Form("torch", torch.float64, 1e-10), "cpp": Form("cpp", torch.float32, 1e-5)}
of_each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@of_each_form
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@by_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_oracle(shape, kind, cuts, form):
    tokens, expected, counts = tokens_and_oracle(shape, kind)
    cache = LayerCache(*kind, backend=form.backend)
    out = through_cache(form.cast(tokens), cuts(shape.seq), cache)
    form.assert_close(out, expected)
    assert torch.equal(cache.slots, counts)


@by_kind
@pytest.mark.parametrize(
    "shape", [Shape(1, 230, 6, 2, 64), Shape(2, 170, 3, 1, 128), Shape(1, 150, 5, 1, 100)], ids=str
)
def test_compiled_code_at_larger_sizes(shape, kind):
    """More than one part of a chunk's queries, of its keys, and of a list; heads for which there is code of its own."""
    form = FORMS["cpp"]
    tokens, expected, counts = tokens_and_oracle(shape, kind)
    cache = LayerCache(*kind, backend="cpp", page_size=8)
    cuts = [shape.seq - 80, 1, 1, 70, *[1] * 8]
    form.assert_close(through_cache(form.cast(tokens), cuts, cache), expected)
    assert torch.equal(cache.slots, counts)


@of_each_form
@by_kind
@pytest.mark.parametrize("alpha", [False, True], ids=["alpha0", "alpha1"])
def test_corners(alpha, kind, form):
    tokens = make_tokens(Shape(2, 40, 4, 2, 8))
    tokens = tokens._replace(alpha=torch.full_like(tokens.alpha, alpha))
    expected, counts = oracle(tokens, kind)
    for cuts in ([40], [20, 20], [1] * 40):
        cache = LayerCache(*kind, backend=form.backend)
        form.assert_close(through_cache(form.cast(tokens), cuts, cache), expected)
        assert torch.equal(cache.slots, counts)


@of_each_form
@by_kind
@pytest.mark.parametrize("cuts", [[40], [20, 20], [1] * 40], ids=["prefill", "chunks", "steps"])
def test_a_sequence_that_is_not_finite_harms_no_other(cuts, kind, form):
    """Their slots lie side by side, all of them write what nobody reads to one slot, and shorter lists are filled up."""
    given = make_tokens(Shape(3, 40, 4, 2, 8))
    given.alpha[0] = False  # its list is the longest
    for bad, others in ((0, [1, 2]), (1, [0, 2])):
        tokens = form.cast(given)
        expected = through_cache(tokens, cuts, LayerCache(*kind, page_size=4, backend=form.backend))
        tokens = Tokens(*(x.clone() for x in tokens))
        for x in (tokens.query, tokens.key, tokens.value, tokens.omega):
            x[bad, 7:] = float("nan")
        out = through_cache(tokens, cuts, LayerCache(*kind, page_size=4, backend=form.backend))
        assert out[bad, -1].isnan().any()
        torch.testing.assert_close(out[others], expected[others], rtol=0, atol=0)


@of_each_form
@by_kind
def test_a_prompt_after_a_step_for_which_one_sequence_had_room_ahead(kind, form):
    """The other one's reserved slots, and the slot that it would open, are nowhere yet."""
    tokens = make_tokens(Shape(2, 60, 4, 2, 8))
    cache, outputs = LayerCache(*kind._replace(local_window=kind.local_window and 16), backend=form.backend), []
    before, lengths = torch.tensor([0, 0]), torch.tensor([2, 12])
    for start, stop in ((0, 12), (12, 13), (13, 60)):
        positions = before[:, None] + torch.arange(stop - start)
        cos, sin = rotation(positions, 8, form.dtype)
        given = lengths if start == 0 else None
        outputs.append(cache.attend(*form.cast(tokens.cut(start, stop)), cos, sin, lengths=given))
        before = before + (lengths if start == 0 else stop - start)
    for row, length in enumerate(lengths.tolist()):
        alone = Tokens(*(torch.cat([x[row : row + 1, :length], x[row : row + 1, 12:]], dim=1) for x in tokens))
        expected, _ = oracle(alone, kind._replace(local_window=kind.local_window and 16))
        found = torch.cat([outputs[0][row, :length], *(x[row] for x in outputs[1:])])
        form.assert_close(found, expected[0])


@by_kind
@pytest.mark.parametrize("clears", [False, True], ids=["all-channels", "last-cleared"])
def test_training_form_is_the_cache(clears, kind):
    """Pooling and attention as in training, with binary alpha, in float32."""
    tokens = make_tokens(Shape(2, 65, 4, 2, 16), dtype=torch.float32)
    if clears:
        for x in (tokens.query, tokens.key):
            x[..., -1] = 0
    cos, sin = rotation(torch.arange(65)[None], 16, torch.float32)
    alpha = tokens.alpha.float()
    given = KeysAndValues(tokens.key, tokens.value, alpha, tokens.omega, cos, sin)
    states = attention_states(tokens.query, given, **kind._asdict(), clear_last_channel=clears)
    when = {"local_window": kind.local_window, "operation": kind.operation}
    expected = windowed_dmc_attention(
        *states,
        hard_merge_logits(alpha),
        omega=tokens.omega if kind.operation == "absorb" else None,
        bias_channel=-1 if clears else None,
        **when,
    )
    for cuts in ([65], [20, 40, 5], [1] * 65):
        out = through_cache(tokens, cuts, LayerCache(*kind, clears_last_channel=clears))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    if clears:
        # The rotation fills the channel again.
        assert not torch.allclose(through_cache(tokens, [65], LayerCache(*kind)), expected, atol=1e-3)


@by_kind
def test_autocast_changes_nothing(kind):
    tokens, cuts = make_tokens(Shape(2, 40, 4, 2, 8), dtype=torch.float32), [20, *[1] * 20]
    expected = through_cache(tokens, cuts, LayerCache(*kind))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(through_cache(tokens, cuts, LayerCache(*kind)), expected)


@of_each_form
@by_kind
def test_padding_of_ragged_chunks_is_ignored(kind, form):
    """Rows of different lengths, in chunks that hold none, some or all of a row, are what each row is by itself."""
    batch, seq = 3, 24
    tokens = form.cast(make_tokens(Shape(batch, 3 * seq, 4, 2, 8), merge=0.85))
    lengths = torch.tensor([[23, 5, 0], [7, 22, 3], [1, 0, 1]])  # of the chunks
    for row, counts in enumerate(lengths.T):  # chunks begin and end with slots that close
        for start in counts.cumsum(0).tolist():
            tokens.alpha[row, start, 0] = False
    cache = LayerCache(*kind, backend=form.backend)
    taken = torch.zeros(batch, dtype=torch.long)
    rows = torch.arange(batch)[:, None]
    outputs: list[list[Tensor]] = [[] for _ in range(batch)]
    for length in [*lengths, *[None] * 6]:
        size = 1 if length is None else seq
        positions = taken[:, None] + torch.arange(size)
        part = Tokens(*(x[rows, positions] for x in tokens))
        if length is not None:  # what comes after a row's tokens is padding
            garbage = torch.arange(size) >= length[:, None]
            part.key[garbage], part.value[garbage], part.alpha[garbage] = 1e4, -1e4, False
        out = cache.attend(*part, *rotation(positions, 8, form.dtype), lengths=length)
        length = torch.ones_like(taken) if length is None else length
        taken = taken + length
        for b in range(batch):
            outputs[b].append(out[b, : length[b]])
    assert torch.equal(cache.tokens, taken)
    for b in range(batch):
        expected, counts = oracle(Tokens(*(x[b : b + 1, : taken[b]] for x in tokens)), kind)
        form.assert_close(torch.cat(outputs[b])[None], expected)
        assert torch.equal(cache.slots[b : b + 1], counts)


@of_each_form
@by_kind
def test_select_reorders_repeats_and_drops(kind, form):
    tokens = form.cast(make_tokens(Shape(3, 50, 4, 2, 8)))
    cache = LayerCache(*kind, backend=form.backend)
    through_cache(tokens.cut(0, 30), [20, 10], cache)
    for sequences in ([2, 0, 0, 1], [3, 2, 0]):
        cache.select(torch.tensor(sequences))
        tokens = Tokens(*(x[sequences] for x in tokens))
    out = through_cache(tokens.cut(30, 50), [1] * 5 + [10] + [1] * 5, cache)
    expected, counts = oracle(tokens, kind)
    form.assert_close(out, expected[:, 30:])
    assert torch.equal(cache.slots, counts)


@pytest.mark.parametrize(
    "chosen",
    [torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.uint8), torch.ones(3), torch.ones(1, 3).long()],
    ids=str,
)
def test_what_are_no_numbers_of_sequences_is_refused(chosen):
    tokens = make_tokens(Shape(3, 12, 4, 2, 8))
    cache = LayerCache(4)
    through_cache(tokens.cut(0, 10), [10], cache)
    with pytest.raises(ValueError, match="sequences are chosen by their numbers"):
        cache.select(chosen)
    expected = through_cache(tokens, [12], LayerCache(4))[:, 10:]
    torch.testing.assert_close(through_cache(tokens.cut(10, 12), [2], cache), expected, rtol=0, atol=1e-10)


def test_wide_products_are_asked_of_cuda_only(monkeypatch):
    assert not has_wide_products(torch.device("cpu")) and not has_wide_products(torch.device("mps"))
    assert has_wide_products(torch.device("cuda"))
    monkeypatch.setattr(type(torch.ops.aten.bmm), "overloads", lambda self: ["default", "out"])  # torch 2.7's
    assert not has_wide_products(torch.device("cuda"))


@pytest.mark.parametrize("cuts", [[2048], [2000] + [1] * 48, [512] * 4], ids=["prefill", "prefill+steps", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["exact", "merge-w16", "evict-w16", "absorb-w16"])
def test_bytes_follow_the_sum_of_lengths(kind, dtype, cuts):
    tokens = make_tokens(Shape(1, 2048, 2, 2, 64), merge=0.75, dtype=dtype)
    cache = LayerCache(*KINDS[kind])
    through_cache(tokens, cuts, cache)
    slots = cache.slots
    assert 3 < 2048 * 2 / int(slots.sum()) < 5
    assert slots.max() > 1.3 * slots.min()  # a dense tensor would pay for the longest head
    half_a_page = cache.layout.page_size / 2 * slots.numel()
    assert cache.nbytes <= (1.05 * int(slots.sum()) + half_a_page) * 2 * 64 * dtype.itemsize


class Operations(TorchDispatchMode):
    """Notes what is run, but for views and empty tensors."""

    FREE = (
        "view",
        "select",
        "slice",
        "transpose",
        "expand",
        "unsqueeze",
        "alias",
        "empty",
        "permute",
        "detach",
        "split",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0].removeprefix("_unsafe_").removeprefix("new_")
        if name not in (*self.FREE, "promote_types"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def one_step(caches: Sequence[LayerCache], tokens: Tokens, at: int) -> Operations:
    """The operations of the last cache's step; each is given the same token."""
    cos, sin = rotation(torch.full((2, 1), at), 16, tokens.key.dtype)
    for cache in caches:
        with Operations() as operations:
            cache.attend(*tokens.cut(at, at + 1), cos, sin)
    return operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@by_kind
def test_a_step_is_few_operations_on_fixed_tensors(kind, dtype):
    """What a CUDA graph needs: nothing is read back, and no tensor of the cache is another one after a step."""
    tokens = make_tokens(Shape(2, 70, 4, 2, 16), dtype=dtype)
    shared: dict = {}
    caches = [LayerCache(*kind, shared=shared, backend="torch") for _ in range(2)]
    for cache in caches:
        through_cache(tokens.cut(0, 30), [30], cache)
        cache.reserve(40)
    before = {name: (x.data_ptr(), x.shape) for name, x in everything(caches[1])}
    for at in range(30, 70):
        names = one_step(caches, tokens, at).names
        assert not {"_local_scalar_dense", "nonzero", "item", "is_nonzero"} & set(names)
        # In low precision the authors' truncated mean converts the tokens that it reads again.
        most = 36 if kind.window_size and dtype == torch.bfloat16 else 30
        assert len(names) <= most, names
    assert before == {name: (x.data_ptr(), x.shape) for name, x in everything(caches[1])}


def everything(cache: LayerCache) -> list[tuple[str, Tensor]]:
    return [(f"{type(holder).__name__}.{name}", x) for holder in cache.holders() for name, x in tensors(holder).items()]


@by_kind
def test_layers_share_what_they_know_of_the_sequences(kind):
    tokens = make_tokens(Shape(2, 60, 4, 2, 8))
    other = Tokens(*(x.flip(1) for x in tokens))
    cuts, shared = [20, 1, 1, 17, 1, 1, 1, 1, 17], {}
    caches = [LayerCache(*kind, shared=shared) for _ in range(2)]
    outputs: list[list[Tensor]] = [[], []]
    start = 0
    for size in cuts:
        for cache, of_layer, out in zip(caches, (tokens, other), outputs, strict=True):
            positions = torch.arange(start, start + size).expand(2, -1)
            out.append(cache.attend(*of_layer.cut(start, start + size), *rotation(positions, 8)))
        start += size
    for of_layer, out in zip((tokens, other), outputs, strict=True):
        expected = through_cache(of_layer, [60], LayerCache(*kind))
        torch.testing.assert_close(torch.cat(out, dim=1), expected, rtol=0, atol=1e-10)


def test_a_call_that_did_not_reach_all_layers_is_noticed():
    tokens, shared = make_tokens(Shape(1, 9, 2, 2, 8)), {}
    first, second = (LayerCache(shared=shared) for _ in range(2))
    for cache in (first, second, first):
        through_cache(tokens.cut(0, 3), [3], cache)
    through_cache(tokens.cut(3, 6), [3], first)
    with pytest.raises(ValueError, match="did not reach all layers"):
        through_cache(tokens.cut(3, 6), [3], second)


@pytest.mark.parametrize("size", [1, 5], ids=["step", "chunk"])
def test_a_call_that_raised_in_the_middle_is_noticed(size, monkeypatch):
    tokens = make_tokens(Shape(2, 40, 4, 2, 8))
    cache = LayerCache(4)
    through_cache(tokens.cut(0, 30), [30], cache)
    with monkeypatch.context() as patch:

        def fails(*args: Any, **kwargs: Any) -> None:
            raise MemoryError

        patch.setattr(Cells, "write", fails)
        with pytest.raises(MemoryError):
            through_cache(tokens.cut(30, 30 + size), [size], cache)
    for use in (cache, copy.deepcopy(cache), copy.deepcopy(cache).to("cpu")):
        with pytest.raises(ValueError, match="reset it"):
            through_cache(tokens.cut(30, 31), [1], use)
        with pytest.raises(ValueError, match="reset it"):
            use.state_dict()
    cache.reset()
    torch.testing.assert_close(through_cache(tokens, [40], cache), through_cache(tokens, [40], LayerCache(4)))


@pytest.mark.parametrize("size", [1, 5], ids=["step", "chunk"])
def test_another_dtype_is_refused_and_changes_nothing(size):
    tokens = make_tokens(Shape(2, 40, 4, 2, 8))
    narrow = Tokens(*(x.float() if x.is_floating_point() else x for x in tokens))
    cache = LayerCache(4)
    through_cache(tokens.cut(0, 30), [30], cache)
    with pytest.raises(ValueError, match=r"the cache holds torch.float64 on cpu, got torch.float32 on cpu"):
        through_cache(narrow.cut(30, 30 + size), [size], cache)
    expected = through_cache(tokens, [40], LayerCache(4))[:, 30:]
    torch.testing.assert_close(through_cache(tokens.cut(30, 40), [10], cache), expected)


@pytest.mark.parametrize("operation", ["evict", "absorb"])
def test_evicting_without_a_window_is_refused(operation):
    with pytest.raises(ValueError, match=f"operation {operation} needs local_window >= 1"):
        LayerCache(0, operation)


@pytest.mark.parametrize("way", ["deepcopy", "saved", "moved"])
@by_kind
def test_a_cache_can_be_copied_saved_and_moved(kind, way, tmp_path):
    tokens = make_tokens(Shape(2, 60, 4, 2, 8))
    cache = LayerCache(*kind)
    through_cache(tokens.cut(0, 37), [30, 1, 1, 1, 4], cache)
    other = another(cache, way, LayerCache(*kind), tmp_path)
    rest, cuts = tokens.cut(37, 60), [1, 1, 11, 1, 9]
    expected = through_cache(tokens, [60], LayerCache(*kind))[:, 37:]
    # Neither has a part of the other.
    for each in (other, cache):
        torch.testing.assert_close(through_cache(rest, cuts, each), expected, rtol=0, atol=1e-10)


@by_kind
def test_one_state_makes_many_caches(kind):
    """And none of them has a part of another, or of the one that was saved."""
    tokens = make_tokens(Shape(2, 60, 4, 2, 8))
    cache = LayerCache(*kind)
    through_cache(tokens.cut(0, 40), [40], cache)
    others = [LayerCache(*kind) for _ in range(2)]
    for other in others:
        other.load_state_dict(cache.state_dict())
    expected = through_cache(tokens, [60], LayerCache(*kind))[:, 40:]
    pieces = [
        [each.attend(*tokens.cut(at, at + 1), *rotation(torch.tensor([[at]]), 8)) for each in (cache, *others)]
        for at in range(40, 60)
    ]
    for out in zip(*pieces, strict=True):
        torch.testing.assert_close(torch.cat(out, dim=1), expected, rtol=0, atol=1e-10)


def test_states_of_different_calls_are_no_model():
    tokens, shared = make_tokens(Shape(2, 40, 4, 2, 8)), {}
    first, second = LayerCache(4), LayerCache(4)
    through_cache(tokens.cut(0, 30), [30], first)
    through_cache(tokens.cut(0, 20), [20], second)
    LayerCache(4, shared=shared).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="have seen different tokens"):
        LayerCache(4, shared=shared).load_state_dict(second.state_dict())


def test_an_empty_cache_can_be_saved():
    cache = LayerCache(4, "evict")
    cache.load_state_dict(LayerCache(4, "evict").state_dict())
    assert cache.nbytes == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("cells"),
        lambda state: state["cells"].pop("table"),
        lambda state: state["cells"]["table"].add_(1000),
        lambda state: state["cells"]["table"].sub_(1),
        lambda state: state["cells"]["taken"].add_(50),
        lambda state: state["rows"]["kept"].add_(5000),
        lambda state: state["rows"].update(kept=state["rows"]["kept"][:1]),
        lambda state: state["rows"].update(kept=state["rows"]["kept"].float()),
        lambda state: state["cells"].update(slots=state["cells"]["slots"][:3]),
        lambda state: state["cells"].update(slots=state["cells"]["slots"][:, :3]),
        lambda state: state.update(kv_heads="two"),
        lambda state: state.update(kv_heads=-1),
        lambda state: state["sequences"].pop("tokens"),
        lambda state: state["sequences"].update(angles=state["sequences"]["tokens"]),
        lambda state: state["sequences"].update(angles=None),
        lambda state: state["sequences"]["tokens"].fill_(-7),
        lambda state: state["sequences"]["tokens"].fill_(0),
        lambda state: state["cells"]["table"].fill_(0),
        lambda state: state["cells"]["table"].copy_(state["cells"]["table"].flip(0)),
        lambda state: state["cells"]["taken"].fill_(0),
        lambda state: state["cells"].update(taken=state["cells"]["taken"].to_sparse()),
        lambda state: state["rows"]["kept"].fill_(0),
        lambda state: state["rows"].update(sums=state["rows"]["sums"][:, :3]),
        lambda state: state["rows"].update(decisions=state["rows"]["decisions"][:, :0]),
    ],
)
def test_a_damaged_state_is_refused(damage):
    tokens = make_tokens(Shape(2, 40, 4, 2, 8))
    cache = LayerCache(4)
    through_cache(tokens, [40], cache)
    state = cache.state_dict()
    damage(state)
    with pytest.raises(ValueError, match="damaged"):
        LayerCache(4).load_state_dict(state)


@pytest.mark.parametrize("state", [None, [], 7, "state"], ids=repr)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="no saved cache"):
        LayerCache(4).load_state_dict(state)


def test_a_state_of_another_layout_is_refused():
    with pytest.raises(ValueError, match="another layout"):
        LayerCache(4).load_state_dict(LayerCache(5).state_dict())


@by_kind
def test_dropped_sequences_and_reset_free_their_bytes(kind):
    tokens = make_tokens(Shape(4, 400, 2, 2, 16))
    cache = LayerCache(*kind)
    through_cache(tokens, [300] + [1] * 100, cache)
    before = cache.nbytes
    cache.select(torch.tensor([2]))
    assert cache.nbytes < 0.3 * before
    cache.reset()
    assert cache.nbytes == 0
    torch.testing.assert_close(through_cache(tokens, [400], cache), through_cache(tokens, [400], LayerCache(*kind)))


@by_kind
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad], ids=["inference-first", "inference-later"])
def test_inference_mode_may_be_entered_and_left(kind, first):
    tokens = make_tokens(Shape(2, 70, 4, 2, 8))
    second = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    cache, outputs, start = LayerCache(*kind), [], 0
    for mode, cuts in ((first, [30]), (second, [1, 1]), (first, [17, 1]), (second, [20])):
        with mode():
            outputs.append(through_cache(tokens.cut(start, start + sum(cuts)), cuts, cache).clone())
        start += sum(cuts)
    expected = through_cache(tokens, [30, 1, 1, 17, 1, 20], LayerCache(*kind))
    assert torch.equal(torch.cat(outputs, dim=1), expected)


@by_kind
def test_room_may_be_made_outside_inference_mode(kind):
    tokens = make_tokens(Shape(2, 40, 4, 2, 8))
    cache = LayerCache(*kind)
    with torch.inference_mode():
        out = [through_cache(tokens.cut(0, 31), [30, 1], cache).clone()]
    cache.reserve(9)
    with torch.inference_mode():
        out.append(through_cache(tokens.cut(31, 40), [1] * 9, cache).clone())
    expected = through_cache(tokens, [40], LayerCache(*kind))
    torch.testing.assert_close(torch.cat(out, dim=1), expected, rtol=0, atol=1e-10)


@by_kind
def test_bf16_cuts_agree(kind):
    tokens = make_tokens(Shape(1, 120, 4, 2, 64), dtype=torch.bfloat16)
    whole = through_cache(tokens, [120], LayerCache(*kind))
    steps = through_cache(tokens, [60] + [1] * 60, LayerCache(*kind))
    assert whole.dtype == steps.dtype == torch.bfloat16
    torch.testing.assert_close(steps.float(), whole.float(), rtol=0, atol=3e-2)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize(
    ("part", "change", "line"),
    [
        ("query", lambda x: x[:, :, :3], "query must be [2, 4, heads, 8] with a multiple of 2 heads, got [2, 4, 3, 8]"),
        ("query", lambda x: x[:, 1:], "query must be [2, 4, heads, 8]"),
        ("query", lambda x: x[..., :4], "query must be [2, 4, heads, 8]"),
        ("key", lambda x: x[0], "key must be [batch, seq, kv_heads, head_dim], got [4, 2, 8]"),
        ("value", lambda x: x[..., :4], "value must be [2, 4, 2, 8], got [2, 4, 2, 4]"),
        ("alpha", lambda x: x[:, :, :1], "alpha must be [2, 4, 2], got [2, 4, 1]"),
        ("alpha", lambda x: x.byte(), "alpha must be bool in the cache, got torch.uint8"),
        ("omega", lambda x: x[:1], "omega must be [2, 4, 2], got [1, 4, 2]"),
        ("cos", lambda x: x[:, 1:], "cos must be [1, 4, 1, 8], got [1, 3, 1, 8]"),
        ("sin", lambda x: x.squeeze(2), "sin must be [1, 4, 1, 8], got [1, 4, 8]"),
        ("omega", lambda x: x.to("meta"), "all tensors must be on one device"),
        (
            "lengths",
            lambda _: torch.tensor([4, 5]),
            "lengths must be within 0 and the 4 tokens of the call, got [4, 5]",
        ),
        (
            "lengths",
            lambda _: torch.tensor([4, -1]),
            "lengths must be within 0 and the 4 tokens of the call, got [4, -1]",
        ),
        ("lengths", lambda _: torch.tensor([4]), "lengths must be int64 [2], got torch.int64 [1]"),
        ("lengths", lambda _: torch.tensor([4.0, 3.0]), "lengths must be int64 [2], got torch.float32 [2]"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,  # a function's text is its address
)
def test_what_does_not_fit_together_is_refused_and_changes_nothing(part, change, line, backend):
    tokens = FORMS["cpp"].cast(make_tokens(Shape(2, 12, 4, 2, 8)))
    cache = LayerCache(4, backend=backend)
    through_cache(tokens.cut(0, 8), [8], cache)
    given = tokens.cut(8, 12)._asdict()
    given |= dict(zip(("cos", "sin"), rotation(torch.arange(8, 12)[None], 8, torch.float32), strict=True))
    with pytest.raises(ValueError, match=re.escape(line)):
        cache.attend(**{**given, "lengths": None, part: change(given.get(part))})
    expected = through_cache(tokens, [12], LayerCache(4, backend="torch"))[:, 8:]
    torch.testing.assert_close(cache.attend(**given), expected, rtol=0, atol=1e-5)


@of_each_form
@pytest.mark.parametrize(
    "lengths",
    [torch.tensor([3, 3], dtype=torch.int32), torch.tensor([3]).expand(2), torch.tensor([3, 0, 3, 0])[::2]],
    ids=str,
)
def test_lengths_may_lie_in_memory_as_they_like(lengths, form):
    tokens = form.cast(make_tokens(Shape(2, 12, 4, 2, 8)))
    expected = through_cache(tokens, [12], LayerCache(4, backend="torch"))
    cache = LayerCache(4, backend=form.backend)
    through_cache(tokens.cut(0, 8), [8], cache)
    at = rotation(torch.arange(8, 12)[None], 8, form.dtype)
    out = cache.attend(*tokens.cut(8, 12), *at, lengths=lengths)
    torch.testing.assert_close(out[:, :3], expected[:, 8:11], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cuts", [[12], [1] * 12], ids=["chunk", "steps"])
def test_compiled_code_sees_a_tensors_numbers(cuts):
    """Negated when they are read, strided, of another dtype; the result has the query's."""
    tokens = FORMS["cpp"].cast(make_tokens(Shape(2, 12, 4, 2, 8)))
    expected = through_cache(tokens, cuts, LayerCache(4, backend="torch"))
    swapped = Tokens(*(x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x for x in tokens))
    given = swapped._replace(key=torch._neg_view(-tokens.key), query=tokens.query.double(), omega=tokens.omega.double())
    assert given.key.is_neg()
    out = through_cache(given, cuts, LayerCache(4, backend="cpp"))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected.double(), rtol=0, atol=1e-5)


@of_each_form
def test_a_later_token_weighs_nothing_however_large_it_is(form):
    tokens = form.cast(make_tokens(Shape(1, 40, 4, 2, 8)))
    tokens.value[:, 30:] = 1e30
    cut = through_cache(tokens.cut(0, 30), [30], LayerCache(4, backend=form.backend))
    whole = through_cache(tokens, [40], LayerCache(4, backend=form.backend))[:, :30]
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-5)


@by_kind
def test_rotations_may_be_wider_than_keys(kind):
    tokens = make_tokens(Shape(2, 60, 4, 2, 8), dtype=torch.bfloat16)
    cache, other = LayerCache(*kind), LayerCache(*kind)
    cache.attend(*tokens.cut(0, 40), *rotation(torch.arange(40)[None], 8, torch.float32))
    other.load_state_dict(cache.state_dict())
    at = rotation(torch.arange(40, 60)[None], 8, torch.float32)
    assert torch.equal(other.attend(*tokens.cut(40, 60), *at), cache.attend(*tokens.cut(40, 60), *at))


def test_clear_errors():
    tokens = make_tokens(Shape(2, 4, 2, 2, 8))
    cache = LayerCache()
    through_cache(tokens, [4], cache)
    with pytest.raises(ValueError, match="holds 2 sequences, got 1"):
        cache.attend(*(x[:1] for x in tokens), *rotation(torch.arange(4)[None], 8))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="at least one token"):
        cache.attend(*tokens.cut(4, 4), *rotation(torch.zeros(2, 0), 8))
    narrow = Tokens(*(x[:, :, :1] for x in tokens))
    with pytest.raises(ValueError, match=r"another model's: it holds \[KV heads, head_dim\] \[2, 8\], got \[1, 8\]"):
        cache.attend(*narrow, *rotation(torch.arange(4)[None], 8))
    for x in (tokens.query, tokens.omega):
        x.requires_grad_()
        with pytest.raises(ValueError, match="no gradients"):
            cache.attend(*tokens, *rotation(torch.arange(4)[None], 8))
        x.requires_grad_(False)


@of_each_form
@by_kind
def test_room_may_be_made_while_another_layer_is_ahead(kind, form):
    tokens, shared, outputs = form.cast(make_tokens(Shape(2, 40, 4, 2, 8))), {}, []
    first, second = (LayerCache(*kind, backend=form.backend, shared=shared) for _ in range(2))
    expected = through_cache(tokens, [1] * 40, LayerCache(*kind, backend=form.backend))
    for at in range(40):
        turn = rotation(torch.full((2, 1), at), 8, form.dtype)
        first.attend(*tokens.cut(at, at + 1), *turn)
        if at in (4, 20):
            second.reserve(9)
        outputs.append(second.attend(*tokens.cut(at, at + 1), *turn))
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-5)


@of_each_form
@pytest.mark.parametrize("tokens", [0, -1, -(2**62), 2**25, 2**62, 3.0, None])
def test_room_that_cannot_be_made_leaves_the_cache_as_it_was(tokens, form):
    given, kind = form.cast(make_tokens(Shape(2, 40, 4, 2, 8))), KINDS["merge-w5-truncated12"]
    cache = LayerCache(*kind, backend=form.backend)
    outputs = [through_cache(given.cut(0, 20), [20], cache)]
    with pytest.raises(ValueError, match="room is made for"):
        cache.reserve(tokens)
    for at in range(20, 40):
        outputs.append(cache.attend(*given.cut(at, at + 1), *rotation(torch.full((2, 1), at), 8, form.dtype)))
    expected = through_cache(given, [40], LayerCache(*kind, backend=form.backend))
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-5)
