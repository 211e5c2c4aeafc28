"""Reading conversations: .jsonl files with messages and their roles."""

import json
import logging
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.data.documents import JSON_LINES_SUFFIX, LIST_HINT, json_lines, text_files
from megatron_dmc.files import why_no_file

logger = logging.getLogger(__name__)

# What a turn may hold instead of words; the second is OpenAI's older form.
CALLS = ("tool_calls", "function_call")
ROLES = ("system", "user", "assistant", "tool")
# What transformers' apply_chat_template, and what it calls, take beside a template's variables.
_NOT_VARIABLES = frozenset(
    (
        *("self", "conversation", "conversations", "messages", "tools", "documents"),
        *("chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
# Functions that every template may call: a variable would hide them.
_FUNCTIONS = frozenset(("raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner"))
# A text part with one of these is not text alone.
_MEDIA = ("image", "image_url", "video", "video_url", "audio", "audio_url", "input_audio", "file")
# What a line or a message has beside its text, in other libraries' data. (A "file" there may say where a text comes from.)
_MEDIA_BESIDE = ("images", "videos", "audios", *(name for name in _MEDIA if name != "file"))
# What a tool or a call may hold beside the name of its function.
_BESIDE_A_NAME = frozenset(("id", "index", "type", "function", "arguments", "description", "parameters", "strict"))
# Why a conversation is left out, and what to do where none is left.
_NO_TURN = "without an assistant turn"
_EMPTY_TURN = "with an empty assistant turn"
_SPELLS_TOKEN = "in which a message spells a special token"
_REMEDIES = {
    _NO_TURN: 'what is learned are messages with the role "assistant": add them',
    _EMPTY_TURN: "write what the assistant says into its messages",
    _SPELLS_TOKEN: "take the tokenizer's special tokens out of the messages",
}
_SHAREGPT = ', in its messages "from" to "role" (human is user, gpt is assistant) and "value" to "content"'


@dataclass(frozen=True)
class Conversation:
    """What a chat template writes.

    Attributes:
        messages: dicts with "role" and "content", and what else a template may read there. A content is a string, or a list
            of parts ``{"type": "text", "text": ...}``.
        place: the file and line.
        tools: what the assistant may call, as the template wants it described; None: not said.
        documents: what the assistant may quote, as the template wants it described; None: not said.
        variables: what else the template may read ("chat_template_kwargs" in a line).
    """

    messages: list[dict[str, Any]]
    place: str
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def iter_conversations(path: str | Path, name: str = "data") -> Iterator[Conversation]:
    """The conversations of a ``.jsonl`` file, or of all such files in a folder: ``{"messages": [...]}`` in every line.

    A message is an object with a "role" (system, user, assistant or tool) and a "content", a string or a list of text parts,
    which an assistant's turn with "tool_calls" can do without; null is no content. Its other fields are handed to the chat
    template, and so are the line's "tools", "documents" and "chat_template_kwargs"; other fields of the line are left out, but
    images, videos and audio are refused. A field that is null or empty is the same as none.

    Args:
        name: what errors call the path, such as the flag that named it.

    Raises:
        ConfigError: (while iterating) a path that is missing, unreadable or holds no conversation, or a line that is
            none. The message names the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in text_files(path) if file.suffix.lower() == JSON_LINES_SUFFIX]
    elif (problem := why_no_file(path)) is not None:
        raise ConfigError(f"{name} {path} {problem}; name a .jsonl file or a folder")
    elif path.suffix.lower() != JSON_LINES_SUFFIX:
        raise ConfigError(
            f"{name} {path} is neither a .jsonl file nor a folder; conversations are read from .jsonl files"
        )
    else:
        files = [path]
    found = False
    for file in files:
        for number, value in json_lines(file):
            found = True
            yield _conversation(value, f"{file}:{number}")
    if not found:
        raise ConfigError(f"{name} {path} holds no conversation; name a .jsonl file or a folder that does")


def usable_conversations(
    conversations: Iterable[Conversation], special_tokens: Iterable[str]
) -> Iterator[Conversation]:
    """Leaves out, with one warning per reason, the conversations that nothing good can be learned from.

    Those are: no assistant turn; an assistant turn without text or calls; a message or a tool that spells one of the
    tokenizer's special tokens anywhere, which rendered text could not tell from the token itself (a message must not end its
    own turn).

    Raises:
        ConfigError: (at the end) none is left.
    """
    special_tokens = tuple(special_tokens)
    skipped: dict[str, list[str]] = {}
    kept = False
    for conversation in conversations:
        reason = _reason_to_skip(conversation, special_tokens)
        if reason is None:
            kept = True
            yield conversation
        else:
            skipped.setdefault(reason, []).append(conversation.place)
    if skipped and not kept:
        found = ", ".join(f"{len(places)} {reason} (the first is {places[0]})" for reason, places in skipped.items())
        remedies = "; ".join(_REMEDIES[reason] for reason in skipped)
        raise ConfigError(f"there is no conversation to learn from: {found}; {remedies}")
    for reason, places in skipped.items():
        logger.warning("warning: skipped %d conversation(s) %s, the first is %s", len(places), reason, places[0])


def _reason_to_skip(conversation: Conversation, special_tokens: tuple[str, ...]) -> str | None:
    turns = [message for message in conversation.messages if message["role"] == "assistant"]
    if not turns:
        return _NO_TURN
    if not all(text_of(turn["content"]).strip() or any(map(turn.get, CALLS)) for turn in turns):
        return _EMPTY_TURN
    # A template writes other fields (the arguments of a tool's call) as JSON.
    read = [conversation.messages, conversation.tools, conversation.documents, conversation.variables]
    texts = [json.dumps(read, ensure_ascii=False), *(text_of(message["content"]) for message in conversation.messages)]
    if any(token in text for text in texts for token in special_tokens):
        return _SPELLS_TOKEN
    return None


def text_of(content: str | list[dict[str, Any]]) -> str:
    """The text of a message's content; parts follow one another without white space, as templates write them."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _conversation(value: Any, place: str) -> Conversation:
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ConfigError(
            f'{place} is not an object with a list "messages" that is not empty; every line must be{_line_hint(value)}'
        )
    _check_no_media(value, place)
    if not _is_empty(value.get("functions")):
        raise ConfigError(
            f'{place} holds "functions", OpenAI\'s older form, which no chat template gets: write "tools" instead, a list of '
            '{"type": "function", "function": {...}}'
        )
    messages = [_message(message, f"{place} messages[{number}]") for number, message in enumerate(messages)]
    tools, documents, variables = (
        None if _is_empty(value.get(name)) else value[name] for name in ("tools", "documents", "chat_template_kwargs")
    )
    for name, objects in (("tools", tools), ("documents", documents)):
        if objects is not None and not _is_list_of_objects(objects):
            raise ConfigError(
                f"{place} {name} must be a list of objects, as the chat template describes them, got {_kind(objects)}; "
                "correct the line"
            )
    for number, tool in enumerate(tools or ()):
        _check_function(tool, f"{place} tools[{number}]")
    variables = _variables({} if variables is None else variables, place)
    try:
        json.dumps([messages, tools, documents, variables], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{place} holds half a surrogate pair, which is no character; correct the line") from None
    except ValueError:
        raise ConfigError(
            f"{place} holds NaN, Infinity or a number as large (1e999), which JSON cannot write; write null or a string"
        ) from None
    except RecursionError:
        raise ConfigError(f"{place} nests objects too deeply; correct the line") from None
    return Conversation(messages, place, tools, documents, variables)


def _variables(values: Any, place: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{place} chat_template_kwargs must be an object, got {_kind(values)}; correct the line")
    if taken := sorted(_NOT_VARIABLES & values.keys()):
        raise ConfigError(
            f"{place} chat_template_kwargs names {taken[0]}, which is no variable of a template; take it out of the line"
        )
    if hidden := sorted(_FUNCTIONS & values.keys()):
        raise ConfigError(
            f"{place} chat_template_kwargs names {hidden[0]}, which is a function that templates call; take it out of the line"
        )
    # Exports of tables fill every column.
    return {name: value for name, value in values.items() if value is not None}


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f'{place} is not an object with "role" and "content"; correct the line')
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise ConfigError(
            f"{place}.role must be one of {', '.join(ROLES)}, got {reprlib.repr(role)}; correct the line{_role_hint(value)}"
        )
    message = {name: field for name, field in value.items() if name == "content" or not _is_empty(field)}
    _check_no_media(message, place)
    calls = message.get("tool_calls")
    if calls is not None and not _is_list_of_objects(calls):
        raise ConfigError(f"{place}.tool_calls must be a list of objects, got {_kind(calls)}; correct the line")
    # A misspelled name of the field must not become a turn without words.
    has_content = "content" in value or (role == "assistant" and calls is not None)
    if has_content and _is_empty(content):
        # Templates add it to other text.
        content = ""
    if isinstance(content, list):
        content = [_part(part, f"{place}.content[{number}]") for number, part in enumerate(content)]
    elif not isinstance(content, str):
        raise ConfigError(f"{place}.content must be a string or a list of text parts, got {_kind(content)}")
    for number, call in enumerate(calls or ()):
        _check_function(call, f"{place}.tool_calls[{number}]")
    if role == "assistant" and message.get("weight", 1) != 1:
        raise ConfigError(
            f"{place}.weight is {reprlib.repr(message['weight'])}, but every turn of the assistant is learned alike; take the "
            "field out, or end the conversation before that turn"
        )
    return message | {"role": role, "content": content}


def _check_function(value: dict[str, Any], place: str) -> None:
    """A tool, or a call of one, names its function, here or in ``function``: it would be written without a name, and learned.
    One of another type or form is the template's to read."""
    function, kind = value.get("function"), value.get("type")
    has_function = not _holds_nothing(function)
    others = (field for name, field in value.items() if name not in _BESIDE_A_NAME)
    is_other = (
        not has_function and kind != "function" and not (_holds_nothing(kind) and all(map(_holds_nothing, others)))
    )
    names = (value.get("name"), function.get("name") if isinstance(function, dict) else function)
    if not is_other and not any(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(
            f'{place} names no function, got {reprlib.repr(value)}; write {{"type": "function", "function": {{"name": ...}}}} '
            "or take it out"
        )


def _part(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") != "text" or not isinstance(value.get("text"), str):
        raise ConfigError(
            f'{place} must be {{"type": "text", "text": "..."}}, got {reprlib.repr(value)}; the model reads text only: '
            "correct the line, or leave it out"
        )
    part = {name: field for name, field in value.items() if name == "text" or not _is_empty(field)}
    if media := next((name for name in _MEDIA if name in part), None):
        raise ConfigError(
            f'{place} is a text with the field "{media}"; the model reads text only: take the field out, or leave the line out'
        )
    return part


def _check_no_media(value: dict[str, Any], place: str) -> None:
    if media := next((name for name in _MEDIA_BESIDE if not _holds_nothing(value.get(name))), None):
        raise ConfigError(
            f'{place} has "{media}" beside its text; the model reads text only: take the field out, or leave the line out'
        )


def _is_empty(field: Any) -> bool:
    """Whether a field says no more than its absence: exports of tables fill every column."""
    return field is None or (isinstance(field, (str, list, dict)) and not field)


def _holds_nothing(field: Any) -> bool:
    """Whether there is nothing in a field, however deep: a table's columns may have columns of their own."""
    if isinstance(field, dict | list):
        return all(map(_holds_nothing, field.values() if isinstance(field, dict) else field))
    return not (field.strip() if isinstance(field, str) else field)


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
