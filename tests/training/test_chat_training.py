"""Runs on chat data: which tokens they learn from, samples without a word of the assistant's, and resuming."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dmc.cli import main
from megatron_dmc.config import ConfigError
from megatron_dmc.data import (
    HeldoutWindows,
    build_chat_dataset,
    build_indexed_dataset,
    heldout_windows,
    iter_conversations,
    load_chat_template,
)
from megatron_dmc.evaluation.perplexity import evaluate
from megatron_dmc.inference.loading import load_model
from megatron_dmc.model.attention import StepContext
from megatron_dmc.recipe import load_recipe
from megatron_dmc.training.schedule import plan_step
from megatron_dmc.training.trainer import Trainer
from tests.support.chats import chat_tokenizer, conversations, write_chats
from tests.support.tensors import assert_same_tensors
from tests.support.toy import recipe_values, scalars, write_recipe

pytestmark = pytest.mark.usefixtures("one_process")

RETROFIT = [{"kind": "compress", "steps": 4, "lr": 5e-3}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokenizer = chat_tokenizer(folder / "tokenizer")
    template = load_chat_template(tokenizer)
    for name, chats in (("train", conversations(50)), ("valid", conversations(17))):
        path = write_chats(folder / f"{name}.jsonl", chats)
        build_chat_dataset(map(template.render, iter_conversations(path)), tokenizer, folder / name)
    build_indexed_dataset([f"Plain text {i}. " * 9 for i in range(30)], tokenizer, folder / "text")
    return folder


def values(folder: Path, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    made = recipe_values(folder, run, RETROFIT)
    made["model"]["vocab_size"] = 352
    made["checkpoint"]["save_interval"] = 2
    for section, changed in sections.items():
        made[section] |= changed
    return made


def trainer(data: Path, run: Path) -> Trainer:
    return Trainer(load_recipe(write_recipe(run, values(data, run))))


def gradients(trainer: Trainer, micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    plan = plan_step(trainer.recipe.phases, trainer.recipe.dmc, 2)
    context = StepContext(plan.merging, plan.channel_scale, trainer._alpha_gradient(plan, micro_batches))
    for layer in trainer._layers():
        layer.step = context
        layer.statistics.reset()
    for chunk in trainer.model:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    trainer._forward_backward(micro_batches)
    return {name: parameter.main_grad.clone() for name, parameter in trainer.model[0].named_parameters()}


def test_only_the_assistants_tokens_teach(data: Path, tmp_path: Path) -> None:
    toy = trainer(data, tmp_path)
    micro_batches = toy._micro_batches(toy.train_data, 0)
    masks = torch.cat([batch["loss_mask"] for batch in micro_batches])
    assert 0.2 < masks.mean() < 0.8
    expected = gradients(toy, micro_batches)
    for learned in (0, 1):
        changed = [
            batch | {"labels": torch.where(batch["loss_mask"] == learned, 7, batch["labels"])}
            for batch in micro_batches
        ]
        same = [torch.equal(gradient, expected[name]) for name, gradient in gradients(toy, changed).items()]
        assert not any(same) if learned else all(same)


class Silenced:
    """A dataset in which the given samples hold nothing that counts."""

    def __init__(self, dataset: Any, samples: set[int]) -> None:
        self.dataset, self.samples = dataset, samples

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        sample = self.dataset[idx]
        return sample | {"loss_mask": sample["loss_mask"] * (idx not in self.samples)}


def test_a_micro_batch_without_the_assistant(data: Path, tmp_path: Path) -> None:
    toy = trainer(data, tmp_path)
    micro_batches = toy._micro_batches(Silenced(toy.train_data, {0, 1}), 0)
    assert not micro_batches[0]["loss_mask"].any() and micro_batches[1]["loss_mask"].any()
    toy.merge_fraction = 1.0  # the gate is closed
    both, alone = gradients(toy, micro_batches), gradients(toy, micro_batches[1:])
    assert_same_tensors(both, alone)
    assert all(gradient.isfinite().all() for gradient in both.values())


def test_a_step_without_the_assistant(data: Path, tmp_path: Path) -> None:
    toy = trainer(data, tmp_path)
    toy.train_data = Silenced(toy.train_data, {4, 5, 6, 7})
    toy.run()
    losses, norms = scalars(tmp_path, "loss/lm"), scalars(tmp_path, "train/gradient_norm")
    assert [step for step, loss in losses.items() if math.isnan(loss)] == [2]
    assert [step for step, norm in norms.items() if norm == 0] == [2]
    assert all(parameter.isfinite().all() for parameter in toy.model[0].parameters())


def test_evaluation_without_the_assistant(data: Path, tmp_path: Path) -> None:
    toy = trainer(data, tmp_path)
    plan = plan_step(toy.recipe.phases, toy.recipe.dmc, 2)
    toy.valid_data = Silenced(toy.valid_data, {0, 1, 2, 3})
    result = toy.evaluate(plan)
    assert result is not None and math.isfinite(result.loss)
    toy.valid_data = Silenced(toy.valid_data, set(range(8)))
    assert toy.evaluate(plan) is None


@pytest.mark.parametrize("reset", [False, True], ids=["running-on", "reset"])
def test_a_resumed_blend_equals_one_not_stopped(data: Path, tmp_path: Path, reset: bool) -> None:
    weights = {}
    for name, stops in (("whole", []), ("stopped", [1, 2])):
        train = [str(data / "train"), str(data / "text")]
        run = values(data, tmp_path / name, data={"train": train, "reset_at_documents": reset})
        recipe = str(write_recipe(tmp_path / name, run))
        for steps in stops:
            assert main(["retrofit", recipe, f"training.exit_after_steps={steps}"]) == 0
        assert main(["retrofit", recipe]) == 0
        loaded = load_model(tmp_path / name / "checkpoints" / "final")
        weights[name] = {key: value.detach() for key, value in loaded.model.named_parameters()}
    assert_same_tensors(weights["stopped"], weights["whole"])
    assert scalars(tmp_path / "stopped", "loss/lm") == scalars(tmp_path / "whole", "loss/lm")


def test_a_resume_keeps_to_its_documents(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, values(data, tmp_path)))
    assert main(["retrofit", recipe, "training.exit_after_steps=2"]) == 0
    assert main(["retrofit", recipe, "data.reset_at_documents=true"]) == 1
    assert "data.reset_at_documents is true, but" in capsys.readouterr().err


def test_heldout_loss_is_the_assistants(data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, values(data, tmp_path))
    Trainer(load_recipe(recipe)).run()
    loaded = load_model(tmp_path / "checkpoints" / "final")
    windows = heldout_windows(str(data / "valid"), 33, loaded.tokenizer)
    expected, tokens = 0.0, 0
    for i in range(5):
        sample = {name: value[None] for name, value in windows[i].items()}
        losses = loaded.model(sample["tokens"], sample["position_ids"], None, labels=sample["labels"])[0].detach()
        for loss, counts in zip(losses.tolist(), sample["loss_mask"][0].tolist(), strict=True):
            expected, tokens = expected + loss * counts, tokens + int(counts)
    result = evaluate(loaded, windows, batch_size=2, limit=5)
    assert result.tokens == tokens and result.loss == pytest.approx(expected / tokens, rel=1e-5)
    text = torch.zeros(99, dtype=torch.int64).numpy()
    with pytest.raises(ConfigError, match="no token of the first 3 held-out windows counts"):
        evaluate(loaded, HeldoutWindows(text, 33 - 1, 4.0, trained=text))
