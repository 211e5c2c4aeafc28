"""How much is measured of a model."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_dmc.evaluation.exported.text_loss import QUARTERS
from megatron_dmc.evaluation.recall_tasks import TASKS

# Texts, tokens of one, samples: a report could ask for any number.
_MOST = 2**17


@dataclass(frozen=True)
class Amount:
    """What every model of one comparison reads.

    Attributes:
        windows, window_tokens: of held-out text, for the loss; a quarter of a window is reported by itself.
        copies: texts whose halves are equal, of each length.
        copy_tokens: their lengths.
        recall_tokens: lengths of the recall tasks' prompts.
        samples: of a recall task at one length.
        serving_tokens: lengths of the texts that cache and speed are measured on.
        new_tokens: decoded after each of them.
    """

    windows: int = 32
    window_tokens: int = 512
    copies: int = 8
    copy_tokens: tuple[int, ...] = (512, 2048)
    recall_tokens: tuple[int, ...] = (300, 1000, 2000)
    samples: int = 16
    serving_tokens: tuple[int, ...] = (2000, 8000)
    new_tokens: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or any(type(number) is not int or not 0 < number <= _MOST for number in numbers):
                raise ValueError(f"{name} must be whole numbers from 1 to {_MOST}, got {value}")
        if self.window_tokens % QUARTERS or any(tokens < 4 or tokens % 2 for tokens in self.copy_tokens):
            raise ValueError(
                f"windows have quarters and copies have halves, got {self.window_tokens}, {self.copy_tokens}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Amount":
        """The inverse of :meth:`to_dict`, also after JSON.

        Raises:
            TypeError, ValueError: values are missing, unknown, or no amount.
        """
        read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        if set(read) != {each.name for each in fields(cls)}:
            raise ValueError(f"an amount has other values than {sorted(read)}")
        return cls(**read)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def recall_parts(self) -> list[tuple[str, int]]:
        """Tasks and lengths of their prompts, in the order of the report."""
        return [(task, tokens) for task in TASKS for tokens in self.recall_tokens]

    @property
    def least_positions(self) -> int:
        """Of a model that is read at the shortest of the lengths."""
        shortest = min(self.copy_tokens), min(self.recall_tokens) + 1, min(self.serving_tokens) + self.new_tokens + 1
        return max(self.window_tokens, *shortest)

    @property
    def least_text(self) -> int:
        """Tokens of held-out text without which nothing is measured. Longer texts for cache and speed are left out then."""
        return max(self.window_tokens, *self.copy_tokens, *self.recall_tokens, min(self.serving_tokens)) + 1


AMOUNTS = {
    "smoke": Amount(
        windows=4,
        window_tokens=128,
        copies=2,
        copy_tokens=(128,),
        recall_tokens=(256,),
        samples=4,
        serving_tokens=(256,),
        new_tokens=4,
    ),
    "brief": Amount(windows=16, recall_tokens=(2000,), samples=8, serving_tokens=(2000,)),
    # Of `megatron-dmc compare`, whose rows are many; compare_512 for models that are trained on samples of 512 tokens.
    "compare": Amount(
        windows=2,
        window_tokens=2048,
        copies=2,
        copy_tokens=(2048,),
        recall_tokens=(2000,),
        samples=6,
        serving_tokens=(2000,),
        new_tokens=16,
    ),
    "compare_512": Amount(
        windows=16, copies=8, copy_tokens=(512,), recall_tokens=(250, 480), serving_tokens=(480,), new_tokens=16
    ),
    "default": Amount(),
    "full": Amount(copies=16, recall_tokens=(300, 1000, 2000, 4000), samples=48),
}
