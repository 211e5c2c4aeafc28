"""The same figures as PNGs, for which no browser is needed."""

import io
from collections.abc import Sequence

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure as Image
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megatron_dmc.report.fates import Decisions
from megatron_dmc.report.figures import Choice, Heat, Plot
from megatron_dmc.report.methods import LOOKS
from megatron_dmc.report.plots import MOST_COLOUR
from megatron_dmc.report.text import plain

_MARKERS = {
    **{"circle": "o", "square": "s", "diamond": "D", "cross": "P", "x": "X", "star": "*"},
    **{"triangle-up": "^", "triangle-down": "v"},
}
# In the order of DASHES.
_DASHES = ("-", "--", ":", "-.")
# What became of a token, in the order of their colours.
FATES = {
    "k": ("a slot of its own", LOOKS["dmc"].colour),
    "m": ("merged", LOOKS["quantized"].colour),
    "e": ("evicted", LOOKS["dms"].colour),
    "a": ("absorbed", LOOKS["gqa"].colour),
    "w": ("still in the window", LOOKS["base"].colour),
}


def choice_image(title: str, choice: Choice) -> bytes:
    """One choice of a figure as a PNG: its plots beside one another."""
    height = max([4.5, *(1.5 + 0.22 * len(plot.values) for plot in choice.plots if isinstance(plot, Heat))])
    image = _image(6.5 * max(len(choice.plots), 1), min(height, 40))
    for axes, plot in zip(image.subplots(1, len(choice.plots), squeeze=False)[0], choice.plots, strict=True):
        if isinstance(plot, Heat):
            _heat(axes, plot)
        else:
            _plot(axes, plot)
    image.suptitle(_label(f"{title}: {choice.name}"), fontsize=10)
    return _png(image)


def decisions_image(decisions: Decisions) -> bytes:
    """Every head a row, every token a column, coloured by what became of it."""
    kinds = list(FATES)
    rows = [[kinds.index(fate.kind.lower()) for fate in head] for layer in decisions.fates for head in layer]
    image = _image(9, min(2.5 + 0.12 * len(rows), 40))
    axes = image.subplots()
    colours = ListedColormap([colour for _, colour in FATES.values()])
    axes.imshow(
        numpy.asarray(rows), cmap=colours, vmin=-0.5, vmax=len(kinds) - 0.5, aspect="auto", interpolation="nearest"
    )
    heads = len(decisions.fates[0])
    axes.set_xlabel("token of the text")
    axes.set_ylabel(f"layer ({heads} KV head{'s' if heads > 1 else ''} each)")
    step = max(1, len(decisions.fates) // 20)
    axes.set_yticks([layer * heads for layer in range(0, len(decisions.fates), step)])
    axes.set_yticklabels([str(layer) for layer in range(0, len(decisions.fates), step)])
    there = {kind for row in rows for kind in row}
    shown = [Patch(color=colour, label=name) for number, (name, colour) in enumerate(FATES.values()) if number in there]
    image.legend(handles=shown, loc="outside upper center", ncols=len(shown), frameon=False)
    return _png(image)


def _image(width: float, height: float) -> Image:
    image = Image(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(image)
    return image


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _plot(axes: Axes, plot: Plot) -> None:
    for line in plot.lines:
        bars: Sequence[Sequence[float]] | None = None
        if line.below is not None and line.above is not None:
            bars = [line.below, line.above]
        axes.errorbar(
            list(line.x),
            list(line.y),
            yerr=bars,
            label=_label(line.name),
            color=line.look.colour,
            marker=_MARKERS[line.look.symbol] if line.markers else "",
            linestyle=_DASHES[line.dash],
            linewidth=1.2,
            capsize=3,
        )
    axes.set_xlabel(_label(plot.x_title))
    axes.set_ylabel(_label(plot.y_title))
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _heat(axes: Axes, heat: Heat) -> None:
    table = numpy.asarray(heat.values)
    top = min(max(float(table.max()), 2.0), MOST_COLOUR)
    shown = axes.imshow(table, norm=LogNorm(1, top), aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    assert axes.figure is not None
    axes.figure.colorbar(shown, ax=axes, label="tokens per slot")


def _label(text: str) -> str:
    """Dollars would begin a formula."""
    return plain(text, 120).replace("$", r"\$")
