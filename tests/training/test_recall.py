"""Recall at every evaluation: what it measures, what it is compared with, and when a run warns of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dmc.cli import main
from megatron_dmc.cluster_check.cases import scatter_decisions
from megatron_dmc.data import heldout_windows
from megatron_dmc.data.repeats import is_repeated, text_twice
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.evaluation.perplexity import measure_recall
from megatron_dmc.inference.loading import load_model
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.recipe import load_recipe, recipe_from_dict
from megatron_dmc.training import messages
from megatron_dmc.training.schedule import plan_step
from megatron_dmc.training.trainer import Trainer
from tests.support.processes import run as run_process
from tests.support.tensors import assert_same_tensors
from tests.support.toy import LR, RETROFIT, recipe_values, scalars, train, weights, write_recipe

pytestmark = pytest.mark.usefixtures("one_process")

LENGTH = 33
# Where a copied token's label stands, so many tokens before: the first copy has 17.
DISTANCE = 16
WIDTH = 64
COPIER = {
    "num_layers": 1,
    "hidden_size": WIDTH,
    "ffn_hidden_size": 16,
    "num_attention_heads": 1,
    "num_query_groups": 1,
}
SEEN = ("evaluation/lm_loss", "evaluation/recall_loss", "evaluation/recall_gap")


@torch.no_grad()
def make_copier(model: torch.nn.Module) -> None:
    """Weights with which a token is predicted to be the one that stands DISTANCE tokens back, whatever the text.

    A token's embedding is a direction of its own and a constant. From the constant come a query and a key that fit at that
    distance; values are the directions, and the output layer looks for them.
    """
    parameters = dict(model.named_parameters())

    def one(name: str) -> torch.Tensor:
        (found,) = (parameter for full, parameter in parameters.items() if full.endswith(name))
        return found

    rows = len(one("word_embeddings.weight"))
    directions = torch.randn(rows, WIDTH - 1, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=1, keepdim=True)
    one("word_embeddings.weight").copy_(torch.cat([directions, torch.ones(rows, 1)], dim=1))
    angles = DISTANCE * 10_000 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    query, key, value = one("linear_qkv.weight").zero_().view(3, WIDTH, WIDTH)
    # Rotary embedding turns pairs of channels that are half a head apart.
    query[:, -1] = 10 * torch.cat([angles.cos(), -angles.sin()])
    key[: WIDTH // 2, -1] = 10
    value[:-1, :-1] = 10 * torch.eye(WIDTH - 1)
    one("linear_proj.weight").copy_(torch.eye(WIDTH))
    one("linear_fc2.weight").zero_()
    one("output_layer.weight").copy_(torch.cat([5 * directions, torch.zeros(rows, 1)], dim=1))


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Path:
    """The copier as a checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    values = recipe_values(data, folder, [{"kind": "pretrain", "steps": 1, "lr": LR}])
    values["model"] |= COPIER
    trainer = Trainer(load_recipe(write_recipe(folder, values)))
    make_copier(trainer.model[0])
    trainer.store.save_weights("copier", 0, 0, None)
    return folder / "checkpoints" / "copier"


def retrofit(base: Path, data: Path, run: Path, /, *, adapter: bool = True, **sections: dict[str, Any]) -> Path:
    """A retrofit whose decisions begin a hair below the edge: nothing merges, and nearly anything would."""
    values = recipe_values(data, run, RETROFIT, decision_bias=0.0, operation="evict", local_window=1)
    values["model"] |= COPIER
    values["checkpoint"]["load_base"] = str(base)
    values["training"]["train"] = "adapter" if adapter else "full"
    for section, settings in sections.items():
        values[section] = values.get(section, {}) | settings
    return write_recipe(run, values)


KEEPS = {"dmc": {"decision_bias": 50.0, "loss_coefficient": 0.0, "operation": "evict", "local_window": 1}}


def decide(trainer: Trainer, *, merges: bool) -> None:
    """Decisions by hand: all that may go goes, or nothing."""
    with torch.no_grad():
        for layer in dmc_layers(trainer.model[0]):
            layer.decision.bias.fill_(1.0 if merges else -1.0)


def test_decisions_that_throw_everything_away_cost_recall(base: Path, data: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_recipe(retrofit(base, data, tmp_path)))
    trainer.store.load()
    plan = plan_step(trainer.recipe.phases, trainer.recipe.dmc, 0)
    decide(trainer, merges=False)
    kept, of_base = trainer.evaluate(plan), trainer.measure_base_recall()
    decide(trainer, merges=True)
    thrown_away, still = trainer.evaluate(plan), trainer.measure_base_recall()
    assert kept is not None and thrown_away is not None
    assert kept.recall_loss is not None and thrown_away.recall_loss is not None
    # A copier copies; merging switched off, the decisions do not matter.
    assert kept.recall_loss == of_base == still and kept.recall_loss < 0.05
    assert thrown_away.recall_loss > 3
    # The loss on plain text does not show it: a copier was bad there before.
    assert thrown_away.loss < kept.loss


def test_recall_is_the_loss_on_second_copies_alone(base: Path, data: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_recipe(retrofit(base, data, tmp_path)))
    trainer.store.load()
    decide(trainer, merges=True)
    result = trainer.evaluate(plan_step(trainer.recipe.phases, trainer.recipe.dmc, 0))
    model, total, tokens = trainer.model[0].eval(), 0.0, 0
    for i in range(8):
        sample, second = text_twice(trainer.valid_data[i])
        ids, positions, labels = (sample[name][None] for name in ("tokens", "position_ids", "labels"))
        with torch.no_grad():
            losses = model(ids, positions, torch.tensor([i]), labels=labels)[0]
        total, tokens = total + float(losses[second].double().sum()), tokens + int(second.sum())
    assert tokens == 8 * 16
    assert result is not None and result.recall_loss == pytest.approx(total / tokens, rel=1e-6)


def lines(capsys: pytest.CaptureFixture[str], begin: str) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(begin)]


def test_a_run_that_loses_recall_says_so(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [{"kind": "compress", "steps": 6, "lr": 0.5}, {"kind": "solidify", "steps": 6, "lr": 0.5}]
    settings = {"dmc": {"loss_coefficient": 1e4, "decision_bias": 0.0, "operation": "evict", "local_window": 1}}
    path = retrofit(base, data, tmp_path, monitor={"eval_interval": 2}, **settings)
    overrides = [f"phases={json.dumps(phases)}"]
    assert main(["retrofit", str(path), *overrides]) == 0
    warnings = lines(capsys, "warning: recall")
    gaps = scalars(tmp_path, "evaluation/recall_gap")
    assert list(gaps) == [0, 2, 4, 6, 8, 10, 12] and gaps[0] == 0 and min(gaps[4], gaps[8], gaps[12]) > 1
    # The first of either phase, and the last of the run.
    first = next(step for step in (2, 4) if gaps[step] > 0.25)
    assert warnings == [
        f"warning: recall falls behind: {gaps[step]:.2f} nats per token above the base on repeated text (limit 0.25, "
        "monitor.recall_limit); try more steps, a larger data.repeat_fraction, a larger dmc.local_window, or a lower "
        "dmc.target_compression_ratio"
        for step in (first, 8, 12)
    ]
    # Seen at the end alone, it is said once.
    more = ["monitor.eval_interval=0", f"checkpoint.directory={tmp_path / 'end'}", "monitor.tensorboard=null"]
    assert main(["retrofit", str(path), *overrides, *more]) == 0
    assert lines(capsys, "warning: recall") == warnings[-1:]
    for limit, run in (("null", "never"), ("1000", "high")):
        more = [f"monitor.recall_limit={limit}", f"checkpoint.directory={tmp_path / run}"]
        assert main(["retrofit", str(path), *overrides, *more, "monitor.tensorboard=null"]) == 0
        assert not lines(capsys, "warning: recall")


def test_a_run_that_keeps_recall_shows_it(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = retrofit(base, data, tmp_path, monitor={"progress_bar": True}, **KEEPS)
    assert main(["retrofit", str(path)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert not [line for line in said if "recall falls behind" in line]
    losses, recalls, gaps = (scalars(tmp_path, tag) for tag in SEEN)
    assert list(losses) == list(recalls) == list(gaps) == [0, 9]
    assert [line for line in said if line.startswith("held-out")] == [
        f"held-out loss after {step} steps: {losses[step]:.4f} nats per token, compression ratio 1.00, recall "
        f"{recalls[step]:.2f} (+0.00 over the base)"
        for step in (0, 9)
    ]


@pytest.mark.parametrize(("fraction", "repeats"), [(0.0, True), (0.4, True), (0.5, False)])
def test_the_remedy_fits(fraction: float, repeats: bool) -> None:
    values = recipe_values(Path("data"), Path("run"), RETROFIT)
    values["data"]["repeat_fraction"] = fraction
    recipe = recipe_from_dict(values)
    warning = messages.recall_behind(recipe, 0.58)
    assert warning is not None and ("data.repeat_fraction" in warning) == repeats
    assert [messages.recall_behind(recipe, gap) for gap in (None, -1.0, 0.25)] == [None] * 3


@pytest.mark.parametrize("fraction", [0.0, 1 / 3, 0.5, 0.37, 1.0])
def test_the_banner_says_how_many_repeat(fraction: float) -> None:
    values = recipe_values(Path("data"), Path("run"), RETROFIT)
    values["data"]["repeat_fraction"] = fraction
    banner = messages.banner(recipe_from_dict(values), messages.World(1, 1, None), 10, 10)
    (line,) = (line for line in banner.splitlines() if line.startswith("  data "))
    share = {0.0: "", 1 / 3: "1/3", 0.5: "1/2", 0.37: "0.37", 1.0: "all"}[fraction]
    assert line.endswith(f"data/train, {share} of the samples a text twice" if share else "data/train")


def test_adapters_repeat_a_third_by_default(base: Path, data: Path, tmp_path: Path) -> None:
    for adapter, given, resolved in ((True, None, 1 / 3), (False, None, 0.0), (True, 0.0, 0.0), (False, 0.5, 0.5)):
        path = retrofit(base, data, tmp_path, adapter=adapter, data={"repeat_fraction": given})
        trainer = Trainer(load_recipe(path))
        assert trainer.recipe.repeat_fraction == resolved
        plain = Trainer(load_recipe(path, ["data.repeat_fraction=0"])).train_data
        for i in range(12):
            expected = text_twice(plain[i])[0] if is_repeated(i, resolved) else plain[i]
            assert torch.equal(trainer.train_data[i]["tokens"], expected["tokens"])


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("reset", [False, True], ids=["running-on", "reset"])
def test_resumed_equals_not_stopped(base: Path, data: Path, tmp_path: Path, adapter: bool, reset: bool) -> None:
    runs = []
    for name, exits in (("whole", []), ("stopped", [2, 3])):
        path = retrofit(
            base,
            data,
            tmp_path / name,
            adapter=adapter,
            data={"repeat_fraction": 0.4, "reset_at_documents": reset},
            monitor={"eval_interval": 1},
        )
        for steps in exits:
            train(path, f"training.exit_after_steps={steps}")
        runs.append(weights(train(path)))
    assert_same_tensors(runs[1], runs[0])
    for tag in ("loss/lm", *SEEN):
        assert scalars(tmp_path / "stopped", tag) == scalars(tmp_path / "whole", tag)
    assert len(scalars(tmp_path / "whole", SEEN[-1])) == 10


def test_the_fraction_must_not_change_under_a_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(retrofit(base, data, tmp_path))
    assert main(["retrofit", path, "training.exit_after_steps=1"]) == 0
    capsys.readouterr()
    assert main(["retrofit", path, "data.repeat_fraction=0.5"]) == 1
    (line,) = lines(capsys, "megatron-dmc:")
    assert "data.repeat_fraction is 0.5, but " in line
    assert "set data.repeat_fraction=0.3333333333333333 again" in line
    # What the default stands for is no other fraction.
    assert main(["retrofit", path, "data.repeat_fraction=0.3333333333333333"]) == 0


def make_old(folder: Path) -> None:
    """A checkpoint as a version without repeats wrote it."""
    path = folder / "dmc.json"
    info = json.loads(path.read_text())
    del info["recipe"]["data"]["repeat_fraction"], info["recipe"]["monitor"]["recall_limit"]
    path.write_text(json.dumps(info))
    common = torch.load(folder / "common.pt", weights_only=False)
    common.pop("base_recall_loss", None)
    torch.save(common, folder / "common.pt")


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_old_checkpoints_resume(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: bool
) -> None:
    path = str(retrofit(base, data, tmp_path, adapter=adapter))
    assert main(["retrofit", path, "training.exit_after_steps=2", "data.repeat_fraction=0"]) == 0
    make_old(tmp_path / "checkpoints" / "step_00000002")
    capsys.readouterr()
    if adapter:
        # It was trained without repeats.
        assert main(["retrofit", path]) == 1
        (line,) = lines(capsys, "megatron-dmc:")
        assert line.endswith(
            "was trained with 0.0; set data.repeat_fraction=0.0 again, or start in a new checkpoint.directory with "
            "checkpoint.load_base"
        )
    assert main(["retrofit", path, "data.repeat_fraction=0"]) == 0
    assert list(scalars(tmp_path, "evaluation/recall_loss")) == [0, 9]
    # An adapter's base can be measured again.
    assert list(scalars(tmp_path, "evaluation/recall_gap")) == ([0, 9] if adapter else [0])


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_other_held_out_samples_are_not_compared(base: Path, data: Path, tmp_path: Path, adapter: bool) -> None:
    """With the base's number of the samples before."""
    path = retrofit(base, data, tmp_path, adapter=adapter)
    train(path, "training.exit_after_steps=2")
    train(path, "monitor.eval_samples=4")
    assert list(scalars(tmp_path, "evaluation/recall_loss")) == [0, 9]
    assert list(scalars(tmp_path, "evaluation/recall_gap")) == ([0, 9] if adapter else [0])


def test_a_retrofit_of_all_weights_has_no_base_to_compare(base: Path, data: Path, tmp_path: Path) -> None:
    """Trained on from its checkpoint: without merging it is no base."""
    train(retrofit(base, data, tmp_path / "first", adapter=False))
    first = tmp_path / "first" / "checkpoints" / "final"
    train(retrofit(first, data, tmp_path / "second", adapter=False))
    assert len(scalars(tmp_path / "second", "evaluation/recall_loss")) == 2
    with pytest.raises(KeyError):
        scalars(tmp_path / "second", "evaluation/recall_gap")


def test_zero_out_is_measured_too(data: Path, tmp_path: Path) -> None:
    phases = [{"kind": "zero_out", "steps": 2, "lr": LR}, {"kind": "compress", "steps": 2, "lr": LR}]
    values = recipe_values(data, tmp_path, phases, decision_source="neuron")
    values["monitor"]["eval_interval"] = 2
    train(write_recipe(tmp_path, values))
    gaps = scalars(tmp_path, "evaluation/recall_gap")
    assert list(gaps) == [0, 2, 4] and gaps[0] == 0 and gaps[2] != 0


def test_pretraining_measures_no_recall(data: Path, tmp_path: Path) -> None:
    values = recipe_values(data, tmp_path, [{"kind": "pretrain", "steps": 1, "lr": LR}])
    train(write_recipe(tmp_path, values))
    assert list(scalars(tmp_path, "evaluation/lm_loss")) == [0, 1]
    with pytest.raises(KeyError):
        scalars(tmp_path, "evaluation/recall_loss")


class FirstTokensOnly:
    """A dataset in which a sample's second to fourth label alone count, or one in which none of its copies' does."""

    def __init__(self, dataset: Any, counts: slice) -> None:
        self.dataset, self.counts = dataset, counts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        sample = self.dataset[idx]
        mask = torch.zeros_like(sample["loss_mask"])
        mask[self.counts] = 1
        return sample | {"loss_mask": mask}


def test_second_copies_in_which_nothing_counts(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in conversations whose first half holds no word of the assistant's."""
    trainer = Trainer(load_recipe(retrofit(base, data, tmp_path, monitor={"progress_bar": True})))
    trainer.valid_data = FirstTokensOnly(trainer.valid_data, slice(20, None))
    result = trainer.run()
    assert result is not None and math.isfinite(result.loss)
    assert result.recall_loss is result.recall_gap is None
    said = lines(capsys, "held-out")
    assert len(said) == 2 and not any("recall" in line or "nan" in line for line in said)
    with pytest.raises(KeyError):
        scalars(tmp_path, "evaluation/recall_loss")
    trainer.valid_data = FirstTokensOnly(trainer.valid_data.dataset, slice(1, 4))
    result = trainer.evaluate(plan_step(trainer.recipe.phases, trainer.recipe.dmc, 0))
    assert result is not None and result.recall_loss is not None


@pytest.mark.parametrize("reset", [False, True], ids=["running-on", "reset"])
def test_a_checkpoint_is_measured_as_its_run_was(base: Path, data: Path, tmp_path: Path, reset: bool) -> None:
    overrides = [f"data.reset_at_documents={reset}", "monitor.eval_samples=32"]
    trainer = train(retrofit(base, data, tmp_path, **KEEPS), *overrides)
    valid = heldout_windows(str(data / "valid"), LENGTH, load_tokenizer(data / "tokenizer"), reset_at_documents=reset)
    for checkpoint in (tmp_path / "checkpoints" / "final", base):
        trainer.valid_data = valid
        trainer.store.load()
        wanted = trainer.measure_base_recall()
        # Nothing merges in this run: it copies as its base does.
        assert measure_recall(load_model(checkpoint), valid, limit=32) == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def scattered(data: Path, tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Path:
    """An adapter with mixed decisions on a base of random weights."""
    folder = tmp_path_factory.mktemp("scattered")
    pretrain = recipe_values(data, folder / "base", [{"kind": "pretrain", "steps": 1, "lr": LR}])
    pretrain["model"]["init_method_std"] = 0.5
    train(write_recipe(folder / "base", pretrain))
    values = recipe_values(data, folder / "adapter", RETROFIT)
    values["checkpoint"]["load_base"] = str(folder / "base" / "checkpoints" / "final")
    values["training"]["train"] = "adapter"
    trainer = Trainer(load_recipe(write_recipe(folder / "adapter", values)))
    trainer.store.load()
    scatter_decisions(trainer.model[0])
    trainer.store.save_weights("scattered", 0, 0, None)
    return folder / "adapter" / "checkpoints" / "scattered"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "reset"),
    [
        ("", True),
        ("context_parallel_size", False),
        ("context_parallel_size", True),
        ("tensor_model_parallel_size", False),
        ("pipeline_model_parallel_size", True),
    ],
    ids=["DP2-reset", "CP2", "CP2-reset", "TP2", "PP2-reset"],
)
def test_two_processes_measure_the_same(scattered: Path, data: Path, tmp_path: Path, layout: str, reset: bool) -> None:
    paths = []
    for run in ("one", "two"):
        # Nothing is learned, and the loss' gate stays open.
        phases = [{"kind": "solidify", "steps": 2, "lr": 1e-9}]
        values = recipe_values(data, tmp_path / run, phases)
        values["checkpoint"]["load_base"] = str(scattered)
        values["training"]["train"] = "adapter"
        values["data"] |= {"sequence_length": 32, "reset_at_documents": reset}
        values["monitor"]["eval_interval"] = 1
        paths.append(write_recipe(tmp_path / run, values))
    train(paths[0])
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    settings = [f"parallel.{layout}=2"] if layout else []
    done = run_process(*launcher, "-m", "megatron_dmc", "retrofit", paths[1], *settings, timeout=300)
    assert done.returncode == 0, done.stderr
    for tag in ("loss/lm", *SEEN):
        one, two = (scalars(tmp_path / run, tag) for run in ("one", "two"))
        assert list(one) == ([1, 2] if tag == "loss/lm" else [0, 1, 2])
        assert two == pytest.approx(one, rel=2e-5, abs=2e-5)
    assert abs(scalars(tmp_path / "one", "evaluation/recall_gap")[0]) > 1e-3


def test_the_ratio_is_that_of_samples_that_are_no_repeats(base: Path, data: Path, tmp_path: Path) -> None:
    """Of 8 samples of a global batch 4 are a text twice; where all are, all count."""
    path = retrofit(base, data, tmp_path)
    for fraction, counted in ((0.5, 4), (1, 8)):
        overrides = [f"data.repeat_fraction={fraction}", "training.global_batch_size=8"]
        trainer = Trainer(load_recipe(path, overrides))
        trainer.store.load()
        result = trainer._train_step(plan_step(trainer.recipe.phases, trainer.recipe.dmc, 0))
        assert set(result.counts[2].flatten().tolist()) == {counted * LENGTH}
