"""Conversations with tools: written as transformers writes them, by the template that it takes, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_dmc.config import ConfigError
from megatron_dmc.data import iter_conversations, load_chat_template
from megatron_dmc.data.chat import Conversation
from tests.support.tokenizer_folders import tokenizer_folder

_TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DEFAULT = "{% for m in messages %}" + _TURN + "{{ m.content }}{{ '<|im_end|>\n' }}{% endfor %}" + _PROMPT
TOOL_USE = (
    "{% if tools %}{{ '<|im_start|>system\nTOOLS ' + tools | tojson + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    + _TURN
    + "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}{{ m.content }}"
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + _PROMPT
)
MARKED = TOOL_USE.replace("{% for c", "{% generation %}{% for c").replace(
    "{{ m.content }}", "{{ m.content }}{% endgeneration %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "what is the weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "seven degrees"},
]
PLAIN_CHAT = [CHAT[0], CHAT[3]]


def folder_of(folder: Path, templates: Any, layout: str) -> Any:
    """A tokenizer whose folder holds named templates as transformers 4 (one file) or 5 (a file each) writes them."""
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    settings = {"chat_template": listed} if layout == "list" else {}
    tokenizer = tokenizer_folder(folder, "<|im_start|>", "<|im_end|>", **settings)
    if layout == "files":
        (folder / "additional_chat_templates").mkdir()
        for name, text in templates.items():
            path = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
            (folder / f"{path}.jinja").write_text(text)
    return tokenizer


@pytest.mark.parametrize("layout", ["list", "files"])
@pytest.mark.parametrize(
    "templates",
    [
        {"default": DEFAULT, "tool_use": TOOL_USE},
        {"default": DEFAULT, "rag": "no", "tool_use": MARKED},
        {"default": TOOL_USE},
        {"default": TOOL_USE, "rag": "no"},
    ],
    ids=["two", "three", "one", "no-tool-use"],
)
def test_written_as_transformers_writes_it(tmp_path: Path, templates: dict[str, str], layout: str) -> None:
    tokenizer = folder_of(tmp_path, templates, layout)
    template = load_chat_template(tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for tools, chat in ((TOOLS, CHAT), (TOOLS, PLAIN_CHAT), (None, PLAIN_CHAT)):
        rendered = template.render(Conversation(chat, "chat.jsonl:1", tools))
        assert rendered.text == theirs.apply_chat_template(chat, tools=tools, tokenize=False)
        [(tokens, _)] = tokenizer.tokenize_rendered([rendered.text])
        assert tokens == theirs.apply_chat_template(chat, tools=tools, return_dict=False)
        if "{% generation %}" not in templates.get("tool_use", ""):
            call = f"<tool_call>{json.dumps(CALL['function'], ensure_ascii=False)}</tool_call><|im_end|>"
            learned = [rendered.text[begin:end] for begin, end in rendered.spans]
            assert learned == [call] * (chat is CHAT) + ["seven degrees<|im_end|>"]


CALL_IN_WORDS = [CHAT[0], {**CHAT[1], "content": "I ask."}]
DESCRIBES = TOOL_USE.replace("c in m.tool_calls or []", "c in []")
OLDER_CALL = [PLAIN_CHAT[0], {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}]
NO_RESULTS = DEFAULT.replace("in messages", "in messages if m.role != 'tool'")


@pytest.mark.parametrize(
    ("source", "chat", "tools", "what"),
    [
        (DEFAULT, PLAIN_CHAT, TOOLS, r'the line\'s "tools"'),
        (DEFAULT, CALL_IN_WORDS, None, r"messages\[1\]\.tool_calls"),
        (DESCRIBES, CALL_IN_WORDS, TOOLS, r"messages\[1\]\.tool_calls"),
        (DEFAULT, OLDER_CALL, None, r"messages\[1\]\.function_call"),
        (NO_RESULTS, [*PLAIN_CHAT, CHAT[2], CHAT[3]], None, r"messages\[2\], which is a tool's"),
    ],
    ids=["descriptions", "call", "call-alone", "older-call", "result"],
)
def test_a_template_that_leaves_them_out_is_refused(
    tmp_path: Path, source: str, chat: list[dict[str, Any]], tools: Any, what: str
) -> None:
    tokenizer = tokenizer_folder(tmp_path, "<|im_start|>", "<|im_end|>", chat_template=source)
    with pytest.raises(ConfigError, match=rf"^chat.jsonl:3: .* leaves out {what}; name a template .*--chat-template"):
        load_chat_template(tokenizer).render(Conversation(chat, "chat.jsonl:3", tools))


def test_a_template_that_needs_tools_leaves_nothing_out(tmp_path: Path) -> None:
    source = "{% if not tools %}{{ raise_exception('tools, please') }}{% endif %}" + TOOL_USE
    tokenizer = tokenizer_folder(tmp_path, "<|im_start|>", "<|im_end|>", chat_template=source)
    assert "TOOLS" in load_chat_template(tokenizer).render(Conversation(CHAT, "chat.jsonl:1", TOOLS)).text


def test_templates_without_a_default(tmp_path: Path) -> None:
    template = load_chat_template(folder_of(tmp_path / "a", {"tool_use": TOOL_USE}, "list"))
    assert template.render(Conversation(CHAT, "chat.jsonl:1", TOOLS)).text
    with pytest.raises(ConfigError, match=r"chat.jsonl:2: .* only for conversations with tools, and this one has none"):
        template.render(Conversation(PLAIN_CHAT, "chat.jsonl:2"))
    with pytest.raises(
        ConfigError, match=r"has no chat template .*name one with --chat-template \(the tokenizer has rag\)"
    ):
        load_chat_template(folder_of(tmp_path / "b", {"rag": DEFAULT}, "list"))


def test_one_of_them_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = folder_of(tmp_path / "tokenizer", {"default": "no", "rag": DEFAULT}, "files")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rendered = load_chat_template(tokenizer, "rag").render(Conversation(PLAIN_CHAT, "chat.jsonl:1"))
    assert rendered.text == theirs.apply_chat_template(PLAIN_CHAT, chat_template="rag", tokenize=False)
    with pytest.raises(ConfigError, match=r"--chat-template rga does not exist; name a file \(the tokenizer has rag\)"):
        load_chat_template(tokenizer, "rga")
    # a file goes before a name
    Path("rag").write_text(TOOL_USE)
    assert "TOOLS" in load_chat_template(tokenizer, "rag").render(Conversation(CHAT, "chat.jsonl:1", TOOLS)).text
    Path("empty").write_text("")
    with pytest.raises(ConfigError, match="--chat-template empty is empty"):
        load_chat_template(tokenizer, "empty")


# It asks whether a field is there, as Llama 3.1's template does.
ASKS = (
    "{% for m in messages %}{% if 'tool_calls' in m and m.tool_calls | length != 1 %}{{ raise_exception('one') }}{% endif %}"
    "{% if m.name is defined %}{{ 'name ' + m.name }}{% endif %}{% if m.documents is defined %}documents{% endif %}"
    + _TURN
    + "{{ m.content + '<|im_end|>' }}{% endfor %}"
    + _PROMPT
    + "{% if tools is not none %}tools{% endif %}"
)


@pytest.mark.parametrize("nothing", [None, [], {}, ""], ids=["null", "list", "object", "string"])
def test_an_empty_field_is_none(tmp_path: Path, nothing: Any) -> None:
    tokenizer = tokenizer_folder(tmp_path, "<|im_start|>", "<|im_end|>", chat_template=ASKS)
    template = load_chat_template(tokenizer)
    fields = ("tool_calls", "name", "documents", "tool_call_id", "reasoning_content")
    made = []
    for empty in ({}, dict.fromkeys(fields, nothing)):
        line: dict[str, Any] = {"messages": [empty | turn for turn in PLAIN_CHAT]}
        line |= dict.fromkeys(("tools", "documents"), nothing) if empty else {}
        (tmp_path / "chat.jsonl").write_text(json.dumps(line))
        [chat] = iter_conversations(tmp_path / "chat.jsonl")
        made.append((chat.messages, chat.tools, template.render(chat)))
    assert made[0] == made[1] and made[0][:2] == (PLAIN_CHAT, None)
