"""Whether two folders or files hold the same model, by a digest that does not read all of a large one."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

_KINDS = (".json", ".safetensors", ".model")


def model_digest(path: Path) -> str:
    """Of a Hugging Face folder's small files and of samples of its weights, or of samples of one file."""
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    digest = hashlib.sha256()
    for file in files:
        if file == path or file.suffix in _KINDS:
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            for part in _samples(file):
                digest.update(part)
    return digest.hexdigest()


def _samples(file: Path, count: int = 64, size: int = 2**16) -> Iterator[bytes]:
    """Stretches of a file, evenly spread: another model's weights differ everywhere. A small file is read whole."""
    length = file.stat().st_size
    with file.open("rb") as content:
        for i in range(count):
            content.seek(i * max(length - size, 0) // max(count - 1, 1))
            yield content.read(size)
            if length <= size:
                return
