"""What a tokenizer's post-processor adds to a text stands in documents and prompts, as it does when transformers tokenizes."""

import json
import logging

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from megatron_dmc.data import build_chat_dataset, build_indexed_dataset, heldout_windows
from megatron_dmc.data.chat_template import RenderedChat
from megatron_dmc.data.indexed_dataset import check_dataset
from megatron_dmc.evaluation.inspect import read_tokens
from tests.support.tokenizer_folders import tokenizer_folder

BEGIN, SEPARATOR, END = SPECIAL_TOKENS = ("<|begin|>", "<|sep|>", "<|end|>")
FRAMES = {
    "none": None,
    "begin": f"{BEGIN} $A",
    "begin-end": f"{BEGIN} $A {END}",
    "two-before": f"{BEGIN} {SEPARATOR} $A",
    "as-BERT": f"{BEGIN} $A {SEPARATOR}",
    "end": f"$A {END}",
}
TEXTS = ["one small text", "größer 日本 🙂\n\n", " \t", f"it spells {BEGIN} and {END}", "the weather " * 50]


@pytest.fixture(scope="module", params=FRAMES)
def tokenizer(request, tmp_path_factory):
    return tokenizer_folder(
        tmp_path_factory.mktemp(request.param), *SPECIAL_TOKENS, frame=FRAMES[request.param], bos_token=BEGIN
    )


@pytest.fixture
def theirs(tokenizer):
    return AutoTokenizer.from_pretrained(tokenizer.folder)


def test_prompts_are_what_transformers_makes_of_them(tokenizer, theirs):
    for text in [*TEXTS, "", BEGIN, f"{BEGIN}a{END}{END}"]:
        assert tokenizer.tokenize_prompt(text) == theirs(text).input_ids


def test_a_text_is_what_transformers_makes_of_it_where_special_tokens_are_split(tokenizer, theirs):
    for text in [*TEXTS, "", BEGIN]:
        assert tokenizer.tokenize(text) == theirs(text, split_special_tokens=True).input_ids


def test_documents_end_with_one_end_token(tmp_path, tokenizer, theirs):
    build_indexed_dataset(TEXTS, tokenizer, tmp_path / "text")
    stored = IndexedDataset(str(tmp_path / "text"))
    for i, text in enumerate(TEXTS):
        expected = theirs(text, split_special_tokens=True).input_ids
        if expected[-1] != tokenizer.eod:
            expected.append(tokenizer.eod)
        assert stored[i].tolist() == expected


def test_the_bytes_per_token_are_those_of_the_text(tmp_path, tokenizer):
    # special tokens that a text spells are counted as text
    texts = [*TEXTS] * 9
    build_indexed_dataset(texts, tokenizer, tmp_path / "text")
    tokens = len(numpy.memmap(tmp_path / "text.bin", dtype=numpy.uint16))
    expected = len("".join(texts).encode()) / tokens
    prefix = str(tmp_path / "text")
    assert heldout_windows(prefix, 16, tokenizer).bytes_per_token == pytest.approx(expected, rel=1e-12)
    (tmp_path / "text.json").unlink()
    assert heldout_windows(prefix, 16, tokenizer).bytes_per_token == pytest.approx(expected, rel=1e-12)


def test_inspect_reads_every_document_as_it_is_trained_on(tmp_path, tokenizer, theirs):
    (tmp_path / "text.jsonl").write_text('{"text": "one small"}\n{"text": "text"}\n')
    expected = theirs("one small").input_ids + theirs("text").input_ids
    assert read_tokens(tokenizer, str(tmp_path / "text.jsonl"), 99).tolist() == expected


def warnings_of(caplog, prefix, tokenizer):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_dataset(str(prefix), tokenizer, 8)
    return caplog.messages


def test_a_dataset_from_before_is_read_with_a_warning(tmp_path, caplog):
    without = tokenizer_folder(tmp_path / "without", *SPECIAL_TOKENS)
    tokenizer = tokenizer_folder(tmp_path / "with", *SPECIAL_TOKENS, frame=f"{BEGIN} $A")
    build_indexed_dataset(TEXTS, without, tmp_path / "old")
    build_indexed_dataset(TEXTS, tokenizer, tmp_path / "new")
    [warning] = warnings_of(caplog, tmp_path / "old", tokenizer)
    assert f"old begins without {BEGIN}" in warning and "\n" not in warning
    assert not warnings_of(caplog, tmp_path / "new", tokenizer)
    assert not warnings_of(caplog, tmp_path / "old", without)


def test_chats_begin_as_their_template_says(tmp_path, caplog):
    tokenizer = tokenizer_folder(tmp_path / "tokenizer", *SPECIAL_TOKENS, frame=f"{BEGIN} $A")
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    texts = [f"{BEGIN}one small{END}", f"one small{END}"]
    build_chat_dataset([RenderedChat(text, ((0, 3),)) for text in texts * 9], tokenizer, tmp_path / "chat")
    stored = IndexedDataset(str(tmp_path / "chat"))
    assert [stored[i].tolist() for i in (0, 1)] == [theirs(text, add_special_tokens=False).input_ids for text in texts]
    build_chat_dataset([RenderedChat(texts[1], ((0, 3),))] * 9, tokenizer, tmp_path / "chat")
    assert not warnings_of(caplog, tmp_path / "chat", tokenizer)
    assert json.loads((tmp_path / "chat.json").read_text())["documents"] == 9
