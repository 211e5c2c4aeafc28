"""What a line says beside its messages' strings, written as transformers' apply_chat_template writes it: contents that are
lists of text parts, documents, and variables of the template (chat_template_kwargs, as TRL hands them on)."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from megatron_dmc.config import ConfigError
from megatron_dmc.data import iter_conversations, load_chat_template
from megatron_dmc.data.chat import _FUNCTIONS, _NOT_VARIABLES, text_of
from megatron_dmc.data.chat_template import RenderedChat
from megatron_dmc.data.tokenizer import load_tokenizer
from tests.support.chats import PLAIN, chat_tokenizer
from tests.support.published_templates import FORMS

_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As templates of Llama 4, Gemma 3 and SmolVLM do.
READS_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}" + _PROMPT
)
# Of the user alone.
READS_USERS_PARTS = READS_PARTS.replace("m.content is string", "m.role != 'user' or m.content is string")
# As Qwen3's: any list is nothing.
DROPS_LISTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set text = m.content if m.content is string else '' %}{{ text }}"
    "<|im_end|>\n{% endfor %}" + _PROMPT
)
WRITES_JSON = PLAIN.replace("{{ m.content }}", "{{ m.content if m.content is string else m.content | tojson }}")
TAKES_STRINGS = PLAIN.replace("{{ m.content }}", "{{ m.content.strip() }}")


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": parts("One rule.")},
    {"role": "user", "content": parts("First, ", "größer?")},
    {"role": "assistant", "content": parts("It ", "is.")},
    {"role": "user", "content": "A string."},
    {"role": "assistant", "content": parts("Yes.")},
]
JOINED = [message | {"content": text_of(message["content"])} for message in CHAT]


def transformers_tokenizer(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def render(folder: Path, **line: Any) -> RenderedChat:
    """A line of a file, by the template of the folder."""
    path = folder / "chat.jsonl"
    path.write_text(json.dumps(line))
    [conversation] = iter_conversations(path)
    return load_chat_template(load_tokenizer(folder)).render(conversation)


@pytest.mark.parametrize("source", [READS_PARTS, READS_USERS_PARTS], ids=["all", "the user's"])
def test_parts_go_to_a_template_that_reads_them(tmp_path: Path, source: str) -> None:
    chat_tokenizer(tmp_path, source)
    rendered = render(tmp_path, messages=CHAT)
    theirs = transformers_tokenizer(tmp_path)
    as_it_is = theirs.apply_chat_template(CHAT, tokenize=False)
    assert rendered.text == theirs.apply_chat_template(JOINED, tokenize=False)
    assert (rendered.text == as_it_is) == (source == READS_PARTS)
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["It is.<|im_end|>", "Yes.<|im_end|>"]


def test_a_template_sees_the_parts_themselves(tmp_path: Path) -> None:
    """And not their text alone: it may write something between them."""
    chat_tokenizer(tmp_path, READS_PARTS.replace("{{ part.text }}", "{{ part.text }}{{ '|' if not loop.last }}"))
    rendered = render(tmp_path, messages=CHAT)
    assert rendered.text == transformers_tokenizer(tmp_path).apply_chat_template(CHAT, tokenize=False)
    assert "First, |größer?" in rendered.text


@pytest.mark.parametrize(
    "source", [PLAIN, TAKES_STRINGS, DROPS_LISTS, WRITES_JSON], ids=["python", "strings", "drops", "json"]
)
def test_parts_are_joined_for_a_template_that_takes_strings(tmp_path: Path, source: str) -> None:
    chat_tokenizer(tmp_path, source)
    rendered = render(tmp_path, messages=CHAT)
    assert rendered == render(tmp_path, messages=JOINED)
    assert rendered.text == transformers_tokenizer(tmp_path).apply_chat_template(JOINED, tokenize=False)


CACHED: list[dict[str, Any]] = [
    CHAT[1],
    {
        "role": "assistant",
        "content": [*parts("It "), {"type": "text", "text": "is.", "cache_control": {"type": "short"}}],
    },
]


@pytest.mark.parametrize("write", ["", "{{ (part.cache_control or {}).type }}"], ids=["not read", "read"])
def test_further_fields_of_parts_go_to_a_template_that_reads_parts(tmp_path: Path, write: str) -> None:
    chat_tokenizer(tmp_path, READS_PARTS.replace("{{ part.text }}", "{{ part.text }}" + write))
    expected = transformers_tokenizer(tmp_path).apply_chat_template(CACHED, tokenize=False)
    assert render(tmp_path, messages=CACHED).text == expected
    assert ("is.short" in expected) == bool(write)


@pytest.mark.parametrize(
    "source",
    [PLAIN, TAKES_STRINGS, DROPS_LISTS, WRITES_JSON, READS_USERS_PARTS],
    ids=["python", "strings", "drops", "json", "the user's"],
)
def test_further_fields_are_not_lost_where_parts_are_joined(tmp_path: Path, source: str) -> None:
    chat_tokenizer(tmp_path, source)
    message = (
        r"chat.jsonl:1 messages\[1\].content\[1\] has the field 'cache_control', but .* takes the text .* alone; name"
    )
    with pytest.raises(ConfigError, match=message):
        render(tmp_path, messages=CACHED)


def test_every_part_is_written(tmp_path: Path) -> None:
    """A template that takes the first part, or another thing in place of the text, does not read parts."""
    chat_tokenizer(
        tmp_path, PLAIN.replace("{{ m.content }}", "{{ m.content if m.content is string else m.content[0].text }}")
    )
    assert render(tmp_path, messages=CHAT) == render(tmp_path, messages=JOINED)
    chat_tokenizer(tmp_path / "b", READS_PARTS.replace("{{ part.text }}", "{{ part.cache_control or part.text }}"))
    with pytest.raises(ConfigError, match="has the field 'cache_control'"):
        render(tmp_path / "b", messages=CACHED)


@pytest.mark.parametrize("name", FORMS)
def test_parts_in_published_templates(tmp_path: Path, name: str) -> None:
    form = FORMS[name]
    chat_tokenizer(tmp_path, form.plain, special_tokens=form.special_tokens)
    start = 0 if form.has_system else 1
    rendered = render(tmp_path, messages=CHAT[start:])
    assert rendered.text == transformers_tokenizer(tmp_path).apply_chat_template(JOINED[start:], tokenize=False)


def test_a_tools_parts(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path, READS_PARTS)
    chat = [CHAT[1], {"role": "tool", "content": parts("7", " degrees")}, CHAT[2]]
    expected = transformers_tokenizer(tmp_path).apply_chat_template(chat, tokenize=False)
    assert render(tmp_path, messages=chat).text == expected


DOCUMENTS = [{"title": "Weather", "text": "It rains."}, {"title": "Größe", "text": "Small."}]
WRITES_DOCUMENTS = (
    "{% for d in documents or [] %}<|im_start|>document\n{{ d.title }}: {{ d.text }}<|im_end|>\n{% endfor %}" + PLAIN
)
# As Qwen3's.
READS_VARIABLES = (
    "{% if enable_thinking is defined and not enable_thinking %}No thoughts.{% endif %}{{ persona }}" + PLAIN
)


def test_documents_are_written_as_transformers_writes_them(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path, WRITES_DOCUMENTS)
    theirs = transformers_tokenizer(tmp_path)
    expected = theirs.apply_chat_template(JOINED, documents=DOCUMENTS, tokenize=False)
    rendered = render(tmp_path, messages=JOINED, documents=DOCUMENTS)
    assert rendered.text == expected and "Größe: Small." in expected
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["It is.<|im_end|>", "Yes.<|im_end|>"]


def test_a_template_that_leaves_documents_out_is_refused(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path, PLAIN)
    with pytest.raises(ConfigError, match='leaves out the line\'s "documents"; name a template that writes them'):
        render(tmp_path, messages=JOINED, documents=DOCUMENTS)


@pytest.mark.parametrize(
    "variables",
    [{"enable_thinking": False}, {"enable_thinking": True, "persona": "A pirate. "}, {"unused": [1, {"a": 2}]}],
)
def test_variables_are_handed_on(tmp_path: Path, variables: dict[str, Any]) -> None:
    chat_tokenizer(tmp_path, READS_VARIABLES)
    expected = transformers_tokenizer(tmp_path).apply_chat_template(JOINED, tokenize=False, **variables)
    rendered = render(tmp_path, messages=JOINED, chat_template_kwargs=variables)
    assert rendered.text == expected
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["It is.<|im_end|>", "Yes.<|im_end|>"]


def test_a_variable_goes_before_the_tokenizers_own(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path, "{{ bos_token }}" + PLAIN)
    expected = transformers_tokenizer(tmp_path).apply_chat_template(JOINED, tokenize=False, bos_token="begin ")
    assert render(tmp_path, messages=JOINED, chat_template_kwargs={"bos_token": "begin "}).text == expected


@pytest.mark.parametrize("nothing", [None, [], {}, ""], ids=["null", "list", "object", "string"])
def test_nothing_is_the_same_as_no_field(tmp_path: Path, nothing: Any) -> None:
    chat_tokenizer(tmp_path, READS_VARIABLES + "{% if documents is not none %}documents{% endif %}")
    plain = render(tmp_path, messages=JOINED)
    assert render(tmp_path, messages=JOINED, documents=nothing, chat_template_kwargs=nothing) == plain


def test_a_variable_that_is_null_is_none(tmp_path: Path) -> None:
    """A table's column of objects has every name in every row."""
    chat_tokenizer(tmp_path, READS_VARIABLES)
    plain = render(tmp_path, messages=JOINED)
    assert render(tmp_path, messages=JOINED, chat_template_kwargs={"enable_thinking": None}) == plain


def test_no_argument_of_transformers_is_a_variable() -> None:
    arguments = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    arguments |= set(inspect.signature(render_jinja_template).parameters)
    # Jinja's render is a method, and its own variables are what render_jinja_template names.
    assert arguments - {"kwargs"} | {"self", "messages"} <= _NOT_VARIABLES


def test_no_function_of_a_template_is_a_variable() -> None:
    assert _compile_jinja_template("").environment.globals.keys() == _FUNCTIONS
