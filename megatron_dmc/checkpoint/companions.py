"""What travels with a model beside its weights: its tokenizer, chat templates, licence, and whatever else lies there.

No list names what is copied, because no list is complete: a tokenizer may bring its own vocabulary files and its own
code. What is left out are weights, what is written anew, what a training run leaves, and what does not belong to the folder.
"""

import ast
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_dmc.files import CHECKPOINT_MARK

# Weights, optimizer states and datasets, in any library's form.
_DATA_SUFFIXES = frozenset(
    (
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data"),
        *(".tflite", ".mlmodel", ".ot", ".npz", ".npy", ".nemo", ".distcp", ".pkl"),
        *(".idx", ".parquet", ".arrow", ".jsonl"),
    )
)
# Of the model, and written anew for every form of it; of its base's form; of a training run.
_OTHERS = frozenset(
    (
        *("config.json", "adapter_config.json", CHECKPOINT_MARK, "metadata.json", "latest"),
        *("trainer_state.json", "training_args.json", "all_results.json", "train_results.json", "eval_results.json"),
    )
)
_OTHER_NAMES = re.compile(r".*\.index\.json|events\.out\.tfevents\..*|.*\.converting-.*|.*\.tmp-.*")
# Code that transformers runs in place of a model's own generate().
_OTHER_FOLDERS = frozenset({"custom_generate", "__pycache__"})
# A folder that holds one of these is a model, a checkpoint or a dataset of its own.
_OWN = frozenset({"config.json", CHECKPOINT_MARK, "trainer_state.json"})
# The largest vocabularies have about 40 MB.
_LARGEST = 128 * 1024 * 1024
# Read by name when a tokenizer is loaded: a folder may share them with another one by links.
_MAY_BE_LINKED = frozenset(
    (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
        *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    )
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what belongs to a model's tokenizer and to the model, as far as it is there; its weights never.

    Everything is copied but weights and datasets, the model's config.json and code, what a training run leaves, hidden
    files, files of more than 128 MB, links that lead out of the folder (but those of the Hub's cache, and a tokenizer's
    own files), and folders inside folders.

    Args:
        source: a tokenizer's folder, often a whole model's.
        target: made if there is something to copy.
    """
    for path in _companions(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _companions(source: Path) -> Iterator[Path]:
    """The files to copy, in order of their names."""
    code = _model_code(source)
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        if path.is_dir():
            if not path.is_symlink() and _is_companion_folder(path):
                yield from (inner for inner in sorted(path.iterdir()) if _is_companion(inner, source))
        elif path.name not in code and _is_companion(path, source):
            yield path


def _is_companion_folder(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name in _OTHER_FOLDERS:
        return False
    return not any(path.name in _OWN or path.suffix.lower() in _DATA_SUFFIXES for path in folder.iterdir())


def _is_companion(path: Path, source: Path) -> bool:
    name = path.name
    if name.startswith(".") or name in _OTHERS or path.suffix.lower() in _DATA_SUFFIXES or _OTHER_NAMES.fullmatch(name):
        return False
    # Follows links; anything but a file (a pipe, a broken link) is none.
    return path.is_file() and path.stat().st_size <= _LARGEST and _stays(path, source)


def _stays(path: Path, source: Path) -> bool:
    """Whether what a path leads to belongs to the folder. The Hub's cache holds the files of a snapshot beside it."""
    found, folder = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    homes = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    return any(found.is_relative_to(home) for home in homes) or (path.parent == source and path.name in _MAY_BE_LINKED)


def _model_code(source: Path) -> set[str]:
    """Names of Python files that are the model's and not its tokenizer's, after the auto_map of either configuration."""
    model = {name: value for name, value in _auto_map(source / "config.json").items() if name not in _TOKENIZER_CLASSES}
    theirs = [_auto_map(source / name) for name in ("tokenizer_config.json", "processor_config.json")]
    theirs.append(
        {name: value for name, value in _auto_map(source / "config.json").items() if name in _TOKENIZER_CLASSES}
    )
    return _code(source, model.values()) - _code(source, [value for each in theirs for value in each.values()])


_TOKENIZER_CLASSES = frozenset({"AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor"})


def _auto_map(path: Path) -> dict[str, Any]:
    """Classes that a folder's code defines; empty where there is no such file, or a damaged one (others say so)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["auto_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {"": found}


def _code(source: Path, references: Iterable[Any]) -> set[str]:
    """Files of the classes that are referred to, such as ``modeling.Class``, and of all that they import beside them."""
    new = [
        reference.split("--")[-1].split(".")[0]
        for value in references
        for reference in (value if isinstance(value, list) else [value])
        if isinstance(reference, str)
    ]
    found: set[str] = set()
    while new:
        path = source / f"{new.pop()}.py"
        if path.name not in found and path.is_file():
            found.add(path.name)
            new += _relative_imports(path)
    return found


def _relative_imports(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [name for node in nodes for name in ([node.module] if node.module else [alias.name for alias in node.names])]
