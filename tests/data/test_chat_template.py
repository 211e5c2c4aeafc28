"""What a chat template writes, and which of it is the assistant's."""

import json
import sys

import pytest

from megatron_dmc.data import load_chat_template
from megatron_dmc.data.build import _overlap
from megatron_dmc.data.chat import Conversation
from tests.support.chats import IN_A_MACRO, MARKED, PLAIN, REWRITES_HISTORY, chat_tokenizer, conversations, message
from tests.support.published_templates import FORMS
from tests.support.texts import fails

CHATS = [Conversation(chat, f"chat.jsonl:{i + 1}") for i, chat in enumerate(conversations(13))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def template_of(tokenizer, tmp_path, source):
    (tmp_path / "template.jinja").write_text(source)
    return load_chat_template(tokenizer, tmp_path / "template.jinja")


@pytest.mark.parametrize("source", [PLAIN, MARKED, IN_A_MACRO], ids=["plain", "marked", "macro"])
def test_spans_are_the_assistants_turns(tokenizer, tmp_path, source):
    template = template_of(tokenizer, tmp_path, source)
    for chat in CHATS:
        rendered = template.render(chat)
        written = [rendered.text[begin:end] for begin, end in rendered.spans]
        assert written == [turn["content"] + "<|im_end|>" for turn in chat.messages if turn["role"] == "assistant"]


def test_equals_transformers_own_mask(tokenizer, tmp_path):
    """Compared where transformers' offsets are those of the text: this tokenizer's post-processor would trim them."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(str(tokenizer.folder))
    theirs.backend_tokenizer.post_processor = None
    template = template_of(tokenizer, tmp_path, MARKED)
    for chat in CHATS:
        rendered = template.render(chat)
        expected = theirs.apply_chat_template(
            chat.messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        [(tokens, characters)] = tokenizer.tokenize_rendered([rendered.text])
        assert tokens == expected["input_ids"]
        assert _overlap(characters, rendered.spans) == expected["assistant_masks"]


@pytest.mark.parametrize("name", FORMS)
def test_published_templates_equal_transformers_own_mask(tmp_path, name):
    from transformers import PreTrainedTokenizerFast

    form = FORMS[name]
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", form.plain, special_tokens=form.special_tokens)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tokenizer.folder))
    theirs.backend_tokenizer.post_processor = None
    odd = [
        "  is it?\n",
        "No,\tit is not. ",
        "[/INST] größer\r\n\n",
        "assistant\n\n",
        "",
        "日本 🙂",
        "e\u0301",
        "e\u0301",
    ]
    chats = [[message(("user", "assistant")[i % 2], text) for i, text in enumerate(odd)]]
    roles = ("system", "user", "assistant") if form.has_system else ("user", "assistant")
    chats += [[turn for turn in chat if turn["role"] in roles] for chat in conversations(13)]
    if form.may_begin_with_assistant:
        chats += [chats[0][1:2], chats[0][1:]]
    templates = load_chat_template(tokenizer), template_of(tokenizer, tmp_path, form.marked)
    for chat in chats:
        expected = theirs.apply_chat_template(
            chat, chat_template=form.marked, return_dict=True, return_assistant_tokens_mask=True
        )
        assert any(expected["assistant_masks"])
        for template in templates:
            rendered = template.render(Conversation(chat, "chat.jsonl:1"))
            [(tokens, characters)] = tokenizer.tokenize_rendered([rendered.text])
            assert tokens == expected["input_ids"]
            assert _overlap(characters, rendered.spans) == expected["assistant_masks"]


def test_calls_of_tools_are_learned(tokenizer, tmp_path):
    """As Qwen 2.5's: the tools are listed in the system's turn, a call is in the assistant's."""
    source = (
        "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
        + PLAIN.replace(
            "{{ m.content }}",
            "{{ m.content }}{% for call in m.tool_calls %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}",
        )
    )
    call = {"name": "f", "arguments": {"x": "größer"}}
    messages = [
        message("user", "a"),
        message("assistant", "") | {"tool_calls": [call]},
        message("tool", "3"),
        message("assistant", "It is 3."),
    ]
    chat = Conversation(messages, "chat.jsonl:1", tools=[{"name": "f", "parameters": {"x": "string"}}])
    rendered = template_of(tokenizer, tmp_path, source).render(chat)
    assert rendered.text.startswith('<|im_start|>system\n{"name": "f", "parameters": {"x": "string"}}\n<|im_end|>')
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == [
        f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call><|im_end|>",
        "It is 3.<|im_end|>",
    ]


def test_the_characters_of_tokens_leave_nothing_out(tokenizer):
    text = "<|im_start|>user\n  hello   you  <|im_end|>\n\n "
    [(tokens, characters)] = tokenizer.tokenize_rendered([text])
    assert "".join(text[begin:end] for begin, end in characters) == text
    assert tokenizer.detokenize(tokens) == text


def test_a_template_without_special_tokens_keeps_its_white_space(tokenizer, tmp_path):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    rendered = template_of(tokenizer, tmp_path, source).render(
        Conversation([message("user", "a"), message("assistant", "b")], "chat.jsonl:1")
    )
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["b\n\n"]


def test_refuses_what_is_not_exact(tokenizer, tmp_path):
    template = template_of(tokenizer, tmp_path, REWRITES_HISTORY)
    one_turn = Conversation([message("user", "a"), message("assistant", "b")], "chat.jsonl:1")
    assert template.render(one_turn).spans
    more = Conversation([*one_turn.messages, message("user", "c")], "chat.jsonl:2")
    fails(r"chat.jsonl:2: .* writes messages\[1\] differently at the end than inside", template.render, more)
    # Its generation prompt is not how a turn begins.
    template = template_of(tokenizer, tmp_path, PLAIN.replace("assistant\n{% endif", "assistant\n<think>{% endif"))
    fails(r"chat.jsonl:1: .* --chat-template", template.render, one_turn)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "hello",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        # The prompt for the turn is the whole turn.
        "{% for m in messages %}{{ m.role }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}",
    ],
)
def test_refuses_a_template_that_writes_nothing_of_the_assistants(tokenizer, tmp_path, source):
    chat = Conversation([message("user", "a"), message("assistant", "b")], "chat.jsonl:3")
    fails(
        r"chat.jsonl:3: .* writes nothing for messages\[1\]",
        template_of(tokenizer, tmp_path, "{# #}" + source).render,
        chat,
    )


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}{{ x | upper }}", None),
        (
            "{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}{{ x | length }}",
            "does not stand around",
        ),
        (
            "{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}{{ x[:3] }}",
            "does not stand around",
        ),
        ("{% generation %}{% endgeneration %}{{ m.content }}", "marks nothing here"),
        ("{% if m.role == 'nobody' %}{% generation %}x{% endgeneration %}{% endif %}", "marks nothing here"),
    ],
)
def test_marks_in_odd_places(tokenizer, tmp_path, block, problem):
    template = template_of(tokenizer, tmp_path, "{% for m in messages %}" + block + "{% endfor %}")
    chat = Conversation([message("assistant", "hello")], "chat.jsonl:7")
    if problem is None:
        assert template.render(chat).spans == ((0, 5),)
    else:
        fails(f"chat.jsonl:7: .*{problem}", template.render, chat)


def test_our_own_marks_in_a_text(tokenizer, tmp_path):
    chat = Conversation([message("user", "a"), message("assistant", "b\ufdd1c")], "chat.jsonl:7")
    fails(
        r"chat.jsonl:7 holds U\+FDD1, a code point that no text has",
        template_of(tokenizer, tmp_path, MARKED).render,
        chat,
    )
    assert template_of(tokenizer, tmp_path, PLAIN).render(chat).spans


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('roles must alternate\\nsecond line') }}", "fails on it: roles must alternate;"),
        ("{% for m in messages %}", "fails on it: Unexpected end of template"),
        ("{{ messages[99]['role'] }}", "fails on it: .* has no element 99"),
        ("{{ 1 // 0 }}", "fails on it"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails on it: access to attribute '__class__' .* is unsafe"),
        ("{{ messages.append(1) }}", "fails on it: access to attribute 'append' .* is unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch owned') }}", "fails on it: access to attribute '__init__'"),
    ],
)
def test_templates_that_fail_or_try_more_than_they_may(tokenizer, tmp_path, monkeypatch, source, problem):
    monkeypatch.chdir(tmp_path)
    fails(f"chat.jsonl:1: the chat template of .*{problem}", template_of(tokenizer, tmp_path, source).render, CHATS[0])
    assert not (tmp_path / "owned").exists()


def test_the_folders_own_template(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "none", None)
    fails("none has no chat template", load_chat_template, tokenizer)
    (tmp_path / "none" / "chat_template.jinja").write_text(PLAIN)
    assert load_chat_template(tokenizer).source == PLAIN
    named = chat_tokenizer(
        tmp_path / "named", [{"name": "default", "template": PLAIN}, {"name": "rag", "template": "x"}]
    )
    assert load_chat_template(named).source == PLAIN
    fails("--chat-template .*missing.jinja does not exist", load_chat_template, tokenizer, tmp_path / "missing.jinja")


def test_variables_are_the_tokenizers(tokenizer, tmp_path):
    rendered = template_of(tokenizer, tmp_path, "{{ bos_token }}" + PLAIN).render(CHATS[0])
    assert rendered.text.startswith("<|endoftext|><|im_start|>")


def test_no_code_of_the_folder_runs(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    path = tokenizer.folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]},
        "tokenizer_class": "Own",
    }
    path.write_text(json.dumps(settings))
    (tokenizer.folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert load_chat_template(tokenizer).source == PLAIN
    assert not (tmp_path / "ran").exists()


def test_without_transformers(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails("transformers, which is not installed; pip install", load_chat_template, tokenizer)
