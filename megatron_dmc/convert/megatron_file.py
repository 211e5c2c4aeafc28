"""One file of a Megatron-LM checkpoint, ``model_optim_rng.pt``: a pickle, read without letting it run anything."""

import argparse
import contextlib
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.files import why_no_file

FILE = "model_optim_rng.pt"


class Ignored:
    """Stands for what such a file holds beside tensors and plain values, and what nothing here needs."""

    def __init__(self, *arguments: Any) -> None:
        """Takes whatever the file gives."""

    def __setstate__(self, state: Any) -> None:
        """Forgets it."""


# By the name in the file, each alone: what it becomes here. The arguments of the run, and of its enumerations the number. The
# others are not built: Transformer Engine's history of FP8 scales (_extra_state), the state of numpy's random numbers, and
# what newer versions keep to run a step again.
ALLOWED: tuple[tuple[Any, str], ...] = (
    (argparse.Namespace, "argparse.Namespace"),
    (int, "megatron.core.enums.ModelType"),
    (int, "megatron.core.transformer.enums.AttnBackend"),
    (int, "signal.Signals"),
    (Ignored, "_io.BytesIO"),
    (Ignored, "numpy.ndarray"),
    (Ignored, "numpy.dtype"),
    (Ignored, "numpy.core.multiarray._reconstruct"),
    (Ignored, "numpy._core.multiarray._reconstruct"),
    (Ignored, "numpy.dtypes.UInt32DType"),
    (Ignored, "megatron.core.rerun_state_machine.RerunDiagnostic"),
    (Ignored, "megatron.core.rerun_state_machine.RerunMode"),
    (Ignored, "megatron.core.rerun_state_machine.RerunState"),
)


class MegatronFile:
    """The model and the arguments of one tensor-parallel rank.

    The file is mapped anew for every tensor, and let go: what was read would stay with the process until then.

    Attributes:
        path: the file's.
        arguments: of the run that wrote it, by name.
        iteration: of the training; None where the file does not say it.
        tensors: the model's, by name, on the meta device; nested dictionaries (of Megatron-LM's legacy models) with dots.

    Raises:
        ConfigError: the file is absent, damaged, without what it should hold, or holds a class that is not in ALLOWED.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_sums(path)
        content = _load(path)
        # Its own methods may have been replaced: an object's state is data of the file.
        arguments, model = dict.get(content, "args"), dict.get(content, "model")
        if not isinstance(arguments, argparse.Namespace):
            raise ConfigError(
                f"{path} holds no args, which tell the model's sizes; save it with Megatron-LM's save_checkpoint"
            )
        if "model0" in content:
            raise ConfigError(
                f"{path} holds the parts of an interleaved pipeline, which are not read; save it without "
                "--num-layers-per-virtual-pipeline-stage"
            )
        if not isinstance(model, dict):
            raise ConfigError(f"{path} holds no model; fetch it again")
        self.arguments: dict[str, Any] = vars(arguments)
        try:
            found = _flat(model)
        except RecursionError:
            raise ConfigError(f"{path} holds a model without end; fetch it again") from None
        self.tensors = {
            name: Tensor.to(tensor, "meta")
            for name, tensor in found.items()
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided
        }
        iteration = dict.get(content, "iteration")
        self.iteration = iteration if type(iteration) is int else None
        self._check_version(dict.get(content, "checkpoint_version", 0))

    def _check_version(self, version: Any) -> None:
        is_legacy = any(name.startswith("language_model.") for name in self.tensors)
        if is_legacy and (not isinstance(version, int | float) or version < 2):
            # The rows of query, key and value were in another order.
            raise ConfigError(f"{self.path} has checkpoint_version {version!r}; 2.0 and newer are read, save it anew")

    def read(self, name: str) -> Tensor:
        """One of ``tensors``, on the CPU."""
        tensor: Tensor = _flat(_load(self.path)["model"])[name]
        return Tensor.detach(tensor).clone(memory_format=torch.contiguous_format)


def _flat(model: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, under the names of all the way to them."""
    found: dict[str, Any] = {}
    for name, value in dict.items(model):
        whole = f"{prefix}{name}"
        for each, leaf in (_flat(value, f"{whole}.") if isinstance(value, dict) else {whole: value}).items():
            if each in found:
                raise ConfigError(f"the model holds {each} twice; save it anew")
            found[each] = leaf
    return found


@contextlib.contextmanager
def _only_allowed() -> Iterator[None]:
    """Inside, torch unpickles ALLOWED and what it allows by itself; not what other packages have added for their own files."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(ALLOWED))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _not_whole(path: Path) -> str:
    return f"{path} is no whole file of torch.save: cut short, or of another format; fetch it again"


def _check_sums(path: Path) -> None:
    """Raises ConfigError where the bytes of a record are not those that were written; torch maps them without a look."""
    if why_no_file(path) is not None or not zipfile.is_zipfile(path):
        return  # said by what reads it
    try:
        with zipfile.ZipFile(path) as archive:
            is_packed = any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
            damaged = "its records are compressed" if is_packed else archive.testzip()
    # A damaged zip file raises nearly anything.
    except Exception:
        raise ConfigError(_not_whole(path)) from None
    if damaged:
        raise ConfigError(
            f"{path} is damaged, or was saved without checksums ({damaged[:200]}); fetch it, or save it, again"
        )


def _load(path: Path) -> dict[str, Any]:
    if (problem := why_no_file(path)) is not None:
        raise ConfigError(f"{path} {problem}; name the folder of a Megatron-LM checkpoint")
    if not zipfile.is_zipfile(path):
        raise ConfigError(_not_whole(path))
    try:
        with _only_allowed():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = named[1] if named else "a pickle of another form than torch.save's"
        raise ConfigError(
            f"{path} holds {what}, which the reading of a model does not need; nothing of it was run: fetch the file from "
            "where it comes from, or save it without that"
        ) from None
    # A damaged zip file raises nearly anything.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "PytorchStreamReader" in first:
            # An archive's end was there: that of one inside it.
            raise ConfigError(_not_whole(path)) from None
        raise ConfigError(f"{path} cannot be read ({first[:200]}); fetch it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no Megatron-LM checkpoint; name the folder of one")
    return content
