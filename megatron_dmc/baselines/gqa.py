"""Fewer KV heads, each the mean of several: where uptraining to grouped queries begins (Ainslie et al. 2023)."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_dmc.checkpoint import copy_tokenizer
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.folders import check_companions, check_output, new_folder, write_json
from megatron_dmc.convert.hf_config import read_config, read_json
from megatron_dmc.convert.mapping import hugging_face_shapes
from megatron_dmc.convert.progress import Written, progress
from megatron_dmc.convert.rows import Shape
from megatron_dmc.convert.weights import Weights, write_weights

_SHARD = 5_000_000_000  # bytes


def group_heads(folder: str | Path, output: str | Path, kv_heads: int) -> Written:
    """Writes a plain model anew, in which neighbouring KV heads have become their mean (section 2.1 of the paper).

    Query heads keep their order: of ``heads``, head h attends to the new KV head h // (heads / kv_heads), into which its old
    one has gone. What is not a KV head's stays as it is, as do config.json but for num_key_value_heads, and the tokenizer.
    Weights pass one after the other, so the largest needs memory twice; a key or value projection in float64.

    Args:
        folder: a plain model's Hugging Face folder.
        output: must not exist, or be empty. It appears when it is whole.
        kv_heads: of the new model; divides the present number, and is smaller.

    Raises:
        ConfigError: the folder holds no such model or is damaged, or ``kv_heads`` or ``output`` cannot be.
    """
    folder, output = Path(folder), Path(output)
    check_output(output, folder)
    model, dmc = read_config(folder)
    if dmc is not None:
        raise ConfigError(f"{folder} is an export that merges, group-heads takes a plain model; name its base")
    present = model.num_query_groups
    if not 1 <= kv_heads < present or present % kv_heads:
        numbers = ", ".join(str(n) for n in range(1, present) if present % n == 0)
        remedy = f"name one of {numbers}" if numbers else "there is nothing to group"
        raise ConfigError(f"--kv-heads {kv_heads}: {folder} has {present} KV heads; {remedy}")
    weights = Weights.of(folder, model, None)
    check_companions(folder)
    shapes = dict(hugging_face_shapes(replace(model, num_query_groups=kv_heads), None))
    written = Written(len(shapes), sum(map(math.prod, shapes.values())) * weights.dtype.itemsize)
    with new_folder(output) as temporary:
        copy_tokenizer(folder, temporary)
        write_json(temporary / "config.json", read_json(folder / "config.json") | {"num_key_value_heads": kv_heads})
        with progress(f"writing {output}", written.bytes) as advance:
            tensors = _grouped(weights, shapes, model.head_dim)
            write_weights(temporary, shapes, tensors, dtype=weights.dtype, max_shard_size=_SHARD, advance=advance)
        # Reads the files' headers, and compares their sizes.
        Weights(temporary).check(shapes.items())
    return written


def _grouped(weights: Weights, shapes: dict[str, Shape], head_dim: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these shapes. Only those of KV heads, weights or biases, have others than before."""
    for name, shape in shapes.items():
        before = weights.finite(name)
        same = before.shape == shape
        yield name, before if same else rounded(mean_of_heads(before, shape[0] // head_dim, head_dim), weights.dtype)


def mean_of_heads(rows: Tensor, groups: int, head_dim: int) -> Tensor:
    """float64 [groups * head_dim, ...] of [heads * head_dim, ...]: each group the mean of as many neighbouring heads."""
    return rows.double().unflatten(0, (groups, -1, head_dim)).mean(1).flatten(0, 1)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 in another dtype, rounded once. torch goes to bfloat16 and float16 by way of float32, and rounds there, too.

    Where float32 is not exact, the neighbour with an odd last bit is taken there: what is rounded from it is right (Boldo and
    Melquiond 2008, "Emulation of FMA and correctly rounded sums", section 3).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return exact.to(dtype)
    near = exact.float()
    rest = exact - near.double()
    beyond = torch.nextafter(near, torch.full_like(near, math.inf).copysign(rest.float()))
    is_even = near.view(torch.int32) & 1 == 0
    return torch.where((rest != 0) & is_even, beyond, near).to(dtype)
