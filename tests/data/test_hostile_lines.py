"""What comes in files: odd bytes, odd JSON, other forms of conversations. Read as it is meant, or one line with its place."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.config import ConfigError
from megatron_dmc.data import iter_conversations, iter_documents, usable_conversations

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
TEXT = {"text": "a"}


def refusal(read: Callable[..., Iterable[Any]], *arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        list(read(*arguments))
    assert "\n" not in str(caught.value)
    # it is printed where the locale may know ASCII alone, but half a character prints nowhere
    str(caught.value).encode()
    return str(caught.value)


@pytest.mark.parametrize(("read", "line"), [(iter_conversations, CHAT), (iter_documents, TEXT)], ids=["chat", "text"])
@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf%s\n%s",
        b"%s\r\n%s\r\n",
        b"\n\n  \n%s\n\r\n\t\n%s\n\n\n",
        b"  %s \t\n%s",
    ],
    ids=["byte-order-mark", "CRLF", "empty-lines", "white-space"],
)
def test_read_as_it_is_meant(tmp_path: Path, read: Callable[[Path], Iterable[Any]], line: Any, content: bytes) -> None:
    written = json.dumps(line).encode()
    (tmp_path / "a.jsonl").write_bytes(content % (written, written))
    found = [getattr(one, "messages", one) for one in read(tmp_path / "a.jsonl")]
    assert found == [line.get("messages", line.get("text"))] * 2


DEEP = 900  # json reads as deep as Python recurses


@pytest.mark.parametrize(("read", "line"), [(iter_conversations, CHAT), (iter_documents, TEXT)], ids=["chat", "text"])
@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"\xef\xbb\xbf{}", "is not JSON: Unexpected UTF-8 BOM"),
        (b"\x00", "holds a NUL byte"),
        (json.dumps(CHAT | TEXT).encode("utf-16"), "holds a NUL byte"),
        (b'"\xff"', "is not UTF-8"),
        (b"{'text': 'a'}", "is not JSON: Expecting property name enclosed in double quotes (column 2)"),
        (b"[", "is not JSON: Expecting value (column 2); every line must hold one whole value"),
        (b"{\n", "is not JSON: .*; every line must hold one whole value"),
        (b'{"text": "a"} {"text": "b"}', "is not JSON: Extra data"),
        (b'{"text": "a\tb"}', "is not JSON: Invalid control character"),
        (b'{"text": "a", "n": ' + b"9" * 10_000 + b"}", "that can be read: it holds a number of 10000 digits; write it as"),
        (b'{"text": "a", "n": -' + b"9" * 5000 + b"}", "that can be read: it holds a number of 5000 digits"),
        (b'{"text": "a", "messages": [], "text": "b"}', "not JSON that can be read: an object names 'text' twice; keep one"),
        (b'{"text": "a", "messages": [{"role": "user", "role": "user"}]}', "names 'role' twice"),
        (b'{"text": "a", "messages": [{"\\ud800": 1, "\\ud800": 2}]}', "names '\\ud800' twice"),
        (b"[" * 100_000, "is not JSON that can be read: it nests too deeply"),
        (b'[{"text": "a"}, {"text": "b"}]', "(this is a list: write every element of it as a line of its own)"),
        (b"null", "is not an object with"),
        (b"3", "is not an object with"),
        (b'"text"', "is not an object with"),
    ],
)  # fmt: skip
def test_bad_lines(tmp_path: Path, read: Callable[[Path], Iterable[Any]], line: Any, bad: bytes, problem: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps(line).encode() + b"\n\n" + bad)
    message = refusal(read, tmp_path / "a.jsonl")
    assert message.startswith(f"{tmp_path}/a.jsonl:3 ")
    assert all(part in message for part in problem.split(".*"))


def chat(*messages: Any, **line: Any) -> dict[str, Any]:
    return {"messages": list(messages), **line}


USER, ANSWER = CHAT["messages"]
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"conversations": [{"from": "human", "value": "a"}]}, ' ("conversations" is another form: rename it to "messages"'),
        (chat({"from": "human", "value": "a"}), 'messages[0].role must be one of .* (this is another form, in its messages'),
        (chat({"role": "User", "content": "a"}), "messages[0].role .* got 'User'; correct the line (write 'user')"),
        (chat(USER, {"role": " assistant", "content": "a"}), "messages[1].role .* (write 'assistant')"),
        (chat({"role": "human", "content": "a"}), "messages[0].role must be one of .* got 'human'"),
        (chat({"role": "x" * 10_000, "content": "a"}), "got 'xxxx"),
        (chat({"role": None, "content": "a"}), "got None"),
        (chat({"role": 10**1000, "content": "a"}), "messages[0].role must be one of"),
        (chat({"role": "user", "content": [{"type": "text", "value": "a"}]}), "messages[0].content[0] must be .* text only"),
        (chat({"role": "user", "content": [{"text": "x" * 10_000}]}), "messages[0].content[0] must be .* text only"),
        (chat({"role": "user", "content": {"text": "a"}}), "messages[0].content must be .* of text parts, got dict"),
        (chat({"role": "user", "content": 10**1000}), "messages[0].content must be .* of text parts, got int"),
        (chat({"role": "user", "content": False}), "messages[0].content must be .* of text parts, got bool"),
        (chat({"role": "user", "contents": "a"}), "messages[0].content must be .* of text parts, got NoneType"),
        (chat(USER, ANSWER | {"tool_calls": "f()"}), "messages[1].tool_calls must be a list of objects, got str"),
        (chat(USER, ANSWER | {"tool_calls": CALL}), "messages[1].tool_calls must be a list of objects, got dict"),
        (chat(USER, ANSWER | {"tool_calls": ["f"]}), "messages[1].tool_calls must be a list of objects, got list"),
        (chat(USER, ANSWER, tools='[{"name": "f"}]'), "tools must be a list of objects, .* got str"),
        (chat(USER, ANSWER, tools={"name": "f"}), "tools must be a list of objects, .* got dict"),
        (chat(USER, ANSWER, tools=[None]), "tools must be a list of objects, .* got list"),
        (chat(USER, ANSWER, tools=False), "tools must be a list of objects, .* got bool"),
        (chat(USER, ANSWER, documents="a"), "documents must be a list of objects, .* got str"),
        (chat(USER, ANSWER, documents={"text": "a"}), "documents must be a list of objects, .* got dict"),
        (chat(USER, ANSWER, chat_template_kwargs="{}"), "chat_template_kwargs must be an object, got str"),
        (chat(USER, ANSWER, chat_template_kwargs=False), "chat_template_kwargs must be an object, got bool"),
        (chat(USER, ANSWER | {"\ud800": 1}), "half a surrogate pair"),
        (chat(USER, ANSWER, tools=[{"name": "\udfff"}]), "half a surrogate pair"),
        (chat(USER, ANSWER | {"name": float("nan")}), "holds NaN, Infinity or a number as large"),
        (chat(USER, ANSWER, tools=[{"name": "f", "limit": float("inf")}]), "holds NaN, Infinity or a number as large"),
        (chat(USER, ANSWER, chat_template_kwargs={"a": float("-inf")}), "holds NaN, Infinity or a number as large"),
        (chat(USER, ANSWER, tools=[CALL, {}]), "tools[1] names no function, got {}; write"),
        (chat(USER, ANSWER, tools=[{"type": "function"}]), "tools[0] names no function, got {'type': 'function'}"),
        (chat(USER, ANSWER, tools=[{"type": "function", "function": None}]), "tools[0] names no function"),
        (chat(USER, ANSWER | {"tool_calls": [CALL, {"id": None}]}), "messages[1].tool_calls[1] names no function"),
        (chat(USER, ANSWER | {"tool_calls": [{"type": "function"}]}), "messages[1].tool_calls[0] names no"),
        (chat(USER, ANSWER | {"tool_calls": [{"id": "a"}]}), "messages[1].tool_calls[0] names no function"),
        (chat(USER, ANSWER | {"tool_calls": [{"function": {"name": " "}}]}), "messages[1].tool_calls[0] names no"),
        (chat(USER, ANSWER | {"tool_calls": [{"function": {"arguments": {}}}]}), "messages[1].tool_calls[0] names no"),
        (chat(USER, ANSWER, tools=[{"type": "function", "function": {"description": "x"}}]), "tools[0] names no function"),
        (chat(USER, ANSWER, images=["x.png"]), 'has "images" beside its text; the model reads text only'),
        (chat(USER | {"image": "x.png"}, ANSWER), 'messages[0] has "image" beside its text'),
        (chat(USER, ANSWER | {"weight": 0}, USER, ANSWER), "messages[1].weight is 0, but every turn .* is learned"),
        (chat(None), "messages[0] is not an object"),
        (chat([USER]), "messages[0] is not an object"),
        ({"messages": {"0": USER}}, 'is not an object with a list "messages"'),
        ({"messages": None}, 'is not an object with a list "messages"'),
    ],
)  # fmt: skip
def test_other_forms_of_conversations(tmp_path: Path, line: Any, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(CHAT) + "\n" + json.dumps(line))
    message = refusal(iter_conversations, tmp_path / "a.jsonl")
    assert message.startswith(f"{tmp_path}/a.jsonl:2 ") and len(message) < 500
    assert all(part in message for part in problem.split(".*"))


def test_numbers_beyond_what_a_computer_has(tmp_path: Path) -> None:
    """json reads them as Infinity; beside a text they do not matter."""
    line = '"name": 1e999, "role": "assistant", "content": "a"'
    (tmp_path / "a.jsonl").write_text(f'{{"messages": [{{{line}}}]}}')
    assert "a.jsonl:1 holds NaN, Infinity or a number as large" in refusal(iter_conversations, tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN, "size": 1e999}')
    assert list(iter_documents(tmp_path / "a.jsonl")) == ["a"]


def test_what_counts_as_a_function(tmp_path: Path) -> None:
    nothing = {"name": None, "arguments": None}
    for tool in (
        *(
            CALL,
            {"name": "f"},
            {"type": "function", "name": "f"},
            {"type": "search"},
            {"type": "search", "function": nothing},
        ),
        *({"name": "f", "function": {"description": "a"}}, {"function": "f", "arguments": "{}"}),
        # forms of other vendors
        *(
            {"tool_name": "f", "parameters": {}},
            {"function_declarations": [{"name": "f"}]},
            {"toolSpec": {"name": "f"}},
        ),
    ):
        line = chat(USER, ANSWER | {"tool_calls": [tool], "weight": 1}, tools=[tool])
        (tmp_path / "a.jsonl").write_text(json.dumps(line))
        [found] = iter_conversations(tmp_path / "a.jsonl")
        assert found.tools == found.messages[1]["tool_calls"] == [tool]


@pytest.mark.parametrize("value", [None, [], {}, "", " ", [None], [""], {"bytes": None, "path": None}, False])
def test_columns_without_media_are_let_be(tmp_path: Path, value: Any) -> None:
    line = chat(USER | {"audio": value}, ANSWER, images=value, image=value)
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    assert len(list(iter_conversations(tmp_path / "a.jsonl"))) == 1


def test_a_file_beside_a_conversation_says_where_it_is_from(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(chat(USER, ANSWER, file="src/a.py")))
    assert len(list(iter_conversations(tmp_path / "a.jsonl"))) == 1


def test_objects_as_deep_as_they_can_be_read(tmp_path: Path) -> None:
    """json writes less deeply than it reads."""
    for depth in range(800, 1000):
        deep = '{"a":' * depth + "1" + "}" * depth
        (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a", "x": ' + deep + "}]}")
        try:
            list(usable_conversations(iter_conversations(tmp_path / "a.jsonl"), ["<|end|>"]))
        except ConfigError as error:
            assert str(error).startswith(f"{tmp_path}/a.jsonl:1 ")


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_no_content_is_an_empty_one(tmp_path: Path, role: str) -> None:
    """Exports of tables write null; a misspelled field is refused above."""
    for content in (None, [], ""):
        (tmp_path / "a.jsonl").write_text(json.dumps(chat(USER, {"role": role, "content": content}, ANSWER)))
        [found] = iter_conversations(tmp_path / "a.jsonl")
        assert found.messages == [USER, {"role": role, "content": ""}, ANSWER]
        if role != "assistant":
            assert list(usable_conversations([found], [])) == [found]
        else:
            assert "with an empty assistant turn" in refusal(usable_conversations, [found], [])


def test_conversations_that_are_taken_for_text(tmp_path: Path) -> None:
    for line in (CHAT, {"conversations": []}):
        (tmp_path / "a.jsonl").write_text(json.dumps(line))
        assert refusal(iter_documents, tmp_path / "a.jsonl").endswith("(conversations are read with --chat)")
