"""Reading documents from real files."""

import logging
import os
import socket

import pytest

from megatron_dmc.data import iter_documents, standard_library_documentation, standard_library_documents
from tests.support.texts import fails


def test_folder_in_sorted_order(tmp_path):
    for name, text in {
        "b.md": "b",
        "a.txt": "a",
        "c/z.py": "z",
        "c/lines.jsonl": '{"text": "one"}\n\n{"text": ""}\n{"text": "two", "more": 1}',
        "d.rst": "d",
        "empty.txt": " \n",
        "data.json": '{"text": "no"}',
        "image.png": "no",
        ".hidden.txt": "no",
        ".git/a.txt": "no",
        "__pycache__/a.py": "no",
        "lib/site-packages/a.py": "no",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    os.mkfifo(tmp_path / "pipe.txt")
    assert list(iter_documents(tmp_path)) == ["a", "b", "d", "one", "two", "z"]


def test_folder_skips_what_is_no_text_with_one_warning(tmp_path, caplog):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.py").write_bytes("# -*- latin-1 -*- ü".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01")
    (tmp_path / "late.jsonl").write_bytes(b'{"text": "first"}\n{"text": "\xff"}\n')
    with caplog.at_level(logging.WARNING):
        assert list(iter_documents(tmp_path)) == ["good"]
    [record] = caplog.records
    assert "skipped 3 file(s)" in record.message and "binary.txt" in record.message


def test_folder_skips_what_is_no_file_with_one_warning(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.jsonl").symlink_to("gone")
    (tmp_path / "link.txt").symlink_to("a.txt")
    os.mkfifo(tmp_path / "a\nb.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "d.py"))
        with caplog.at_level(logging.WARNING):
            assert list(iter_documents(tmp_path)) == ["a", "a"]
    [record] = caplog.records
    assert record.getMessage() == (
        f"warning: skipped 4 path(s) that are no files: '{tmp_path}/a\\nb.txt' is a named pipe, not a file, "
        f"'{tmp_path}/b.txt' is a named pipe, not a file, '{tmp_path}/c.jsonl' is a link to gone, which does not exist, "
        f"'{tmp_path}/d.py' is a socket, not a file"
    )
    for number in range(20):
        os.mkfifo(tmp_path / f"more{number}.txt")
    caplog.clear()
    assert list(iter_documents(tmp_path)) == ["a", "a"]
    [record] = caplog.records
    assert record.getMessage().startswith("warning: skipped 24 path(s)") and record.getMessage().endswith(
        " and 19 more"
    )


def test_single_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ndocument")
    assert list(iter_documents(tmp_path / "a.txt")) == ["one\r\ndocument"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "1"}\r\n{"text": "2\\n"}')
    assert list(iter_documents(str(tmp_path / "a.jsonl"))) == ["1", "2\n"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"fine\nfine\n\xfc\n", r"a\.txt:3 is not UTF-8"),
        ("a.txt", b"fine\n\x00", r"a\.txt:2 holds a NUL byte"),
        ("a.txt", b"", r"a\.txt holds no text"),
        ("a.txt", b" \n\n", r"a\.txt holds no text"),
        ("a.jsonl", b"", r"a\.jsonl holds no text"),
        ("a.jsonl", b'{"text": ""}\n', r"a\.jsonl holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xfc"}\n', r"a\.jsonl:2 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl:3 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"content": "a"}', r"a\.jsonl:1 is not an object with a string \"text\""),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1 is not an object with a string \"text\""),
        ("a.jsonl", b'["text"]', r"a\.jsonl:1 is not an object with a string \"text\""),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1 holds half a surrogate"),
        ("a.csv", b"a,b", r"a\.csv is neither a folder nor a text file"),
    ],
)
def test_bad_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    fails(message, lambda: list(iter_documents(tmp_path / name)))


def test_bad_json_line_in_a_folder_is_no_encoding_problem(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nnot json\n')
    fails(r"a\.jsonl:2 is not JSON", lambda: list(iter_documents(tmp_path)))


def test_missing_empty_and_special(tmp_path):
    fails("missing does not exist", lambda: list(iter_documents(tmp_path / "missing")))
    fails("holds no text", lambda: list(iter_documents(tmp_path)))
    os.mkfifo(tmp_path / "pipe.txt")
    fails("pipe.txt is a named pipe, not a file", lambda: list(iter_documents(tmp_path / "pipe.txt")))


def test_unreadable(tmp_path):
    # Reading this file fails for every user, root included.
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    fails("a.txt cannot be read: Input/output error", lambda: list(iter_documents(tmp_path / "a.txt")))
    fails("a.txt cannot be read: Input/output error", lambda: list(iter_documents(tmp_path)))


def test_documentation_of_the_standard_library():
    documents = list(standard_library_documentation())
    assert documents == list(standard_library_documentation())
    # help()'s topics, each a document of its own, and no source.
    assert any(document.startswith('The "assert" statement') for document in documents)
    assert sum(map(len, documents)) > 400_000
    assert not set(documents) & set(standard_library_documents())


def test_standard_library():
    documents = list(standard_library_documents())
    assert len(documents) > 300 and sum(map(len, documents)) > 5_000_000
    assert documents == list(standard_library_documents())
    everything = "".join(documents)
    assert "class JSONDecodeError" in everything  # json/decoder.py
    assert "class PydocDocTest" not in everything  # test/test_pydoc.py
