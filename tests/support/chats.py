"""What the tests of chat data share: conversations, a tokenizer with a chat template, and which tokens are the assistant's."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from megatron_dmc.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

_TURN = "<|im_start|>{{ m.role }}\n"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + _TURN + "{{ m.content }}<|im_end|>\n{% endfor %}" + _PROMPT
MARKED = (
    "{% for m in messages %}"
    + _TURN
    + "{% if m.role == 'assistant' %}{%- generation -%} {{ m.content }}<|im_end|>{% endgeneration %}"
    + "{% else %}{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}"
    + _PROMPT
)
IN_A_MACRO = (
    "{% macro say(text) %}assistant\n{% generation %}{{ text }}<|im_end|>{% endgeneration %}\n{% endmacro %}"
    "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{{ say(m.content) }}"
    "{% else %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + _PROMPT
)
# As Qwen3's and gpt-oss' do in their own ways.
REWRITES_HISTORY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}(thought){% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + _PROMPT
)


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def conversations(count: int) -> list[list[dict[str, Any]]]:
    """Of one to four turns; contents begin with a letter and end without white space."""
    made = []
    for i in range(count):
        turns = [message("system", f"Rule {i}.")] if i % 3 == 0 else []
        for turn in range(i % 4 + 1):
            turns.append(message("user", f"Question {i} {turn} größer " + "why? " * (i % 5) + "please"))
            if i % 6 == 5:
                turns.append(message("tool", f"Result {turn}"))
            turns.append(message("assistant", f"Answer {i} {turn}\n\n  日本 🙂 " + "because " * (i * 7 % 11) + "yes"))
        # The user may have the last word.
        made.append([*turns, message("user", f"Thanks {i}")] if i % 5 == 4 else turns)
    return made


def write_chats(path: Path, chats: list[list[dict[str, Any]]]) -> str:
    path.write_text("".join(json.dumps({"messages": chat, "id": i}) + "\n" for i, chat in enumerate(chats)))
    return str(path)


def chat_tokenizer(
    folder: Path,
    template: str | None = PLAIN,
    vocab_size: int = 350,
    special_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
) -> Tokenizer:
    """A byte-level BPE with special tokens (ChatML's), as they are in published folders, and a chat template."""
    texts = [turn["content"] for chat in conversations(40) for turn in chat]
    train_tokenizer([f"assistant user system {text}" for text in texts], vocab_size - 2, folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(list(special_tokens))
    # As Llama 3's: it takes white space out of the tokens' offsets.
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.save(str(folder / "tokenizer.json"))
    if template is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return load_tokenizer(folder)


def naive_document(tokenizer: Tokenizer, chat: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Tokens and loss mask of a conversation under PLAIN, piece by piece."""
    [start], [end] = (tokenizer.tokenize_rendered([token])[0][0] for token in ("<|im_start|>", "<|im_end|>"))
    tokens, mask = [], []
    for turn in chat:
        header, content = tokenizer.tokenize(turn["role"] + "\n"), tokenizer.tokenize(turn["content"])
        line_end = tokenizer.tokenize("\n")
        tokens += [start, *header, *content, end, *line_end]
        learned = int(turn["role"] == "assistant")
        mask += [0] * (1 + len(header)) + [learned] * (len(content) + 1) + [0] * len(line_end)
    return [*tokens, tokenizer.eod], [*mask, 0]
