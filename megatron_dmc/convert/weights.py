"""Weights of a Hugging Face folder: reading and writing sharded safetensors, one tensor at a time."""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.hf_config import read_json
from megatron_dmc.convert.mapping import hugging_face_shapes
from megatron_dmc.convert.rows import Shape
from megatron_dmc.convert.safetensors_file import DTYPES, Place, is_finite, places, write_file
from megatron_dmc.errors import MOST_NAMES, first_names
from megatron_dmc.hf.adapter import ADAPTER_FILE, PEFT_CONFIG
from megatron_dmc.model.model_config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# How transformers saves the shards of a distributed model; where they are, it looks for nothing else.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

_REMEDY = "fetch the folder again, or see whether model_type and sizes in its config.json are this model's"
_EMBEDDING, _OUTPUT_LAYER = "model.embed_tokens.weight", "lm_head.weight"


class Weights:
    """The tensors of a folder: none is read before it is asked for, and none is kept.

    Attributes:
        shapes: of all tensors, by name.
        dtype: the one that holds every tensor exactly: their own where they share one.

    Raises:
        ConfigError: no safetensors, a shard that is missing or truncated, an index that does not fit its shards, or a
            dtype that is not floating point; more than one set of weights that transformers would mix.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, Place] = {}
        self.shapes: dict[str, Shape] = {}
        dtypes = set()
        files: dict[str, Path] = {}
        for path, names in _files(folder).items():
            held = places(path)
            if lost := sorted(set(names) - set(held)):
                raise ConfigError(f"{path} does not hold {lost[0]}, which {INDEX_FILE} says it does; fetch it again")
            # As in transformers, all that a file of the index holds counts, also what the index does not speak of.
            for name in sorted(held):
                if (other := files.setdefault(name, path)) != path:
                    raise ConfigError(
                        f"{other} and {path.name} both hold {name}; they were saved by different runs: fetch the folder "
                        "again, or save it anew with save_pretrained"
                    )
                place = held[name]
                if place.dtype not in DTYPES:
                    raise ConfigError(
                        f"{path}: {name} is {place.dtype}; only {', '.join(DTYPES)} weights are supported"
                    )
                self._places[name] = place
                self.shapes[name] = place.shape
                dtypes.add(DTYPES[place.dtype])
        if not dtypes:
            raise ConfigError(f"{folder} holds no tensors")
        self.dtype = functools.reduce(torch.promote_types, sorted(dtypes, key=str))

    @classmethod
    def of(cls, folder: Path, model: ModelConfig, dmc: DMCConfig | None) -> "Weights":
        """Those of this model and no others, by their files' headers; raises ConfigError as the class and :meth:`check`."""
        weights = cls(folder)
        # What older transformers saved beside them.
        for name in [name for name in weights.shapes if name.endswith(".rotary_emb.inv_freq")]:
            weights.drop(name)
        if model.share_embeddings_and_output_weights and {_OUTPUT_LAYER, _EMBEDDING} <= set(weights.shapes):
            weights.drop_copy(_OUTPUT_LAYER, _EMBEDDING)
        weights.check(hugging_face_shapes(model, dmc))
        return weights

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].read()

    def finite(self, name: str) -> Tensor:
        """A tensor; raises ConfigError for one that holds NaN or infinity."""
        value = self[name]
        if not is_finite(value):
            raise ConfigError(
                f"{self._folder}: {name} is not finite everywhere; its weights are damaged, fetch it again"
            )
        return value

    def drop(self, name: str) -> None:
        """Forgets a tensor that the model does not have."""
        del self._places[name], self.shapes[name]

    def drop_copy(self, name: str, original: str) -> None:
        """Forgets a tensor that tied weights make redundant; raises ConfigError if it is not ``original``'s copy."""
        if not torch.equal(self[name], self[original]):
            raise ConfigError(
                f"{self._folder}: {name} differs from {original}, but config.json ties them; set tie_word_embeddings to "
                "false, or remove the one that is not used"
            )
        self.drop(name)

    def check(self, expected: Iterable[tuple[str, Shape]]) -> None:
        """Raises ConfigError unless names and shapes are exactly those of ``expected``."""
        seen, missing = set(), []
        for name, shape in expected:
            if name not in self.shapes:
                missing.append(name)
                # config.json may promise any number of layers
                if len(missing) > MOST_NAMES:
                    break
            elif self.shapes[name] != shape:
                raise ConfigError(
                    f"{self._folder}: {name} has shape {list(self.shapes[name])}, config.json asks for {list(shape)}"
                )
            seen.add(name)
        if missing:
            raise ConfigError(f"{self._folder}: missing from the weights: {first_names(missing)}; {_REMEDY}")
        if unexpected := sorted(set(self.shapes) - seen):
            raise ConfigError(
                f"{self._folder}: in the weights, but not in the model: {first_names(unexpected)}; {_REMEDY}"
            )


def write_weights(
    folder: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes safetensors, and their index if there is more than one; holds one tensor in memory at a time.

    Args:
        shapes: of all tensors, in the order in which ``tensors`` gives them.
        dtype: to write.
        max_shard_size: bytes; a single tensor may exceed it.
        advance: told of bytes after they were written.
    """
    shards = _plan(shapes, dtype, max_shard_size)
    weight_map: dict[str, str] = {}
    remaining = iter(tensors)
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: shapes[name] for name in names}, remaining, dtype, advance)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(map(math.prod, shapes.values())) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes one safetensors file, which anyone may read whom the umask lets; in the dtype that holds all exactly.

    Raises:
        ConfigError: the file, read again, is another.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_file(path, shapes, iter(tensors.items()), dtype)
    if {name: place.shape for name, place in places(path).items()} != shapes:
        raise ConfigError(f"{path} is not what was written; the disk is damaged, or another program writes there")


def _plan(shapes: Mapping[str, Shape], dtype: torch.dtype, max_shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = []
    size = 0
    for name, shape in shapes.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if not shards or size + bytes_ > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


def _files(folder: Path) -> dict[Path, list[str]]:
    """Files to read, and the tensors that each must hold; in the order in which transformers looks for them."""
    if (folder / PEFT_CONFIG).is_file():
        raise ConfigError(
            f"{folder} holds a PEFT adapter ({PEFT_CONFIG}), which transformers adds to the weights: merge it "
            f"(merge_and_unload) and save the model anew, or remove {PEFT_CONFIG} to leave it out"
        )
    if distributed := next((path for path in _named(folder) if _DISTRIBUTED.fullmatch(path.name)), None):
        raise ConfigError(
            f"{folder} holds weights as one file per process ({distributed.name}), which are not read: load the model "
            "in transformers, and save it anew with save_pretrained"
        )
    if os.path.lexists(folder / SINGLE_FILE):
        return {folder / SINGLE_FILE: []}
    if os.path.lexists(folder / INDEX_FILE):
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        files: dict[Path, list[str]] = {}
        for name, file in _entries(folder, weight_map):
            files.setdefault(folder / file, []).append(name)
        for path in files:
            if not os.path.lexists(path):
                raise ConfigError(f"{path} is missing; {INDEX_FILE} names it")
        return files
    if (folder / ADAPTER_FILE).is_file():
        raise ConfigError(f"{folder} holds an adapter without its base's weights; name a merged export")
    if next(folder.glob("*.bin"), None) or next(folder.glob("*.pth"), None):
        raise ConfigError(
            f"{folder} holds its weights only as pickles (.bin, .pth), which are not read: convert to safetensors, "
            "with save_pretrained of a recent transformers"
        )
    other = next(iter(_named(folder)), None)
    raise ConfigError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
        + (
            f"; {other.relative_to(folder)}, which it holds, transformers does not load by itself either"
            if other
            else ""
        )
    )


def _named(folder: Path) -> list[Path]:
    """Files of weights by whatever name: another library's, a variant's, a subfolder's."""
    return sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*/*.safetensors"))


def _entries(folder: Path, weight_map: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / INDEX_FILE} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(f"{folder / INDEX_FILE}: {file!r} is not the name of a safetensors file in the folder")
        yield name, file
