"""Training a tokenizer, and reading one from a folder."""

import json
import os
import shutil

import pytest

from megatron_dmc.data.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer
from tests.support.texts import TEXTS, fails


def test_text_comes_back_unchanged(tokenizer):
    text = "any string: \x00\t\r\n  ü 日本 🙂 \u2028 " + "".join(map(chr, range(256)))
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert max(ids) < tokenizer.vocab_size == 320
    assert tokenizer.tokenize_documents([text, "x"]) == [
        [*made, tokenizer.eod] for made in (ids, tokenizer.tokenize("x"))
    ]


def test_spelled_special_token_is_text(tokenizer):
    assert tokenizer.eod not in tokenizer.tokenize("a<|endoftext|>b")
    assert tokenizer.detokenize([tokenizer.eod]) == "<|endoftext|>"


def test_transformers_reads_the_same_tokenizer(tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    for text in TEXTS[:5]:
        assert theirs(text).input_ids == tokenizer.tokenize(text)
        assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eod
    assert len(theirs) == tokenizer.vocab_size


def test_training_is_deterministic(tokenizer, tmp_path):
    again = train_tokenizer(TEXTS, 320, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer.folder / "tokenizer.json").read_bytes()
    assert again.unique_identifiers == tokenizer.unique_identifiers
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("vocab_size", [256, 0, -1, 2**24 + 1, 10**30])
def test_vocabulary_of_no_sensible_size_is_refused(tmp_path, vocab_size):
    fails(f"vocabulary must be >= 257 .* got {vocab_size}", train_tokenizer, TEXTS, vocab_size, tmp_path)
    assert os.listdir(tmp_path) == []


def test_no_text_is_refused(tmp_path):
    fails("no text to train", train_tokenizer, [], 300, tmp_path)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    fails("cannot write the tokenizer to", train_tokenizer, TEXTS, 300, tmp_path / "file" / "folder")


def test_missing_folder_and_file(tmp_path):
    fails("missing does not exist; name a folder that holds tokenizer.json", load_tokenizer, tmp_path / "missing")
    fails("holds no tokenizer.json", load_tokenizer, tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    fails(r"tokenizer.json cannot be read as a tokenizer", load_tokenizer, tmp_path)


@pytest.mark.parametrize(
    "name, eos_token",
    [
        ("tokenizer_config.json", "</s>"),
        ("tokenizer_config.json", {"content": "</s>", "lstrip": False}),
        ("special_tokens_map.json", "</s>"),
        (None, None),
    ],
    ids=["string", "added-token", "special-tokens-map", "well-known"],
)
def test_llama_style_end_token(tmp_path, name, eos_token):
    _llama_style(tmp_path)
    if name:
        (tmp_path / name).write_text(json.dumps({"eos_token": eos_token}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eod == 2
    assert tokenizer.vocab_size == 5
    assert tokenizer.tokenize("ab a") == [1, 3, 4, 3]  # with the <s> that the file adds; not truncated to 2


def test_no_end_token(tmp_path):
    _llama_style(tmp_path, end="<stop>")
    fails("names no end-of-text token; set eos_token in", load_tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<gone>"}))
    fails("'<gone>' is not in the vocabulary", load_tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    fails("tokenizer_config.json is not JSON", load_tokenizer, tmp_path)


def test_vocabulary_must_fit_the_model(tokenizer):
    check_vocabulary(tokenizer, 320, "x")
    fails("has 320 tokens, its model 319; x", check_vocabulary, tokenizer, 319, "x")


def _llama_style(folder, end="</s>"):
    """A sentencepiece-like tokenizer.json: it adds <s>, truncates, and has an unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, end: 2, "a": 3, "b": 4}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", end])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(2)
    backend.save(str(folder / "tokenizer.json"))


def test_a_number_of_thousands_of_digits(tmp_path, tokenizer):
    shutil.copytree(tokenizer.folder, tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"model_max_length": ' + "9" * 5000 + "}")
    fails("tokenizer_config.json holds a number of thousands of digits; fetch or save", load_tokenizer, tmp_path / "t")
