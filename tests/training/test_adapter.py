"""Training an adapter on a frozen base, and learning from a teacher: what learns, what is saved, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dmc.cli import main
from megatron_dmc.inference.loading import load_model
from megatron_dmc.model.distillation_loss import distillation_loss
from megatron_dmc.model.gpt import dmc_layers
from megatron_dmc.recipe import load_recipe
from megatron_dmc.training import forward_step
from megatron_dmc.training.trainer import Trainer
from tests.support.tensors import assert_same_tensors
from tests.support.toy import LR, RETROFIT, recipe_values, scalars, train, weights, write_base, write_recipe

pytestmark = pytest.mark.usefixtures("one_process")

ADAPTER = {"local_window": 4, "operation": "merge"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a pretrained base in ``base/checkpoints/final``."""
    folder = tmp_path_factory.mktemp("data")
    write_base(folder, 3)
    return folder


def recipe(data: Path, run: Path, *, weight: float = 0.0, adapter: bool = True, bf16: bool = False, **dmc: Any) -> Path:
    values = recipe_values(data, run, RETROFIT, target_compression_ratio=3.0, **(ADAPTER | dmc))
    values["checkpoint"]["load_base"] = str(data / "base" / "checkpoints" / "final")
    values["training"] |= {"train": "adapter" if adapter else "full", "bf16": bf16}
    values["distillation"] = {"weight": weight}
    return write_recipe(run, values)


def base_weights(data: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(data / "base" / "checkpoints" / "final").model.named_parameters())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_only_decisions_learn(data: Path, tmp_path: Path, weight: float, recompute: str) -> None:
    trainer = train(recipe(data, tmp_path, weight=weight), f"training.recompute={recompute}")
    base = base_weights(data)
    for name, weight_now in weights(trainer).items():
        name = name.removeprefix("module.")
        if ".decision." in name:
            assert weight_now.any()
        else:
            assert torch.equal(weight_now, base[name]), name
    held = sum(tensor.numel() for group in trainer.optimizer.param_groups for tensor in group["params"])
    decisions = (layer.decision.parameters() for layer in dmc_layers(trainer.model[0]))
    assert held == sum(parameter.numel() for layer in decisions for parameter in layer)
    gradients = sum(buffer.grad_data.numel() for buffer in trainer.model[0].buffers)
    assert gradients <= held + 1024  # the buffer's padding


class _ExpandedProducts(TorchDispatchMode):
    """Notes the shapes of batched products with one matrix for all of the batch: one product with all rows does the same."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.bmm.default and args[1].stride(0) == 0:
            self.found.append(list(args[1].shape))
        return function(*args, **(kwargs or {}))


def test_no_product_of_a_frozen_weight_is_made_token_by_token(data: Path, tmp_path: Path) -> None:
    with _ExpandedProducts() as products:
        train(recipe(data, tmp_path, weight=1.0), "training.exit_after_steps=1", "monitor.eval_interval=0")
    assert not products.found


def test_recomputation_changes_nothing(data: Path, tmp_path: Path) -> None:
    runs = [
        weights(train(recipe(data, tmp_path / kind, weight=0.5), f"training.recompute={kind}"))
        for kind in ("none", "selective", "full")
    ]
    assert_same_tensors(runs[1], runs[0])
    assert_same_tensors(runs[2], runs[0])


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_resumed_equals_not_stopped(data: Path, tmp_path: Path, adapter: bool, bf16: bool) -> None:
    runs = []
    for name, exits in (("whole", []), ("stopped", [2, 4])):
        path = recipe(data, tmp_path / name, weight=0.5, adapter=adapter, bf16=bf16)
        for steps in exits:
            train(path, f"training.exit_after_steps={steps}")
        runs.append(weights(train(path)))
    assert_same_tensors(runs[1], runs[0])
    for tag in ("loss/lm", "loss/distillation", "compression_ratio/noisy", "train/gradient_norm"):
        assert scalars(tmp_path / "stopped", tag) == scalars(tmp_path / "whole", tag)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_no_logits_are_widened_all_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    """megatron-core would give all of a bf16 model's in float32."""
    compared: set[torch.dtype] = set()

    def watched(student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> torch.Tensor:
        compared.update((student.dtype, teacher.dtype))
        return distillation_loss(student, teacher, **options)

    monkeypatch.setattr(forward_step, "distillation_loss", watched)
    train(recipe(data, tmp_path, weight=1.0, bf16=bf16), "training.exit_after_steps=1")
    assert compared == {torch.bfloat16 if bf16 else torch.float32}


def test_the_first_step_distills_from_the_base(data: Path, tmp_path: Path) -> None:
    """Student and teacher differ by the noise alone: the reported KL is that of the two models' logits."""
    runs = {}
    # An adapter's default would repeat some.
    same = "data.repeat_fraction=0"
    for name, adapter in (("adapter", True), ("full", False)):
        path = recipe(data, tmp_path / name, weight=0.5, adapter=adapter)
        trainer = train(path, "training.exit_after_steps=1", same)
        runs[name] = scalars(tmp_path / name, "loss/distillation")[1], scalars(tmp_path / name, "loss/lm")[1]
    # The frozen base and a second copy of it teach the same.
    assert runs["adapter"] == pytest.approx(runs["full"], rel=1e-4)

    trainer = Trainer(load_recipe(recipe(data, tmp_path / "fresh"), [same]))
    trainer.store.load()
    base, student = load_model(data / "base" / "checkpoints" / "final").model, trainer.model[0]
    student.train()
    divergence = []
    for batch in trainer._micro_batches(trainer.train_data, 0):
        arguments = batch["tokens"], batch["position_ids"], batch["sample_index"]
        with torch.no_grad():
            taught, said = base(*arguments[:2], None), student(*arguments)
        divergence.append(
            F.kl_div(said.log_softmax(-1), taught.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        )
    assert runs["full"][0] == pytest.approx(float(torch.cat(divergence).mean()), rel=1e-4)


def test_an_adapters_checkpoint_is_small_and_needs_its_base(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "data"
    shutil.copytree(data / "base", here / "base")
    path = recipe(data, tmp_path / "run")
    trainer = train(path, f"checkpoint.load_base={here}/base/checkpoints/final")
    final, base = tmp_path / "run" / "checkpoints" / "final", here / "base" / "checkpoints" / "final"
    small, large = (sum(path.stat().st_size for path in folder.glob("*.distcp")) for folder in (final, base))
    assert small < 0.2 * large
    loaded = {f"module.{name}": parameter for name, parameter in load_model(final).model.named_parameters()}
    assert_same_tensors(loaded, weights(trainer))

    # Base and adapter, moved together, are found again.
    shutil.move(here, tmp_path / "moved")
    assert main(["inspect", str(final), "--tokens", "50"]) == 1
    assert f"{final} is an adapter, and its base {base} is not there; put it back" in capsys.readouterr().err
    (tmp_path / "data").symlink_to(tmp_path / "moved")
    assert main(["inspect", str(final), "--tokens", "50"]) == 0
    # An incomplete base.
    metadata = tmp_path / "moved/base/checkpoints/final/.metadata"
    kept = metadata.read_bytes()
    metadata.unlink()
    capsys.readouterr()
    assert main(["inspect", str(final), "--tokens", "50"]) == 1
    error = capsys.readouterr().err.strip()
    assert ".metadata" in error and "\n" not in error
    metadata.write_bytes(kept)
    # Another base.
    info = json.loads((tmp_path / "moved/base/checkpoints/final/dmc.json").read_text())
    (tmp_path / "moved/base/checkpoints/final/dmc.json").write_text(json.dumps(info | {"consumed_samples": 99}))
    capsys.readouterr()
    assert main(["inspect", str(final), "--tokens", "50"]) == 1
    assert f"{final} is an adapter of another base than {base}" in capsys.readouterr().err


def test_an_adapter_goes_on_from_another(data: Path, tmp_path: Path) -> None:
    train(recipe(data, tmp_path / "first"))
    first = tmp_path / "first" / "checkpoints" / "final"
    trainer = train(recipe(data, tmp_path / "second"), f"checkpoint.load_base={first}", "training.exit_after_steps=1")
    assert (tmp_path / "second" / "checkpoints" / trainer.store.base["folder"]).resolve()  # type: ignore[index]
    started = dict(load_model(first).model.named_parameters())
    moved = [n for n, w in weights(trainer).items() if (w - started[n.removeprefix("module.")]).abs().max() > 2 * LR]
    assert not moved
    base = json.loads((first / "dmc.json").read_text())["base"]
    assert trainer.store.base is not None and trainer.store.base["digest"] == base["digest"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dmc.decision_source=neuron"], "training.train adapter needs dmc.decision_source projection, got neuron"),
        (["checkpoint.load_base=null"], "training.train adapter needs a base to adapt; set checkpoint.load_base"),
        (["checkpoint.load_base=null", "training.train=full"], "distillation.weight 0.5 needs a base to teach"),
        (["phases.0.kind=pretrain"], "training.train adapter cannot pretrain"),
        (["distillation.teacher=x"], "distillation.teacher x cannot be chosen with training.train adapter"),
        (["distillation.weight=1.5"], "distillation.weight must be <= 1, got 1.5"),
        (["distillation.temperature=0"], "distillation.temperature must be >= 0.001, got 0"),
        (["distillation.top_k=301"], "distillation.top_k must be <= model.vocab_size (300), got 301"),
        (["distillation.direction=both"], "distillation.direction"),
        (["dmc.local_window=-1"], "dmc.local_window must be >= 0"),
        (["dmc.local_window=33"], "dmc.local_window (33) must be smaller than data.sequence_length (33)"),
        (["dmc.local_window=11"], "dmc.target_compression_ratio 3 is out of reach"),
        (["dmc.local_window=0", "dmc.operation=evict"], "dmc.operation evict needs local_window >= 1"),
        (["dmc.local_window=0", "dmc.operation=absorb"], "dmc.operation absorb needs local_window >= 1"),
        (["dmc.operation=evict", "dmc.window_size=12"], "dmc.window_size must be null for operation evict"),
        (["dmc.operation=drop"], "dmc.operation"),
        (["training.train=some"], "training.train"),
    ],
)
def test_bad_settings_end_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    path = recipe(data, tmp_path, weight=0.5)
    assert main(["retrofit", str(path), *overrides]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "checkpoints").exists()


def test_a_teacher_must_be_a_base_of_the_same_vocabulary(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(data, tmp_path / "run", weight=0.5, adapter=False)
    final = data / "base" / "checkpoints" / "final"
    other = tmp_path / "other"
    shutil.copytree(final, other)
    info = json.loads((other / "dmc.json").read_text())
    for size, remedy in (
        (301, "if 1 of its rows pad it, set model.vocab_size=301, or name the base without them"),
        (3000, "name a base with the same tokenizer"),
    ):
        info["recipe"]["model"]["vocab_size"] = size
        (other / "dmc.json").write_text(json.dumps(info))
        assert main(["retrofit", str(path), f"distillation.teacher={other}"]) == 1
        said = capsys.readouterr().err
        assert f"the teacher {other} has a vocabulary of {size}, model.vocab_size is 300: " in said
        assert said.endswith(f"; {remedy}\n")
    train(path, "distillation.weight=0")
    retrofit = tmp_path / "run" / "checkpoints" / "final"
    again = recipe(data, tmp_path / "again", weight=0.5, adapter=False)
    assert main(["retrofit", str(again), f"distillation.teacher={retrofit}"]) == 1
    assert f"{retrofit} is a retrofitted model; name its base in distillation.teacher" in capsys.readouterr().err
    assert main(["retrofit", str(again), f"checkpoint.load_base={retrofit}", "training.train=adapter"]) == 1
    assert f"{retrofit} is a retrofit with all its weights trained" in capsys.readouterr().err
