"""Tokenizers of the classes that families are published with, with small vocabularies."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, Qwen2Tokenizer

TEXTS = ["The cat sat on the mat; the dog ran to the log.", "one small text, 1 2 3"]


def save_tokenizer(family: str, folder: Path) -> None:
    """Llama's and Mistral's have bytes as tokens of their own, Qwen's spells them as letters and has no first token."""
    (_save_qwen if family.startswith("qwen") else _save_llama)(folder)


def _save_qwen(folder: Path) -> None:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    Qwen2Tokenizer(vocab=model["vocab"], merges=merges).save_pretrained(folder)


def _save_llama(folder: Path) -> None:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁Tabcdeghlmnorstxz"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    names += [left + right for left, right in merges]
    LlamaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges).save_pretrained(folder)
