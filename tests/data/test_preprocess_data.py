"""tools/preprocess_data.py, mostly called in this process."""

import json
import os
from pathlib import Path

import pytest

from megatron_dmc.data.indexed_dataset import read_index
from megatron_dmc.data.tokenizer import load_tokenizer
from tests.support.chats import chat_tokenizer, conversations, message, naive_document, write_chats
from tests.support.processes import ROOT, run
from tests.support.scripts import load_script
from tests.support.texts import TEXTS, full_disk

TOOL = "tools/preprocess_data.py"

preprocess_data = load_script(TOOL)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def test_trains_a_tokenizer_and_splits(tmp_path, text, capsys):
    prefix = str(tmp_path / "out" / "data")
    arguments = ["--input", text, "--input", text, "--train-tokenizer", "300", "--output", prefix]
    assert preprocess_data.main([*arguments, "--valid-fraction", "0.2"]) == 0
    tokenizer = load_tokenizer(f"{prefix}_tokenizer")
    assert tokenizer.vocab_size == 300
    train, valid = read_index(f"{prefix}_train"), read_index(f"{prefix}_valid")
    assert train.documents + valid.documents == 2 * len(TEXTS) and valid.documents >= 2
    assert f"data_train: {train.documents} documents, {train.tokens} tokens" in capsys.readouterr().out


def test_refuses_to_overwrite(tmp_path, text, tokenizer, capsys):
    prefix = str(tmp_path / "data")
    arguments = ["--input", text, "--tokenizer", str(tokenizer.folder), "--output", prefix]
    assert preprocess_data.main(arguments) == 0
    first = Path(prefix + ".bin").read_bytes()
    Path(text).write_text('{"text": "other"}')
    assert preprocess_data.main(arguments) == 1
    assert "data.bin exists; choose another --output or add --overwrite" in capsys.readouterr().err
    assert Path(prefix + ".bin").read_bytes() == first
    assert preprocess_data.main([*arguments, "--overwrite"]) == 0
    assert read_index(prefix).documents == 1


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"--input": "missing.txt"}, "preprocess_data: --input missing.txt does not exist; name a folder"),
        ({"--tokenizer": "missing"}, "preprocess_data: --tokenizer missing does not exist; name a folder"),
        ({"--input": "a" * 300}, "File name too long"),
    ],
)
def test_bad_input_is_one_line(tmp_path, text, tokenizer, capsys, changed, message):
    options = {"--input": text, "--tokenizer": str(tokenizer.folder), "--output": str(tmp_path / "data")} | changed
    before = sorted(os.listdir(tmp_path))
    assert preprocess_data.main([word for pair in options.items() for word in pair]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_full_disk(tmp_path, tokenizer, capsys):
    large = tmp_path / "large.jsonl"
    large.write_text('{"text": "many short documents"}\n' * 1000)
    arguments = ["--input", str(large), "--tokenizer", str(tokenizer.folder), "--output", str(tmp_path / "data")]
    with full_disk(4096):
        assert preprocess_data.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("preprocess_data: cannot write the dataset") and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["large.jsonl"]


def test_help_needs_no_package():
    # -S: without site-packages.
    done = run("-S", ROOT / TOOL, "--help", PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "--valid-fraction" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("chat_tokenizer")).folder


def test_chat(tmp_path, chat_folder, capsys):
    chats = conversations(30)
    path = write_chats(tmp_path / "chat.jsonl", [*chats, [message("user", "nobody answers")]])
    arguments = ["--chat", "--input", path, "--tokenizer", str(chat_folder), "--output", str(tmp_path / "data")]
    assert preprocess_data.main([*arguments, "--valid-fraction", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokenizer = load_tokenizer(chat_folder)
    learned = 0
    for name, line in zip(("train", "valid"), lines, strict=True):
        counts = json.loads((tmp_path / f"data_{name}.json").read_text())
        learned += counts["trained_tokens"]
        assert f"{counts['documents']} documents, {counts['tokens']} tokens ({counts['trained_tokens']} of" in line
    assert learned == sum(sum(naive_document(tokenizer, chat)[1]) for chat in chats)
    assert preprocess_data.main(arguments) == 0 and read_index(str(tmp_path / "data")).documents == 30


@pytest.mark.parametrize(
    ("lines", "changed", "message"),
    [
        ("", {"--input": "missing.jsonl"}, "preprocess_data: --input missing.jsonl does not exist; name a .jsonl file"),
        ('{"text": "a"}', {}, 'chat.jsonl:1 is not an object with a list "messages"'),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            {},
            "there is no conversation to learn from: 1 without an assistant turn",
        ),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', {"--valid-fraction": "0.5"}, "is not cut"),
        ("", {"--tokenizer": "{plain}"}, "has no chat template"),
        (
            "",
            {"--chat-template": "missing.jinja"},
            "preprocess_data: --chat-template missing.jinja does not exist; name a file",
        ),
        ("", {"--chat": None, "--chat-template": "a.jinja"}, "--chat-template is for --chat"),
        ("", {"--tokenizer": None, "--train-tokenizer": "300"}, "--chat needs --tokenizer"),
        ('{"messages": []}', {"--chat": None}, "(conversations are read with --chat)"),
    ],
)
def test_bad_chat_input_is_one_line(tmp_path, chat_folder, tokenizer, capsys, lines, changed, message):
    (tmp_path / "chat.jsonl").write_text(lines)
    options = {"--chat": "", "--input": str(tmp_path / "chat.jsonl"), "--output": str(tmp_path / "data")}
    options |= {"--tokenizer": str(chat_folder)} | changed
    words = [word for pair in options.items() if pair[1] is not None for word in pair if word]
    words = [word.replace("{plain}", str(tokenizer.folder)) for word in words]
    assert preprocess_data.main(words) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("skipped")]
    assert len(error) == 1 and message in error[0]
    assert os.listdir(tmp_path) == ["chat.jsonl"]
