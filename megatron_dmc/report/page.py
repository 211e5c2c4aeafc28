"""The page: one HTML file that loads nothing, neither from the network nor from beside it."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.offline

from megatron_dmc.report import plots
from megatron_dmc.report.fates import Decisions
from megatron_dmc.report.figures import Figure, report_command
from megatron_dmc.report.methods import look
from megatron_dmc.report.run import Row, Run
from megatron_dmc.report.text import MARK, data, escaped, plain

# As many are shown at once.
_FEW = 2
_PNGS = "The same figures are PNG files in the folder <code>report</code> beside this page."
_FATES = (
    ("k", "alpha 0: a slot of its own"),
    ("m", "alpha 1: merged into the slot before it"),
    ("e", "alpha 1: evicted"),
    ("a", "alpha 1: absorbed into the residual slot"),
    ("w", "still in the window: either"),
)
_OF_OPERATION = {"merge": "kmw", "evict": "kew", "absorb": "kaw"}


def page(run: Run, figures: Sequence[Figure], decisions: Decisions | None, left_out: Sequence[str]) -> str:
    """The whole file.

    Args:
        left_out: what the run has no figure of, and why; a sentence each.
    """
    sections = [_section(figure) for figure in figures]
    links = [(figure.key, figure.title) for figure in figures]
    if decisions is not None:
        sections.append(_text(run, decisions))
        links.append(("text", "A text, token by token"))
    sections.append(_table(run))
    links.append(("numbers", "All numbers"))
    if run.stages:
        sections.append(_stages(run))
        links.append(("stages", "How it was made"))
    scripts = [plotly.offline.get_plotlyjs(), _beside("page.js")]
    shown = {figure.key: plots.choices(figure) for figure in figures}
    values = data({"figures": shown, "text": None if decisions is None else _fates(decisions)})
    name = escaped(run.name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{MARK}
<link rel="icon" href="data:,">
<title>{name}: a report</title>
<style>
{_beside("page.css")}</style>
</head>
<body>
<main>
<header>
<h1>{name}</h1>
<p>Report of {escaped(run.kind)}.</p>
{_facts(run.facts)}
<nav aria-label="On this page"><ul>{"".join(f'<li><a href="#{key}">{title}</a></li>' for key, title in links)}</ul></nav>
<noscript><p>The figures need JavaScript. {_PNGS}</p></noscript>
</header>
{"".join(sections)}
<footer>
{"".join(f'<p class="note">{escaped(each)}</p>' for each in left_out)}
<p class="note">Written by <code>{escaped(report_command(run))}</code>. {_PNGS}</p>
</footer>
</main>
<script type="application/json" id="data">{values}</script>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is loaded, and no script runs but these."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts)
    return f"<dl>{rows}</dl>" if facts else ""


def _section(figure: Figure) -> str:
    names = [escaped(choice.name) for choice in figure.choices]
    if len(names) > 1:
        options = "".join(f"<option>{name}</option>" for name in names)
        chooser = f'<div class="controls"><label>{figure.chooser} <select>{options}</select></label></div>'
    else:
        chooser = f"<p><strong>{names[0]}</strong></p>"
    return f"""<section class="figure" id="{figure.key}">
<h2>{escaped(figure.title)}</h2>
<p>{escaped(figure.caption)}</p>
{chooser}
<div class="plots"></div>
{_commands(figure.commands)}
</section>
"""


def _commands(commands: Sequence[str]) -> str:
    """Under a figure."""
    if not commands:
        return ""
    shown = f"<pre>{chr(10).join(escaped(command, 2000) for command in commands)}</pre>"
    if len(commands) <= _FEW:
        return f"<p class=note>Made by</p>{shown}"
    return f"<details><summary>The {len(commands)} commands that made the numbers</summary>{shown}</details>"


def _text(run: Run, decisions: Decisions) -> str:
    kinds = _OF_OPERATION[decisions.operation]
    legend = "".join(
        f'<li><span class="fate-{kind}">{meaning}</span></li>' for kind, meaning in _FATES if kind in kinds
    )
    selects = (("layer", "layer", len(decisions.fates)), ("head", "KV head", len(decisions.fates[0])))
    chooser = "".join(
        f'<label>{name} <select id="{key}">{"".join(f"<option>{number}</option>" for number in range(count))}</select></label>'
        for key, name, count in selects
    )
    window = (
        f"A decision takes effect when its token is {decisions.window} tokens old."
        if decisions.window
        else "A decision takes effect at once."
    )
    return f"""<section id="text">
<h2>A text, token by token</h2>
<p>What one KV head of one layer does with each token of a text ({len(decisions.tokens)} tokens of
{escaped(decisions.source)}): alpha 0 gives it a slot of its own in the cache, alpha 1 does not.</p>
<p class="note">{window} Pointing at a token shows where it went, and marks the others in the same slot.</p>
<div class="controls">{chooser}</div>
<ul class="legend">{legend}</ul>
<output id="fate"></output>
<div id="tokens" role="group" aria-label="The text's tokens; the arrow keys move"></div>
{_commands([report_command(run)])}
</section>
"""


def _fates(decisions: Decisions) -> dict[str, Any]:
    return {
        "tokens": [_token(token) for token in decisions.tokens],
        "kinds": [["".join(fate.kind for fate in head) for head in layer] for layer in decisions.fates],
        "slots": [[[fate.slot for fate in head] for head in layer] for layer in decisions.fates],
    }


def _token(text: str) -> str:
    """Line breaks and tabs stay: the page shows them."""
    kept = [plain(part) for part in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(kept)


class _Column(NamedTuple):
    """value: a number, a text, or None for an empty cell. form: of a number."""

    title: str
    value: Callable[[Row], float | str | None]
    form: str = ",.4g"


def _table(run: Run) -> str:
    columns = [
        _Column("name", lambda row: row.name),
        _Column("method", lambda row: row.label),
        _Column("step", lambda row: row.step, ",d"),
        _Column("target CR", lambda row: row.target, "g"),
        _Column("CR", lambda row: row.ratio, ".2f"),
        _Column("seed", lambda row: row.seed, "d"),
        _Column("cache, KiB", lambda row: None if row.cache_bytes is None else row.cache_bytes / 1024, ",.0f"),
        *(_Column(each.title, lambda row, each=each: row.values.get(each), ".4f") for each in run.measures),  # type: ignore[misc]
        _Column("trained tokens", lambda row: row.trained_tokens, ",d"),
        _Column("training, s", lambda row: row.training_seconds, ",.0f"),
    ]
    used = [column for column in columns if any(column.value(row) is not None for row in run.rows)]
    head = "".join(
        f"<th{_side(column)} scope=col><button type=button>{escaped(column.title)}</button></th>" for column in used
    )
    body = "".join(f"<tr>{''.join(_cell(column, row) for column in used)}</tr>" for row in run.rows)
    length = "" if run.bytes_tokens is None else f" The cache is that of a text of {run.bytes_tokens:,} tokens."
    return f"""<section id="numbers">
<h2>All numbers</h2>
<p>One row for each model that was measured; CR is the compression ratio, in tokens per slot of the cache.{length} A column's
name sorts by it.</p>
<div class="scroll" tabindex="0" role="region" aria-label="All numbers">
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
</div>
</section>
"""


def _side(column: _Column) -> str:
    return ' class="text"' if column.title in ("name", "method") else ""


def _cell(column: _Column, row: Row) -> str:
    value = column.value(row)
    if value is None:
        return '<td data-value=""></td>'
    if isinstance(value, str):
        colour = f'<span class="swatch" style="background:{look(row.method).colour}"></span>'
        swatch = colour if column.title == "method" else ""
        return f'<td class="text" data-value="{escaped(value)}">{swatch}{escaped(value)}</td>'
    return f'<td data-value="{value}">{value:{column.form}}</td>'


def _stages(run: Run) -> str:
    rows = "".join(
        f'<tr><td class="text">{escaped(each.title)}</td><td>{each.seconds:,.0f}</td>'
        f'<td class="text"><code>{escaped(each.command, 2000)}</code></td></tr>'
        for each in run.stages
    )
    return f"""<section id="stages">
<h2>How it was made</h2>
<p>The stages of the run in their order, with the command of each.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Stages">
<table><thead><tr><th scope="col">stage</th><th scope="col">seconds</th><th scope="col" class="text">command</th></tr></thead>
<tbody>{rows}</tbody></table>
</div>
</section>
"""
