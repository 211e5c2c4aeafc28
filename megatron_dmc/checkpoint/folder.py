"""A folder of checkpoints: what each one says it is, which is the newest, and changes that a crash cannot harm.

Nothing here needs torch or more than one process. Below the folder: ``step_*`` (full), ``cr_*`` and ``final`` (weights),
and ``latest``, a text file with the name of the newest full checkpoint. Names with a leading dot are never checkpoints.
"""

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_dmc.errors import DMCError, is_too_long_number
from megatron_dmc.files import ABSENT, CHECKPOINT_MARK, LOCK, why_no_checkpoint, why_no_file

FORMAT_VERSION = 1
# More tokens than any batch holds.
MOST_RATIO = 1e12
_LATEST, _NEXT_LATEST = "latest", ".latest.tmp"


class CheckpointError(DMCError, RuntimeError):
    """A checkpoint that cannot be written or must not be read. One line: what, where, and why."""


@dataclass(frozen=True)
class CheckpointInfo:
    """``dmc.json``: what a checkpoint holds.

    Attributes:
        kind: ``full`` can be resumed; ``weights`` holds the model only.
        recipe: the run's settings, ``Recipe.to_dict()``.
        step: optimizer steps taken, over all phases.
        consumed_samples: samples taken from the training data, over all phases.
        phase: index into the recipe's phases.
        compression_ratio: noise-free ratio of the last global batch, None where nothing is compressed yet.
        datasets: content digest of each of ``data.train``; None where no run wrote it down.
        base: of an adapter: ``folder`` (seen from the checkpoint's) and ``digest`` of the base it needs; None: the
            checkpoint holds all weights.
        vocabulary: tokens that the model knows, where its embedding has rows after theirs which pad it for tensor
            parallelism; None: every row counts.
    """

    kind: Literal["full", "weights"]
    recipe: dict[str, Any]
    step: int
    consumed_samples: int
    phase: int
    compression_ratio: float | None = None
    datasets: dict[str, str] | None = None
    base: dict[str, str] | None = None
    vocabulary: int | None = None


def read_info(folder: Path) -> CheckpointInfo:
    """``dmc.json`` of a checkpoint; raises CheckpointError for anything but a description this version understands."""
    if (problem := why_no_checkpoint(folder)) is not None:
        raise CheckpointError(problem)
    path = folder / CHECKPOINT_MARK
    values = read_json(path)
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, this version of megatron_dmc reads {FORMAT_VERSION}"
        )
    try:
        info = CheckpointInfo(**values)
    except TypeError as error:
        raise CheckpointError(f"{path} is not a checkpoint's description: {error}") from None
    if not isinstance(info.recipe, dict) or not isinstance(info.recipe.get("model"), dict):
        raise CheckpointError(f"{path} holds no recipe of the run that wrote it")
    if info.kind not in ("full", "weights"):
        raise CheckpointError(f"{path} has kind {info.kind!r}, it must be full or weights")
    for field in ("step", "consumed_samples", "phase"):
        value = getattr(info, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{path} has {field} {value!r}, it must be an integer >= 0")
    ratio = info.compression_ratio
    if ratio is not None and not (
        isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio < MOST_RATIO
    ):
        raise CheckpointError(f"{path} has compression_ratio {ratio!r}, it must be a number > 0, or null")
    if not isinstance(info.datasets, dict | None):
        raise CheckpointError(f"{path} has datasets {info.datasets!r}, it must be an object or null")
    if info.base is not None and (
        not isinstance(info.base, dict)
        or set(info.base) != {"folder", "digest"}
        or not all(isinstance(value, str) for value in info.base.values())
    ):
        raise CheckpointError(f"{path} has base {info.base!r}, it must name a folder and its digest, or be null")
    tokens, rows = info.vocabulary, info.recipe["model"].get("vocab_size")
    if tokens is not None and not (type(tokens) is int and type(rows) is int and 0 < tokens <= rows):
        raise CheckpointError(
            f"{path} has vocabulary {tokens!r}, it must be an integer from 1 to the model's vocab_size ({rows!r}), or null"
        )
    return info


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; raises CheckpointError for any other."""
    must_be_readable(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = "it holds a number of thousands of digits" if is_too_long_number(error) else f"it is not JSON: {error}"
        raise CheckpointError(f"{path} is damaged, {what}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it must hold a JSON object")
    return values


def must_be_readable(path: Path) -> None:
    """Raises CheckpointError unless a file of a checkpoint is there and can be read."""
    problem = why_no_file(path)
    if problem == ABSENT:
        raise CheckpointError(f"checkpoint {path.parent} is not whole: {path.name} is missing")
    if problem is not None:
        raise CheckpointError(f"{path} {problem}")


def put_in_place(temporary: Path, folder: Path) -> None:
    """Renames a whole checkpoint to its final name. One that already has the name goes only after that."""
    old = _aside(folder)
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        _restore_if_half_replaced(folder)
        raise
    flush_to_disk(folder.parent)
    _remove(old)


def _aside(folder: Path) -> Path:
    """Where a checkpoint that is being replaced waits, between two renames."""
    return folder.with_name(f".{folder.name}.old")


def _restore_if_half_replaced(folder: Path) -> None:
    """Undoes a replacement that was killed between its two renames. Several ranks may try at once."""
    if not folder.exists():
        with contextlib.suppress(FileNotFoundError):
            _aside(folder).rename(folder)


def remove_leftovers(root: Path) -> None:
    """Removes what a run that was killed left behind; only while no other run writes into ``root``."""
    for path in root.glob(".*"):
        if (leftover := _leftover(path.name)) is not None:
            if leftover["kind"] == "old":
                _restore_if_half_replaced(root / leftover["checkpoint"])
            _remove(path)


def _leftover(name: str) -> re.Match[str] | None:
    """The parts of a name that a run which was killed may leave behind; None for any other."""
    match = re.fullmatch(r"\.(?P<checkpoint>\w+)\.(?P<kind>old|tmp-[0-9a-f]{8}|tmp-deleted)", name)
    return match if match and is_checkpoint_name(match["checkpoint"]) else None


def _remove(path: Path) -> None:
    """A folder with all it holds, or the link to one that someone has moved elsewhere."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def update_latest(root: str | Path, name: str) -> None:
    """Makes ``root/latest`` name the checkpoint ``name``, in one step; one rank calls this, after the save.

    Raises:
        CheckpointError: ``root/name`` is not a checkpoint, or the disk is full (``latest`` is then as it was).
    """
    root = Path(root)
    latest, temporary = root / _LATEST, root / _NEXT_LATEST
    if not (root / name / CHECKPOINT_MARK).is_file():
        raise CheckpointError(f"{latest} cannot name {name!r}: {root / name} is not a whole checkpoint")
    try:
        temporary.write_text(name + "\n", encoding="utf-8")
        flush_to_disk(temporary)
        temporary.replace(latest)
        flush_to_disk(root)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {latest}: {error.strerror or error}") from error


def read_latest(root: str | Path) -> str | None:
    """The name of the newest full checkpoint below ``root``, None before the first.

    Raises:
        CheckpointError: ``root/latest`` does not hold the name of a folder.
    """
    path = Path(root) / _LATEST
    problem = why_no_file(path)
    if problem == ABSENT:
        return None
    if problem is not None:
        raise CheckpointError(f"{path} {problem}; write the name of a step_* folder beside it into a file of that name")
    try:
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not name or Path(name).name != name or name.startswith("."):
        raise CheckpointError(f"{path} must hold the name of a checkpoint folder beside it, got {name[:80]!r}")
    _restore_if_half_replaced(path.parent / name)
    return name


def full_checkpoints(root: str | Path) -> list[str]:
    """Names of the whole full checkpoints ``step_*`` below ``root``, the newest last."""
    steps = {path.name: step for path in Path(root).glob("step_*") if (step := _step(path.name)) is not None}
    return [name for name in sorted(steps, key=lambda name: steps[name]) if _is_whole_and_full(Path(root) / name)]


def prune(root: str | Path, keep_last: int) -> list[str]:
    """Deletes all but the newest ``keep_last`` full checkpoints ``step_*``, and never the one that ``latest`` names.

    Newer ones than ``latest`` do not count and stay: a user who set it back goes on from there, and what is newer must not
    push out what is older. Folders that are not whole full checkpoints stay. One rank calls this.

    Returns:
        The names that were deleted.
    """
    root = Path(root)
    latest = read_latest(root)
    newest = _step(latest or "")
    full = [name for name in full_checkpoints(root) if newest is None or (_step(name) or 0) <= newest]
    deleted = [name for name in full[: max(0, len(full) - keep_last)] if name != latest]
    for name in deleted:
        # Renamed first: a half deleted folder must not look like a checkpoint.
        gone = root / f".{name}.tmp-deleted"
        _remove(gone)
        (root / name).rename(gone)
        _remove(gone)
    return deleted


def kept_ratio(name: str) -> int | None:
    """N of ``cr_N``, which is kept because the schedule's target passed N; None for any other name."""
    match = re.fullmatch(r"cr_(\d+)", name)
    return int(match[1]) if match else None


def is_checkpoint_name(name: str) -> bool:
    """Whether a run could save a checkpoint under this name, and replace what has it."""
    return name == "final" or kept_ratio(name) is not None or _step(name) is not None


def is_reserved_name(name: str) -> bool:
    """Whether a run writes, replaces or removes what has this name in its folder of checkpoints."""
    return is_checkpoint_name(name) or name in (_LATEST, _NEXT_LATEST, LOCK) or _leftover(name) is not None


def _step(name: str) -> int | None:
    match = re.fullmatch(r"step_(\d+)", name)
    return int(match[1]) if match else None


def _is_whole_and_full(folder: Path) -> bool:
    try:
        return read_info(folder).kind == "full"
    except CheckpointError:
        return False


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
