"""Reading conversations: .jsonl files with messages and their roles."""

import json
import logging
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.data.documents import JSON_LINES_SUFFIX, LIST_HINT, json_lines, text_files
from megatron_dmc.files import why_no_file

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = ', in its messages "from" to "role" (human is user, gpt is assistant) and "value" to "content"'


@dataclass(frozen=True)
class Conversation:
    """What a chat template writes.

    Attributes:
        messages: dicts with "role" and "content", and what else a template may read there.
        place: the file and line.
        tools: what the assistant may call, as the template wants it described; None: not said.
    """

    messages: list[dict[str, Any]]
    place: str
    tools: list[dict[str, Any]] | None = None


def iter_conversations(path: str | Path) -> Iterator[Conversation]:
    """The conversations of a ``.jsonl`` file, or of all such files in a folder: ``{"messages": [...]}`` in every line.

    A message is an object with a "role" (system, user, assistant or tool) and a string "content", which an assistant's turn
    with "tool_calls" can do without; null is no content. Its other fields are handed to the chat template, and so are the
    line's "tools"; other fields of the line are left out. A field that is null or empty is the same as none.

    Raises:
        ConfigError: (while iterating) a path that is missing, unreadable or holds no conversation, or a line that is
            none. The message names the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in text_files(path) if file.suffix.lower() == JSON_LINES_SUFFIX]
    elif (problem := why_no_file(path)) is not None:
        raise ConfigError(f"data {path} {problem}; name a .jsonl file or a folder")
    elif path.suffix.lower() != JSON_LINES_SUFFIX:
        raise ConfigError(
            f"data {path} is neither a .jsonl file nor a folder; conversations are read from .jsonl files"
        )
    else:
        files = [path]
    found = False
    for file in files:
        for number, value in json_lines(file):
            found = True
            yield _conversation(value, f"{file}:{number}")
    if not found:
        raise ConfigError(f"data {path} holds no conversation; name a .jsonl file or a folder that does")


def usable_conversations(
    conversations: Iterable[Conversation], special_tokens: Iterable[str]
) -> Iterator[Conversation]:
    """Leaves out, with one warning per reason, the conversations that nothing good can be learned from.

    Those are: no assistant turn; an assistant turn without text or calls; a message or a tool that spells one of the
    tokenizer's special tokens anywhere, which rendered text could not tell from the token itself (a message must not end its
    own turn).
    """
    special_tokens = tuple(special_tokens)
    skipped: dict[str, list[str]] = {}
    for conversation in conversations:
        reason = _reason_to_skip(conversation, special_tokens)
        if reason is None:
            yield conversation
        else:
            skipped.setdefault(reason, []).append(conversation.place)
    for reason, places in skipped.items():
        logger.warning("skipped %d conversation(s) %s, the first is %s", len(places), reason, places[0])


def _reason_to_skip(conversation: Conversation, special_tokens: tuple[str, ...]) -> str | None:
    turns = [message for message in conversation.messages if message["role"] == "assistant"]
    if not turns:
        return "without an assistant turn"
    if not all(turn["content"].strip() or turn.get("tool_calls") for turn in turns):
        return "with an empty assistant turn"
    # A template writes other fields (the arguments of a tool's call) as JSON.
    written = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False)
    texts = [written, *(message["content"] for message in conversation.messages)]
    if any(token in text for text in texts for token in special_tokens):
        return "in which a message spells a special token"
    return None


def _conversation(value: Any, place: str) -> Conversation:
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ConfigError(
            f'{place} is not an object with a list "messages" that is not empty; every line must be{_line_hint(value)}'
        )
    messages = [_message(message, f"{place} messages[{number}]") for number, message in enumerate(messages)]
    tools = None if _is_empty(value.get("tools")) else value["tools"]
    if tools is not None and not _is_list_of_objects(tools):
        raise ConfigError(
            f"{place} tools must be a list of objects, as the chat template describes them, got {_kind(tools)}; correct the "
            "line"
        )
    try:
        json.dumps([messages, tools], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{place} holds half a surrogate pair, which is no character; correct the line") from None
    except RecursionError:
        raise ConfigError(f"{place} nests objects too deeply; correct the line") from None
    return Conversation(messages, place, tools)


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f'{place} is not an object with "role" and "content"; correct the line')
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise ConfigError(
            f"{place}.role must be one of {', '.join(ROLES)}, got {reprlib.repr(role)}; correct the line{_role_hint(value)}"
        )
    message = {name: field for name, field in value.items() if name == "content" or not _is_empty(field)}
    calls = message.get("tool_calls")
    if calls is not None and not _is_list_of_objects(calls):
        raise ConfigError(f"{place}.tool_calls must be a list of objects, got {_kind(calls)}; correct the line")
    # A misspelled name of the field must not become a turn without words.
    has_content = "content" in value or (role == "assistant" and calls is not None)
    if has_content and _is_empty(content):
        # Templates add it to other text.
        content = ""
    if not isinstance(content, str):
        parts = "; join the texts of its parts into one string" if isinstance(content, list) else ""
        raise ConfigError(f"{place}.content must be a string, got {_kind(content)}{parts}")
    return message | {"role": role, "content": content}


def _is_empty(field: Any) -> bool:
    """Whether a field says no more than its absence: exports of tables fill every column."""
    return field is None or (isinstance(field, (str, list, dict)) and not field)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(element, dict) for element in value)


def _kind(value: Any) -> str:
    return type(value).__name__


def _line_hint(value: Any) -> str:
    """What to do about a line of another form that is often met."""
    if isinstance(value, list):
        return LIST_HINT
    if isinstance(value, dict) and "conversations" in value:
        return f' ("conversations" is another form: rename it to "messages"{_SHAREGPT})'
    return ""


def _role_hint(message: dict[str, Any]) -> str:
    if {"from", "value"} <= message.keys():
        return f" (this is another form{_SHAREGPT})"
    role = message.get("role")
    plain = role.strip().lower() if isinstance(role, str) else None
    return f" (write {plain!r})" if plain in ROLES else ""
