"""The look of each method: the same colour and marker on every page, which people with colour blindness tell apart."""

import zlib
from typing import NamedTuple


class Look(NamedTuple):
    """colour: #rrggbb, to be seen on white and on black. symbol: a plotly marker."""

    colour: str
    symbol: str


# Okabe and Ito's colours (2008), the yellow darker. Markers differ, too, where a colour stands twice.
_BLUE, _SKY, _GREEN, _ORANGE = "#0072b2", "#56b4e9", "#009e73", "#e69f00"
_VERMILION, _PURPLE, _OLIVE, _GREY = "#d55e00", "#cc79a7", "#a89b00", "#888888"
LOOKS = {
    "base": Look(_GREY, "star"),
    "control": Look(_GREY, "diamond"),
    "dmc": Look(_BLUE, "circle"),
    "trained": Look(_BLUE, "circle"),
    "recipe": Look(_BLUE, "circle"),
    "dmc_at_threshold": Look(_SKY, "circle"),
    "dmc_int8": Look(_BLUE, "square"),
    "dmc_fp8": Look(_BLUE, "diamond"),
    "dmc_int4": Look(_BLUE, "cross"),
    "calibrated": Look(_GREEN, "square"),
    "adapter": Look(_GREEN, "square"),
    "dms": Look(_VERMILION, "triangle-up"),
    "neuron": Look(_VERMILION, "triangle-up"),
    "gqa": Look(_PURPLE, "diamond"),
    "quantized": Look(_ORANGE, "cross"),
    "streaming_llm": Look(_OLIVE, "triangle-down"),
    "knorm": Look(_GREY, "x"),
    "h2o": Look(_VERMILION, "x"),
    "tova": Look(_ORANGE, "triangle-down"),
    "snapkv": Look(_OLIVE, "x"),
    "expected_attention": Look(_PURPLE, "triangle-up"),
    "adakv_expected_attention": Look(_PURPLE, "triangle-down"),
    "kvzip": Look(_SKY, "square"),
}
_OTHERS = [
    Look(colour, symbol)
    for symbol in ("cross", "star", "triangle-down")
    for colour in (_BLUE, _GREEN, _VERMILION, _PURPLE, _ORANGE, _SKY, _OLIVE)
]


def look(method: str) -> Look:
    """The same for the same name, also of a method that nobody has listed."""
    return LOOKS.get(method) or _OTHERS[zlib.crc32(method.encode("utf-8", "replace")) % len(_OTHERS)]
