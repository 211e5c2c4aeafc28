"""The long-context tasks: every prompt is read again, plainly, and must give its answers; and it fills the asked length."""

import re
from collections import Counter
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest
import yaml

from megatron_dmc.config import ConfigError
from megatron_dmc.evaluation.harness import datasets as made
from megatron_dmc.evaluation.harness.fitting import long_prompts
from megatron_dmc.evaluation.harness.long_texts import LONG_TEXTS, Prompt
from tests.support.processes import ROOT
from tests.support.texts import fails
from tests.support.tokenizer_folders import tokenizer_folder

TASKS = ROOT / "megatron_dmc/evaluation/harness/tasks"
YAML_OF = {
    "dmc_niah_noise": "dmc_niah_noise",
    "dmc_vt": "dmc_vt",
    "dmc_cwe": "dmc_cwe",
    "dmc_fwe": "dmc_fwe",
}


def words(text: str) -> int:
    return len(text.split())


def answers_of_needle(text: str) -> set[str]:
    (key,) = re.findall(r"What is the special magic number for (\S+) mentioned", text)
    return set(re.findall(rf"magic numbers for {re.escape(key)} is: (\d+)\.", text))


def answers_of_chain(text: str) -> set[str]:
    asked = text.rsplit("\n\n", 1)[1]
    (value,) = re.findall(r"assigned the value (\d+) in", asked)
    values: dict[str, str] = {}
    for name, known in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", asked):
        values[name] = values.get(known, known)
    return {name for name, found in values.items() if found == value}


def answers_of_list(text: str) -> set[str]:
    asked = text.rsplit("Below is a numbered list", 1)[1]
    counts = Counter(re.findall(r"\d+\. (\S+)", asked.rsplit("Question:", 1)[0]))
    assert len(set(counts.values())) == 2
    return {word for word, count in counts.items() if count == max(counts.values())}


def answers_of_code(text: str) -> set[str]:
    coded = text.split("coded words. ", 1)[1].split("\nQuestion:")[0].split()
    (dots, _), *most = Counter(coded).most_common(5)
    assert dots == "..." and most[2][1] > most[3][1]
    return {word for word, _ in most[:3]}


ORACLES = {
    "dmc_niah_noise": answers_of_needle,
    "dmc_vt": answers_of_chain,
    "dmc_cwe": answers_of_list,
    "dmc_fwe": answers_of_code,
}


@pytest.mark.parametrize("name", LONG_TEXTS)
@pytest.mark.parametrize("tokens", [2000, 4096], ids=lambda n: f"L{n}")
@pytest.mark.parametrize("more", [0, 1, 37, 611], ids=lambda n: f"least+{n}")
def test_a_prompt_holds_its_answers_and_no_others(name: str, tokens: int, more: int) -> None:
    task = LONG_TEXTS[name]
    for seed in range(5):
        prompt = task.draw(Random(seed), task.least_size + more, tokens)
        assert ORACLES[name](prompt.text) == set(prompt.answers)
        assert len(prompt.answers) == len(set(prompt.answers))
        assert not any(answer in prompt.answer_prefix for answer in prompt.answers)


# Of what models read and answered before a prompt had two parts.
WHOLE = {
    ("dmc_niah_noise", 700): "20791f9b82ef3c76",
    ("dmc_niah_noise", 4096): "20791f9b82ef3c76",
    ("dmc_vt", 700): "1dec8bb49362d77b",
    ("dmc_vt", 4096): "1dec8bb49362d77b",
    ("dmc_cwe", 700): "fc260e64352df5a2",
    ("dmc_cwe", 4096): "94e36404fe114e23",
    ("dmc_fwe", 700): "ee19a2644053e60c",
    ("dmc_fwe", 4096): "ee19a2644053e60c",
}


@pytest.mark.parametrize(("name", "tokens"), WHOLE)
def test_a_whole_prompt_is_what_it_was(name: str, tokens: int) -> None:
    digest, task = sha256(), LONG_TEXTS[name]
    for seed in range(5):
        prompt = task.draw(Random(seed), task.least_size + 37 * seed, tokens)
        digest.update((prompt.whole + str(prompt.answers)).encode())
    assert digest.hexdigest()[:16] == WHOLE[name, tokens]


# How a question begins, which is asked once, at the end.
QUESTIONS = {
    "dmc_niah_noise": r"What is the special magic number for (\S+) mentioned in the provided text\?",
    "dmc_vt": r"Question: Find all variables that are assigned the value (\d+) in the text above\.",
    "dmc_cwe": r"Question: What are the 10 most common words in the above list\?",
    "dmc_fwe": r"Question: Do not provide any explanation\. .*\?",
}


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_the_context_does_not_know_the_question(name: str) -> None:
    """It is all that comes before it; a solved example's question stands in it, which asks for something else."""
    for seed in range(3):
        prompt = LONG_TEXTS[name].draw(Random(seed), 90, 2000)
        assert prompt.text == prompt.context + prompt.question and prompt.context.endswith("\n")
        assert (asked := re.fullmatch(QUESTIONS[name], prompt.question)) is not None
        before = [found.groups() for found in re.finditer(QUESTIONS[name], prompt.context)]
        assert len(before) == (1 if name in ("dmc_vt", "dmc_cwe") else 0)
        assert name == "dmc_cwe" or asked.groups() not in before


def test_words_do_not_run_out() -> None:
    prompt = LONG_TEXTS["dmc_cwe"].draw(Random(0), 12_000, 2000)
    assert answers_of_list(prompt.text) == set(prompt.answers)


@pytest.mark.parametrize("name", LONG_TEXTS)
@pytest.mark.parametrize("tokens", [777, 4100, 20_011], ids=lambda n: f"L{n}")
def test_a_text_fills_its_length(name: str, tokens: int) -> None:
    room = tokens - LONG_TEXTS[name].new_tokens
    for prompt in long_prompts(name, tokens, 3, 0, words):
        assert 0.9 * room < words(prompt.whole) <= room
        assert ORACLES[name](prompt.text) == set(prompt.answers)


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_a_seed_gives_the_same_texts_and_the_first_of_many(name: str) -> None:
    def prompts(tokens: int, count: int, seed: int) -> list[Prompt]:
        return long_prompts(name, tokens, count, seed, words)

    first = prompts(900, 2, 0)
    assert first == prompts(900, 5, 0)[:2]
    assert first[0] != first[1]
    assert not set(map(str, first)) & {str(each) for each in (*prompts(900, 2, 1), *prompts(901, 2, 0))}


def test_a_length_that_is_too_short() -> None:
    fails(r"dmc_niah_noise needs texts of about 2\d\d tokens or more", long_prompts, "dmc_niah_noise", 150, 1, 0, words)


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_lm_eval_reads_the_whole_prompt(name: str, tmp_path: Path) -> None:
    """Its request is the text that was measured: with its answer it fits into the length, to the token."""
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    tokenizer_folder(tmp_path, "<s>", "</s>", frame="<s> $A")
    length = 3000
    metadata = {"pretrained": str(tmp_path), "max_seq_lengths": [length], "num_samples": 2, "seed": 3}
    manager = TaskManager(include_defaults=False, include_path=str(TASKS), metadata=metadata)
    (task,) = manager.load([YAML_OF[name]])["tasks"].values()
    task.build_all_requests()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompts = long_prompts(name, length, 2, 3, lambda text: len(tokenizer(text).input_ids))
    assert tokenizer("a").input_ids[0] == tokenizer.convert_tokens_to_ids("<s>")
    for request, prompt, document in zip(task.instances, prompts, task.test_docs(), strict=True):
        context, settings = request.args
        assert context == prompt.whole and document["context"] == prompt.context
        assert settings["max_gen_toks"] == LONG_TEXTS[name].new_tokens
        used = len(tokenizer(context).input_ids) + settings["max_gen_toks"]
        assert 0.9 * length < used <= length
        half = prompt.answers[: len(prompt.answers) // 2]
        assert task.process_results(document, [" ".join(prompt.answers).upper()]) == {"score": 1}
        assert task.process_results(document, [" ".join(half)]) == {"score": len(half) / len(prompt.answers)}


def test_without_a_tokenizer_one_line() -> None:
    with pytest.raises(ConfigError, match="name the tokenizer's folder in --metadata"):
        made.niah_noise(max_seq_lengths=[4096])


def test_the_group_has_every_task() -> None:
    group = yaml.safe_load((TASKS / "dmc_ruler.yaml").read_text())
    assert sorted(group["task"]) == sorted(YAML_OF.values())
    assert {path.stem for path in TASKS.glob("*.yaml")} == {*group["task"], "dmc_ruler", "dmc_csqa", "dmc_paper"}
