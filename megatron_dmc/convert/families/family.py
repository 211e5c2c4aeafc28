"""What a file of this folder says of its family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dmc.convert.rows import Row

SLIDING = "sliding-window attention is not supported, take a model that has none"


@dataclass(frozen=True)
class HuggingFaceFamily:
    """A model type of transformers that is a Llama but for what stands here.

    Attributes:
        architecture: transformers' class.
        defaults: what transformers takes where ``config.json`` lacks a key.
        must_be: key, the value that it must have, and what another value means.
        rows: tensors of a layer beyond Llama's.
        writes: keys of ``config.json`` beyond those of all families.
        plain_tokenizer: for this model type AutoTokenizer takes tokenizer.json as it is, whichever class the folder names.
        head_divides: transformers refuses a hidden size that the number of heads does not divide.
    """

    architecture: str
    defaults: Mapping[str, Any]
    must_be: tuple[tuple[str, Any, str], ...] = ()
    rows: tuple[Row, ...] = ()
    writes: Mapping[str, Any] = field(default_factory=dict)
    plain_tokenizer: bool = False
    head_divides: bool = False
