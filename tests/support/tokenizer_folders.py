"""Tokenizers as published folders hold them: special tokens, a post-processor that adds some, chat templates."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from megatron_dmc.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


def tokenizer_folder(
    folder: Path, *special_tokens: str, frame: str | None = None, vocab_size: int = 300, **settings: Any
) -> Tokenizer:
    """A byte-level BPE.

    Args:
        special_tokens: the last of them ends a text.
        frame: what the post-processor makes of a text ``$A``, as tokenizers' TemplateProcessing writes it.
        settings: of tokenizer_config.json.
    """
    train_tokenizer(["one small text about the weather in Paris: user assistant system"], vocab_size, folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special_tokens])
    if frame is not None:
        named = [(token, backend.token_to_id(token)) for token in special_tokens if token in frame]
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=named)
    backend.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special_tokens[-1], **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return load_tokenizer(folder)
