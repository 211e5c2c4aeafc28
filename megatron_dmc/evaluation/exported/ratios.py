"""``megatron-dmc ratios``: which merge threshold gives an export which compression ratio, measured on a text."""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.hf_config import read_config, read_json
from megatron_dmc.convert.identity import model_digest
from megatron_dmc.data.tokenizer import check_own_vocabulary, load_tokenizer
from megatron_dmc.evaluation.exported.evaluate import Heldout
from megatron_dmc.evaluation.exported.model import extend, load, serving_dtype
from megatron_dmc.files import CHECKPOINT_MARK, why_nothing_new, write_whole
from megatron_dmc.hf.curve import MOST_THRESHOLD, CompressionCurve

# Neighbouring points of a curve differ by this factor at most: the line between them is then right within a percent or two.
_APART = 1.15
# Logits. Of two thresholds that are this near, the ratio between them is not asked for.
_CLOSEST = 1e-3
LEAST_RATIO = 1.5


def measure_ratios(folder: str, text: str, *, tokens: int, texts: int, most: float | None) -> CompressionCurve:
    """Measures an export's curve and writes it into its ``config.json``, whose other values stay.

    Args:
        folder: an export of a model that merges, with its tokenizer.
        text: path prefix of a held-out dataset.
        tokens: of each text.
        texts: that are read for each point.
        most: the ratio that the curve goes up to, if the model reaches it; None: twice the one it was trained for.

    Raises:
        ConfigError: no such export or text, or a ``config.json`` that cannot be written.
    """
    config, dmc = read_config(Path(folder))
    if dmc is None:
        raise ConfigError(f"{folder} is a plain model, which merges nothing; name an export of a retrofit")
    if tokens > config.max_position_embeddings:
        raise ConfigError(
            f"--tokens {tokens}: the model has {config.max_position_embeddings} positions; ask for that or fewer"
        )
    if most is not None and most < LEAST_RATIO:
        raise ConfigError(f"--most must be {LEAST_RATIO} or more, got {most:g}")
    if (highest := tokens / (dmc.local_window + 1 + dmc.absorbs)) < LEAST_RATIO:
        raise ConfigError(
            f"--tokens {tokens}: the last {dmc.local_window} of them stay as they are, so there is no ratio above "
            f"{highest:.2f}; ask for more"
        )
    path = Path(folder, "config.json")
    if (problem := why_nothing_new(path.with_name(f".{path.name}.tmp"))) is not None:
        raise ConfigError(f"{path} cannot be written: {problem}; copy the export to another folder")
    tokenizer = load_tokenizer(folder)
    check_own_vocabulary(tokenizer, config.vocab_size)
    heldout = Heldout.open(text, tokenizer, tokens)
    _drop_damaged_curve(path)
    digest = model_digest(Path(folder))
    model = load(folder, serving_dtype())
    windows = heldout.windows(texts, tokens)
    most = 2 * dmc.target_compression_ratio if most is None else most
    with _progress() as progress:
        bar = progress.add_task("ratios", total=None)

        def ratio(threshold: float) -> float:
            found = ratio_at(model, windows, threshold)
            progress.update(bar, description=f"threshold {threshold:+.3f}: CR {found:.2f}")
            return found

        curve = curve_of(ratio, tokens, most)
    if model_digest(Path(folder)) != digest:
        raise ConfigError(f"{folder} has changed while it was measured; measure it again")
    if curve.ratios[-1] < most:
        print(f"{folder}: it does not reach CR {most:g} in texts of {tokens} tokens", file=sys.stderr)
    _write(path, read_json(path) | {"compression_curve": curve.to_dict()})
    return curve


def _drop_damaged_curve(path: Path) -> None:
    """Or the model could not be loaded. It is to be measured anew."""
    config = read_json(path)
    if config.get("compression_curve") is None:
        return
    try:
        CompressionCurve.from_dict(config["compression_curve"])
    except ValueError:
        del config["compression_curve"]
        _write(path, config)


def _write(path: Path, config: dict[str, Any]) -> None:
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def ratio_at(model: Any, texts: Sequence[Tensor], threshold: float) -> float:
    """Tokens per slot, of all layers and heads, once each text, int64 [tokens], is in a cache of its own."""
    before, slots, tokens = model.config.merge_threshold, 0, 0
    model.config.merge_threshold = threshold
    try:
        with torch.inference_mode():
            for text in texts:
                _, cache = extend(model, text, last_only=True)
                slots += int(cache.slots.sum())
                tokens += len(text) * cache.slots.numel()
    finally:
        model.config.merge_threshold = before
    return tokens / slots


def curve_of(ratio: Callable[[float], float], tokens: int, most: float) -> CompressionCurve:
    """Points from LEAST_RATIO to ``most``, and one beyond each, or as far as a model goes; each at most _APART from the next.

    Args:
        ratio: what the model has at a threshold; it falls as the threshold rises.
        tokens: of the texts it is measured on.
    """
    # Nothing merges; everything does.
    lowest, highest = ratio(MOST_THRESHOLD), ratio(-MOST_THRESHOLD)
    found = {0.0: ratio(0.0)}
    for sign, end in ((1, max(lowest, LEAST_RATIO)), (-1, min(highest, most))):
        step, last = 0.5, found[0.0]
        while sign * (last - end) > 1e-6 * end and step < MOST_THRESHOLD:
            last = found[sign * step] = ratio(sign * step)
            step *= 2
    while (wanted := _gap(found, most)) is not None:
        found[wanted] = ratio(wanted)
    thresholds = sorted(found, reverse=True)
    # Beyond the ends nothing was asked between two points.
    first = max((i for i, t in enumerate(thresholds) if found[t] <= LEAST_RATIO), default=0)
    reached = (i for i, t in enumerate(thresholds) if i >= first and found[t] >= most)
    last_one = min(reached, default=len(thresholds) - 1)
    kept: list[tuple[float, float]] = []
    # From the highest threshold on. Of equal ratios the first: later layers see other states, so a ratio may even fall back.
    for threshold in thresholds[first : last_one + 1]:
        if not kept or found[threshold] > kept[-1][0]:
            kept.append((found[threshold], threshold))
    return CompressionCurve(tokens, *zip(*kept, strict=True))


def _gap(found: dict[float, float], most: float) -> float | None:
    """The threshold in the middle of two between which too much is unknown."""
    thresholds = sorted(found, reverse=True)
    for high, low in itertools.pairwise(thresholds):
        asked = found[low] > LEAST_RATIO and found[high] < most
        if asked and found[low] > _APART * found[high] and high - low > _CLOSEST:
            return (high + low) / 2
    return None


def chosen_threshold(folder: str | Path, ratio: float | None, threshold: float | None) -> float | None:
    """What ``--compression-ratio`` and ``--merge-threshold`` of a command ask for; None: neither is given.

    Raises:
        ConfigError: the folder's model merges nothing, or its curve says nothing of such a ratio.
    """
    if ratio is None and threshold is None:
        return None
    flag = "--merge-threshold" if ratio is None else "--compression-ratio"
    path = Path(folder, "config.json")
    if (Path(folder) / CHECKPOINT_MARK).exists():
        if ratio is not None:
            raise ConfigError(
                f"{flag}: {folder} is a checkpoint, which has no curve; export it with megatron-dmc convert-to-hf, and run "
                "megatron-dmc ratios on the export"
            )
        return threshold
    config = read_json(path)
    if "dmc" not in config:
        raise ConfigError(f"{flag}: {folder} is no export of a model that merges; leave it out")
    if ratio is None:
        return threshold
    if config.get("compression_curve") is None:
        raise ConfigError(
            f"{flag}: it has not been measured which threshold gives {folder} which ratio; run megatron-dmc ratios {folder} "
            "--text PREFIX first"
        )
    try:
        return CompressionCurve.from_dict(config["compression_curve"]).threshold(ratio)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from None


def _progress() -> Progress:
    columns = TextColumn("{task.description:32}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True))
