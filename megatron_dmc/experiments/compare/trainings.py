"""What is trained for a comparison: the recipe of every run, as plain values."""

import copy
from dataclasses import dataclass
from typing import Any

# Of DMS' published ramp: from 1 to so much.
DMS_RATIO = 16
# DMS' published window, as a part of a sample: 512 of 32768 tokens.
DMS_WINDOW = 64


@dataclass(frozen=True)
class Training:
    """One run of ``megatron-dmc retrofit``.

    Attributes:
        name: of its folders.
        recipe: all its settings.
        tokens: that it reads.
        base: the training that it starts from; None: the base.
    """

    name: str
    recipe: dict[str, Any]
    tokens: int
    base: "Training | None" = None


@dataclass(frozen=True)
class Trainings:
    """Makes recipes for one comparison; all of them read as many tokens.

    Attributes:
        recipe: the retrofit's, whose target and seeds are set here.
        dms, gqa: what differs in those.
    """

    recipe: dict[str, Any]
    dms: dict[str, Any]
    gqa: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Of a whole run."""
        return self._step_tokens * self._steps

    @property
    def calibrates(self) -> bool:
        """Whether the retrofit has a first part that trains nothing."""
        return self.recipe["phases"][0]["kind"] == "calibrate" and len(self.recipe["phases"]) > 1

    def dmc(self, ratio: float, seed: int) -> tuple[Training, ...]:
        """The retrofit: what ``calibrate`` makes, if it does, then all of it."""
        if not self.calibrates:
            return (self._training(f"dmc-{_named(ratio, seed)}", seed, {"dmc": {"target_compression_ratio": ratio}}),)
        first, *others = self.recipe["phases"]
        target = {"dmc": {"target_compression_ratio": ratio}}
        # Nothing is taught there.
        alone = {**target, "phases": [first], "distillation": {"weight": 0.0}}
        start = self._training(f"calibrated-{_named(ratio, seed)}", seed, alone)
        load = {"load_base": f"checkpoints/{start.name}/final"}
        changes = {**target, "phases": others, "checkpoint": load}
        return start, self._training(f"dmc-{_named(ratio, seed)}", seed, changes, start)

    def sparsified(self, ratio: float, seed: int) -> Training:
        """DMS up to this ratio; it keeps the weights at every whole ratio on its way."""
        (ramp,) = self.dms["phases"]
        # Its authors take so many steps to this ratio.
        published = ramp["steps"] * (ratio - 1) / (DMS_RATIO - 1)
        phase = {**ramp, "steps": self._steps, "lr": ramp["lr"] * published / self._steps}
        length = self.recipe["data"]["sequence_length"]
        changes = merged(
            self.dms,
            {
                "dmc": {"target_compression_ratio": ratio, "local_window": max(1, length // DMS_WINDOW)},
                "phases": [phase],
                "checkpoint": {"save_every_integer_ratio": True},
            },
        )
        return self._training(f"dms-seed{seed}", seed, changes)

    def grouped(self, base: str, kv_heads: int, seed: int) -> Training:
        """Grouped-query uptraining of a checkpoint whose heads have been averaged."""
        (phase,) = self.gqa["phases"]
        changes = merged(
            self.gqa, {"phases": [{**phase, "steps": self._steps}], "checkpoint": {"load_base": f"checkpoints/{base}"}}
        )
        training = self._training(f"gqa-{kv_heads}-seed{seed}", seed, changes)
        del training.recipe["dmc"]
        return training

    @property
    def _steps(self) -> int:
        return sum(phase["steps"] for phase in self.recipe["phases"])

    @property
    def _step_tokens(self) -> int:
        return self.recipe["training"]["global_batch_size"] * self.recipe["data"]["sequence_length"]

    def _training(self, name: str, seed: int, changes: dict[str, Any], base: Training | None = None) -> Training:
        own: dict[str, dict[str, Any]] = {
            "dmc": {"seed": seed},
            "data": {"seed": seed},
            "training": {"seed": seed},
            "checkpoint": {"directory": f"checkpoints/{name}"},
            "monitor": {"tensorboard": f"tensorboard/{name}"},
        }
        if "save_every_integer_ratio" not in changes.get("checkpoint", {}):
            own["checkpoint"]["save_every_integer_ratio"] = False
        recipe = merged(merged(self.recipe, changes), own)
        return Training(name, recipe, self._step_tokens * sum(phase["steps"] for phase in recipe["phases"]), base)


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's sections with some of their settings changed."""
    made = copy.deepcopy(values)
    for name, section in copy.deepcopy(changes).items():
        made[name] = {**made.get(name, {}), **section} if isinstance(section, dict) else section
    return made


def _named(ratio: float, seed: int) -> str:
    return f"cr{ratio:g}-seed{seed}"
