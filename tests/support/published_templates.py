"""The forms of published chat templates: what models' folders hold, and the same with the assistant's part marked.

The marked ones are for transformers' own mask, which has no other way to know.
"""

from dataclasses import dataclass

_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
_GENERATION, _END = "{% generation %}", "{% endgeneration %}"


@dataclass(frozen=True)
class Form:
    """template: with ``[[`` and ``]]`` around the assistant's part; the others: which conversations it takes."""

    special_tokens: tuple[str, ...]
    template: str
    has_system: bool = True
    may_begin_with_assistant: bool = False

    @property
    def plain(self) -> str:
        return self.template.replace("[[", "").replace("]]", "")

    @property
    def marked(self) -> str:
        return self.template.replace("[[", _GENERATION).replace("]]", _END)


_LLAMA_3_TOKENS = ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
_LLAMA_3_PROMPT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_LLAMA_3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}"
    "{% if m.role == 'assistant' %}[[{{ m.content | trim }}<|eot_id|>]]{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}"
)
FORMS = {
    "llama-2": Form(
        ("</s>", "<s>"),
        "{% if messages[0].role == 'system' %}{% set rest, system = messages[1:], messages[0].content %}"
        "{% else %}{% set rest, system = messages, none %}{% endif %}{% for m in rest %}"
        + _ALTERNATE
        + "{% if m.role == 'user' %}{{ '<s>[INST] ' }}{% if loop.first and system %}"
        "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}{{ m.content.strip() + ' [/INST]' }}"
        "{% else %}[[{{ ' ' + m.content.strip() + ' </s>' }}]]{% endif %}{% endfor %}",
    ),
    "llama-3": Form(
        _LLAMA_3_TOKENS,
        _LLAMA_3 + "{% if add_generation_prompt %}{{ '" + _LLAMA_3_PROMPT + "' }}{% endif %}",
        may_begin_with_assistant=True,
    ),
    # As it was first published: the prompt ends every conversation.
    "llama-3 first": Form(_LLAMA_3_TOKENS, _LLAMA_3 + "{{ '" + _LLAMA_3_PROMPT + "' }}", may_begin_with_assistant=True),
    "qwen-2.5": Form(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "{%- if messages[0].role != 'system' %}\n    {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}\n{%- endif %}\n"
        "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\n' }}\n"
        "    {%- if m.role == 'assistant' %}[[{{- m.content + '<|im_end|>' }}]]{% else %}{{- m.content + '<|im_end|>' }}"
        "{% endif %}\n    {{- '\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n",
    ),
    "gemma": Form(
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>{% for m in messages %}"
        + _ALTERNATE
        + "<start_of_turn>{% if m.role == 'assistant' %}{{ 'model\n' }}[[{{ m.content | trim }}<end_of_turn>]]"
        "{% else %}{{ 'user\n' + m.content | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        has_system=False,
    ),
    # A finished text ends with its own token.
    "phi-3": Form(
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
        "{% if m.role == 'assistant' %}[[{{ m.content + '<|end|>' }}]]{% else %}{{ m.content + '<|end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}<|endoftext|>{% endif %}",
        may_begin_with_assistant=True,
    ),
}
