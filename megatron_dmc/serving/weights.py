"""Whether an export's attention weights are what its ``config.json`` says, seen as they pass by."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

_NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.(.+)")


class Checked:
    """Of one model's loading. config: of the export."""

    def __init__(self, config: Any):
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or hidden // heads
        self.layers = config.num_hidden_layers
        self.shapes: dict[str, tuple[int, ...]] = {
            "q_proj.weight": (heads * width, hidden),
            "k_proj.weight": (kv_heads * width, hidden),
            "v_proj.weight": (kv_heads * width, hidden),
            "o_proj.weight": (hidden, heads * width),
        }
        # A quantized model's have other names and shapes, which vLLM knows.
        self.own_shapes: set[str] = set() if getattr(config, "quantization_config", None) is None else set(self.shapes)
        self.source = config.dmc["decision_source"]
        if self.source == "projection":
            self.shapes |= {"decision.weight": (2 * kv_heads, hidden), "decision.bias": (2 * kv_heads,)}
        self.seen: set[tuple[int, str]] = set()

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same pairs of name and tensor. Raises ValueError, one line, for one that cannot be this model's."""
        for name, tensor in weights:
            if (match := _NAME.fullmatch(name)) is not None:
                self._check(name, match[2], tensor)
                self.seen.add((int(match[1]), match[2]))
            yield name, tensor

    def _check(self, name: str, part: str, tensor: Tensor) -> None:
        decides = part.startswith("decision.")
        if decides and part not in self.shapes:
            raise ValueError(f"{name} has no place where decision_source is {self.source}; export the model again")
        if decides and not tensor.is_floating_point():
            raise ValueError(f"{name} is quantized; leave the decisions out when you quantize a model")
        shape = tuple(tensor.shape) if part in self.own_shapes else self.shapes.get(part, tuple(tensor.shape))
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; export it again"
            )
        if decides and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds numbers that are not finite: no token could be decided on; export it again")

    def refuse_what_is_missing(self) -> None:
        """After the last weight; raises ValueError, one line."""
        for layer in range(self.layers):
            for part in self.shapes:
                if part not in self.own_shapes and (layer, part) not in self.seen:
                    raise ValueError(
                        f"model.layers.{layer}.self_attn.{part} is missing from the model's weights; export it again"
                    )
