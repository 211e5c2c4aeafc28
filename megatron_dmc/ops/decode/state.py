"""The tensors of a cache, all at once: to move, copy, save and restore them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.decode.layout import Layout
from megatron_dmc.ops.decode.rows import Rows
from megatron_dmc.ops.decode.sequences import Sequences


def tensors(holder: Any) -> dict[str, Tensor]:
    """An object's attributes that are tensors."""
    return {name: x for name, x in vars(holder).items() if isinstance(x, Tensor)}


def change_tensors(holder: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Replaces every tensor of an object."""
    for name, x in tensors(holder).items():
        setattr(holder, name, change(x))


def bytes_of(*holders: Any) -> int:
    """Bytes of all their tensors, those in common once."""
    storages = [x.untyped_storage() for holder in holders for x in tensors(holder).values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def restored(layout: Layout, state: Mapping[str, Any]) -> tuple[Rows, Sequences]:
    """Rows and sequences of a saved state, on the device of its tensors, as tensors of their own.

    Raises:
        ValueError: the tensors do not fit together.
    """
    try:
        slots, tokens = state["cells"]["slots"], state["sequences"]["tokens"]
        like = state["cells"].get("near", slots)
        rows = Rows(layout, len(tokens), state["kv_heads"], state["head_dim"], like=like)
        # A call of no tokens makes the tensors that are to be replaced.
        sequences = Sequences(layout)
        angles = state["sequences"].get("angles", like)
        sequences.start(
            like.new_empty(
                len(tokens), 1, 1, state["head_dim"], dtype=angles.dtype if angles.is_floating_point() else None
            )
        )
        for name, holder in (("rows", rows), ("cells", rows.cells), ("sequences", sequences)):
            for key, x in tensors(holder).items():
                new = state[name][key]
                fits = new.dtype == x.dtype and new.ndim == x.ndim and new.layout == x.layout
                # Only the cells' tensors grow, but for what lies beside them.
                fits = fits and ((holder is rows.cells and key != "near") or new.shape == x.shape)
                if not fits or new.device != slots.device:
                    raise ValueError(f"{name}.{key} is {new.dtype} {list(new.shape)} on {new.device}")
                # Whoever saved it goes on writing to its own, and so does another that is restored from the same state.
                setattr(holder, key, new.detach().clone(memory_format=torch.contiguous_format))
        rows.cells.used = int(rows.cells.taken.sum())
        _check(rows, sequences)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"this is no saved cache, or a damaged one ({error!r}); save it again") from None
    return rows, sequences


def _check(rows: Rows, sequences: Sequences) -> None:
    """Every index stays within what it points to, and every cell is one row's: a wrong one could read another sequence's
    memory, or memory that nobody has written."""
    cells, count = rows.cells, rows.batch * rows.kv_heads
    width, codes = cells.table.shape[1], rows.layout.codes(rows.head_dim)
    slot = 2 * rows.head_dim if codes is None else codes.slot_bytes
    bounds = {
        "slots": cells.slots.shape[1] == slot and len(cells.slots) > cells.used * cells.page_size,
        "tokens": _within(sequences.tokens, 2**62),
        "taken": len(cells.taken) == count and _within(cells.taken, width + 1),
        "table": len(cells.table) == count and _within(cells.table, max(cells.used, 1)),
        "kept": _within(rows.kept, cells.page_size * width + 1),
    }
    _refuse(bounds)
    cell = cells.named()[2]
    assert sequences.tokens is not None
    left = (sequences.tokens - rows.layout.local_window).clamp(min=0).repeat_interleave(rows.kv_heads)
    fit = (rows.kept <= left) & ((rows.kept > 0) == (left > 0))
    fit &= rows.lengths(rows.kept, sequences.tokens) <= cells.base + cells.taken * cells.page_size
    _refuse(
        {
            "table": torch.equal(cell.sort().values, torch.arange(cells.used, device=cell.device)),
            "kept": bool(fit.all()),
        }
    )


def _refuse(bounds: Mapping[str, bool]) -> None:
    for name, holds in bounds.items():
        if not holds:
            raise ValueError(f"{name} does not fit")


def _within(x: Tensor | None, end: int) -> bool:
    return x is None or x.numel() == 0 or bool(((x >= 0) & (x < end)).all())
