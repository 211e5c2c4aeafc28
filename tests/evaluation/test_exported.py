"""What ``megatron-dmc evaluate`` measures, against generate() and against losses that are computed plainly."""

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dmc.cli import main
from megatron_dmc.config import ConfigError
from megatron_dmc.data import build_indexed_dataset
from megatron_dmc.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_dmc.evaluation.exported import evaluate
from megatron_dmc.evaluation.exported import model as model_module
from megatron_dmc.evaluation.exported.amount import AMOUNTS, Amount
from megatron_dmc.evaluation.exported.evaluate import evaluate_exported, recall_over_base
from megatron_dmc.evaluation.exported.method import AsItIs
from megatron_dmc.evaluation.exported.model import cache_bytes, load
from megatron_dmc.evaluation.exported.recall import recalls
from megatron_dmc.evaluation.exported.report import is_report, read_report
from megatron_dmc.evaluation.exported.serving import serving
from megatron_dmc.evaluation.exported.text_loss import CONTINUED, continued_loss, copying_loss, text_loss
from megatron_dmc.evaluation.recall_tasks import Sample
from tests.support.exports import VOCABULARY, dmc_model, plain_model
from tests.support.llamas import save_random_base
from tests.support.texts import fails
from tests.support.toy import TEXT


@pytest.fixture(scope="module", params=["plain", "merge", "evict", "absorb"])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "plain":
        return plain_model()
    return dmc_model({"decision_source": "projection", "local_window": 4, "operation": request.param})


def prompts(count: int, tokens: int) -> list[torch.Tensor]:
    return list(torch.randint(3, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(2)))


def test_an_answer_is_recalled_where_greedy_generation_gives_it(model: Any) -> None:
    for prompt in prompts(4, 61):
        with torch.no_grad():
            made = model.generate(prompt[None], max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0)
        answer = made[0, len(prompt) :].tolist()
        for size in (1, 2, 7):
            for question in (0, 9, 60):
                assert recalls(model, Sample(prompt.tolist(), answer[:size], 0, question))
            for place in range(size):
                wrong = [*answer[:place], (answer[place] + 1) % VOCABULARY, *answer[place + 1 : size]]
                assert not recalls(model, Sample(prompt.tolist(), wrong, 0))


def test_losses(model: Any) -> None:
    base = dmc_model({"decision_source": "projection"})
    windows = prompts(3, 33)
    told: list[int] = []
    found = text_loss(model, base, windows, AsItIs(), told.append)
    assert sum(told) == 2 * 3 * 33
    with torch.no_grad():
        logits, wanted = (each(torch.stack(windows)[:, :-1], use_cache=False).logits.double() for each in (model, base))
    predicted, expected = logits.log_softmax(-1), wanted.log_softmax(-1)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.stack(windows)[:, 1:].flatten(), reduction="none"
    )
    divergence = (expected.exp() * (expected - predicted)).sum(-1)
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found["kl"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    quarters = losses.view(3, 4, 8).mean((0, 2)).tolist()
    assert found["loss_by_quarter"] == pytest.approx(quarters, rel=1e-4)
    assert found["kl_by_quarter"] == pytest.approx(divergence.view(3, 4, 8).mean((0, 2)).tolist(), rel=1e-3)


def test_the_loss_after_a_context(model: Any) -> None:
    """Of each text's last tokens, as if the whole text were read at once."""
    base, windows, told = dmc_model({"decision_source": "projection"}), prompts(3, CONTINUED + 40), []
    found = continued_loss(model, base, windows, AsItIs(), told.append)
    assert sum(told) == 2 * 3 * (CONTINUED + 40)
    whole = torch.stack(windows)
    with torch.no_grad():
        logits, wanted = (each(whole[:, :-1], use_cache=False).logits.double() for each in (model, base))
    predicted, expected = (each[:, -CONTINUED:].log_softmax(-1) for each in (logits, wanted))
    losses = -predicted.gather(2, whole[:, -CONTINUED:, None])
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    divergence = (expected.exp() * (expected - predicted)).sum(-1).mean()
    assert found["kl"] == pytest.approx(float(divergence), rel=1e-3)
    assert "kl" not in continued_loss(model, None, windows, AsItIs(), told.append)


def test_a_model_is_no_distance_from_itself(model: Any) -> None:
    assert text_loss(model, model, prompts(2, 17), AsItIs(), lambda _: None)["kl"] == 0
    assert "kl" not in text_loss(model, None, prompts(2, 17), AsItIs(), lambda _: None)


def test_copying_counts_the_second_half(model: Any) -> None:
    halves = prompts(2, 20)
    whole = torch.stack([torch.cat([half, half]) for half in halves])
    with torch.no_grad():
        predicted = model(whole, use_cache=False).logits.double().log_softmax(-1)
    # Token 20 begins the second half: nothing before it says that the text begins again.
    losses = [-predicted[i, t - 1, whole[i, t]] for i in range(2) for t in range(21, 40)]
    assert copying_loss(model, halves, AsItIs(), lambda _: None) == pytest.approx(
        float(sum(losses) / len(losses)), rel=1e-4
    )


def test_serving_reads_the_real_cache(model: Any) -> None:
    (text,) = prompts(1, 100)
    found = serving(model, text, 3)
    with torch.no_grad():
        cache = model(text[None], use_cache=True).past_key_values
    assert found["cache_bytes"] == cache_bytes(cache)
    assert found["tokens_per_second"] > 0 and found["seconds_to_first_token"] > 0
    if not hasattr(cache, "slots"):
        assert found["cache_bytes"] == 100 * 3 * 2 * 2 * 16 * 4
        assert "compression_ratio" not in found
        return
    ratios = torch.tensor(found["layer_head_compression_ratio"])
    assert ratios.shape == (3, 2)
    torch.testing.assert_close(100 / ratios, cache.slots[:, 0].float())
    assert found["compression_ratio"] == pytest.approx(cache.compression_ratio)


def test_an_amount_comes_back_from_json() -> None:
    for amount in AMOUNTS.values():
        assert Amount.from_dict(json.loads(json.dumps(amount.to_dict()))) == amount


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, its tokenizer, and a held-out dataset."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_random_base(folder / "base", max_position_embeddings=512)
    train_tokenizer(TEXT, 300, folder / "base")
    text = [f"{i} {one}" for i, one in enumerate(TEXT * 3)]
    build_indexed_dataset(text, load_tokenizer(folder / "base"), folder / "text")
    return folder


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)

    def evaluate(*words: str) -> tuple[int, str]:
        status = main(["evaluate", "base", "--text", "text", *words])
        printed, said = capfd.readouterr()
        return status, printed + said

    status, said = evaluate("--output", "reports/base.json", "--amount", "smoke")
    assert status == 0, said
    report = read_report("reports/base.json")
    assert set(report) == {
        *(
            "model",
            "amount",
            "text",
            "weights",
            "heldout_tokens",
            "loss",
            "loss_by_quarter",
            "copying",
            "continued",
            "serving",
            "recall",
        ),
        *("machine", "seconds", "serving_dtype"),
    }
    assert [row["task"] for row in report["recall"]] == ["passkey", "number", "lookup", "copy"]
    status, said = evaluate("--output", "reports/again.json", "--base", "reports/base.json")
    assert status == 0, said
    again = json.loads(Path("reports/again.json").read_text())
    assert re.search(r"loss \d\.\d+ nats per token, KL\(base \|\| model\) 0\.0000\n.*\n.*\nrecall 0 of 0 right", said)
    assert re.search(r"256 tokens: cache (\S+) MB \(base \1 MB\), CR 1\.00, first token after", said)
    assert again["base"] == "base" and again["kl"] == 0 and again["loss"] == report["loss"]
    assert again["serving"][0]["plain_cache_bytes"] == again["serving"][0]["cache_bytes"]
    # The tiny model is random: it recalls nothing, so nothing is asked of what was made from it.
    assert all(not row["counts"] for row in again["recall"]) and recall_over_base(again) is None

    status, said = evaluate("--output", "reports/base.json")
    assert status == 1 and "reports/base.json exists; name a new file" in said
    status, said = evaluate("--output", "c.json", "--base", "reports/again.json")
    assert status == 1 and "--base reports/again.json is no report of a base" in said
    save_random_base(folder / "other", vocab_size=320, max_position_embeddings=512)
    train_tokenizer(TEXT, 300, folder / "other")
    with pytest.raises(ConfigError, match="other has vocab_size 320, its base base 300; name the report of the base"):
        evaluate_exported("other", "text", base="reports/base.json")
    save_random_base(folder / "deep", num_hidden_layers=4, max_position_embeddings=512)
    shutil.copy("base/tokenizer.json", "deep")
    with pytest.raises(ConfigError, match="deep has num_layers 4, its base base 2"):
        evaluate_exported("deep", "text", base="reports/base.json")
    save_random_base(folder / "heads", num_key_value_heads=4, max_position_embeddings=512)
    shutil.copy("base/tokenizer.json", "heads")
    with pytest.raises(ConfigError, match="heads has num_query_groups 4, its base base 2"):
        evaluate_exported("heads", "text", base="reports/base.json")
    dmc_model(
        {"local_window": 4},
        **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 512},
    ).save_pretrained(folder / "merging")
    shutil.copy("base/tokenizer.json", "merging")
    with pytest.raises(ConfigError, match="merging has num_query_groups 1, its base base 2"):
        evaluate_exported("merging", "text", base="reports/base.json")
    status, said = evaluate("--output", "base/report.json")
    assert status == 1 and "--output base/report.json lies in base, and would count as a part of the model" in said


def test_what_changes_while_it_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model, and the report's place."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "base", "model")
    report = Path("report.json")

    def evaluated_while(change: Callable[[], object]) -> str:
        def changing(*arguments: Any) -> Any:
            change()
            return serving(*arguments)

        monkeypatch.setattr(evaluate, "serving", changing)
        words = ["--text", str(folder / "text"), "--output", str(report), "--amount", "smoke"]
        assert main(["evaluate", "model", *words]) == 1
        return capsys.readouterr().err

    said = evaluated_while(lambda: Path("model/generation_config.json").write_text('{"do_sample": true}'))
    assert "model has changed while it was measured; measure it again" in said and not report.exists()
    said = evaluated_while(lambda: report.write_text("another's"))
    assert "--output report.json has been written by another process meanwhile; name a new file" in said
    assert report.read_text() == "another's" and sorted(x.name for x in tmp_path.iterdir()) == ["model", "report.json"]


def test_a_report_outlives_its_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = ["evaluate", "base", "--text", "text", "--amount", "smoke", "--output", "unseen.json"]
    # It cannot be closed without an error, either.
    with contextlib.suppress(OSError), open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(words) == 1
    assert read_report("unseen.json")["model"] == "base"


def test_a_config_that_asks_for_tuples(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    assert evaluate_exported(str(tmp_path / "base"), str(folder / "text"), base=None, amount="smoke")["loss"] > 0


def test_text_with_tokens_that_the_tokenizer_has_not(folder: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"text{suffix}", tmp_path)
    tokens = numpy.fromfile(tmp_path / "text.bin", numpy.uint16)
    tokens[::7] = 60_000
    tokens.tofile(tmp_path / "text.bin")
    with pytest.raises(ConfigError, match=r"text\.bin holds token 60000, its tokenizer has 300: it is damaged; build"):
        evaluate_exported(str(folder / "base"), str(tmp_path / "text"), base=None, amount="smoke")


def test_what_a_base_recalls_is_asked_of_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    report = evaluate_exported("base", "text", base=None, amount="smoke")
    for row in report["recall"][:2]:
        row |= {"correct": 2, "accuracy": 0.5, "counts": True}
    Path("able.json").write_text(json.dumps(report))
    again = evaluate_exported("base", "text", base="able.json")
    assert [row["samples"] for row in again["recall"]] == [4, 4, 0, 0]
    assert again["recall"][0] == {
        **{"task": "passkey", "tokens": 256, "samples": 4, "correct": 0, "accuracy": 0.0},
        **{"base_accuracy": 0.5, "over_base": 0.0, "counts": True},
    }
    assert recall_over_base(again) == 0


def test_what_it_refuses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)

    def evaluate(name: str, text: str = "text", base: str | None = None) -> None:
        evaluate_exported(name, text, base=base, amount=None if base else "smoke")

    fails("nowhere does not exist", evaluate, "nowhere")
    fails("nothing", evaluate, "base", "nothing")
    fails(r"--base missing\.json does not exist; write it with", evaluate, "base", "text", "missing.json")
    build_indexed_dataset(TEXT[:2], load_tokenizer("base"), tmp_path / "short")
    fails(r"holds \d+ tokens, the evaluation reads 257 in a row; hold out", evaluate, "base", str(tmp_path / "short"))
    save_random_base(tmp_path / "small", max_position_embeddings=64)
    train_tokenizer(TEXT, 300, tmp_path / "small")
    fails("the model has 64 positions, the evaluation reads 261 tokens at once", evaluate, str(tmp_path / "small"))


def test_lengths_that_the_text_has_not_are_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(AMOUNTS, "smoke", replace(AMOUNTS["smoke"], serving_tokens=(256, 100_000)))
    save_random_base(folder / "long", max_position_embeddings=200_000)
    shutil.copy("base/tokenizer.json", "long")
    report = evaluate_exported("long", "text", base=None, amount="smoke")
    assert [row["tokens"] for row in report["serving"]] == list(report["amount"]["serving_tokens"]) == [256]
    assert re.search(r"the held-out text has \d+ tokens: not measured at 100000 tokens", capsys.readouterr().err)


def test_a_base_of_another_text_or_place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    report = evaluate_exported("base", "text", base=None, amount="smoke")
    (tmp_path / "base.json").write_text(json.dumps(report))
    build_indexed_dataset(
        [f"{i} other {one}" for i, one in enumerate(TEXT * 3)], load_tokenizer("base"), tmp_path / "other"
    )
    other, place = str(tmp_path / "other"), str(tmp_path / "base.json")
    with pytest.raises(ConfigError, match=r"base\.json was measured on other text than .*other; name the same text"):
        evaluate_exported("base", other, base=place)
    (tmp_path / "moved.json").write_text(json.dumps(report | {"model": "elsewhere"}))
    with pytest.raises(
        ConfigError, match=r"moved\.json was measured on elsewhere, which is not there; run in the same"
    ):
        evaluate_exported("base", "text", base=str(tmp_path / "moved.json"))


def test_a_base_that_has_become_another_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    report = evaluate_exported("base", "text", base=None, amount="smoke")
    shutil.copytree("base", "changed")
    weights = load_file("changed/model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, "changed/model.safetensors", {"format": "pt"})
    (tmp_path / "base.json").write_text(json.dumps(report | {"model": "changed"}))
    with pytest.raises(
        ConfigError, match=r"was measured on another model than changed holds now; measure the base again"
    ):
        evaluate_exported("base", "text", base=str(tmp_path / "base.json"))
    fails("--amount brief has no effect with --base", evaluate_exported, "base", "text", base="x.json", amount="brief")


def test_a_model_that_does_not_fit_its_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    save_random_base(tmp_path / "small", vocab_size=299, max_position_embeddings=512)
    shutil.copy("base/tokenizer.json", tmp_path / "small")
    small = str(tmp_path / "small")
    fails(
        "has 300 tokens, its model 299; put the model's own",
        evaluate_exported,
        small,
        "text",
        base=None,
        amount="smoke",
    )
    shutil.copytree("base", tmp_path / "resized")
    config = json.loads((tmp_path / "resized" / "config.json").read_text())
    (tmp_path / "resized" / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    with pytest.raises(ConfigError, match=r"k_proj\.weight has shape \[16, 32\], config\.json asks for \[8, 32\]"):
        load(tmp_path / "resized")


def test_a_damaged_report_is_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    report = evaluate_exported("base", "text", base=None, amount="smoke")
    place = tmp_path / "base.json"
    place.write_text(json.dumps(report))
    assert read_report(str(place)) == json.loads(json.dumps(report))
    amount, (first, *rows) = report["amount"], report["recall"]
    damaged: list[Any] = [
        *(["amount", "model", "copying", "recall", "text"], 3, None, {}),
        *(report | {"amount": value} for value in (3, None, {}, "4", amount | {"more": 1})),
        *(report | {"amount": amount | {"window_tokens": value}} for value in (130, "4", 4.5, -1, 0, True, None)),
        *(report | {"amount": amount | {"copy_tokens": value}} for value in (128, [1], [], [129])),
        report | {"amount": {name: value for name, value in amount.items() if name != "samples"}},
        *(report | {"recall": value} for value in ([], None, rows, [first | {"task": "other"}, *rows])),
        *(
            report | {"recall": [first | value, *rows]}
            for value in ({"correct": None}, {"samples": 0}, {"accuracy": 2})
        ),
        report | {"recall": [first | {"correct": 0, "accuracy": 0.0, "counts": True}, *rows]},
        report | {"recall": [{"task": first["task"], "tokens": first["tokens"]}, *rows]},
        *(report | {"model": value} for value in (5, None, "", "base\n", "\x1b[31mbase", "b" * 5000)),
        *(report | {"amount": amount | {name: 10**12}} for name in ("windows", "copies", "samples", "new_tokens")),
        *(report | {"serving_dtype": value} for value in ("float8", "", None)),
        *(report | {"loss": value} for value in ("6", None, float("nan"))),
        *(report | {"serving": value} for value in ([], None, [{"tokens": 256}])),
        *(report | more for more in ({"copying": []}, {"text": None}, {"kl": 0.1}, {"dmc": {}})),
    ]
    for each in damaged:
        place.write_text(json.dumps(each))
        fails(r"base\.json is no report of a base; write it with megatron-dmc evaluate BASE", read_report, str(place))


def test_a_damaged_report_of_what_was_measured_beside_a_base(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    base = evaluate_exported("base", "text", base=None, amount="smoke")
    (tmp_path / "base.json").write_text(json.dumps(base))
    again = evaluate_exported("base", "text", base=str(tmp_path / "base.json"))
    settings = {"target_compression_ratio": 4.0, "local_window": 4, "operation": "absorb"}
    report = again | {"dmc": settings, "serving": [row | {"compression_ratio": 2.0} for row in again["serving"]]}
    base, report = json.loads(json.dumps([base, report]))
    assert is_report(report, base)
    assert is_report({name: value for name, value in report.items() if name != "base_weights"}, base)
    assert is_report({name: value for name, value in report.items() if name != "continued"}, base)
    assert is_report(base | {"model": "\u30e2\u30c7\u30eb\u3000\u4e00"})
    # Of what carries no settings of compression: a plain model, whose caches are compared by their bytes.
    plain = json.loads(json.dumps(again))
    assert plain["serving"][0]["compression_ratio"] == 1 and is_report(plain, base)
    baseline = {name: value for name, value in plain.items() if name not in ("loss", "kl", "copying")}
    baseline |= {"baseline": {"compression_ratio": 4.0, "press": "snapkv"}}
    assert is_report(baseline, base) and not is_report(baseline) and not is_report(plain)
    (served,), (continued,) = plain["serving"], plain["continued"]
    damaged: list[Any] = [
        *(
            each | more
            for each in (plain, baseline)
            for more in (
                {"serving": []},
                {"serving": [served | {"compression_ratio": None}]},
                {"serving": [served | {"plain_cache_bytes": "9"}]},
                {"recall": []},
                {"text": "0"},
                {"continued": []},
                {"continued": [continued | {"tokens": 5}]},
                {"continued": [continued | {"kl": None}]},
                {"weights": "\n"},
            )
        ),
        *({name: x for name, x in plain.items() if name != lost} for lost in ("loss", "kl", "copying", "continued")),
        *({name: x for name, x in baseline.items() if name != lost} for lost in ("baseline", "serving", "continued")),
        *(baseline | {"baseline": value} for value in (None, {}, [], {"press": "snapkv"}, {"compression_ratio": "4"})),
        *(baseline | {"baseline": {"compression_ratio": 4.0, "press": value}} for value in (None, "a\nb", [], True)),
        *(baseline | {name: plain[name]} for name in ("loss", "kl", "copying")),
        baseline | {"dmc": settings},
        *(
            report | {name: value}
            for name in ("dmc", "kl", "kl_by_quarter", "recall", "serving", "continued", "copying")
            for value in ({}, None)
        ),
        *(report | {"dmc": settings | {name: None}} for name in settings),
        *(report | {"kl": value} for value in ("0.1", float("inf"), True)),
        report | {"recall": []},
        report | {"recall": [row | {"counts": True} for row in report["recall"]]},
        report | {"amount": report["amount"] | {"samples": 5}},
        report | {"text": "0"},
        report | {"base_weights": "another's"},
    ]
    for each in damaged:
        assert not is_report(each, base), each


def test_weights_that_are_missing_or_not_finite(folder: Path, tmp_path: Path) -> None:
    def with_weights(name: str, weights: dict[str, torch.Tensor]) -> str:
        shutil.copytree(folder / "base", tmp_path / name)
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        return str(tmp_path / name)

    weights = load_file(folder / "base" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    rest = {other: x for other, x in weights.items() if other != name}
    fails(rf"missing from the weights: {name}", load, with_weights("missing", rest))
    more = with_weights("more", weights | {"model.layers.7.mlp.up_proj.weight": weights["model.norm.weight"].clone()})
    fails(r"in the weights, but not in the model: model\.layers\.7\.mlp\.up_proj\.weight", load, more)
    nan = with_weights("nan", weights | {name: torch.full_like(weights[name], float("nan"))})
    with pytest.raises(ConfigError, match="nan: its loss is nan; its weights are damaged"):
        evaluate_exported(nan, str(folder / "text"), base=None, amount="smoke")


def test_no_code_of_a_folder_is_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "base" / "modeling_other.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_other.Other"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    load(tmp_path / "base")
    assert not (tmp_path / "ran").exists()


def test_recall_over_the_bases() -> None:
    rows = [
        {"counts": True, "over_base": 0.5},
        {"counts": True, "over_base": 1.0},
        {"counts": False, "over_base": 0.0},
        {"counts": False},
    ]
    assert recall_over_base({"recall": rows}) == 0.75


@pytest.mark.parametrize("fast", [False, True])
def test_what_is_served_in_bfloat16(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """Cache, speed and recall, where the machine is fast in it; on a CPU the losses are float32's on every machine."""
    monkeypatch.chdir(folder)
    used: dict[str, Any] = {}

    def seen(name: str) -> None:
        function = getattr(evaluate, name)

        def wrapped(*arguments: Any) -> Any:
            used[name] = arguments[0].dtype
            return function(*arguments)

        monkeypatch.setattr(evaluate, name, wrapped)

    for name in ("text_loss", "copying_loss", "serving", "recalls"):
        seen(name)
    monkeypatch.setattr(model_module, "bf16_is_fast", lambda: fast)
    report = evaluate_exported("base", "text", base=None, amount="smoke")
    served = torch.bfloat16 if fast else torch.float32
    assert used == {"text_loss": torch.float32, "copying_loss": torch.float32, "serving": served, "recalls": served}
    assert report["serving_dtype"] == str(served).removeprefix("torch.")

    (tmp_path / "base.json").write_text(json.dumps(report))
    monkeypatch.setattr(model_module, "bf16_is_fast", lambda: not fast)
    line = "base.json was measured in {}, this machine serves in {}; measure the base again"
    words = ("bfloat16", "float32") if fast else ("float32", "bfloat16")
    fails(line.format(*words), evaluate_exported, "base", "text", base=str(tmp_path / "base.json"))
