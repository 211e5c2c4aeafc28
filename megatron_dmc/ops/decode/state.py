"""The tensors of a cache, all at once: to move, copy, save and restore them."""

from collections.abc import Callable, Mapping
from typing import Any

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
    """Rows and sequences of a saved state, on the device of its tensors.

    Raises:
        ValueError: the tensors do not fit together.
    """
    try:
        slots, tokens = state["cells"]["slots"], state["sequences"]["tokens"]
        rows = Rows(layout, len(tokens), state["kv_heads"], state["head_dim"], like=slots)
        angles = state["sequences"].get("angles", slots[:0])
        # A call of no tokens makes the tensors that are to be replaced.
        sequences = Sequences(layout)
        sequences.start(angles.new_empty(len(tokens), 1, 1, state["head_dim"]))
        for name, holder in (("rows", rows), ("cells", rows.cells), ("sequences", sequences)):
            for key, x in tensors(holder).items():
                new = state[name][key]
                if new.dtype != x.dtype or new.ndim != x.ndim or new.device != slots.device:
                    raise ValueError(f"{name}.{key} is {new.dtype} {list(new.shape)} on {new.device}")
                setattr(holder, key, new)
        rows.cells.used = len(rows.cells.owner)
        _check(rows, sequences)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"this is no saved cache, or a damaged one ({error!r}); save it again") from None
    return rows, sequences


def _check(rows: Rows, sequences: Sequences) -> None:
    """Every index stays within what it points to: a wrong one could read another sequence's memory."""
    cells, count = rows.cells, rows.batch * rows.kv_heads
    fixed = {"kept": rows.kept, "taken": cells.taken, "table": cells.table, "column": rows.column, "ahead": rows.ahead}
    fixed |= {name: x for name in ("sums", "decisions", "recent") if (x := getattr(rows, name)) is not None}
    wrong = [name for name, x in fixed.items() if len(x) != count]
    width = cells.table.shape[1]
    places = cells.used * cells.page_size
    bounds = {
        "slots": cells.slots.shape[1] == 2 * rows.head_dim and len(cells.slots) > places,
        "hidden": len(cells.hidden) == len(cells.slots),
        "place": len(cells.place) == cells.used and _within(cells.place, count * width),
        "owner": _within(cells.owner, count),
        "table": _within(cells.table, max(cells.used, 1)),
        "taken": _within(cells.taken, width + 1),
        "tokens": _within(sequences.tokens, 2**62),
        "angles": sequences.angles is None
        or sequences.angles.shape == (rows.batch, rows.layout.local_window, rows.head_dim),
        "kept": _within(rows.kept, cells.page_size * width + 1),
    }
    wrong += [name for name, holds in bounds.items() if not holds]
    if wrong:
        raise ValueError(f"{wrong[0]} does not fit")


def _within(x: Tensor | None, end: int) -> bool:
    return x is None or x.numel() == 0 or bool(((x >= 0) & (x < end)).all())
