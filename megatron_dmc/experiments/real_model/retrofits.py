"""What is made of the model: the list, and the words of each command."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

SMOKE_SETTINGS = [
    "data.sequence_length=256",
    "dmc.local_window=8",
    "training.global_batch_size=2",
    "monitor.eval_samples=2",
    "monitor.eval_interval=0",
]
# A GPU is busy with eight samples at a time. Its steps see sixteen times as much as a CPU's.
GPU_BATCH = {"training.micro_batch_size": 8, "training.global_batch_size": 32}
SMOKE_SEQUENCE_LENGTH = 256
# Tokens of a smoke run's calibration that are learned from, about, for each of the model's hidden size.
_LEARNED, _STEP_LEARNS = 1.5, 2 * SMOKE_SEQUENCE_LENGTH * 0.7
SMOKE_TOKENS = 4 * 2 * SMOKE_SEQUENCE_LENGTH


@dataclass(frozen=True)
class Retrofit:
    """One result of the comparison.

    Attributes:
        name: of its folders, and in tables.
        recipe: a file of examples/smollm2 without its suffix.
        overrides: settings over the recipe's.
        scaled: the budget of tokens decides the steps of the recipe's phases. If not, the recipe has one and does not train.
        evaluated: it is exported and measured, not only what another one starts from.
        steps: of its one phase, in place of the recipe's.
    """

    name: str
    recipe: str
    overrides: Sequence[str] = ()
    scaled: bool = True
    evaluated: bool = True
    steps: int | None = None


def _retrofits(ratio: int) -> tuple[Retrofit, Retrofit]:
    """Decisions from the base's attention, and the same ones trained."""
    calibrated, target = f"calibrated-cr{ratio}", f"dmc.target_compression_ratio={ratio}"
    start = f"checkpoint.load_base=checkpoints/{calibrated}/final"
    return (
        Retrofit(calibrated, "calibrate", (target,), scaled=False),
        Retrofit(f"trained-cr{ratio}", "train", (target, start)),
    )


RETROFITS = (*_retrofits(4), *_retrofits(8))
# Of --full.
ALL_RETROFITS = (*_retrofits(2), *RETROFITS)


@dataclass(frozen=True)
class Budget:
    """What a run may spend.

    Attributes:
        tokens: that each retrofit is trained on; None: as many as its recipe says.
        bf16: retrofits compute in bfloat16.
        gpu: batches are a GPU's.
        hidden_size: the model's.
    """

    tokens: int | None
    smoke: bool
    bf16: bool = False
    gpu: bool = False
    hidden_size: int = 0

    def words(self, retrofit: Retrofit, recipes: Path) -> list[str]:
        """The command that trains it, in the run's folder."""
        words = ["retrofit", str(recipes / f"{retrofit.recipe}.yaml")]
        words += [
            f"checkpoint.directory=checkpoints/{retrofit.name}",
            f"monitor.tensorboard=tensorboard/{retrofit.name}",
            f"training.bf16={str(self.bf16).lower()}",
        ]
        words += [*retrofit.overrides, *(SMOKE_SETTINGS if self.smoke else ())]
        if self.gpu and not self.smoke:
            words += [f"{name}={value}" for name, value in GPU_BATCH.items()]
        if (steps := self._steps(retrofit, recipes)) != self._recipe(retrofit, recipes).steps:
            words += [f"phases.{i}.steps={count}" for i, count in enumerate(steps)]
        return words

    def read_tokens(self, retrofit: Retrofit, recipes: Path) -> int:
        """Tokens of all its steps."""
        return self._recipe(retrofit, recipes).step_tokens * sum(self._steps(retrofit, recipes))

    def sequence_length(self, retrofits: Sequence[Retrofit], recipes: Path) -> int:
        """Tokens of their longest samples."""
        return max(self._recipe(retrofit, recipes).sequence_length for retrofit in retrofits)

    def _steps(self, retrofit: Retrofit, recipes: Path) -> list[int]:
        recipe = self._recipe(retrofit, recipes)
        if retrofit.scaled and self.tokens is not None:
            return scaled_steps(recipe.steps, self.tokens // recipe.step_tokens, recipe.least_steps)
        if not self.smoke:
            return recipe.steps if retrofit.steps is None else [retrofit.steps]
        fit = math.ceil(_LEARNED * self.hidden_size / _STEP_LEARNS)
        return [max(5, fit + math.ceil(fit / 4))]  # the last fifth only measures

    def least(self, retrofits: Sequence[Retrofit], recipes: Path) -> int:
        """Tokens that are enough for every retrofit: for each phase its warm-up, and a step."""
        read = (self._recipe(retrofit, recipes) for retrofit in retrofits if retrofit.scaled)
        return max((sum(recipe.least_steps) * recipe.step_tokens for recipe in read), default=0)

    def _recipe(self, retrofit: Retrofit, recipes: Path) -> "_Read":
        values: dict[str, Any] = yaml.safe_load((recipes / f"{retrofit.recipe}.yaml").read_text(encoding="utf-8"))
        samples = GPU_BATCH["training.global_batch_size"] if self.gpu else values["training"]["global_batch_size"]
        length = values["data"]["sequence_length"]
        if self.smoke:
            samples, length = 2, SMOKE_SEQUENCE_LENGTH
        phases = values["phases"]
        least = [phase.get("lr_warmup_steps", 0) + 1 for phase in phases]
        return _Read([phase["steps"] for phase in phases], least, length, samples * length)


class _Read(NamedTuple):
    """Of a recipe: the steps of its phases, as few as they can have; tokens of a sample and of a step in this budget."""

    steps: list[int]
    least_steps: list[int]
    sequence_length: int
    step_tokens: int


def scaled_steps(steps: Sequence[int], total: int, least: Sequence[int]) -> list[int]:
    """``total`` steps in the same proportions, at least so many of each; the first takes what rounding leaves."""
    scaled = [max(fewest, total * count // sum(steps)) for count, fewest in zip(steps, least, strict=True)]
    return [max(least[0], total - sum(scaled[1:])), *scaled[1:]]
