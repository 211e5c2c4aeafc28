"""Counter-based noise against Random123's known answers, its integer oracle, and its promises about global indices."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dmc.ops.noise import logistic_noise, naive
from megatron_dmc.ops.noise.torch import philox

# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
PI = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (list(PI[:4]), list(PI[4:]), [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert naive.philox(counter, key) == expected
    c0, c1, c2, c3 = torch.tensor(counter)
    words = philox(c0, c1, c2, c3, key[0], key[1])
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize(
    ("seed", "samples", "layer", "heads", "positions"),
    [
        pytest.param(0, [0], 0, [0], [0], id="origin"),
        pytest.param(1234, [0, 1, 2], 3, [0, 1], list(range(13)), id="B3-T13-H2"),
        pytest.param(7, [2**32 - 1, 2**32, 2**40 + 5], 1, [0, 3], list(range(5)), id="samples-beyond-32-bits"),
        pytest.param(2**63 - 1, [9], 2, [1], list(range(6)), id="largest-seed"),
        pytest.param(2**32, [0], 0, [0], list(range(4)), id="seed-beyond-32-bits"),
        pytest.param(5, [3], 4, [1, 0, 7], [31, 2, 3, 64, 63, 2, 2**20], id="positions-in-any-order"),
        pytest.param(5, [3], 2**16 - 1, [2**16 - 1], [2**33 - 1], id="largest-layer-head-position"),
    ],
)
def test_tensor_form_equals_the_oracle(
    seed: int, samples: list[int], layer: int, heads: list[int], positions: list[int]
) -> None:
    arguments = (seed, torch.tensor(samples), layer, heads, torch.tensor(positions))
    fast, oracle = logistic_noise(*arguments), logistic_noise(*arguments, backend="naive")
    assert fast.dtype == torch.float32 and fast.shape == (len(samples), len(positions), len(heads))
    torch.testing.assert_close(fast, oracle, rtol=1e-6, atol=1e-6)


def _block(seed: int = 11, layer: int = 2) -> torch.Tensor:
    return logistic_noise(seed, torch.arange(100, 106), layer, range(8), torch.arange(40))


def test_a_global_index_has_one_number_in_every_layout() -> None:
    whole = _block()
    order = torch.tensor([4, 0, 5, 1])
    assert torch.equal(logistic_noise(11, 100 + order, 2, range(8), torch.arange(40)), whole[order])
    # A tensor-parallel rank's heads, by number and by tensor.
    assert torch.equal(logistic_noise(11, torch.arange(100, 106), 2, range(4, 8), torch.arange(40)), whole[..., 4:])
    heads = torch.tensor([6, 1])
    assert torch.equal(logistic_noise(11, torch.arange(100, 106), 2, heads, torch.arange(40)), whole[..., heads])
    # A chunk that starts inside a block of four, and a context-parallel rank's two zigzag chunks.
    for positions in (torch.arange(7, 22), torch.cat([torch.arange(0, 10), torch.arange(30, 40)])):
        assert torch.equal(logistic_noise(11, torch.arange(100, 106), 2, range(8), positions), whole[:, positions])


def test_neighbouring_indices_share_no_number() -> None:
    """Seed, sample, layer, head and position all count: of all the noise around an index no two numbers agree."""
    near = torch.stack([_block(seed, layer) for seed in (11, 12, 11 + 2**32) for layer in (2, 3)])
    # 23 random bits: some 11 000 numbers meet by chance about 8 times, a forgotten index hundreds of times.
    assert near.unique().numel() > near.numel() - 40
    high = logistic_noise(11, torch.arange(100, 106) + 2**32, 2, range(8), torch.arange(40))
    assert not torch.any(high == _block())


def test_distribution_is_standard_logistic() -> None:
    noise = logistic_noise(3, torch.arange(64), 0, range(8), torch.arange(256)).double().flatten()
    error = 1 / math.sqrt(noise.numel())
    assert abs(noise.mean()) < 5 * math.pi / math.sqrt(3) * error
    assert abs(noise.std() - math.pi / math.sqrt(3)) < 10 * error
    # Kolmogorov-Smirnov: sup |F_n - F| exceeds 2 / sqrt(n) with probability 7e-4.
    uniform = torch.sigmoid(noise).sort().values
    assert (uniform - torch.linspace(0, 1, noise.numel(), dtype=torch.float64)).abs().max() < 2 * error
    # The chance that token t merges is sigmoid(a).
    assert abs((noise - 1.0 > 0).double().mean() - torch.sigmoid(torch.tensor(-1.0))) < 3 * error
    assert noise.isfinite().all() and noise.abs().max() < 16.7


def test_neighbours_are_not_correlated() -> None:
    noise = logistic_noise(8, torch.arange(32), 5, range(8), torch.arange(256)).double()
    noise = noise / noise.std()
    for dim in range(3):
        neighbours = noise.narrow(dim, 0, noise.shape[dim] - 1) * noise.narrow(dim, 1, noise.shape[dim] - 1)
        assert abs(neighbours.mean()) < 5 / math.sqrt(neighbours.numel())


class _Constants(TorchFunctionMode):
    """Notes tensors that are built from Python numbers for another device than the host."""

    def __init__(self) -> None:
        super().__init__()
        self.built: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = torch.device((kwargs or {}).get("device") or "cpu")
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor) and device.type != "cpu":
            self.built.append(f"{args[0]} on {device}")
        return function(*args, **(kwargs or {}))


class _Copies(TorchDispatchMode):
    """Notes copies from the host to another device: the shape, and whether the host waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        source = args[0] if args else None
        if isinstance(source, Tensor) and source.is_cpu and isinstance(result, Tensor) and not result.is_cpu:
            self.seen.append((tuple(source.shape), not (kwargs or {}).get("non_blocking", False)))
        return result


@pytest.mark.parametrize("heads", [range(2, 7), range(1), [3, 1], torch.tensor([3, 1])], ids=str)
def test_no_host_waits_for_a_device(heads: Any) -> None:
    """As in a layer on a GPU: samples on the device, positions on the host. Every machine has the device ``meta``."""
    samples = torch.empty(2, dtype=torch.int64, device="meta")
    with _Constants() as constants, _Copies() as copies:
        noise = logistic_noise(7, samples, 3, heads, torch.arange(13))
    assert noise.is_meta and noise.shape == (2, 13, len(heads))
    assert constants.built == []
    # The positions, split into blocks of four, and heads that are no range: all are inputs.
    inputs = [(13,), (4,)] if isinstance(heads, range) else [(13,), (4,), (2,)]
    assert sorted(copies.seen) == sorted((shape, False) for shape in inputs)
