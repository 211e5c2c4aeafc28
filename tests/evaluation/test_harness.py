"""``megatron-dmc evaluate --tasks``: lm-eval's own numbers, and a cache that is counted without padding.

All data is local: lm-eval downloads nothing here.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_dmc.cli import evaluate, main
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.data.tokenizer import train_tokenizer
from megatron_dmc.evaluation.exported.model import load as load_exported
from megatron_dmc.evaluation.harness import run as harness
from megatron_dmc.evaluation.harness.observed import CacheUse
from megatron_dmc.evaluation.harness.rows import rows_of
from megatron_dmc.evaluation.harness.run import TaskRequest
from megatron_dmc.evaluation.harness.source import open_source
from megatron_dmc.evaluation.harness.tasks_by_name import FOLDER, load, task_manager
from megatron_dmc.hf.export import write_modeling_code
from tests.support.exports import dmc_model
from tests.support.llamas import save_random_base
from tests.support.lm_tasks import LOCAL_TASKS, write_local_tasks, write_paper_tasks
from tests.support.processes import PRODUCT, ROOT, run
from tests.support.toy import TEXT

VOCABULARY, POSITIONS = 300, 2048
DMC = {"decision_source": "projection", "local_window": 4, "operation": "merge"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``export`` and ``base``, each with a tokenizer, and ``tasks``."""
    folder = tmp_path_factory.mktemp("harness")
    for name in ("export", "base"):
        train_tokenizer(TEXT, VOCABULARY, folder / name)
    dmc_model(DMC, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS).save_pretrained(folder / "export")
    write_modeling_code(folder / "export")
    save_random_base(folder / "base", max_position_embeddings=POSITIONS)
    write_local_tasks(folder / "tasks")
    return folder


@pytest.fixture(autouse=True)
def offline(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The libraries have read these variables by now; what they decide is set as well."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield


def tasks(place: Path, *names: str) -> list[Any]:
    return TaskManager(include_defaults=False, include_path=str(place / "tasks")).load(list(names))["tasks"].values()


def observed(place: Path, name: str, batch_size: int, *named: str) -> tuple[dict[str, Any], dict[str, CacheUse]]:
    source = open_source(place / name)
    request = TaskRequest(named, batch_size=batch_size)
    model = harness._model(source, request)
    return harness._run(model, [*tasks(place, *named)], request), dict(model.uses)


def numbers(results: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """By task and metric; standard errors are metrics, too."""
    return {
        (task, metric): value
        for task, values in results.items()
        for metric, value in values.items()
        if "," in metric and value != "N/A"
    }


def test_the_command_gives_the_numbers_of_lm_evals_command(place: Path, tmp_path: Path) -> None:
    names = ",".join([*LOCAL_TASKS, "dmc_fwe"])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    include = tmp_path / "tasks"
    include.mkdir()
    for file in (*place.joinpath("tasks").iterdir(), FOLDER / "dmc_fwe.yaml", FOLDER / "dmc_niah_noise.yaml"):
        (include / file.name).write_bytes(file.read_bytes())
    plain = run(
        *("-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={place / 'export'},trust_remote_code=True"),
        *("--include_path", include, "--tasks", names, "--limit", 7, "--output_path", tmp_path / "plain"),
        *("--metadata", json.dumps({"max_seq_lengths": [1500], "num_samples": 7})),
        folder=tmp_path,
        timeout=300,
        **offline,
    )
    assert plain.returncode == 0, plain.stderr
    (file,) = (tmp_path / "plain").rglob("results_*.json")
    expected = numbers(json.loads(file.read_text())["results"])
    ours = run(
        *(*PRODUCT, "evaluate", place / "export", "--tasks", names, "--include-path", place / "tasks"),
        *("--limit", 7, "--length", 1500, "--output", tmp_path / "ours.json"),
        folder=tmp_path,
        timeout=300,
        **offline,
    )
    assert ours.returncode == 0, ours.stderr
    assert "Traceback" not in ours.stderr
    report = json.loads((tmp_path / "ours.json").read_text())
    found: dict[tuple[str, str], Any] = {}
    for row in report["results"]:
        found[row["task"], f"{row['metric']},{row['filter']}"] = row["value"]
        if row["stderr"] is not None:
            found[row["task"], f"{row['metric']}_stderr,{row['filter']}"] = row["stderr"]
        assert row["samples"] == 7 and row["compression_ratio"] > 1.2
        assert row["length"] == (1500 if row["task"] == "dmc_fwe" else None)
        assert 0 < row["plain_cache_bytes"] == pytest.approx(row["tokens"] * 3 * 2 * 2 * 16 * 4)
    assert found == expected
    assert {task for task, _ in found} == {*LOCAL_TASKS, "dmc_fwe"}
    assert len({value for (task, metric), value in found.items() if not metric.startswith("score")}) > 6
    table = ours.stdout
    assert all(
        f"{row['value']:.4f}" in table and f"{row['compression_ratio']:.2f}" in table for row in report["results"]
    )
    assert f"{tmp_path / 'ours.json'}: evaluated {place / 'export'}" in table


@pytest.mark.parametrize("name", ["export", "base"])
@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_a_batch_has_lm_evals_scores_to_the_last_bit(place: Path, name: str, task: str) -> None:
    """Also where a mask keeps its padding out of the compressed cache."""
    found, _ = observed(place, name, 4, task)
    plain = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(place / name), "trust_remote_code": True},
        tasks=[*tasks(place, task)],
        batch_size=4,
        device="cpu",
        task_manager=TaskManager(include_defaults=False),
    )
    assert numbers(found["results"]) == numbers(plain["results"])


@pytest.mark.parametrize("seed", [None, 7])
def test_examples_are_drawn_as_lm_eval_draws_them(place: Path, seed: int | None) -> None:
    source, request = open_source(place / "base"), TaskRequest((), num_fewshot=2, seed=seed)
    found = harness._run(harness._model(source, request), [*tasks(place, "local_choice", "local_generate")], request)
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    plain = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(place / "base")},
        tasks=[*tasks(place, "local_choice", "local_generate")],
        num_fewshot=2,
        device="cpu",
        task_manager=TaskManager(include_defaults=False),
        **({} if seed is None else dict.fromkeys(names, seed)),
    )
    assert numbers(found["results"]) == numbers(plain["results"])
    assert set(found["n-shot"].values()) == {2}


@pytest.mark.parametrize("name", ["export", "base"])
def test_batches_change_neither_scores_nor_what_is_counted(place: Path, name: str) -> None:
    one, uses_one = observed(place, name, 1, *LOCAL_TASKS)
    five, uses_five = observed(place, name, 5, *LOCAL_TASKS)
    assert numbers(five["results"]) == pytest.approx(numbers(one["results"]), rel=1e-5)
    assert set(uses_one) == set(LOCAL_TASKS)
    for task, use in uses_one.items():
        other = uses_five[task]
        assert (use.sequences, use.tokens, use.slots) == (other.sequences, other.tokens, other.slots)
        assert use.plain_nbytes == other.plain_nbytes
        # Pages are allocated for a batch together, and a mask is held with padding.
        assert other.nbytes == pytest.approx(use.nbytes, rel=0.1)


@pytest.mark.parametrize("name", ["export", "base"])
def test_the_cache_is_that_of_every_text_by_itself(place: Path, name: str) -> None:
    _, uses = observed(place, name, 3, "local_rolling", "local_generate")
    model = harness._model(open_source(place / name), TaskRequest(()))
    for task in tasks(place, "local_rolling", "local_generate"):
        expected = CacheUse()
        for document in task.eval_docs:
            if task.config.task == "local_rolling":
                ids = [model.prefix_token_id, *model.tok_encode(document["text"])][:-1]
            else:
                ids = model.tok_encode(document["question"])
            with torch.no_grad():
                cache = model.model(torch.tensor([ids]), use_cache=True).past_key_values
            if name == "export":
                slots, nbytes = int(cache.slots.sum()), cache.nbytes
            else:
                nbytes = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
                slots = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)
            config = model.config
            plain = len(ids) * config.num_hidden_layers * config.num_key_value_heads
            width = 2 * config.hidden_size // config.num_attention_heads * 4
            expected.add(CacheUse(1, len(ids), slots, plain, nbytes, plain * width))
        use = uses[task.config.task]
        assert vars(use) | {"nbytes": 0} == vars(expected) | {"nbytes": 0}
        assert use.nbytes == pytest.approx(expected.nbytes, rel=0.1 if name == "export" else 0)
        ratio = use.report()["compression_ratio"]
        assert ratio > 1.2 if name == "export" else ratio == 1


def test_a_token_that_looks_like_padding_is_counted(place: Path) -> None:
    """lm-eval pads with token 0, which may stand at the end of an input; the last token of all is no input."""
    model = harness._model(open_source(place / "export"), TaskRequest((), batch_size=2))
    model._loglikelihood_tokens([(None, [7, 8, 9, 10, 11], [12, 13]), (None, [5, 0, 0], [0, 6])])
    assert (model._use.sequences, model._use.tokens) == (2, 6 + 4)


def test_a_group_has_the_cache_of_all_its_tasks() -> None:
    uses = {"a": CacheUse(1, 10, 30, 60, 5, 7), "b": CacheUse(3, 20, 90, 120, 3, 9), "c": CacheUse(9, 9, 9, 9, 9, 9)}
    found = {
        "results": {
            "outer": {"acc,none": 0.5, "acc_stderr,none": 0.1},
            "c": {"acc,none": 1.0, "acc_stderr,none": "N/A"},
        },
        "group_subtasks": {"outer": ["inner", "b"], "inner": ["a"]},
        **{name: {} for name in ("versions", "n-shot", "higher_is_better")},
    }
    outer, c = rows_of(found, uses, None)
    cache = ("compression_ratio", "tokens", "cache_bytes", "plain_cache_bytes")
    assert [outer[name] for name in cache] == [180 / 120, 30 / 4, 8 / 4, 16 / 4]
    assert (outer["value"], outer["stderr"], c["stderr"]) == (0.5, 0.1, None)


def test_a_checkpoint_is_exported_and_gone_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    import_hf(place / "export", tmp_path / "checkpoint")
    reports = []
    for name in (tmp_path / "checkpoint", place / "export"):
        output = tmp_path / f"{name.name}.json"
        flags = ["--tasks", "dmc_fwe", "--length", "1200", "--limit", "2", "--output", str(output)]
        assert main(["evaluate", str(name), *flags]) == 0
        reports.append(json.loads(output.read_text()))
    assert reports[0]["results"] == reports[1]["results"]
    assert reports[0]["model"] == str(tmp_path / "checkpoint")
    assert not list(temporary.iterdir())


def test_no_code_of_a_folder_is_run(place: Path, tmp_path: Path) -> None:
    """Not even an export's: it may have been changed on its way."""
    folder = tmp_path / "export"
    shutil.copytree(place / "export", folder)
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values["auto_map"] = {"AutoTokenizer": [None, f"{next(folder.glob('*.py')).stem}.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    done = run(
        *PRODUCT,
        *("evaluate", folder, "--tasks", "dmc_fwe", "--length", 1500, "--limit", 1),
        *("--output", tmp_path / "a.json"),
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "was-run").exists()


def test_the_papers_group(tmp_path: Path) -> None:
    """MMLU with five examples and six sets of questions with none; HumanEval where code may run."""
    write_paper_tasks(tmp_path / "tasks")
    manager = task_manager(["dmc_paper"], {}, str(tmp_path / "tasks"))
    (group,) = load(manager, ["dmc_paper"], seed=0, runs_code=False)
    shots = {task.task_name: task.get_config("num_fewshot") for task in group.get_all_tasks()}
    csqa = {"piqa", "boolq", "arc_challenge", "arc_easy", "hellaswag", "winogrande"}
    assert shots == {"mmlu_part": 5, **dict.fromkeys(csqa)}
    assert group.child_names == ["mmlu", "dmc_csqa"]
    with pytest.raises(harness.ConfigError, match="humaneval runs code that the model writes"):
        load(manager, ["humaneval"], seed=0, runs_code=False)
    request = TaskRequest(("dmc_paper",), include=str(tmp_path / "tasks"), runs_code=True)
    ((_, found),) = harness._jobs(harness.Source(tmp_path, tmp_path, None, None), request)
    assert [getattr(each, "name", None) or each.task_name for each in found] == ["dmc_paper", "humaneval"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--tasks", "local_choise"], "lm-eval has no such task; did you mean local_choice"),
        (["--tasks", "hellaswag"], "--tasks hellaswag: its data is not on this machine and cannot be downloaded"),
        (["--tasks", "local_unsafe"], "--tasks local_unsafe runs code that the model writes"),
        (["--tasks", "local_choice,local_twice"], "--tasks: local_choice is named twice"),
        (["--tasks", "local_broken"], "--tasks local_broken: lm-eval cannot load it (the task's own fault)"),
        (["--tasks", "dmc_ruler"], "--tasks dmc_ruler reads texts of a length that you choose; add --length"),
        (["--tasks", "dmc_ruler", "--length", "1024,4096"], "reads at most 2048 tokens at once; ask for that or less"),
        (["--tasks", "dmc_ruler", "--length", "150"], "--tasks dmc_ruler: dmc_niah_noise needs texts of about"),
        (["--tasks", "local_choice", "--length", "512"], "--length has no effect on local_choice; leave it out"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[:30],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    place: Path, tmp_path: Path, flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are no weights: whoever loads them says so instead."""
    model = tmp_path / "model"
    model.mkdir()
    for path in (place / "export").iterdir():
        if path.is_file():
            (model / path.name).write_bytes(b"none" if path.suffix == ".safetensors" else path.read_bytes())
    write_local_tasks(tmp_path / "tasks", 3)
    (tmp_path / "tasks" / "twice.yaml").write_text("group: local_twice\ntask:\n  - local_choice\n")
    (tmp_path / "tasks" / "unsafe.yaml").write_text(
        "include: local_broken.yaml\ntask: local_unsafe\nunsafe_code: true\n"
    )
    (tmp_path / "tasks" / "faults.py").write_text('def f(**_):\n    raise ValueError("the task\'s own fault")\n')
    (tmp_path / "tasks" / "local_broken.yaml").write_text(
        "include: local_choice.yaml\ntask: local_broken\ncustom_dataset: !function faults.f\n"
    )
    flags = [*flags, "--include-path", str(tmp_path / "tasks"), "--output", str(tmp_path / "out.json")]
    assert main(["evaluate", str(model), *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not (tmp_path / "out.json").exists()


def test_a_model_that_cannot_be_loaded(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what the folder itself shows."""
    flags = ["--tasks", "dmc_fwe", "--length", "1000", "--limit", "1", "--output", str(tmp_path / "out.json")]

    def said(folder: Path) -> str:
        assert main(["evaluate", str(folder), *flags]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    model = tmp_path / "model"
    assert "model does not exist; name the folder of a Hugging Face model or of a checkpoint" in said(model)
    model.mkdir()
    assert "is not a checkpoint of megatron_dmc" in said(model)
    config = json.loads((place / "base" / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config))
    assert "holds no tokenizer; save one there" in said(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((place / "base" / name).read_bytes())
    assert "cannot be loaded: " in said(model)
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    assert "has 200 tokens, its tokenizer 300" in said(model)
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "m.M"}}))
    assert "brings code of its own, which is not run here" in said(model)
    (model / "adapter.safetensors").touch()
    assert "is an adapter without its base; evaluate the checkpoint" in said(model)
    (model / "tokenizer.json").write_text("{}")
    (model / "adapter.safetensors").unlink()
    (model / "config.json").write_text(json.dumps(config))
    assert "holds no tokenizer that can be read" in said(model)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "nothing to evaluate on: give --text PREFIX, a held-out dataset, or --tasks"),
        (["--tasks", "a", "--text", "b"], "--text and --tasks are two evaluations"),
        (["--tasks", "a", "--amount", "smoke"], "--amount has no effect with --tasks"),
        (["--tasks", "a", "--base", "b.json"], "--base has no effect with --tasks"),
        (["--tasks", "a", "--include-path", "/none"], "--include-path /none does not exist; name a folder with"),
        (["--text", "b", "--limit", "3"], "--limit has no effect with --text"),
        (["--text", "b", "--num-fewshot", "0"], "--num-fewshot has no effect with --text"),
        (["--text", "b", "--confirm-run-unsafe-code"], "--confirm-run-unsafe-code has no effect with --text"),
    ],
)
def test_flags_that_do_not_fit(
    tmp_path: Path, flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path / "no"), "--output", str(tmp_path / "out.json"), *flags]) == 1
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--length", "0"], ["--length", "1k"], ["--limit", "0.5"], ["--batch-size", "-1"], ["--tasks", ","]]
)
def test_numbers_that_are_none(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "model", "--output", "out.json", *flags])
    assert f"argument {flags[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["lm_eval", "wonderwords"])
def test_without_lm_eval_one_line(
    place: Path, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["evaluate", str(place / "export"), "--tasks", "a", "--output", str(tmp_path / "out.json")]) == 1
    named = missing.replace("_", "-")
    assert f"--tasks needs {missing}; run pip install {named}" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_export(place: Path, tmp_path: Path, family: str) -> None:
    """By the classes here, as by the code that it carries."""
    folder = tmp_path / "export"
    train_tokenizer(TEXT, VOCABULARY, folder)
    dmc_model(DMC, family, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS).save_pretrained(folder)
    write_modeling_code(folder)
    _, uses = observed(place, str(folder), 1, "local_choice")
    assert uses["local_choice"].report()["compression_ratio"] > 1.2
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours = load_exported(folder, torch.float32)(ids).logits
        carried = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(ids).logits
    assert torch.equal(ours, carried)


def test_weights_that_are_not_finite(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "export", tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    write_local_tasks(tmp_path / "tasks")
    with pytest.raises(ConfigError, match="its logits are not finite; its weights are damaged"):
        observed(tmp_path, "export", 1, next(iter(LOCAL_TASKS)))


def test_more_examples_than_there_are(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(place / "export"), "--tasks", "local_choice", "--include-path", str(place / "tasks")]
    assert main([*words, "--num-fewshot", "99999", "--output", str(tmp_path / "a.json")]) == 1
    assert "--num-fewshot 99999: local_choice has " in capsys.readouterr().err


def test_a_model_with_windows_has_no_cache_to_show(tmp_path: Path) -> None:
    """What its cache holds is less than every token."""
    train_tokenizer(TEXT, VOCABULARY, tmp_path / "windows")
    save_random_base(tmp_path / "windows", family="mistral", sliding_window=16, max_position_embeddings=POSITIONS)
    write_local_tasks(tmp_path / "tasks")
    _, uses = observed(tmp_path, "windows", 1, next(iter(LOCAL_TASKS)))
    assert uses and all(use.report() == {} for use in uses.values())


def test_an_output_that_makes_a_checkpoint_of_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path), "--tasks", "dmc_fwe", "--output", str(tmp_path / "out" / "dmc.json")]) == 1
    assert "its folder would count as a checkpoint; give the file another name" in capsys.readouterr().err


def test_an_output_that_exists(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.json").write_text("kept")
    assert main(["evaluate", str(place / "export"), "--tasks", "a", "--output", str(tmp_path / "out.json")]) == 1
    assert "exists; name a new file, or remove it" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == "kept"


def test_lm_eval_is_imported_for_tasks_only() -> None:
    code = (
        "import sys\nfrom megatron_dmc.cli import main\n"
        "import megatron_dmc.evaluation.exported.evaluate\n"
        "try:\n    main(['evaluate', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('lm_eval' in sys.modules)"
    )
    assert run("-c", code).returncode == 0


def test_the_pages_commands_have_these_flags() -> None:
    """Of docs/evaluation.md: each names a task, or a text, and what it names is there."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    typed = re.findall(r"^    megatron-dmc evaluate (.*)$", page, re.MULTILINE)
    assert len(typed) == 8
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    for line in typed:
        options = parser.parse_args(line.split())
        assert options.tasks or options.text or options.ruler_data
    (inner,) = re.findall(r"print\(megatron_dmc.__path__\[0\]\)'\)/(\S+)", page)
    assert ROOT / "megatron_dmc" / inner == FOLDER
