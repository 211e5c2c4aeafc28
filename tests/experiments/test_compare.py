"""``megatron-dmc compare``: each training is a valid run on as many tokens as the others; from a folder to a table."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dmc.baselines.presses import OF_KVPRESS, QUANTIZED
from megatron_dmc.cli import main
from megatron_dmc.cli.compare import METHODS as NAMES
from megatron_dmc.experiments.compare import page
from megatron_dmc.experiments.compare.ground import own_ground, shipped
from megatron_dmc.experiments.compare.rows import AT_THRESHOLD, BITS, CODED, LABELS, METHODS, Wanted, possible_groups
from megatron_dmc.experiments.compare.trainings import Trainings, merged
from megatron_dmc.recipe import Recipe, load_recipe
from tests.support.llamas import SMOLLM2
from tests.support.texts import fails
from tests.support.toy import LR, QUICKSTART_MODEL, recipe_values, write_recipe, write_text

MODELS = {"quickstart": [f"model={QUICKSTART_MODEL}"], "smollm2": SMOLLM2}


def trainings(name: str) -> Trainings:
    return Trainings(shipped(name), shipped("dms"), shipped("gqa"))


def read(recipe: dict[str, Any], model: list[str], folder: Path) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path, model)


@pytest.mark.parametrize("name", MODELS)
def test_every_training_is_a_valid_run_on_as_many_tokens(name: str, tmp_path: Path) -> None:
    made = trainings(name)
    rows = Wanted(METHODS, (2.0, 4.0, 8.0), (1, 2)).rows(made, {3.0: 1})
    assert len({row.name for row in rows}) == len(rows)
    for row in (row for row in rows if row.training is not None):
        whole = [read(each.recipe, MODELS[name], tmp_path) for each in row.trainings]
        steps = [each.total_steps for each in whole]
        length = whole[0].data.sequence_length
        assert [each.tokens for each in row.trainings] == [
            count * each.training.global_batch_size * length for count, each in zip(steps, whole, strict=True)
        ]
        if row.method in ("dmc", "gqa") or (row.method, row.ratio) == ("dms", 8.0):
            assert row.tokens == made.tokens
        for training, recipe in zip(row.trainings, whole, strict=True):
            assert recipe.checkpoint.directory == f"checkpoints/{training.name}"
            assert {recipe.data.seed, recipe.training.seed, *([recipe.dmc.seed] if recipe.merges else [])} == {row.seed}
        for before, after in zip(row.trainings, whole[1:], strict=False):
            assert after.checkpoint.load_base == f"checkpoints/{before.name}/final"


def test_dms_is_as_it_was_published(tmp_path: Path) -> None:
    """Its rate for 238 steps to CR 8 is 3e-5; its window is a 64th of a sample; it stops at its target."""
    made = trainings("smollm2")
    recipe = read(made.sparsified(8.0, 1).recipe, SMOLLM2, tmp_path)
    (phase,) = recipe.phases
    assert (phase.kind, phase.start_compression_ratio, recipe.dmc.target_compression_ratio) == ("compress", 1, 8)
    assert phase.lr * phase.steps == pytest.approx(3e-5 * 238)
    assert (recipe.dmc.operation, recipe.dmc.local_window, recipe.dmc.decision_scale) == ("evict", 32, 100)
    assert recipe.distillation.direction == "reverse" and recipe.repeat_fraction == 0 and recipe.trains_adapter


def test_what_comes_first_and_what_one_training_serves() -> None:
    made = trainings("smollm2")
    rows = Wanted(METHODS, (4.0, 8.0), (1, 2)).rows(made, possible_groups(3, 8))
    # Codes and other thresholds are asked of the first seed's exports alone.
    assert [row.seed for row in rows] == [None] * (2 * len(OF_KVPRESS) + len(BITS)) + [1] * (13 + 2 * len(CODED)) + [
        2
    ] * 10
    assert [row.flags for row in rows if row.method == "dmc_int4"] == [("--cache-dtype", "int4")] * 2
    assert [row.ratio for row in rows if row.method == QUANTIZED] == [2, 4, 8]
    assert [row.ratio for row in rows if row.method == AT_THRESHOLD] == [2, 3, 6]
    assert [row.training.name for row in rows if row.method == AT_THRESHOLD if row.training] == [
        "dmc-cr4-seed1",
        "dmc-cr4-seed1",
        "dmc-cr8-seed1",
    ]
    dms = [row for row in rows if row.method == "dms" and row.seed == 2]
    assert {row.training.name for row in dms if row.training} == {"dms-seed2"}
    assert [(row.checkpoint, row.tokens) for row in dms] == [
        (f"cr_{ratio}" if ratio < 8 else "final", round(made.tokens * (ratio - 1) / 7)) for ratio in (4, 8, 2, 3, 6)
    ]
    first = [row.name for row in rows if row.seed == 1]
    assert first[:6] == [f"{method}-cr{ratio}-seed1" for ratio in (4, 8) for method in ("calibrated", "dmc")] + [
        "dms-cr4-seed1",
        "dms-cr8-seed1",
    ]


def test_a_recipe_without_calibration_is_one_training() -> None:
    recipe = merged(shipped("smollm2"), {})
    recipe["phases"] = recipe["phases"][1:]
    made = Trainings(recipe, shipped("dms"), shipped("gqa"))
    rows = Wanted(("calibrated", "dmc"), (4.0,), (1,)).rows(made, {})
    assert [row.name for row in rows if row.method != AT_THRESHOLD] == ["dmc-cr4-seed1"]
    assert [each.name for each in rows[0].trainings] == ["dmc-cr4-seed1"]


def test_heads_are_averaged_where_that_is_possible() -> None:
    assert possible_groups(8, 8) == {2.0: 4, 4.0: 2, 8.0: 1}
    assert possible_groups(6, 4) == {2.0: 3, 3.0: 2}
    assert possible_groups(1, 8) == {}


def test_the_command_knows_every_method() -> None:
    """It lists them without importing what trains."""
    assert NAMES == METHODS and set(METHODS) <= set(LABELS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "dmc,h2"], "there is no method 'h2'; name some of calibrated, dmc"),
        (["--methods", ""], "there is no method ''"),
        (["--ratios", "4,0.5"], "must be numbers above 1"),
        (["--ratios", "nan"], "must be numbers above 1"),
        (["--ratios", "4;8"], "must be numbers above 1"),
        (["--seeds", "0"], "must be a whole number from 1 to 100"),
        (["--seeds", "²"], "must be a whole number from 1 to 100"),
        (["recipe.yaml", "--smoke"], "RECIPE has its own model and data"),
        (["recipe.yaml"], "recipe recipe.yaml does not exist"),
    ],
)
def test_what_is_refused_at_once(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["compare", *words])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status in (1, 2) and said in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def own(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a checkpoint (base), and text."""
    folder = tmp_path_factory.mktemp("own")
    write_text(folder)
    assert main(["convert-from-hf", str(tiny_model / "tiny"), str(folder / "base")]) == 0
    return folder


def retrofit_of(folder: Path) -> dict[str, Any]:
    recipe = recipe_values(folder, folder / "run", [{"kind": "solidify", "steps": 2, "lr": LR}])
    del recipe["model"]
    recipe["data"]["sequence_length"] = 600
    recipe["checkpoint"]["load_base"] = str(folder / "base")
    return recipe


def test_a_recipe_of_ones_own_is_compared_on_its_base(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its paths are read where the user is, and commands run in the run's folder."""
    monkeypatch.chdir(own)
    recipe = retrofit_of(Path("."))
    ground = own_ground(tmp_path / "run", str(write_recipe(tmp_path, recipe)))
    assert ground.base == str(own / "base") and ground.heldout == str(own / "valid")
    assert ground.amount == "compare_512" and "model" not in ground.recipe
    assert ground.recipe["data"]["tokenizer"] == str(own / "tokenizer")


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("checkpoint", {"load_base": None}, "must be given"),
        ("data", {"valid": []}, "data.valid is empty; name a held-out dataset"),
        ("data", {"sequence_length": 500}, "data.sequence_length 500 is too short to compare on; 512 or more"),
        ("parallel", {"pipeline_model_parallel_size": 2}, "parallel divides the model among 2 processes"),
        ("dmc", {"target_compression_ratio": 0.5}, "target_compression_ratio must be"),
    ],
)
def test_a_recipe_that_cannot_be_compared(
    section: str, changes: dict[str, Any], said: str, own: Path, tmp_path: Path
) -> None:
    recipe = retrofit_of(own)
    recipe.setdefault(section, {}).update(changes)
    fails(said, own_ground, tmp_path / "run", str(write_recipe(tmp_path, recipe)))


def test_a_recipe_that_merges_nothing(own: Path, tmp_path: Path) -> None:
    recipe = retrofit_of(own)
    recipe["phases"] = [{"kind": "pretrain", "steps": 2}]
    fails("none of its phases merges", own_ground, tmp_path / "run", str(write_recipe(tmp_path, recipe)))


def report(ratio: float, loss: float) -> dict[str, Any]:
    """As a report beside a base, what the table needs of it."""
    return {
        "kl": 0.005 * ratio,
        "continued": [{"tokens": 2000, "loss": loss, "kl": 0.01 * ratio}],
        "copying": [{"tokens": 2048, "loss": 0.25}],
        "serving": [
            {
                "tokens": 2000,
                "compression_ratio": ratio,
                "cache_bytes": 46e6 / ratio,
                "plain_cache_bytes": 46e6,
                "tokens_per_second": 12.0,
                "plain_tokens_per_second": 10.0,
            }
        ],
    }


def row(method: str, seed: int | None, found: dict[str, Any], recall: float | None) -> dict[str, Any]:
    shown = {"method": method, "label": LABELS[method], "ratio": 4.0, "seed": seed}
    trained = {"trained_tokens": 131_072, "training_seconds": 600.0 * seed} if seed else {"trained_tokens": 0}
    return {"training_seconds": None, **shown, **trained, "report": found, "recall_over_base": recall}


def test_the_table_shows_means_and_ranges() -> None:
    base = report(1, 2.0) | {"amount": {"samples": 6, "copies": 3}}
    press = report(4, 2.5)
    del press["copying"], press["kl"], press["serving"][0]["compression_ratio"]
    results = {
        "model": {"name": "toy"},
        "base": base,
        "rows": [
            row("snapkv", None, press, None),
            row("dmc", 1, report(3.9, 2.1), 1.0),
            row("dmc", 2, report(4.1, 2.2), 0.9),
        ],
    }
    shown, dmc, snapkv = page.rows(results)
    assert shown[0] == "base" and shown[3] == "46.0 MB"
    assert dmc[:3] == ["DMC", "4", "4.00 (3.90 to 4.10)"] and dmc[4] == "+0.150 (+0.100 to +0.200)"
    assert dmc[6:] == [
        "0.0200 (0.0195 to 0.0205)",
        "0.250 (0.250 to 0.250)",
        "95% (90% to 100%)",
        "1.20",
        "131 k",
        "15",
        "2",
    ]
    assert snapkv[:3] == ["snapkv", "4", "4.00"] and snapkv[6:] == ["", "", "", "1.20", "", "", ""]
    assert {len(each) for each in page.rows(results)} == {len(page.columns(results))}


def test_from_a_folder_to_a_table(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def compare(methods: str) -> str:
        words = ["--smoke", "--model", str(tiny_model / "tiny"), "--data", str(tiny_model / "text.jsonl")]
        status = main(["compare", *words, "--methods", methods, "--ratios", "4", "--output", "run"])
        said = capfd.readouterr()
        assert status == 0, said.err
        return said.out

    said = compare("dmc")
    assert "tiny: ways to a smaller cache" in said and "results: run/comparison.json" in said
    results = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [found["name"] for found in results["rows"]] == [
        "dmc-cr4-seed1",
        "dmc_at_threshold-cr2-seed1",
        "dmc_at_threshold-cr3-seed1",
    ]
    for found in results["rows"]:
        assert found["report"]["continued"][-1]["kl"] >= 0 and found["training_seconds"] > 0
        assert found["commands"][-1].startswith("megatron-dmc evaluate hf-")
        assert str(tmp_path) not in json.dumps(found["commands"])
    # An export is only for its rows, and one of DMC for the report.
    assert {path.name for path in (tmp_path / "run").glob("hf-*")} == {"hf-base", "hf-dmc-cr4-seed1"}
    assert (tmp_path / "run" / "report.html").exists() and "A text, token by token" in (
        tmp_path / "run" / "report.html"
    ).read_text(encoding="utf-8")
    # What is done is not done again, though the exports are gone; another recipe is not taken for this one.
    assert "$ megatron-dmc" not in compare("dmc")
    recipe = tmp_path / "run" / "recipes" / "dmc-cr4-seed1.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.6", "lr: 0.5"))
    words = ["compare", "--smoke", "--model", str(tiny_model / "tiny"), "--output", "run"]
    assert main([*words, "--data", str(tiny_model / "text.jsonl"), "--methods", "dmc"]) == 1
    assert "dmc-cr4-seed1.yaml is of a comparison with other settings" in capfd.readouterr().err
    (tmp_path / "other.jsonl").write_text((tiny_model / "text.jsonl").read_text().replace("cat", "dog"))
    assert main([*words, "--data", "other.jsonl", "--methods", "dmc"]) == 1
    assert "holds a run with another text" in capfd.readouterr().err
