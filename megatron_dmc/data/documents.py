"""Reading documents: from folders, text files and .jsonl files, or Python's own standard library."""

import json
import logging
import os
import reprlib
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.files import why_no_file

logger = logging.getLogger(__name__)

# What a folder scan takes for text. JSON, CSV and the like are data: name them as .jsonl with a "text" field.
TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")
JSON_LINES_SUFFIX = ".jsonl"
LIST_HINT = " (this is a list: write every element of it as a line of its own)"
# Of what is skipped; a line must stay readable.
_MOST_NAMED = 5
_SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "site-packages"})
_TEST_FOLDERS = frozenset({"idle_test", "test", "tests"})


class NotTextError(ConfigError):
    """A file that is not UTF-8 text. The message names the file and the line."""


def iter_documents(path: str | Path, name: str = "data") -> Iterator[str]:
    """The documents of a folder, a text file (one document) or a ``.jsonl`` file (one object with "text" per line).

    A folder is read recursively in sorted order: files ending in .md, .py, .rst, .txt and .jsonl. Hidden files and
    folders, ``__pycache__``, ``site-packages``, ``dist-packages`` and links to folders are left out. Files there that
    are not UTF-8 text, and paths that are no files (named pipes, sockets, links to nothing), are skipped with one warning
    each that counts them; empty documents are skipped silently.

    Args:
        name: what errors call the path, such as the flag that named it.

    Raises:
        ConfigError: (while iterating) a path that is missing, unreadable, of an unknown kind or without any text; a
            file named directly that is not UTF-8; a ``.jsonl`` line that is not an object with "text". The message
            names the file, and the line where there is one.
    """
    path = Path(path)
    if path.is_dir():
        documents = _read_files(text_files(path), skip_undecodable=True)
    elif (problem := why_no_file(path)) is not None:
        raise ConfigError(f"{name} {path} {problem}; name a folder, a text file or a .jsonl file")
    elif path.suffix.lower() not in (*TEXT_SUFFIXES, JSON_LINES_SUFFIX):
        raise ConfigError(
            f"{name} {path} is neither a folder nor a text file ({', '.join(TEXT_SUFFIXES)}) nor a .jsonl file; "
            "rename or convert it"
        )
    else:
        documents = _read_files([path], skip_undecodable=False)
    first = next(documents, None)
    if first is None:
        raise ConfigError(f"{name} {path} holds no text; name a folder, a text file or a .jsonl file that does")
    yield first
    yield from documents


def standard_library_documents() -> Iterator[str]:
    """The sources of this Python's own standard library, without tests, in a fixed order: text on every machine.

    Raises:
        ConfigError: where the interpreter comes without them.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in (text_files(folder, _SKIPPED_FOLDERS | _TEST_FOLDERS) if folder.is_dir() else [])
        # what the build wrote down about its machine is no source
        if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise ConfigError(f"no standard library sources below {folder}; name a folder, a text file or a .jsonl file")
    yield from _read_files(files, skip_undecodable=True)


def standard_library_documentation() -> Iterator[str]:
    """What this Python's own standard library says in prose, in a fixed order: the topics of its ``help()``, and the .rst and
    .txt files that lie beside its sources, without tests. ``standard_library_documents`` has the sources.
    """
    # Written when Python is released; some distributions leave it out.
    with suppress(ImportError):
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    folder = Path(sysconfig.get_path("stdlib"))
    files = text_files(folder, _SKIPPED_FOLDERS | _TEST_FOLDERS) if folder.is_dir() else []
    yield from _read_files([file for file in files if file.suffix in (".rst", ".txt")], skip_undecodable=True)


def text_files(folder: Path, skipped: frozenset[str] = _SKIPPED_FOLDERS) -> list[Path]:
    """What :func:`iter_documents` reads in a folder, in its order."""

    def fail(error: OSError) -> None:
        raise ConfigError(f"data folder {error.filename} cannot be read: {error.strerror}")

    files = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        files += [
            Path(parent, name)
            for name in sorted(names)
            if not name.startswith(".") and name.lower().endswith((*TEXT_SUFFIXES, JSON_LINES_SUFFIX))
        ]
    # A named pipe would never end.
    read: list[Path] = []
    others: list[Path] = []
    for file in files:
        (read if file.is_file() else others).append(file)
    if others:
        named = ", ".join(f"{str(file)!r} {why_no_file(file)}" for file in others[:_MOST_NAMED])
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        logger.warning("warning: skipped %d path(s) that are no files: %s%s", len(others), named, more)
    return read


def _read_files(files: Iterable[Path], *, skip_undecodable: bool) -> Iterator[str]:
    skipped: list[Path] = []
    for file in files:
        try:
            if file.suffix.lower() != JSON_LINES_SUFFIX:
                documents: Iterable[str] = ["".join(line for _, line in _lines(file))]
            else:
                # A file is taken whole or not at all, so it is decoded once before its first document is used.
                for _ in _lines(file) if skip_undecodable else ():
                    pass
                documents = _read_json_lines(file)
        except NotTextError:
            if not skip_undecodable:
                raise
            skipped.append(file)
            continue
        yield from (document for document in documents if document.strip())
    if skipped:
        logger.warning("warning: skipped %d file(s) that are not UTF-8 text, the first is %s", len(skipped), skipped[0])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered from 1, each with its line end; a byte order mark at the start of the file is left out."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if b"\x00" in line:
                    raise NotTextError(f"{path}:{number} holds a NUL byte; it is no text file")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise NotTextError(f"{path}:{number} is not UTF-8 ({error.reason}); convert the file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a ``.jsonl`` file with their lines' numbers; empty lines are skipped.

    Raises:
        ConfigError: (while iterating) a file that cannot be read, or a line that is not JSON or names a key of an object
            twice.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object, parse_int=_integer)
        except json.JSONDecodeError as error:
            hint = "; every line must hold one whole value" if line.strip() in ("[", "{") else ""
            raise ConfigError(f"{path}:{number} is not JSON: {error.msg} (column {error.colno}){hint}") from None
        except RecursionError:
            raise ConfigError(f"{path}:{number} is not JSON that can be read: it nests too deeply") from None
        except ValueError as error:
            raise ConfigError(f"{path}:{number} is not JSON that can be read: {error}") from None
        yield number, value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Keeps json from dropping all but the last of equal keys in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object names {reprlib.repr(twice)} twice; keep one")
    return value


def _integer(digits: str) -> int:
    """Python makes no integer of several thousand digits, and its own words for that speak of Python's settings."""
    try:
        return int(digits)
    except ValueError:
        raise ValueError(
            f"it holds a number of {len(digits.lstrip('-'))} digits; write it as a string, or leave it out"
        ) from None


def _read_json_lines(path: Path) -> Iterator[str]:
    for number, value in json_lines(path):
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            hint = LIST_HINT if isinstance(value, list) else ""
            if isinstance(value, dict) and not {"messages", "conversations"}.isdisjoint(value):
                hint = " (conversations are read with --chat)"
            raise ConfigError(f'{path}:{number} is not an object with a string "text"; every line must be{hint}')
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{path}:{number} holds half a surrogate pair, which is no character") from None
        yield text
