"""Conversations as a tokenizer's own chat template writes them, and which of the characters are the assistant's.

The template is a Jinja program out of the tokenizer's folder. transformers runs it in Jinja's immutable sandbox, on plain
strings, lists and dicts; nothing else of the folder is run or unpickled.
"""

import re
import reprlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.data.chat import CALLS, Conversation, text_of
from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.files import why_no_file

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
# Code points that no text holds: Unicode keeps them for a program's own use.
_BEGIN, _END = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class RenderedChat:
    """text: a whole conversation; spans: the characters [begin, end) in it that the model has to learn, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """Renders conversations. Made by :func:`load_chat_template`.

    Args:
        source: the Jinja template.
        variables: the special tokens that it may name (``bos_token`` and the like).
        special_tokens: how all special tokens are spelled.
        name: of the template in messages.
    """

    def __init__(self, source: str, variables: dict[str, Any], special_tokens: frozenset[str], name: str) -> None:
        self.source = source
        self.variables = variables
        self.special_tokens = tuple(special_tokens)
        self.name = name
        self.marked_source = _GENERATION.sub(_marker, source)

    def render(self, conversation: Conversation) -> RenderedChat:
        """Where the template marks the assistant's part with ``{% generation %}``, that is it.

        Otherwise it is what follows a turn's generation prompt, up to the token that ends the turn. That is exact where the
        conversation up to that token is rendered alike whether or not more follows; a template that rewrites turns (drops
        their reasoning, say) is refused, and so is one that writes nothing for a turn.

        Raises:
            ConfigError: the template refuses the conversation, leaves out what it has to do with tools, or does not tell the
                assistant's part exactly.
        """
        conversation = self._with_contents_it_reads(conversation)
        text = self._run(self.source, conversation)
        self._check_all_is_written(text, conversation)
        if self.marked_source != self.source:
            spans = self._marked_spans(text, conversation)
        else:
            spans = self._turn_spans(text, conversation)
        return RenderedChat(text, tuple(spans))

    def _with_contents_it_reads(self, conversation: Conversation) -> Conversation:
        """A list of parts stays as it is where the template writes the texts of parts; it is one string where it does not.

        Templates differ in this, and some from role to role. Others drop a list, or write it as Python does, brackets and all.

        Raises:
            ConfigError: a list has to become one string, and its parts say more than their text.
        """
        lists = {
            number: message["content"]
            for number, message in enumerate(conversation.messages)
            if isinstance(message["content"], list)
        }
        if not lists:
            return conversation
        # The parts with other texts and a field of our own: what reads parts writes every text and not the field.
        asked = conversation
        texts = {
            number: [f"{_BEGIN}{number}.{i}{_BEGIN}" for i in range(len(parts))] for number, parts in lists.items()
        }
        fields = {number: f"{_END}{number}{_END}" for number in lists}
        for number, parts in lists.items():
            other = [
                part | {"text": text, fields[number]: True} for part, text in zip(parts, texts[number], strict=True)
            ]
            asked = _exchange(asked, number, conversation.messages[number] | {"content": other})
        written = ""
        with suppress(ConfigError):
            written = self._run(self.source, asked)
        for number, parts in lists.items():
            if fields[number] not in written and all(text in written for text in texts[number]):
                continue
            for place, part in enumerate(parts):
                if more := sorted(part.keys() - {"type", "text"}):
                    raise ConfigError(
                        f"{conversation.place} messages[{number}].content[{place}] has the field {reprlib.repr(more[0])}, but "
                        f"the chat template of {self.name} takes the text of such a message alone; name a template that reads "
                        "lists of parts with --chat-template, or take the field out of the line"
                    )
            content = text_of(parts)
            conversation = _exchange(conversation, number, conversation.messages[number] | {"content": content})
        return conversation

    def _check_all_is_written(self, text: str, conversation: Conversation) -> None:
        """Many templates know nothing of tools or documents, and drop them, calls and results without a word."""
        for what, other in _without_one_thing(conversation):
            try:
                is_written = self._run(self.source, other) != text
            except ConfigError:
                # It misses what was taken away.
                continue
            if not is_written:
                raise ConfigError(
                    f"{conversation.place}: the chat template of {self.name} leaves out {what}; name a template that writes "
                    "them with --chat-template, or take them out of the line"
                )

    def _marked_spans(self, text: str, conversation: Conversation) -> list[tuple[int, int]]:
        """From a second rendering in which characters of our own stand for the marks.

        transformers counts what came before a block, and counts wrong where the block is inside a macro.
        """
        if own := next((character for character in (_BEGIN, _END) if character in text), None):
            raise ConfigError(
                f"{conversation.place} holds U+{ord(own):04X}, a code point that no text has and that marks the assistant's "
                "part here; take it out of the line"
            )
        spans, plain, begin = [], "", None
        for piece in re.split(f"([{_BEGIN}{_END}])", self._run(self.marked_source, conversation)):
            if piece == _BEGIN and begin is None:
                begin = len(plain)
            elif piece == _END and begin is not None:
                spans.append((begin, len(plain)))
                begin = None
            else:
                plain += piece
        if plain != text or begin is not None:
            raise ConfigError(
                f"{conversation.place}: {{% generation %}} in the chat template of {self.name} does not stand around text "
                "that is written as it is; correct the template, or name another with --chat-template"
            )
        spans = [span for span in spans if span[0] < span[1]]
        if not spans:
            raise ConfigError(
                f"{conversation.place}: the chat template of {self.name} has {{% generation %}}, but marks nothing here; "
                "correct the template, or name another with --chat-template"
            )
        return spans

    def _turn_spans(self, text: str, conversation: Conversation) -> list[tuple[int, int]]:
        spans = []
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            prompt = self._run(self.source, conversation, number, prompts=True)
            through = self._run(self.source, conversation, number + 1)
            begin = len(prompt)
            end = begin + self._turn_length(through[begin:])
            if not (through.startswith(prompt) and text.startswith(through[:end])):
                raise ConfigError(
                    f"{conversation.place}: the chat template of {self.name} writes messages[{number}] differently at the "
                    "end than inside, so the assistant's part is not exact; put {% generation %} ... {% endgeneration %} "
                    "around it in a copy of the template and name that with --chat-template"
                )
            if begin == end:
                raise ConfigError(
                    f"{conversation.place}: the chat template of {self.name} writes nothing for messages[{number}], so "
                    "there is nothing to learn; correct the template, or name another with --chat-template"
                )
            spans.append((begin, end))
        return spans

    def _turn_length(self, turn: str) -> int:
        """How many characters of ``turn``, which ends a conversation, are the turn's own.

        It ends with the first special token of what it has in common with the end of a user's turn: after that some
        templates write an end of text, or always the next prompt.
        """
        alike = takewhile(
            lambda pair: pair[0] == pair[1], zip(reversed(turn), reversed(self._users_turn), strict=False)
        )
        ending = turn[len(turn) - len(list(alike)) :]
        places = [ending.find(token) + len(token) for token in self.special_tokens if token in ending]
        if places:
            return len(turn) - len(ending) + min(places)
        written = turn.rstrip()
        return len(written) if written.endswith(self.special_tokens) else len(turn)

    @cached_property
    def _users_turn(self) -> str:
        """A conversation of one; empty where the template refuses that."""
        with suppress(ConfigError):
            return self._run(self.source, Conversation([{"role": "user", "content": "?"}], "a question"))
        return ""

    def _run(self, source: str, conversation: Conversation, count: int | None = None, *, prompts: bool = False) -> str:
        """The first ``count`` messages; ``prompts``: with what asks the model for the next turn."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tools: Any = conversation.tools
        documents: Any = conversation.documents
        try:
            rendered: Any = render_jinja_template(
                [conversation.messages[:count]],
                tools=tools,
                documents=documents,
                chat_template=source,
                add_generation_prompt=prompts,
                **(self.variables | dict(conversation.variables)),
            )
        # A template can raise whatever Python can.
        except Exception as error:
            raise ConfigError(
                f"{conversation.place}: the chat template of {self.name} fails on it: {_one_line(error)}; correct the line, "
                "or name another template with --chat-template"
            ) from None
        [text], _ = rendered
        return text


@dataclass(frozen=True)
class NamedTemplates:
    """A tokenizer's templates, of which transformers takes ``tool_use`` for a conversation with tools.

    Attributes:
        default: None where there is none.
        name: of the tokenizer in messages.
    """

    default: ChatTemplate | None
    tool_use: ChatTemplate
    name: str

    def render(self, conversation: Conversation) -> RenderedChat:
        """:meth:`ChatTemplate.render` of the template for the conversation.

        Raises:
            ConfigError: there is none, or the template raises it.
        """
        template = self.tool_use if conversation.tools is not None else self.default
        if template is None:
            raise ConfigError(
                f"{conversation.place}: {self.name} has a chat template only for conversations with tools, and this one has "
                "none; name another with --chat-template"
            )
        return template.render(conversation)


def load_chat_template(tokenizer: Tokenizer, file: str | Path | None = None) -> ChatTemplate | NamedTemplates:
    """What writes conversations as transformers' ``apply_chat_template`` does.

    Args:
        file: a Jinja template, or the name of one of the folder's, for all conversations; None: the folder's own, of several
            ``tool_use`` for conversations with tools and ``default`` for the others.

    Raises:
        ConfigError: transformers is not installed, the folder names no template, or the file cannot be read.
    """
    try:
        from transformers import PreTrainedTokenizerFast
        from transformers.utils import chat_template_utils  # noqa: F401
    except ImportError:
        raise ConfigError(
            "chat data is rendered by transformers, which is not installed; pip install 'megatron-dmc[hf]'"
        ) from None
    try:
        # This class by name, and not the one that the folder names: no code of the folder's is looked for.
        settings = PreTrainedTokenizerFast.from_pretrained(str(tokenizer.folder), local_files_only=True)
        variables, source = settings.special_tokens_map, settings.chat_template
    except Exception as error:
        raise ConfigError(f"tokenizer {tokenizer.folder} cannot be read by transformers: {_one_line(error)}") from None
    named = {name: text for name, text in (source if isinstance(source, dict) else {"default": source}).items() if text}

    def template(source: str, name: str) -> ChatTemplate:
        return ChatTemplate(source, variables, tokenizer.special_tokens, name)

    folder = str(tokenizer.folder)
    if file is not None:
        return template(_read_template(str(file), named), str(file))
    tool_use = template(named["tool_use"], f"{folder} (tool_use)") if "tool_use" in named else None
    default = template(named["default"], folder) if "default" in named else None
    if tool_use is not None:
        return NamedTemplates(default, tool_use, folder)
    if default is None:
        raise ConfigError(
            f"tokenizer {folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); name "
            f"one with --chat-template{_among(named)}"
        )
    return default


def _read_template(file: str, named: dict[str, str]) -> str:
    if file in named and not Path(file).exists():
        return named[file]
    if (problem := why_no_file(Path(file))) is not None:
        raise ConfigError(f"--chat-template {file} {problem}; name a file{_among(named)}")
    try:
        source = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template {file} cannot be read: {_one_line(error)}{_among(named)}") from None
    if not source:
        raise ConfigError(f"--chat-template {file} is empty; name another")
    return source


def _among(named: dict[str, str]) -> str:
    others = sorted(named.keys() - {"default"})
    return f" (the tokenizer has {', '.join(others)})" if others else ""


def _without_one_thing(conversation: Conversation) -> Iterator[tuple[str, Conversation]]:
    """Everything in a conversation that has to do with tools or documents: what it is, and the conversation without it."""
    if conversation.tools is not None:
        yield 'the line\'s "tools"', replace(conversation, tools=None)
    if conversation.documents is not None:
        yield 'the line\'s "documents"', replace(conversation, documents=None)
    for number, message in enumerate(conversation.messages):
        for call in filter(message.get, CALLS):
            other = {name: field for name, field in message.items() if name != call}
            yield f"messages[{number}].{call}", _exchange(conversation, number, other)
        if message["role"] == "tool":
            # other text, because many templates refuse a call without a result
            content = message["content"]
            more: Any = "?" if isinstance(content, str) else [{"type": "text", "text": "?"}]
            other = message | {"content": content + more}
            yield f"messages[{number}], which is a tool's", _exchange(conversation, number, other)


def _exchange(conversation: Conversation, number: int, message: dict[str, Any]) -> Conversation:
    messages = [*conversation.messages[:number], message, *conversation.messages[number + 1 :]]
    return replace(conversation, messages=messages)


def _marker(tag: re.Match[str]) -> str:
    """Text at the place of a tag, with the tag's own say over the white space around it."""
    left, ends, right = tag.groups()
    return f"{{%{left} if true %}}{_END if ends else _BEGIN}{{% endif {right}%}}"


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n", maxsplit=1)[0]
