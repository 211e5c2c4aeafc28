"""Every recall task: the same samples every time, of the length that was asked for, with the answer in the prompt once."""

from pathlib import Path

import numpy
import pytest

from megatron_dmc.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from megatron_dmc.evaluation.recall_tasks import TASKS, draw
from megatron_dmc.evaluation.recall_tasks.sample import Unfit, occurrences, once
from tests.support.texts import fails
from tests.support.tokenizer_folders import tokenizer_folder

# A line of the lookup task has fewer tokens, also where every byte is one.
LINE = 20
ALL = pytest.mark.parametrize("task", TASKS)
WORDS = [f"{a}{b}" for a in ("red", "old", "far", "new", "dim") for b in ("stone", "river", "cloud", "table", "garden")]
TEXT = " ".join(f"{WORDS[i * i % 25]} {WORDS[i * 7 % 23]} {i}." for i in range(3000))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([TEXT], 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> numpy.ndarray:
    return numpy.asarray(tokenizer.tokenize(TEXT))


@ALL
@pytest.mark.parametrize("tokens", [200, 333, 1000])
def test_a_sample(task: str, tokens: int, tokenizer: Tokenizer, text: numpy.ndarray) -> None:
    for index in range(5):
        sample = draw(task, tokenizer, text, tokens, index)
        assert tokens - 2 * LINE < len(sample.prompt) <= tokens
        assert task == "lookup" or len(sample.prompt) == tokens
        assert occurrences(sample.answer, sample.prompt) == [sample.place]
        assert task == "copy" or tokenizer.detokenize(sample.answer).strip().isdigit()


@ALL
def test_the_same_every_time_and_different_by_index(task: str, tokenizer: Tokenizer, text: numpy.ndarray) -> None:
    samples = [draw(task, tokenizer, text, 300, index) for index in range(6)]
    assert samples == [draw(task, tokenizer, text, 300, index) for index in range(6)]
    assert len({tuple(sample.answer) for sample in samples}) > 3
    assert samples[0] != draw(task, tokenizer, text, 310, 0)
    assert len({sample.place for sample in samples}) > 2


@ALL
def test_the_question_leads_to_the_answer(task: str, tokenizer: Tokenizer, text: numpy.ndarray) -> None:
    """What stands right before the answer in the text is what the prompt ends with: greedy copying would be right."""
    sample = draw(task, tokenizer, text, 300, 1)
    before = tokenizer.detokenize(sample.prompt[: sample.place])
    asked = tokenizer.detokenize(sample.prompt)
    question = tokenizer.detokenize(sample.prompt[len(sample.prompt) - sample.question :])
    begins = {"passkey": "What is the pass key?", "number": "Question: what is", "lookup": asked.split()[-1][:4]}
    assert task == "copy" or question.strip().startswith(begins[task])
    assert sample.question < 80 and len(sample.prompt) - sample.question > sample.place + len(sample.answer)
    size = {"passkey": len("The pass key is"), "number": len("'s secret number is"), "lookup": 7, "copy": 40}[task]
    assert before[-size:].casefold() == asked[-size:].casefold()


@ALL
def test_what_opens_a_text_stands_first_and_only_there(task: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_folder(tmp_path, "<s>", "</s>", frame="<s> $A", vocab_size=300)
    text = numpy.asarray(tokenizer.tokenize(TEXT)[1:])
    opening = tokenizer.added_tokens[0][0]
    sample = draw(task, tokenizer, text, 400, 0)
    assert sample.prompt[0] == opening and opening not in sample.prompt[1:] and opening not in sample.answer


@ALL
def test_too_little_room(task: str, tokenizer: Tokenizer, text: numpy.ndarray) -> None:
    fails(f"the recall task {task} takes .* tokens or more, not 30", draw, task, tokenizer, text, 30, 0)


@pytest.mark.parametrize("task", ["number", "copy"])
def test_too_little_text(task: str, tokenizer: Tokenizer, text: numpy.ndarray) -> None:
    fails("the held-out text has 99 tokens", draw, task, tokenizer, text[:99], 300, 0)


def test_text_that_only_repeats_itself(tokenizer: Tokenizer) -> None:
    same = numpy.full(2000, 17)
    fails("holds nothing that the recall task copy could ask for", draw, "copy", tokenizer, same, 300, 0)


def test_a_loaded_tokenizer_draws_the_same(tokenizer: Tokenizer, text: numpy.ndarray) -> None:
    assert draw("number", load_tokenizer(tokenizer.folder), text, 300, 0) == draw("number", tokenizer, text, 300, 0)


def test_an_answer_that_stands_there_twice_is_no_sample() -> None:
    assert once([5, 1, 2, 5, 3], [1, 2], 2) == ([5, 1, 2, 5, 3], [1, 2], 1, 2)
    for prompt in ([1, 2, 5, 1, 2], [5, 1, 3], []):
        with pytest.raises(Unfit):
            once(prompt, [1, 2])
