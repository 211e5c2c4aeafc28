"""Presses in generations: dmc_ruler by lm-eval, and RULER's questions as kvpress' own pipeline answers them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_dmc.baselines.press import Press
from megatron_dmc.baselines.presses import PRESSES
from megatron_dmc.baselines.quantized import Quantized
from megatron_dmc.cli import main
from megatron_dmc.data.tokenizer import train_tokenizer
from megatron_dmc.evaluation.exported.method import AsItIs
from megatron_dmc.evaluation.exported.model import load
from megatron_dmc.evaluation.harness import run as harness
from megatron_dmc.evaluation.harness.observed import ObservedLM
from megatron_dmc.evaluation.harness.ruler import answer
from megatron_dmc.evaluation.harness.ruler_data import read_questions
from megatron_dmc.evaluation.harness.run import TaskRequest
from megatron_dmc.evaluation.harness.source import open_source
from tests.support.exports import dmc_model
from tests.support.llamas import save_random_base
from tests.support.lm_tasks import write_local_tasks
from tests.support.ruler_files import LENGTH, TEMPLATE, ruler_rows, write_ruler
from tests.support.toy import TEXT

needs_kvpress = pytest.mark.skipif(
    importlib.util.find_spec("kvpress") is None,
    reason="no kvpress here: make kvpress, then PYTHONPATH=.venv-kvpress pytest tests/baselines",
)
TOKENS = 700
# kvpress hides what these drop by keys that no query attends to, of which it finds none for random weights.
HIDE = ("adakv_expected_attention", "kvzip")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``export``, each with a tokenizer, RULER's ``data``, and ``tasks``. What the base repeats is punished, so
    that steps differ that leave it out."""
    folder = tmp_path_factory.mktemp("tasks")
    save_random_base(folder / "base", max_position_embeddings=1024)
    (folder / "base" / "generation_config.json").write_text(
        json.dumps({"repetition_penalty": 1.3, "eos_token_id": 299})
    )
    dmc_model({"local_window": 4}, vocab_size=300, max_position_embeddings=1024).save_pretrained(folder / "export")
    for name in ("base", "export"):
        train_tokenizer(TEXT, 300, folder / name)
    write_ruler(folder / "data", ruler_rows())
    write_local_tasks(folder / "tasks")
    return folder


def generated(place: Path, baseline: Press | None) -> ObservedLM:
    """The model, after three texts of a task."""
    request = TaskRequest(("dmc_fwe",), (TOKENS,), 3, baseline=baseline)
    source = open_source(place / "base")
    ((_, tasks),) = harness._jobs(source, request)
    model = harness._model(source, request)
    harness._run(model, tasks, request)
    return model


@pytest.fixture(scope="module")
def plain(place: Path) -> ObservedLM:
    return generated(place, None)


@needs_kvpress
@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_nothing_is_dropped_at_a_ratio_of_one(place: Path, plain: ObservedLM, name: str) -> None:
    """Then the answers are those of lm-eval's own generation, penalties included."""
    pressed = generated(place, Press(1.0, name))
    assert pressed.answers == plain.answers and pressed.uses == plain.uses
    assert len({text for _, text in plain.answers["dmc_fwe"]}) == 3


@needs_kvpress
@pytest.mark.parametrize("name", ["knorm", "adakv_expected_attention"])
def test_a_context_is_compressed_before_its_question_is_read(place: Path, plain: ObservedLM, name: str) -> None:
    """Against the same steps, one after the other, from the place that the tokenizer itself gives for the question."""
    press = Press(4.0, name)
    found = generated(place, press)
    assert found.answers != plain.answers
    model = load(place / "base", "auto", press.attention)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    slots = tokens = 0
    for doc, text in found.answers["dmc_fwe"]:
        read = tokenizer(f"{doc['input']} {doc['gen_prefix']}", return_offsets_mapping=True)
        border = sum(end <= len(doc["context"]) for _, end in read["offset_mapping"])
        made = torch.tensor(read["input_ids"])
        assert 0.5 * len(made) < border < len(made) - 5
        _, kept = press.read(model, made[:border])
        with torch.inference_mode():
            logits, kept = press.extend(model, made[border:], kept)
            slots, tokens = slots + int(press.slots(model, kept).sum()), tokens + len(made)
            for _ in range(12):
                token = penalty(made[None], logits[-1:]).argmax(-1)
                made = torch.cat([made, token])
                logits, kept = press.extend(model, token, kept)
        assert text.startswith(tokenizer.decode(made[-12:-2], skip_special_tokens=True)) and len(text) > 12
    use = found.uses["dmc_fwe"]
    assert (use.sequences, use.tokens, use.slots) == (3, tokens, slots)
    assert use.nbytes == slots * 2 * 8 * 4 and 2 < use.plain_slots / use.slots < 4


@needs_kvpress
@pytest.mark.parametrize(
    ("name", "template"),
    [*((name, None) for name in (None, *PRESSES) if name not in HIDE), ("knorm", TEMPLATE)],
)
def test_rulers_answers_are_those_of_kvpress_pipeline(place: Path, name: str | None, template: str | None) -> None:
    import kvpress

    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = template
    method: Any = AsItIs() if name is None else Press(2.0, name)
    ours = load(place / "base", "auto", method.attention)
    theirs = load(place / "base", "auto", "eager" if name == "h2o" else None)
    pipe = kvpress.KVPressTextGenerationPipeline(model=theirs, tokenizer=tokenizer)
    for question in read_questions(place / "data", LENGTH):
        press = None if name is None else PRESSES[name](kvpress, 0.5)
        expected = pipe(
            question.context,
            question=question.question,
            answer_prefix=question.answer_prefix,
            press=press,
            max_new_tokens=question.max_new_tokens,
        )["answer"]
        assert answer(ours, tokenizer, question, method)[0] == expected


@needs_kvpress
def test_the_commands(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(place)
    press = ["--baseline", "h2o", "--compression-ratio", "4", "--leaderboard", str(tmp_path / "board")]
    for i, words in enumerate(
        (["--tasks", "dmc_fwe", "--length", "700", "--limit", "2"], ["--ruler-data", "data", "--length", str(LENGTH)])
    ):
        output = tmp_path / f"{i}.json"
        assert main(["evaluate", "base", *words, *press, "--output", str(output)]) == 0, capsys.readouterr().err
        report = json.loads(output.read_text())
        assert report["settings"]["baseline"] == {"compression_ratio": 4.0, "press": "h2o"}
        for row in report["results"]:
            assert 1.5 < row["compression_ratio"] < 4
            assert row["cache_bytes"] == pytest.approx(row["plain_cache_bytes"] / row["compression_ratio"])
    names = [path.name for path in sorted((tmp_path / "board").iterdir())]
    assert names == ["dmc_ruler__700__base__observed_attention__0.75", "ruler__512__base__observed_attention__0.75"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tasks", "local_generate"], "--baseline: local_generate does not say where its question begins"),
        (["--tasks", "local_choice"], "--baseline: local_choice does not say where its question begins"),
        (["--tasks", "dmc_fwe,local_choice", "--length", "700"], "--baseline: local_choice does not say where"),
        (["--tasks", "dmc_fwe", "--length", "700", "--batch-size", "2"], "--batch-size 2: a baseline takes one text"),
    ],
)
def test_tasks_that_take_no_baseline(
    place: Path, tmp_path: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is loaded: its weights are none."""
    for path in (place / "base").iterdir():
        (tmp_path / path.name).write_bytes(b"none" if path.suffix == ".safetensors" else path.read_bytes())
    given = ["evaluate", str(tmp_path), *words, "--include-path", str(place / "tasks"), "--limit", "2"]
    given += ["--baseline", "snapkv", "--compression-ratio", "4", "--output", str(place / "out.json")]
    assert main(given) == 1
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


@needs_kvpress
@pytest.mark.parametrize(
    "words", [["--tasks", "dmc_fwe", "--length", "700"], ["--ruler-data", "data", "--length", "512"]]
)
def test_models_and_ratios_that_take_no_baseline(
    place: Path, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for folder, ratio, line in (
        ("export", "4", "is an export that merges; name its base"),
        ("base", "999", "--compression-ratio 999 keeps less than one of"),
    ):
        given = ["evaluate", folder, *words, "--baseline", "snapkv", "--compression-ratio", ratio]
        assert main([*given, "--output", str(tmp_path / "out.json")]) == 1
        assert line in capsys.readouterr().err


def test_a_quantized_cache_keeps_every_token_in_fewer_bytes(place: Path) -> None:
    model, base = load(place / "base", "auto"), place / "base"
    (question, *_) = read_questions(place / "data", LENGTH)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    _, use = answer(model, tokenizer, question, Quantized(8))
    assert use.slots == use.plain_slots and use.nbytes < 0.6 * use.plain_nbytes
