"""``megatron-dmc evaluate --ruler-data`` and ``--leaderboard``: kvpress' questions, scores and folders, without kvpress."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from megatron_dmc.cli import main
from megatron_dmc.data.tokenizer import train_tokenizer
from megatron_dmc.evaluation.exported.method import AsItIs
from megatron_dmc.evaluation.exported.model import load
from megatron_dmc.evaluation.harness.leaderboard import Prediction, Submission, model_name, press_name, string_match
from megatron_dmc.evaluation.harness.ruler import answer
from megatron_dmc.evaluation.harness.ruler_data import Question, first_of_each_task, read_questions, tokens_of
from megatron_dmc.hf.export import write_modeling_code
from tests.support.exports import dmc_model
from tests.support.llamas import save_random_base
from tests.support.ruler_files import LENGTH, TEMPLATE, ruler_rows, write_ruler
from tests.support.texts import fails
from tests.support.tokenizer_folders import tokenizer_folder
from tests.support.toy import TEXT


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``export``, each with a tokenizer, and ``data``."""
    folder = tmp_path_factory.mktemp("ruler")
    for name in ("export", "base"):
        train_tokenizer(TEXT, 300, folder / name)
    dmc = {"decision_source": "projection", "local_window": 4, "operation": "merge"}
    dmc_model(dmc, vocab_size=300, max_position_embeddings=1024).save_pretrained(folder / "export")
    write_modeling_code(folder / "export")
    save_random_base(folder / "base", max_position_embeddings=1024)
    write_ruler(folder / "data", ruler_rows(), "parquet")
    return folder


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_files_are_read_as_they_are(tmp_path: Path, form: str) -> None:
    rows = [row | {"length": 3} for row in ruler_rows()]
    write_ruler(tmp_path, rows, form)
    found = read_questions(tmp_path, LENGTH)
    assert [each._asdict() for each in found] == ruler_rows()
    first = first_of_each_task(found, 1)
    assert [(each.task, each.context[:10]) for each in first] == [
        (task, "Document 0") for task in ("niah_single_1", "qa_1", "vt")
    ]
    assert sorted(first_of_each_task(found, None)) == sorted(found)


def test_files_that_are_none(tmp_path: Path) -> None:
    fails(r"512 does not exist; download simonjegou/ruler there, or choose another", read_questions, tmp_path, LENGTH)
    write_ruler(tmp_path, [])
    fails("holds no questions as .parquet or .jsonl", read_questions, tmp_path, LENGTH)
    good = ruler_rows()[0]
    (lacking := dict(good)).pop("answer")
    write_ruler(tmp_path, [good, lacking])
    fails("test.jsonl has no answer; its columns must be context, question", read_questions, tmp_path, LENGTH)
    for name, value in (("answer", "cat"), ("answer", []), ("max_new_tokens", 0), ("context", ""), ("question", None)):
        write_ruler(tmp_path, [good, good | {name: value}])
        fails("test.jsonl holds a question that is none", read_questions, tmp_path, LENGTH)
    (tmp_path / str(LENGTH) / "test.jsonl").write_text('{"context":\n')
    fails("test.jsonl cannot be read: .*; download it again", read_questions, tmp_path, LENGTH)
    (tmp_path / str(LENGTH) / "test.jsonl").unlink()
    (tmp_path / str(LENGTH) / "a.parquet").write_text("none")
    fails("a.parquet cannot be read: .*; download it again", read_questions, tmp_path, LENGTH)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_context_and_its_question_become_one_prompt(tmp_path: Path, template: str | None) -> None:
    settings = {} if template is None else {"chat_template": template}
    tokenizer_folder(tmp_path, "<s>", "</s>", frame="<s> $A", bos_token="<s>", **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    context, asked = tokens_of(tokenizer, Question("A the-story\n", "Who?", "It was", ["b"], "vt", 3))
    expected = ("<s>A the-story\n", "Who?\nIt was")
    if template is not None:
        expected = ("<s>[user] A the-story\n", "Who? [/][assistant]It was")
    assert (tokenizer.decode(context), tokenizer.decode(asked)) == expected


def test_a_template_that_loses_the_question(tmp_path: Path) -> None:
    asked = Question("A story", "Who?", "It was", ["b"], "vt", 3)
    for template, problem in (
        ("{{ messages[0]['content'][:3] }}", "its chat template changes what is asked"),
        ("{{ raise_exception('no\nway') }}", "its chat template takes no plain question: .*no way"),
    ):
        tokenizer_folder(tmp_path, "</s>", chat_template=template)
        fails(problem, tokens_of, transformers.AutoTokenizer.from_pretrained(tmp_path), asked)


def whole_prompt(tokenizer: Any, question: Question) -> torch.Tensor:
    context, rest = tokens_of(tokenizer, question)
    return torch.tensor([context + rest])


def asked(task: str, *answers: str) -> Question:
    return Question("", "", "", list(answers), task, 1)


def test_scores_are_rulers() -> None:
    """By hand: a part of the answers counts as a part, in tasks named qa one of them is enough."""
    texts = [
        (asked("vt", "AB", "cd", "ef"), " xab CD"),
        (asked("vt", "ab", "cd"), ""),
        (asked("qa_1", "ab", "cd"), "the Cd"),
        (asked("qa_1", "ab", "cd"), "a b"),
        (asked("niah_single_1", "12345"), "it is 12\n345\t."),
    ]
    found = string_match([Prediction(question, text, 0.5) for question, text in texts])
    assert found == {"niah_single_1": 100.0, "qa_1": 50.0, "vt": 33.33}
    assert list(found) == sorted(found)


@pytest.mark.parametrize("name", ["base", "export"])
def test_an_answer_is_the_models_own_generation(place: Path, name: str) -> None:
    """transformers' generate() from the whole prompt at once."""
    model = load(place / name, "auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / name)
    for question in read_questions(place / "data", LENGTH):
        prompt = whole_prompt(tokenizer, question)
        # Without a mask, generate() takes some tokens for padding.
        mask = torch.ones_like(prompt)
        whole = model.generate(
            prompt, attention_mask=mask, do_sample=False, max_new_tokens=question.max_new_tokens, eos_token_id=None
        )
        text, use = answer(model, tokenizer, question, AsItIs())
        assert text == tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True)
        with torch.no_grad():
            cache = model(prompt, use_cache=True).past_key_values
        slots = use.tokens * 4 if name == "base" else int(cache.slots.sum())
        assert (use.tokens, use.slots) == (prompt.shape[1], slots)


def test_an_answer_ends_where_the_model_ends_it(place: Path) -> None:
    """Like kvpress', not with its first token."""
    model = load(place / "base", "auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    question = read_questions(place / "data", LENGTH)[0]._replace(max_new_tokens=30)
    prompt = whole_prompt(tokenizer, question)
    mask = torch.ones_like(prompt)
    made = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=30, eos_token_id=None)[
        0, prompt.shape[1] :
    ].tolist()
    place_of_new = next(i for i in range(2, 30) if made[i] not in made[:i])
    again = made.index(made[0], 1) if made[0] in made[1:] else 29
    for ends, last in ((made[place_of_new], place_of_new), ([299, made[place_of_new]], place_of_new), (made[0], again)):
        model.generation_config.eos_token_id = ends
        text, _ = answer(model, tokenizer, question, AsItIs())
        assert text == tokenizer.decode(made[: last + 1], skip_special_tokens=True)


@pytest.mark.parametrize(("name", "press"), [("base", "no_press"), ("export", "dmc")])
def test_the_command_on_the_official_columns(
    place: Path,
    tmp_path: Path,
    name: str,
    press: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    board, output = tmp_path / "board", tmp_path / "out.json"
    words = ["evaluate", name, "--ruler-data", "data", "--length", str(LENGTH), "--leaderboard", str(board)]
    assert main([*words, "--output", str(output)]) == 0, capsys.readouterr().err
    report = json.loads(output.read_text())
    rows = {row["task"]: row for row in report["results"]}
    assert list(rows) == ["niah_single_1", "qa_1", "vt", "ruler"]
    assert rows["ruler"]["value"] == pytest.approx(sum(rows[task]["value"] for task in list(rows)[:3]) / 3)
    assert [row["samples"] for row in rows.values()] == [2, 2, 3, 7]
    ratio = rows["ruler"]["compression_ratio"]
    assert ratio == 1 if name == "base" else ratio > 1.2
    (folder,) = board.iterdir()
    assert report["leaderboard"] == [str(folder)]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    dropped = config["compression_ratio"]
    assert folder.name == f"ruler__{LENGTH}__{name}__{press}__{dropped:.2f}"
    assert (config["dataset"], config["data_dir"], config["model"]) == ("ruler", str(LENGTH), name)
    assert (config["press_name"], config["fraction"], config["query_aware"]) == (press, 1, False)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == {task: {"string_match": rows[task]["value"]} for task in list(rows)[:3]}
    with (folder / "predictions.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))
    given = sorted(ruler_rows(), key=lambda row: row["task"])
    for row, found in zip(given, predictions, strict=True):
        kept = {key: str(value) for key, value in row.items() if key != "context"}
        assert found == kept | {key: found[key] for key in ("predicted_answer", "compression_ratio")}
    assert dropped == pytest.approx(sum(float(each["compression_ratio"]) for each in predictions) / 7, abs=1e-6)
    assert dropped == 0 if name == "base" else 0.1 < dropped < 1
    assert str(folder) in capsys.readouterr().out


def test_a_part_of_the_data_says_so(place: Path, tmp_path: Path) -> None:
    words = [
        "evaluate",
        str(place / "base"),
        "--ruler-data",
        str(place / "data"),
        "--length",
        str(LENGTH),
        "--limit",
        "1",
    ]
    assert main([*words, "--leaderboard", str(tmp_path / "board"), "--output", str(tmp_path / "out.json")]) == 0
    (folder,) = (tmp_path / "board").iterdir()
    assert folder.name == f"ruler__{LENGTH}__base__no_press__0.00__fraction0.429"


def test_own_texts_are_not_called_the_official_ones(place: Path, tmp_path: Path) -> None:
    board, output = tmp_path / "board", tmp_path / "out.json"
    words = ["evaluate", str(place / "export"), "--tasks", "dmc_fwe,dmc_niah_noise", "--length", "700", "--limit", "2"]
    assert main([*words, "--leaderboard", str(board), "--output", str(output)]) == 0
    (folder,) = board.iterdir()
    assert folder.name.startswith("dmc_ruler__700__export__dmc__0.")
    report = json.loads(output.read_text())
    rows = {row["task"]: row for row in report["results"]}
    with (folder / "predictions.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))
    assert [each["task"] for each in predictions] == ["dmc_fwe"] * 2 + ["dmc_niah_noise"] * 2
    for each in predictions:
        assert float(each["compression_ratio"]) == pytest.approx(1 - 1 / rows[each["task"]]["compression_ratio"])
        assert each["question"].startswith(("Question: Do not provide", "What is the special magic number"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == {task: {"string_match": round(100 * rows[task]["value"], 2)} for task in sorted(rows)}


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    made = Submission("ruler", 4096, "a/b", "snapkv", 1, "float32", [Prediction(asked("vt", "a"), "a", 0.75)])
    places = [made.write(tmp_path) for _ in range(3)]
    name = "ruler__4096__a--b__snapkv__0.75"
    assert places == [tmp_path / name, tmp_path / name / "1", tmp_path / name / "2"]
    assert all((each / "metrics.json").exists() for each in places)
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_names_on_the_leaderboard() -> None:
    assert [model_name(name) for name in ("org/model", "./org/model/", "/data/org/model")] == ["org/model"] * 2 + [
        "model"
    ]
    assert (press_name(None, True), press_name(None, False)) == ("dmc", "no_press")
    assert [press_name(name, False) for name in ("snapkv", "h2o", "adakv_expected_attention")] == [
        *("snapkv", "observed_attention", "expected_attention"),
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--ruler-data", "data"], "--ruler-data has a folder for each length of its texts; add --length 4096"),
        (["--ruler-data", "data", "--tasks", "dmc_vt"], "--tasks and --ruler-data are two evaluations; run one after"),
        (["--ruler-data", "data", "--length", "99"], "99 does not exist; download simonjegou/ruler there"),
        (["--ruler-data", "data", "--length", "512", "--seed", "1"], "--seed has no effect with --ruler-data"),
        (["--ruler-data", "data", "--length", "2048"], "reads at most 1024 tokens at once; ask for that or less"),
        (["--text", "data", "--leaderboard", "b"], "--leaderboard has no effect with --text"),
        (
            ["--tasks", "hellaswag", "--leaderboard", "b"],
            "--leaderboard takes the tasks of dmc_ruler only; leave hellaswag",
        ),
        (["--tasks", "dmc_fwe", "--length", "700", "--leaderboard", "base/config.json"], "config.json is no folder"),
    ],
)
def test_what_cannot_be(
    place: Path, tmp_path: Path, words: list[str], line: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert main(["evaluate", "base", "--output", str(tmp_path / "out.json"), *words]) == 1
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_questions_that_are_too_long(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ruler(tmp_path / "data", [row | {"context": "The cat sat. " * 999} for row in ruler_rows()])
    words = ["evaluate", str(place / "base"), "--ruler-data", str(tmp_path / "data"), "--length", str(LENGTH)]
    assert main([*words, "--output", str(tmp_path / "out.json")]) == 1
    assert "reads at most 1024 at once; ask for a shorter length" in capsys.readouterr().err
