"""The base and the text of a comparison: the quickstart's, a pretrained model's, or those of a recipe of the user's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.single_process import single_process
from megatron_dmc.evaluation.exported.amount import AMOUNTS
from megatron_dmc.experiments.compare.trainings import merged
from megatron_dmc.experiments.places import comparison_recipes
from megatron_dmc.experiments.real_model.retrofits import RETROFITS
from megatron_dmc.experiments.real_model.run import Options, RealModelRun
from megatron_dmc.experiments.stages import Stage, StagedRun
from megatron_dmc.recipe import load_recipe


@dataclass(frozen=True)
class Ground:
    """What every row of a comparison shares.

    Attributes:
        run: prepares the text, and knows the environment of commands.
        name: of the model, in tables.
        recipe: the retrofit's settings; paths are as seen from the run's folder.
        stages: that make its base and its datasets, and ``hf-base``.
        amount: of AMOUNTS, that is measured.
        ratios: that are compared unless others are asked for.
    """

    run: StagedRun
    name: str
    recipe: dict[str, Any]
    stages: tuple[Stage, ...]
    amount: str
    ratios: tuple[float, ...]

    @property
    def base(self) -> str:
        """The base's checkpoint."""
        return str(self.recipe["checkpoint"]["load_base"])

    @property
    def heldout(self) -> str:
        """Prefix of the held-out dataset."""
        return str(self.recipe["data"]["valid"][0])

    @property
    def trained_text(self) -> str:
        """Prefix of a dataset to train on."""
        return str(self.recipe["data"]["train"][0])


class _Small(StagedRun):
    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "comparison": True}


class _Real(RealModelRun):
    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "comparison": True}


class _Own(StagedRun):
    """Its text is there already."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        super().__init__(folder, None, False)
        self._recipe = recipe

    def _identity(self) -> dict[str, Any]:
        return {"base": self._recipe["checkpoint"]["load_base"], "data": self._recipe["data"], "comparison": True}

    def _check_same(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        if found != wanted:
            raise ConfigError(
                f"{self.folder} holds a comparison on another base or text; name a new folder with --output"
            )

    def _write_text(self) -> None:
        self._new_text_folder()


def small_ground(folder: Path, data: str | None, smoke: bool) -> Ground:
    """The quickstart's small model, pretrained first."""
    run = _Small(folder, data, smoke)
    base = Stage("training: base.yaml", "checkpoints/base/final", run.training("base"), 150)
    recipe = shipped("quickstart")
    if smoke:
        recipe = merged(recipe, {"data": {"sequence_length": 128}, "monitor": {"eval_samples": 4}})
        recipe["dmc"]["local_window"], recipe["training"]["micro_batch_size"] = 4, 4
        recipe["phases"] = _shortened(recipe, 4)
    return Ground(
        run,
        "quickstart",
        recipe,
        (base, export_of("checkpoints/base/final", "hf-base", "base")),
        "smoke" if smoke else "compare_512",
        (2.0, 4.0) if smoke else (2.0, 4.0, 6.0, 8.0),
    )


def real_ground(folder: Path, model: str, data: str | None, smoke: bool) -> Ground:
    """A pretrained model: smollm2, a Hugging Face folder or a GGUF file."""
    run = _Real(folder, Options(model, data, smoke=smoke, brief=not smoke), retrofits=RETROFITS[:1])
    run.check()
    recipe = shipped("smollm2")
    if smoke:
        recipe = merged(recipe, {"data": {"sequence_length": 256}, "dmc": {"local_window": 8}})
        recipe["phases"] = _shortened(recipe, max(5, 2 * run.source.sizes[1] // 256))
    bf16 = {"training": {"bf16": run.budget.bf16}}
    return Ground(
        run,
        Path(model).name,
        merged(recipe, bf16),
        (*run.model_stages(), run.text_stage()),
        "smoke" if smoke else "compare",
        (2.0, 4.0) if smoke else (4.0, 8.0),
    )


def own_ground(folder: Path, path: str) -> Ground:
    """A recipe's own base and datasets, which are there.

    Raises:
        ConfigError: a bad recipe; no base, or one that merges already; no held-out text; or samples too short to measure on.
    """
    read = load_recipe(path)
    base = read.checkpoint.load_base
    if base is None:
        raise ConfigError(f"recipe {path}: nothing to compare with; name the base in checkpoint.load_base")
    with single_process():
        merges = SavedModel.open(base).merges
    if merges:
        raise ConfigError(
            f"recipe {path}: checkpoint.load_base {base} merges already; name the plain model that it was made from"
        )
    if read.parallel.model_ranks > 1:
        raise ConfigError(
            f"recipe {path}: parallel divides the model among {read.parallel.model_ranks} processes, a comparison trains in "
            "one; set its sizes to 1"
        )
    if not read.merges:
        raise ConfigError(f"recipe {path}: none of its phases merges; name a retrofit's recipe")
    if not read.data.valid:
        raise ConfigError(f"recipe {path}: data.valid is empty; name a held-out dataset to measure on")
    sizes = [(AMOUNTS[name].window_tokens, name) for name in ("compare_512", "compare")]
    amount = max((each for each in sizes if each[0] <= read.data.sequence_length), default=None)
    if amount is None:
        raise ConfigError(
            f"recipe {path}: data.sequence_length {read.data.sequence_length} is too short to compare on; 512 or more"
        )
    recipe = read.to_dict()
    del recipe["model"]
    data = recipe["data"]
    data |= {name: [str(Path(prefix).absolute()) for prefix in data[name]] for name in ("train", "valid")}
    data |= {"tokenizer": str(Path(data["tokenizer"]).absolute()), "cache": "data/cache"}
    recipe["checkpoint"]["load_base"] = str(Path(base).absolute())
    run = _Own(folder, recipe)
    return Ground(
        run,
        Path(path).stem,
        recipe,
        (export_of(recipe["checkpoint"]["load_base"], "hf-base", "base"),),
        amount[1],
        (4.0, 8.0),
    )


def export_of(checkpoint: str, folder: str, name: str, serves: tuple[str, ...] = ()) -> Stage:
    """A checkpoint as a Hugging Face folder."""
    words = ["convert-to-hf", checkpoint, folder, "--dtype", "float32"]
    return Stage(f"export: {name}", folder, words, 20, serves=serves)


def shipped(name: str) -> dict[str, Any]:
    """A recipe of examples/compare, as it is written."""
    values: dict[str, Any] = yaml.safe_load((comparison_recipes() / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def _shortened(recipe: dict[str, Any], calibration: int) -> list[dict[str, Any]]:
    """Its phases in so many steps of calibration, and a few of training."""
    return [
        {**phase, "steps": calibration if phase["kind"] == "calibrate" else 4, "lr_warmup_steps": 0}
        for phase in recipe["phases"]
    ]
