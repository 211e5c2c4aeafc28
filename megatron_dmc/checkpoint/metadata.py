"""Reads torch.distributed.checkpoint's ``.metadata``, which is a pickle, without letting it run anything."""

import io
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

# What a pickled Metadata is made of: plain data, and calls (NEWOBJ, REDUCE, BUILD) on the globals below. Not in it:
# INST and OBJ (older calls), EXT (registered globals), PERSID (callbacks), and buffers from outside the file.
_ALLOWED_OPCODES = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
        *("GLOBAL", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD"),
    )
)

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED_GLOBALS = frozenset(
    {
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    }
)
# Whose instances may be given attributes.
_BUILT = (
    *(Metadata, MetadataIndex, TensorStorageMetadata, ChunkStorageMetadata, BytesStorageMetadata, TensorProperties),
    _StorageInfo,
)


class UnsafeMetadataError(ValueError):
    """A ``.metadata`` file that is damaged, or asks for more than a checkpoint's metadata needs. One line."""


# The one in Python: only there can BUILD be watched.
_PythonUnpickler: Any = pickle._Unpickler


class _AllowListUnpickler(_PythonUnpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def load_build(self) -> None:
        # BUILD sets attributes: of a class, a function or an enumeration's member for the rest of the process.
        if type(self.stack[-2]) not in _BUILT:
            raise UnsafeMetadataError(
                f"asks to change {self.stack[-2]!r:.80}, which no checkpoint's metadata needs; it was not loaded"
            )
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        # Every global passes through here, however its name was put together, before it can be called. The names are
        # compared whole, so that no dotted path leads from an allowed class to something else.
        if (module, name) not in _ALLOWED_GLOBALS:
            raise UnsafeMetadataError(
                f"asks to load {module}.{name}, which no checkpoint's metadata needs; it was not loaded"
            )
        return super().find_class(module, name)


def read_metadata(data: bytes) -> Metadata:
    """The metadata of a checkpoint, after two allow-lists: of pickle opcodes, then of every global it names.

    Bytes that pass can be given to torch's own reader: unpickling them again names the same globals.

    Raises:
        UnsafeMetadataError: one line, without the file's name.
    """
    try:
        for opcode, _, _ in pickletools.genops(data):
            if opcode.name not in _ALLOWED_OPCODES:
                raise UnsafeMetadataError(
                    f"holds the pickle opcode {opcode.name}, which no checkpoint's metadata needs; it was not loaded"
                )
        metadata = _AllowListUnpickler(io.BytesIO(data)).load()
    except UnsafeMetadataError:
        raise
    # A damaged pickle raises nearly anything: ValueError, EOFError, IndexError, TypeError, ...
    except Exception:
        raise UnsafeMetadataError("is damaged: it is not a complete pickle") from None
    if not _is_well_formed(metadata):
        raise UnsafeMetadataError("is damaged: it does not describe the tensors of a checkpoint")
    return metadata


def _is_well_formed(metadata: Any) -> bool:
    if not isinstance(metadata, Metadata):
        return False
    # Unpickling does not run __init__, so a field can be absent.
    entries, storage = getattr(metadata, "state_dict_metadata", None), getattr(metadata, "storage_data", None)
    return (
        isinstance(entries, dict)
        and all(isinstance(key, str) and _is_entry(value) for key, value in entries.items())
        and isinstance(storage, dict)
        and all(isinstance(index, MetadataIndex) and _is_place(value) for index, value in storage.items())
    )


def _is_entry(entry: Any) -> bool:
    if isinstance(entry, TensorStorageMetadata):
        return isinstance(getattr(entry, "size", None), torch.Size)
    return isinstance(entry, BytesStorageMetadata)


def _is_place(place: Any) -> bool:
    if not isinstance(place, _StorageInfo):
        return False
    values = vars(place)
    name, numbers = values.get("relative_path"), (values.get("offset"), values.get("length"))
    # A plain file name: nothing outside the checkpoint's folder is ever opened.
    return (
        isinstance(name, str)
        and Path(name).name == name
        and all(isinstance(number, int) and number >= 0 for number in numbers)
    )


class Entry(NamedTuple):
    """What a checkpoint holds under one key: a tensor's global shape and dtype; None for every other object."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None


def entries(metadata: Metadata) -> dict[str, Entry]:
    """All that a checkpoint holds, by key."""
    stored: Mapping[str, Any] = metadata.state_dict_metadata
    return {key: Entry(getattr(value, "size", None), _dtype(value)) for key, value in stored.items()}


def _dtype(entry: Any) -> torch.dtype | None:
    dtype = getattr(getattr(entry, "properties", None), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def bytes_per_file(metadata: Metadata) -> dict[str, int]:
    """How long each data file must at least be, by its name in the checkpoint's folder."""
    needed: dict[str, int] = {}
    for place in metadata.storage_data.values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    return needed
