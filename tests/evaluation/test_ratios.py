"""``megatron-dmc ratios``: the curve that it writes gives the ratio that is asked for."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_dmc.cli import main
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.hf_config import read_config
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_dmc.evaluation.exported.evaluate import Heldout
from megatron_dmc.evaluation.exported.model import load
from megatron_dmc.evaluation.exported.ratios import (
    LEAST_RATIO,
    chosen_threshold,
    curve_of,
    measure_ratios,
    ratio_at,
)
from megatron_dmc.hf.curve import CompressionCurve
from megatron_dmc.hf.export import write_modeling_code
from tests.support.exports import dmc_model
from tests.support.llamas import save_random_base
from tests.support.toy import TEXT

TOKENS = 400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export of random weights, its tokenizer, the plain model beside it, and two held-out datasets."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 1024}
    save_random_base(tmp_path / "base", **sizes)
    model = dmc_model({"operation": "evict", "local_window": 16}, vocab_size=300, **sizes)
    model.save_pretrained(tmp_path / "export")
    write_modeling_code(tmp_path / "export")
    for name in ("base", "export"):
        train_tokenizer(TEXT, 300, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path / "export")
    for name, part in (("text", 0), ("other", 1)):
        texts = [f"{i} {one} {i * i}" for i, one in enumerate(TEXT * 8) if i % 2 == part]
        build_indexed_dataset(texts, tokenizer, tmp_path / name)
    return tmp_path


def test_the_command_writes_a_curve_that_hits_what_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = json.loads(Path("export/config.json").read_text())
    words = ["ratios", "export", "--text", "text", "--tokens", str(TOKENS), "--texts", "4", "--most", "8"]
    assert main(words) == 0, capfd.readouterr().err
    assert "measured CR" in capfd.readouterr().out
    after = json.loads(Path("export/config.json").read_text())
    assert after == before | {"compression_curve": after["compression_curve"]}
    curve = CompressionCurve.from_dict(after["compression_curve"])
    assert curve.tokens == TOKENS and curve.ratios[0] <= LEAST_RATIO and curve.ratios[-1] >= 8
    read_config(Path("export"))
    model = load("export", torch.float32)
    for name, most in (("text", 0.02), ("other", 0.06)):
        texts = Heldout.open(name, load_tokenizer("export"), TOKENS).windows(4, TOKENS)
        for asked in (1.7, 2.0, 3.3, 4.0, 6.0, 7.7):
            found = ratio_at(model, texts, model.config.threshold_of(asked))
            assert abs(found / asked - 1) < most, (name, asked, found)
    assert chosen_threshold("export", 4.0, None) == model.config.threshold_of(4.0)
    assert chosen_threshold("export", None, -2.5) == -2.5
    assert chosen_threshold("export", None, None) is None


def test_evaluate_takes_it(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    config = json.loads(Path("export/config.json").read_text())
    curve = {"tokens": 400, "ratios": [1.5, 4.0], "thresholds": [20.0, -20.0]}
    Path("export/config.json").write_text(json.dumps(config | {"compression_curve": curve}))
    assert main(["evaluate", "base", "--text", "text", "--output", "base.json", "--amount", "smoke"]) == 0
    ratios = []
    for name, flag in (("high", "--merge-threshold=20"), ("own", None), ("low", "--compression-ratio=4")):
        words = ["evaluate", "export", "--text", "text", "--base", "base.json", "--output", f"{name}.json"]
        assert main([*words, *([flag] if flag else [])]) == 0, capfd.readouterr().err
        report = json.loads(Path(f"{name}.json").read_text())
        assert report.get("merge_threshold") == {"high": 20.0, "own": None, "low": -20.0}[name]
        ratios.append(report["serving"][0]["compression_ratio"])
    assert ratios[0] < ratios[1] < ratios[2]
    words = ["evaluate", "export", "--tasks", "dmc_niah_noise", "--length", "600", "--limit", "1"]
    for name, flag in (("high-tasks", "--merge-threshold=1e6"), ("low-tasks", "--merge-threshold=-1e6")):
        assert main([*words, flag, "--output", f"{name}.json"]) == 0, capfd.readouterr().err
    high, low = (json.loads(Path(f"{name}-tasks.json").read_text())["results"][0] for name in ("high", "low"))
    assert high["compression_ratio"] == 1 and low["compression_ratio"] > 10


def test_evaluate_takes_a_cache_dtype(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["evaluate", "base", "--text", "text", "--output", "coded-base.json", "--amount", "smoke"]) == 0
    reports = {}
    for name, flags in (("none", []), ("int4", ["--cache-dtype", "int4"])):
        words = ["evaluate", "export", "--text", "text", "--base", "coded-base.json", "--output", f"{name}.json"]
        assert main([*words, *flags]) == 0, capfd.readouterr().err
        reports[name] = json.loads(Path(f"{name}.json").read_text())
        assert reports[name].get("cache_dtype") == {"none": None, "int4": "int4"}[name]
        assert ("kept slots in int4" in capfd.readouterr().out) == (name == "int4")
    # It is measured with codes in all parts: the loss, what follows a context, and the bytes.
    for part in (lambda x: x["loss"], lambda x: x["continued"][0]["loss"], lambda x: x["serving"][0]["cache_bytes"]):
        assert part(reports["none"]) != part(reports["int4"])
    assert reports["int4"]["serving"][0]["cache_bytes"] < reports["none"]["serving"][0]["cache_bytes"]
    words = ["evaluate", "export", "--tasks", "dmc_niah_noise", "--length", "600", "--limit", "1"]
    for name, flags in (("none", []), ("int4", ["--cache-dtype", "int4"])):
        assert main([*words, *flags, "--output", f"{name}-tasks.json"]) == 0, capfd.readouterr().err
        reports[name] = json.loads(Path(f"{name}-tasks.json").read_text())
        assert reports[name]["settings"]["cache_dtype"] == {"none": None, "int4": "int4"}[name]
    sizes = [reports[name]["results"][0]["cache_bytes"] for name in ("int4", "none")]
    assert sizes[0] < sizes[1]
    for words in (["--text", "text"], ["--tasks", "dmc_ruler", "--length", "600"]):
        assert main(["evaluate", "base", *words, "--cache-dtype", "int4", "--output", "no.json"]) == 1
        line = "--cache-dtype int4: base is a plain model, whose cache transformers keeps"
        assert line in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["base"], "base is a plain model, which merges nothing"),
        (["export", "--tokens", "1025"], "--tokens 1025: the model has 1024 positions"),
        (["export", "--tokens", "2"], "--tokens must be >= 16"),
        (
            ["export", "--tokens", "20"],
            "the last 16 of them stay as they are, so there is no ratio above 1.18; ask for more",
        ),
        (["export", "--texts", "0"], "--texts must be >= 1"),
        (["export", "--tokens", "100", "--most", "1"], "--most must be 1.5 or more, got 1"),
        (["export", "--most", "nan"], "--most must be a finite number"),
        (["nowhere"], "nowhere does not exist"),
    ],
)
def test_what_cannot_be_measured(
    folder: Path, words: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["ratios", *words, "--text", "text"]) == 1
    said = capfd.readouterr().err
    assert line in said and said.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(folder: Path) -> None:
    (folder / "export").chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        measure_ratios(str(folder / "export"), str(folder / "text"), tokens=100, texts=1, most=None)


def test_flags_for_what_has_no_curve(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--compression-ratio: it has not been measured .* run megatron-dmc ratios"):
        chosen_threshold(folder / "export", 4.0, None)
    for given in ((4.0, None), (None, 1.0)):
        with pytest.raises(ConfigError, match="is no export of a model that merges"):
            chosen_threshold(folder / "base", *given)


def test_a_checkpoint_has_no_curve(tmp_path: Path) -> None:
    (tmp_path / "dmc.json").touch()
    assert chosen_threshold(tmp_path, None, 1.0) == 1.0
    with pytest.raises(
        ConfigError, match=r"is a checkpoint, which has no curve; export it with megatron-dmc convert-to-hf"
    ):
        chosen_threshold(tmp_path, 4.0, None)


def test_an_exports_cache_dtype_has_no_place_in_a_checkpoint(folder: Path) -> None:
    path = folder / "export" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"cache_dtype": "int4"}))
    with pytest.raises(ConfigError, match="cache_dtype is 'int4', which a checkpoint has no place for; set it to null"):
        import_hf(folder / "export", folder / "coded")
    path.write_text(before)


def test_an_exports_threshold_has_no_place_in_a_checkpoint(folder: Path) -> None:
    config = json.loads((folder / "export" / "config.json").read_text())
    (folder / "export" / "config.json").write_text(json.dumps(config | {"merge_threshold": -1.5}))
    with pytest.raises(
        ConfigError, match=r"merge_threshold is -1\.5, which a checkpoint has no place for; set it to 0"
    ):
        import_hf(folder / "export", folder / "checkpoint")
    (folder / "export" / "config.json").write_text(json.dumps(config | {"merge_threshold": 0.0}))
    import_hf(folder / "export", folder / "checkpoint")


def falling(x: float) -> float:
    return 1 / (1 + math.exp(min(x, 500)))


def steep(threshold: float) -> float:
    """A jump from 2 to 6 at 0.3."""
    return 2.0 if threshold > 0.3 else 6.0


def wavy(threshold: float) -> float:
    """Not quite falling."""
    return 1 + 15 * falling(threshold) * (1 + 0.05 * math.sin(20 * threshold))


@pytest.mark.parametrize(
    ("ratio", "ends"),
    [
        (lambda t: 1 + 15 * falling(t), (1.5, 10)),
        (lambda t: 1 + 15 * falling((t - 500) / 100), (1.5, 10)),
        (lambda t: 1 + 3 * falling(t), (1.5, 3.9)),
        (steep, (2, 6)),
        (wavy, (1.5, 10)),
    ],
)
def test_curves_of_any_form(ratio: Callable[[float], float], ends: tuple[float, float]) -> None:
    asked: list[float] = []

    def counted(threshold: float) -> float:
        asked.append(threshold)
        return ratio(threshold)

    curve = curve_of(counted, 100, most=10)
    assert len(asked) < 60 and len(set(asked)) == len(asked)
    least, most = ends
    assert curve.ratios[0] <= max(least, 2) and curve.ratios[-1] >= most
    if ratio is not steep:
        for each in torch.linspace(max(1.5, curve.ratios[0]), most, 30).tolist():
            assert ratio(curve.threshold(each)) == pytest.approx(each, rel=0.1 if ratio is wavy else 0.02)


def test_a_curve_that_ends_where_it_begins() -> None:
    assert curve_of(lambda t: 1 + 15 * falling(t), 100, most=LEAST_RATIO).ratios[-1] >= LEAST_RATIO


def test_a_model_that_never_merges() -> None:
    assert curve_of(lambda _: 1.0, 100, most=10).ratios == (1.0,)


def test_decisions_of_two_kinds_far_apart() -> None:
    """A quarter of the logits near 50, the rest near -50: no ratio changes for a long way around 0."""

    def ratio(threshold: float) -> float:
        merged = 0.25 * falling(threshold - 50) + 0.7 * falling(threshold + 50)
        return 1 / (1 - merged)

    curve = curve_of(ratio, 100, most=10)
    assert curve.ratios[-1] >= 10
    for asked in (1.34, 2.0, 6.0):
        assert ratio(curve.threshold(asked)) == pytest.approx(asked, rel=0.02)


def test_a_damaged_curve_is_measured_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    path = Path("export/config.json")
    path.chmod(0o600)
    Path("precious").write_text("mine")
    Path("export/.config.json.tmp").symlink_to("../precious")
    for curve in ({"tokens": 1}, {"tokens": 9, "ratios": [2.0, 10**400], "thresholds": [1, 0]}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"compression_curve": curve}))
        assert main(["ratios", "export", "--text", "text", "--tokens", "60", "--texts", "1", "--most", "2.5"]) == 0
        assert json.loads(path.read_text())["compression_curve"]["tokens"] == 60
    assert path.stat().st_mode & 0o777 == 0o600
    # What lies there under another's name is not written to.
    assert Path("precious").read_text() == "mine" and not path.is_symlink()
    assert sorted(x.name for x in Path("export").iterdir() if "tmp" in x.name) == [".config.json.tmp"]
    capfd.readouterr()
    assert main(["ratios", "export", "--text", "text", "--tokens", "60", "--texts", "1", "--most", "9"]) == 0
    assert "it does not reach CR 9 in texts of 60 tokens" in capfd.readouterr().err
