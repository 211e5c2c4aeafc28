"""RULER's questions as kvpress has them, in files on disk, and their tokens as kvpress' pipeline makes them.

The official ones are the data set simonjegou/ruler of the Hugging Face Hub: a folder for each length.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dmc.config import ConfigError
from megatron_dmc.errors import in_one_line
from megatron_dmc.files import why_no_folder

# In the place of a question while a chat template is filled in.
_MARK = "the-question-stands-here"


class Question(NamedTuple):
    """What a model reads is the context, then the question, then the beginning of its answer, of which ``max_new_tokens`` are
    generated. ``answer``: what it should contain."""

    context: str
    question: str
    answer_prefix: str
    answer: list[str]
    task: str
    max_new_tokens: int


def read_questions(folder: Path, length: int) -> list[Question]:
    """All that ``folder/length`` holds as .parquet or .jsonl, in the order of the files' names.

    Raises:
        ConfigError: there is none, or one that is damaged or lacks a column.
    """
    place = folder / str(length)
    if (problem := why_no_folder(place)) is not None:
        raise ConfigError(
            f"--ruler-data {folder}: {place} {problem}; download simonjegou/ruler there, or choose another --length"
        )
    files = sorted(path for path in place.iterdir() if path.suffix in (".parquet", ".jsonl"))
    found = [_question(row, file) for file in files for row in _rows(file)]
    if not found:
        raise ConfigError(
            f"--ruler-data {folder}: {place} holds no questions as .parquet or .jsonl; download them again"
        )
    return found


def first_of_each_task(questions: list[Question], limit: int | None) -> list[Question]:
    """At most ``limit`` of each task, tasks in the order of their names."""
    tasks = sorted({each.task for each in questions})
    return [each for task in tasks for each in [one for one in questions if one.task == task][:limit]]


def tokens_of(tokenizer: Any, question: Question) -> tuple[list[int], list[int]]:
    """Token ids of the context, and of question and answer prefix: each by itself, in the tokenizer's chat template where it
    has one (thinking switched off).

    Raises:
        ConfigError: the template cannot be filled in.
    """
    before, after = tokenizer.bos_token or "", "\n"
    if tokenizer.chat_template is not None:
        try:
            filled = tokenizer.apply_chat_template(
                [{"role": "user", "content": question.context + _MARK}],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
        # A template may raise whatever its author thought of.
        except Exception as error:
            raise ConfigError(
                f"{tokenizer.name_or_path}: its chat template takes no plain question: {in_one_line(error)}; save another one"
            ) from None
        context, mark, after = filled.rpartition(_MARK)
        if not mark or question.context not in context:
            raise ConfigError(f"{tokenizer.name_or_path}: its chat template changes what is asked; save another one")
    else:
        context = before + question.context
    asked = question.question + after + question.answer_prefix
    one, other = (tokenizer.encode(text, add_special_tokens=False) for text in (context, asked))
    return list(one), list(other)


def _rows(file: Path) -> list[Any]:
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(file).to_pylist())
    # pyarrow raises whatever it happens to meet.
    except Exception as error:
        raise ConfigError(f"{file} cannot be read: {in_one_line(error)}; download it again") from None


def _question(row: Any, file: Path) -> Question:
    values = row if isinstance(row, dict) else {}
    if missing := [name for name in Question._fields if name not in values]:
        raise ConfigError(f"{file} has no {', '.join(missing)}; its columns must be {', '.join(Question._fields)}")
    found = Question(**{name: values[name] for name in Question._fields})
    texts = (found.context, found.question, found.answer_prefix, found.task)
    if (
        not all(isinstance(text, str) for text in texts)
        or not (found.context and found.task)
        or not (isinstance(found.answer, list) and found.answer and all(isinstance(each, str) for each in found.answer))
        or type(found.max_new_tokens) is not int
        or found.max_new_tokens < 1
    ):
        raise ConfigError(
            f"{file} holds a question that is none: context, question, answer_prefix and task are text, answer is a list of "
            "text, max_new_tokens a number from 1; download it again"
        )
    return found
