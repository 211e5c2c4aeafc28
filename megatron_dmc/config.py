"""The one configuration of Dynamic Memory Compression that every part of the package reads."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from megatron_dmc.errors import DMCError

DecisionSource = Literal["neuron", "projection"]
Operation = Literal["merge", "evict"]


class ConfigError(DMCError, ValueError):
    """A setting that cannot work. The message names the field, its value and the remedy."""


def is_same_setting(a: Any, b: Any) -> bool:
    """Equal; numbers of which one is a float, as float32: other tools round settings to it, 1e-5 to 9.999999747378752e-06."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    if numbers and (isinstance(a, float) or isinstance(b, float)):
        return math.isclose(a, b, rel_tol=2**-24)
    return bool(a == b)


@dataclass(frozen=True)
class DMCConfig:
    """Dynamic Memory Compression of one model (Nawrot et al., ICML 2024, arXiv 2403.09636).

    Attributes:
        target_compression_ratio: CR*, the tokens per cache slot that the retrofit aims at; >= 1.
        decision_source: where the logits of alpha (merge) and omega (weight) come from. ``neuron`` (the paper): the last
            channel of key and query. ``projection``: a linear map of the layer's normed attention input, which starts at
            zero.
        decision_bias: c, in logits. The logits start at a = -c (append) and b = +c (full weight).
        decision_scale: s, multiplies the projection's output: s (W h + beta). Under Adam it acts as a learning-rate
            multiplier of W and beta.
        temperature: tau of the Gumbel-sigmoid that relaxes alpha in training.
        local_window: w, tokens. A decision takes effect when its token is w tokens old; until then the token stays raw.
            0: at once (the paper).
        operation: what then becomes of a token with alpha 1. ``merge``: it joins the slot before it. ``evict``: it is
            dropped (DMS, arXiv 2506.05345), which needs a local_window.
        window_size: tokens. Only the last so many tokens of a slot count in it (12: the authors' code). null: all do, by an
            exact scan.
        per_layer: DMC-C: all heads of a layer take one decision, by the mean of their logits.
        loss_coefficient: lambda of the one-sided compression loss.
        seed: of the decisions' noise; in [0, 2^63).
    """

    target_compression_ratio: float = 4.0
    decision_source: DecisionSource = "projection"
    decision_bias: float = 5.0
    decision_scale: float = 1.0
    temperature: float = 0.1
    local_window: int = 0
    operation: Operation = "merge"
    window_size: int | None = None
    per_layer: bool = False
    loss_coefficient: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, choices in (("decision_source", DecisionSource), ("operation", Operation)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        _at_least("target_compression_ratio", self.target_compression_ratio, 1.0)
        _at_least("decision_bias", self.decision_bias, 0.0)
        _at_least("loss_coefficient", self.loss_coefficient, 0.0)
        for name in ("temperature", "decision_scale"):
            _at_least(name, getattr(self, name), 0.0)
            if getattr(self, name) == 0.0:
                raise ConfigError(f"{name} must be > 0, got 0")
        for name, kind in (("local_window", int), ("window_size", int), ("seed", int), ("per_layer", bool)):
            value = getattr(self, name)
            if type(value) is not kind and not (name == "window_size" and value is None):
                raise ConfigError(f"{name} must be of type {kind.__name__}, got {value!r}")
        if self.window_size is not None and self.window_size < 1:
            raise ConfigError(
                f"window_size must be null (the exact scan) or >= 1, got {self.window_size}; "
                "the authors' checkpoints use 12"
            )
        if self.local_window < 0:
            raise ConfigError(
                f"local_window must be >= 0 (0: decisions take effect at once, as in the paper), got {self.local_window}"
            )
        if self.evicts and self.local_window == 0:
            raise ConfigError(
                "operation evict needs local_window >= 1, got 0: a token would be gone before it is seen; set local_window "
                "(16 or more), or operation merge"
            )
        if self.evicts and self.window_size is not None:
            raise ConfigError(
                f"window_size must be null for operation evict (nothing is merged), got {self.window_size}"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be in [0, 2^63), got {self.seed}")

    @property
    def uses_key_channel(self) -> bool:
        """Whether decisions are read from the last channel of key and query, which attention must then not see."""
        return self.decision_source == "neuron"

    @property
    def has_projection(self) -> bool:
        """Whether every layer has a decision projection, with weights of its own."""
        return self.decision_source == "projection"

    @property
    def evicts(self) -> bool:
        """Whether a token with alpha 1 is dropped, not merged."""
        return self.operation == "evict"

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
        """The inverse of :meth:`to_dict`; raises ConfigError for a key it does not know."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown DMC setting {', '.join(unknown)}; it may come from a newer megatron_dmc")
        return cls(**values)


def _at_least(name: str, value: float, least: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
    if value < least:
        raise ConfigError(f"{name} must be >= {least:g}, got {value:g}")
