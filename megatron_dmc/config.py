"""The one configuration of Dynamic Memory Compression that every part of the package reads."""

import math
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_dmc.errors import DMCError

DecisionSource = Literal["neuron", "projection"]
RatioControl = Literal["loss", "offset"]
Operation = Literal["merge", "evict", "absorb"]


class ConfigError(DMCError, ValueError):
    """A setting that cannot work. The message names the field, its value and the remedy."""


def is_same_setting(a: Any, b: Any) -> bool:
    """Equal; numbers of which one is a float, as float32: other tools round settings to it, 1e-5 to 9.999999747378752e-06."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    if numbers and (isinstance(a, float) or isinstance(b, float)):
        return math.isclose(a, b, rel_tol=2**-24)
    return bool(a == b)


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included: ``steps: Annotated[int, Range(1, 10)]``.

    Every number of a configuration has one. Its ends keep what is computed from it finite in float32 and within the
    integers that torch and numpy count with; nobody means a number beyond them.

    Attributes:
        or_zero: 0 may stand below ``least``, for none.
    """

    least: float
    most: float
    or_zero: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError for anything but a finite number within the range."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # math.isfinite does not take whole numbers beyond those of a float.
        if not is_number or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"{name} must be a finite number, got {value!r}")
        if value < self.least and not (self.or_zero and value == 0):
            zero = " or 0" if self.or_zero else ""
            raise ConfigError(f"{name} must be >= {_plain(self.least)}{zero}, got {_plain(value)}")
        if value > self.most:
            raise ConfigError(f"{name} must be <= {_plain(self.most)}, got {_plain(value)}")


def ranges(section: type) -> Iterator[tuple[str, Range]]:
    """The numbers of a dataclass by name, each with its range."""
    for name, kind in get_type_hints(section, include_extras=True).items():
        for part in (kind, *(get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ())):
            if get_origin(part) is Annotated:
                yield from ((name, mark) for mark in get_args(part) if isinstance(mark, Range))


def check_ranges(section: Any, place: str = "") -> None:
    """Raises ConfigError for the first number of a dataclass's instance that is out of its range; None is none.

    Args:
        place: the section's name in a recipe, for the message.
    """
    for name, allowed in ranges(type(section)):
        value = getattr(section, name)
        if value is not None:
            allowed.check(f"{place}.{name}" if place else name, value)


# An interval, a size or a number of things: megatron-core and numpy count with int32 here and there.
MOST = 2**31 - 1
# Of a tokenizer that is trained: every byte and the end of a text; the trainer sets memory aside for all of it.
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 257, 2**24
Count = Annotated[int, Range(1, MOST)]
CountOrZero = Annotated[int, Range(0, MOST)]
# More tokens per slot than any sequence could use.
Ratio = Annotated[float, Range(1, 10_000)]
# What omega_floor was before it was a setting: the bf16 epsilon of the authors' code.
PAPER_OMEGA_FLOOR = 2.0**-7


def saved_dmc_settings(values: dict[str, Any]) -> dict[str, Any]:
    """A saved ``dmc`` section as it was meant: one without ``omega_floor`` is from before that setting. Empty: defaults."""
    return {"omega_floor": PAPER_OMEGA_FLOOR, **values} if values else values


@dataclass(frozen=True)
class DMCConfig:
    """Dynamic Memory Compression of one model (Nawrot et al., ICML 2024, arXiv 2403.09636).

    Attributes:
        target_compression_ratio: CR*, the tokens per cache slot that the retrofit aims at; >= 1.
        decision_source: where the logits of alpha (merge) and omega (weight) come from. ``neuron`` (the paper): the last
            channel of key and query. ``projection``: a linear map of the layer's normed attention input, which starts at
            zero.
        decision_bias: c, in logits. The logits start at a = -c (append) and b = +c (full weight; with ``absorb`` at b = 0,
            where a token weighs 1).
        decision_scale: s, multiplies the projection's output: s (W h + beta). Under Adam it acts as a learning-rate
            multiplier of W and beta.
        omega_floor: added to the weight: omega = sigmoid(b) + omega_floor. The default keeps a weight above zero and no more,
            so that one token of full weight outweighs thousands of others. 0.0078125 (2^-7): the authors' code. ``merge``
            only.
        temperature: tau of the Gumbel-sigmoid that relaxes alpha in training.
        local_window: w, tokens. A decision takes effect when its token is w tokens old; until then the token stays raw.
            0: at once (the paper).
        operation: what then becomes of a token with alpha 1. ``merge``: it joins the slot before it. ``evict``: it is
            dropped (DMS, arXiv 2506.05345). ``absorb``: it joins a weighted mean of all such tokens of its head, one more
            slot that weighs as much as they do. Evicting and absorbing need a local_window.
        window_size: tokens. Only the last so many tokens of a slot count in it (12: the authors' code). null: all do, by an
            exact scan.
        per_layer: DMC-C: all heads of a layer take one decision, by the mean of their logits.
        ratio_control: what keeps the ratio at its target in training. ``loss`` (the paper): a loss that presses every
            decision towards merging while the ratio is below it. ``offset``: one number, added to all decisions' logits,
            that is moved after every step; for decisions that a calibration has set.
        loss_coefficient: lambda of the one-sided compression loss.
        seed: of the decisions' noise.
    """

    target_compression_ratio: Ratio = 4.0
    decision_source: DecisionSource = "projection"
    decision_bias: Annotated[float, Range(0, 10_000)] = 5.0
    decision_scale: Annotated[float, Range(1e-6, 1e6)] = 1.0
    omega_floor: Annotated[float, Range(1e-12, 1)] = 2.0**-24
    temperature: Annotated[float, Range(1e-6, 1000)] = 0.1
    local_window: CountOrZero = 0
    operation: Operation = "merge"
    window_size: Count | None = None
    per_layer: bool = False
    ratio_control: RatioControl = "loss"
    loss_coefficient: Annotated[float, Range(0, 1e6)] = 1.0
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1234

    def __post_init__(self) -> None:
        choices_of = {"decision_source": DecisionSource, "operation": Operation, "ratio_control": RatioControl}
        for name, choices in choices_of.items():
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        for name, kind in (("local_window", int), ("window_size", int), ("seed", int), ("per_layer", bool)):
            value = getattr(self, name)
            if type(value) is not kind and not (name == "window_size" and value is None):
                raise ConfigError(f"{name} must be of type {kind.__name__}, got {value!r}")
        check_ranges(self)
        if self.ratio_control == "offset" and not self.has_projection:
            raise ConfigError(
                "ratio_control offset needs decision_source projection, got neuron; set ratio_control to loss"
            )
        if not self.merges and self.local_window == 0:
            raise ConfigError(
                f"operation {self.operation} needs local_window >= 1, got 0: a token would be gone before it is seen; set "
                "local_window (16 or more), or operation merge"
            )
        if not self.merges and self.window_size is not None:
            raise ConfigError(
                f"window_size must be null for operation {self.operation} (nothing is merged into the slot before), got "
                f"{self.window_size}"
            )

    @property
    def uses_key_channel(self) -> bool:
        """Whether decisions are read from the last channel of key and query, which attention must then not see."""
        return self.decision_source == "neuron"

    @property
    def has_projection(self) -> bool:
        """Whether every layer has a decision projection, with weights of its own."""
        return self.decision_source == "projection"

    @property
    def merges(self) -> bool:
        """Whether a token with alpha 1 is merged into the slot before it."""
        return self.operation == "merge"

    @property
    def absorbs(self) -> bool:
        """Whether a token with alpha 1 joins the residual slot of its head."""
        return self.operation == "absorb"

    @property
    def omega_bias(self) -> float:
        """What is added to the logit of omega."""
        return 0.0 if self.absorbs else self.decision_bias

    def cache_settings(self) -> dict[str, Any]:
        """The keyword arguments of a layer's compressed cache, see ``LayerCache``."""
        return {
            "local_window": self.local_window,
            "operation": self.operation,
            "window_size": self.window_size,
            "clears_last_channel": self.uses_key_channel,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to ``config.json`` and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DMCConfig":
        """The inverse of :meth:`to_dict`, of earlier versions too; raises ConfigError for a key it does not know."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown DMC setting {', '.join(unknown)}; it may come from a newer megatron_dmc")
        return cls(**saved_dmc_settings(values))


def _plain(number: float) -> str:
    """A number for a message: a float with few digits, a whole number with all."""
    return f"{number:g}" if isinstance(number, float) else str(number)
