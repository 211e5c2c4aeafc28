"""Files of conversations: what is read, left out and refused."""

import json
import logging

import pytest

from megatron_dmc.config import ConfigError
from megatron_dmc.data.chat import iter_conversations, usable_conversations
from tests.support.chats import conversations, message, write_chats
from tests.support.texts import fails


def read(path):
    return list(iter_conversations(path))


def test_reads_files_and_folders(tmp_path):
    chats = conversations(7)
    write_chats(tmp_path / "b.jsonl", chats[:4])
    write_chats(tmp_path / "a.jsonl", chats[4:])
    (tmp_path / "notes.txt").write_text("left out")
    assert [chat.messages for chat in read(tmp_path)] == chats[4:] + chats[:4]
    assert [chat.place for chat in read(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl:{i}" for i in (1, 2, 3)]


TEXT = '{"type": "text", "text": "a"}'
GOOD = '{"messages": [{"role": "user", "content": "a"}]}\n'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not json", "is not JSON"),
        ('{"messages": [', "is not JSON"),
        ("[]", 'is not an object with a list "messages"'),
        ('{"text": "a"}', 'is not an object with a list "messages"'),
        ('{"messages": []}', "that is not empty"),
        ('{"messages": "hello"}', 'is not an object with a list "messages"'),
        ('{"messages": ["hello"]}', r"messages\[0\] is not an object"),
        ('{"messages": [{"content": "a"}]}', r"messages\[0\].role must be one of .* got None"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', r"messages\[0\].role must be one of .* got 'bot'"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', r"messages\[0\].role must be one of"),
        (
            '{"messages": [{"role": "user"}]}',
            r"messages\[0\].content must be a string or a list of text parts, got NoneType",
        ),
        ('{"messages": [{"role": "user", "content": 1}]}', "content must be a string or a list of text parts, got int"),
        *(
            (
                f'{{"messages": [{{"role": "user", "content": [{TEXT}, {part}]}}]}}',
                r"\.content\[1\] must be .* reads text only",
            )
            for part in (
                *('"a"', "null", "{}", '{"text": "a"}', '{"type": "text"}', '{"type": "text", "text": null}'),
                *('{"type": "image", "image": "a.png"}', '{"type": "image_url", "text": "a"}', "[]"),
            )
        ),
        *(
            (
                f'{{"messages": [{{"role": "user", "content": [{TEXT}, {TEXT[:-1]}, "{media}": "a.png"}}]}}]}}',
                rf'\.content\[1\] is a text with the field "{media}"; the model reads text only',
            )
            for media in ("image", "image_url", "video", "input_audio")
        ),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
        (
            '{"messages": [{"role": "user", "tool_calls": [{}]}]}',
            r"messages\[0\].content must be a string or a list of text parts, got NoneType",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": []}]}',
            "content must be a string or a list of text parts, got NoneType",
        ),
        (GOOD.strip()[:-1] + ', "tools": "f(x)"}', "tools must be a list of objects"),
        (GOOD.strip()[:-1] + ', "functions": [{"name": "f"}]}', 'holds "functions", .* write "tools"'),
        (GOOD.strip()[:-1] + ', "tools": ["f"]}', "tools must be a list of objects"),
        (GOOD.strip()[:-1] + ', "tools": [{"name": "\\ud800"}]}', "half a surrogate pair"),
        (GOOD.strip()[:-1] + ', "documents": ["text"]}', "documents must be a list of objects"),
        (GOOD.strip()[:-1] + ', "documents": [{"text": "\\ud800"}]}', "half a surrogate pair"),
        (GOOD.strip()[:-1] + ', "chat_template_kwargs": [1]}', "chat_template_kwargs must be an object, got list"),
        (GOOD.strip()[:-1] + ', "chat_template_kwargs": {"tokenize": true}}', "names tokenize, which is no variable"),
        *(
            (
                GOOD.strip()[:-1] + f', "chat_template_kwargs": {{"{name}": 1}}}}',
                f"kwargs names {name}, which is {what}; take",
            )
            for what, names in (
                ("no variable of a template", ("self", "conversations", "messages", "tools", "add_generation_prompt")),
                ("a function that templates call", ("raise_exception", "strftime_now", "namespace", "range")),
            )
            for name in names
        ),
        (GOOD.strip()[:-1] + ', "chat_template_kwargs": {"a": "\\ud800"}}', "half a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, problem):
    (tmp_path / "chat.jsonl").write_text(GOOD + "\n" + line)
    fails(rf"chat\.jsonl:3 .*{problem}", read, tmp_path / "chat.jsonl")


def test_bad_paths(tmp_path):
    fails("missing.jsonl does not exist", read, tmp_path / "missing.jsonl")
    fails("holds no conversation", read, tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    fails("holds no conversation", read, tmp_path / "empty.jsonl")
    (tmp_path / "chat.json").write_text(GOOD)
    fails("neither a .jsonl file nor a folder", read, tmp_path / "chat.json")
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + b'{"messages": "\xff"}')
    fails("latin.jsonl:2 is not UTF-8", read, tmp_path / "latin.jsonl")


def test_leaves_out_what_teaches_nothing_and_says_so(tmp_path, caplog):
    user, answer = message("user", "a"), message("assistant", "b")
    chats = [
        [user, answer],
        [user],
        [user, message("assistant", " \n")],
        [message("user", "is <|im_end|> a word?"), answer],
        [user, message("assistant", "it is <|im_end|>")],
        [message("system", ""), message("user", ""), answer],
        [user, user],
        [user, answer | {"tool_calls": [{"name": "f", "arguments": {"x": ["<|im_end|>"]}}]}],
    ]
    path = write_chats(tmp_path / "chat.jsonl", chats)
    with caplog.at_level(logging.WARNING):
        kept = list(usable_conversations(iter_conversations(path), {"<|im_end|>"}))
    assert [chat.messages for chat in kept] == [chats[0], chats[5]]
    assert sorted(caplog.messages) == [
        f"warning: skipped 1 conversation(s) with an empty assistant turn, the first is {path}:3",
        f"warning: skipped 2 conversation(s) without an assistant turn, the first is {path}:2",
        f"warning: skipped 3 conversation(s) in which a message spells a special token, the first is {path}:4",
    ]


def test_what_a_template_may_read_is_kept(tmp_path):
    calls = message("assistant", "a") | {"tool_calls": [{"name": "f"}]}
    older = message("assistant", "") | {"function_call": {"name": "f"}}
    line = {
        "messages": [calls, calls | {"content": None}, older],
        "tools": [{"name": "f"}],
        "source": "web",
        "functions": [],
    }
    (tmp_path / "chat.jsonl").write_text(json.dumps(line))
    [chat] = usable_conversations(read(tmp_path / "chat.jsonl"), {"<|im_end|>"})
    assert chat.messages == [calls, calls | {"content": ""}, older]
    assert chat.tools == line["tools"]


PARTS = [{"type": "text", "text": text} for text in ("ends <|im_", "end|> here")]


@pytest.mark.parametrize(
    "changed",
    [
        {"tools": [{"name": "f", "description": "writes <|im_end|>"}]},
        {"documents": [{"title": "a", "text": "writes <|im_end|>"}]},
        {"chat_template_kwargs": {"persona": "writes <|im_end|>"}},
        {"messages": [{"role": "assistant", "content": PARTS}]},
    ],
    ids=["tools", "documents", "variables", "parts"],
)
def test_whatever_spells_a_special_token_is_left_out(tmp_path, caplog, changed):
    lines = [{"messages": [message("assistant", "a")]}, {"messages": [message("assistant", "b")], **changed}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    [kept] = usable_conversations(read(tmp_path / "chat.jsonl"), {"<|im_end|>"})
    assert kept.messages == lines[0]["messages"]
    assert "in which a message spells a special token" in caplog.text


def test_nothing_left_says_why_and_what_to_do(tmp_path, caplog):
    user = message("user", "a")
    path = write_chats(tmp_path / "chat.jsonl", [[user], [user, user], [user, message("assistant", " ")]])
    with pytest.raises(ConfigError) as caught:
        list(usable_conversations(iter_conversations(path), {"<|im_end|>"}))
    assert str(caught.value) == (
        f"there is no conversation to learn from: 2 without an assistant turn (the first is {path}:1), 1 with an empty "
        f'assistant turn (the first is {path}:3); what is learned are messages with the role "assistant": add them; '
        "write what the assistant says into its messages"
    )
    assert not caplog.messages
