"""Figures for plotly.js, as plain values. Colours of text, grid and background are the page's: ``page.js`` adds them."""

import math
from typing import Any

import plotly.graph_objects as go

from megatron_dmc.report.figures import DASHES, Figure, Heat, Line, Plot
from megatron_dmc.report.text import escaped, label

# Of a heatmap's colours; one extreme head must not flatten the others'.
MOST_COLOUR = 64.0
# More cells would print over one another.
_MOST_PRINTED = 128
_CELL = 18


def choices(figure: Figure) -> list[dict[str, Any]]:
    """{name, plots: [{data, layout}]} of each choice."""
    return [
        {"name": escaped(choice.name), "plots": [_drawn(plot) for plot in choice.plots]} for choice in figure.choices
    ]


def _drawn(plot: Plot | Heat) -> dict[str, Any]:
    made = _heat(plot) if isinstance(plot, Heat) else _plot(plot)
    found = made.to_plotly_json()
    # plotly's own template sets colours for a light page.
    found["layout"].pop("template", None)
    return {"data": found["data"], "layout": found["layout"]}


def _plot(plot: Plot) -> go.Figure:
    made = go.Figure([_line(line) for line in plot.lines])
    made.update_layout(
        margin={"l": 60, "r": 16, "t": 16},
        # At the bottom: page.js makes room for its rows, which depend on the page's width.
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        hovermode="closest",
    )
    made.update_xaxes(title=label(plot.x_title))
    made.update_yaxes(title=label(plot.y_title), rangemode="tozero" if plot.from_zero else "normal")
    return made


def _line(line: Line) -> go.Scatter:
    bars = {"type": "data", "symmetric": False, "arrayminus": line.below, "array": line.above, "thickness": 1.5}
    return go.Scatter(
        name=label(line.name),
        x=list(line.x),
        y=list(line.y),
        mode="lines+markers" if line.markers else "lines",
        line={"color": line.look.colour, "width": 1.5, "dash": DASHES[line.dash]},
        marker={"color": line.look.colour, "symbol": line.look.symbol, "size": 9},
        error_y=bars if line.below is not None else None,
        hovertext=[label(note) for note in line.notes] or None,
        hoverinfo="text" if line.notes else "all",
        showlegend=True,
    )


def _heat(heat: Heat) -> go.Figure:
    values = [list(row) for row in heat.values]
    layers, heads = len(values), len(values[0])
    top = min(max(2.0, *(value for row in values for value in row)), MOST_COLOUR)
    ticks = [2**power for power in range(int(math.log2(top)) + 1)]
    made = go.Figure(
        go.Heatmap(
            z=[[math.log2(value) for value in row] for row in values],
            text=[[f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in row] for row in values],
            texttemplate="%{text}" if layers * heads <= _MOST_PRINTED else None,
            hovertemplate="layer %{y}, KV head %{x}: %{text} tokens per slot<extra></extra>",
            colorscale="Cividis",
            zmin=0.0,
            zmax=math.log2(top),
            colorbar={"tickvals": [math.log2(tick) for tick in ticks], "ticktext": [str(tick) for tick in ticks]},
        )
    )
    made.update_layout(height=120 + max(220, _CELL * layers), margin={"l": 60, "r": 16, "t": 16, "b": 60})
    made.update_xaxes(title="KV head", dtick=max(1, heads // 16), showgrid=False)
    made.update_yaxes(title="layer", dtick=max(1, layers // 20), autorange="reversed", showgrid=False)
    return made
