"""``megatron-dmc evaluate``: one Hugging Face folder, by itself or beside the base that it was made from."""

import hashlib
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.hf_config import read_config
from megatron_dmc.convert.identity import model_digest
from megatron_dmc.data.indexed_dataset import check_dataset, token_stream
from megatron_dmc.data.tokenizer import Tokenizer, check_own_vocabulary, load_tokenizer
from megatron_dmc.evaluation.exported.amount import AMOUNTS, Amount
from megatron_dmc.evaluation.exported.method import AsItIs, Method
from megatron_dmc.evaluation.exported.model import check_cache_dtype, load, loss_dtype, serving_dtype
from megatron_dmc.evaluation.exported.recall import recalls
from megatron_dmc.evaluation.exported.report import read_report
from megatron_dmc.evaluation.exported.serving import serving
from megatron_dmc.evaluation.exported.text_loss import continued_loss, copying_loss, text_loss
from megatron_dmc.evaluation.recall_tasks import draw

# A base that recalls none of so many samples is asked for no more of them.
PROBE = 4
# A base that recalls fewer of its samples cannot do the task: it says nothing about compression.
LEAST_BASE_ACCURACY = 0.5
# What a model shares with its base, of a ModelConfig.
_OF_BASE = ("vocab_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
# A decoded token takes so many times as long as one of a prompt, roughly.
_DECODING = 10


@dataclass(frozen=True)
class Heldout:
    """The text that every model of a comparison reads: ids int64 [tokens], of this tokenizer."""

    tokenizer: Tokenizer
    ids: numpy.ndarray

    @classmethod
    def open(cls, prefix: str, tokenizer: Tokenizer, least: int) -> "Heldout":
        """Raises ConfigError for a damaged dataset, one of another tokenizer, or one with fewer than ``least`` tokens."""
        index = check_dataset(prefix, tokenizer, 1)
        ids = numpy.asarray(token_stream(prefix, index), dtype=numpy.int64)
        if (largest := int(ids.max(initial=0))) >= tokenizer.vocab_size:
            raise ConfigError(
                f"{prefix}.bin holds token {largest}, its tokenizer has {tokenizer.vocab_size}: it is damaged; build the "
                "dataset again"
            )
        if len(ids) < least:
            raise ConfigError(
                f"{prefix} holds {len(ids)} tokens, the evaluation reads {least} in a row; hold out "
                f"{least / max(len(ids), 1):.1f} times as much text"
            )
        return cls(tokenizer, ids)

    @property
    def digest(self) -> str:
        """The same for the same tokens."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()

    def windows(self, count: int, tokens: int) -> list[torch.Tensor]:
        """So many stretches of so many tokens, evenly spread over the text; they overlap where the text is short."""
        last = len(self.ids) - tokens
        begins = [round(i * last / max(count - 1, 1)) for i in range(count)]
        return [torch.from_numpy(self.ids[begin : begin + tokens].copy()) for begin in begins]


def evaluate_exported(
    folder: str,
    text: str,
    *,
    base: str | None,
    amount: str | None = None,
    merge_threshold: float | None = None,
    cache_dtype: str | None = None,
    method: Method | None = None,
) -> dict[str, Any]:
    """All that ``megatron-dmc evaluate`` reports of one model, as plain values.

    Args:
        folder: a Hugging Face folder with its tokenizer.
        text: path prefix of a held-out dataset.
        base: the report of the base that the model was made from: the same samples are read. None: this is the base.
        amount: a name of AMOUNTS; of a base only, what is compared with it reads as much. None: "default".
        merge_threshold, cache_dtype: of a model that merges, in place of its own.
        method: a baseline, which the model's cache is kept by; None: the model as it is.

    Raises:
        ConfigError: no such model, text or report, or text that is too short.
    """
    if base is not None and amount is not None:
        raise ConfigError(
            f"--amount {amount} has no effect with --base: as much is measured as of the base; leave it out"
        )
    before = None if base is None else read_report(base)
    config, dmc = read_config(Path(folder))
    check_cache_dtype(folder, dmc is not None, cache_dtype)
    weights = model_digest(Path(folder))
    settings = AMOUNTS[amount or "default"] if before is None else Amount.from_dict(before["amount"])
    settings = _within(settings, config.max_position_embeddings)
    tokenizer = load_tokenizer(folder)
    check_own_vocabulary(tokenizer, config.vocab_size)
    heldout = Heldout.open(text, tokenizer, settings.least_text)
    settings = _within_text(settings, len(heldout.ids))
    for task, tokens in settings.recall_parts:
        # What cannot be drawn is said before a model is read.
        draw(task, heldout.tokenizer, heldout.ids, tokens, 0)
    if before is not None:
        if before["text"] != heldout.digest:
            raise ConfigError(
                f"--base {base} was measured on other text than {text}; name the same text, or measure it again"
            )
        if before["serving_dtype"] != _name(serving_dtype()):
            raise ConfigError(
                f"--base {base} was measured in {before['serving_dtype']}, this machine serves in {_name(serving_dtype())}; "
                "measure the base again"
            )
        if not Path(before["model"]).is_dir():
            raise ConfigError(
                f"--base {base} was measured on {before['model']}, which is not there; run in the same folder as then, or "
                "measure the base again"
            )
        base_config, _ = read_config(Path(before["model"]))
        for name in _OF_BASE:
            mine, theirs = getattr(config, name), getattr(base_config, name)
            # Of a plain model, heads may have been joined.
            joined = dmc is None and name == "num_query_groups" and theirs % mine == 0
            if mine != theirs and not joined:
                raise ConfigError(
                    f"{folder} has {name} {mine}, its base {before['model']} {theirs}; name the report of the base that it "
                    "was made from"
                )
        if model_digest(Path(before["model"])) != before["weights"]:
            raise ConfigError(
                f"--base {base} was measured on another model than {before['model']} holds now; measure the base again"
            )
    if method is not None:
        if before is None or before["weights"] != weights:
            raise ConfigError(
                f"--base {base} was measured on another model than {folder}; measure {folder} itself first"
            )
        method.check(folder, min(*settings.recall_tokens, *settings.serving_tokens) // 2)
    evaluation = _Evaluation(folder, dmc, before, heldout, settings, merge_threshold, cache_dtype, method or AsItIs())
    report = evaluation.report()
    if model_digest(Path(folder)) != weights:
        raise ConfigError(f"{folder} has changed while it was measured; measure it again")
    return report | {"weights": weights}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _within(amount: Amount, positions: int) -> Amount:
    """The lengths that the model has positions for."""
    kept: dict[str, Any] = {
        "copy_tokens": tuple(n for n in amount.copy_tokens if n <= positions),
        "recall_tokens": tuple(n for n in amount.recall_tokens if n < positions),
        "serving_tokens": tuple(n for n in amount.serving_tokens if n + amount.new_tokens < positions),
    }
    if amount.window_tokens > positions or not all(kept.values()):
        raise ConfigError(
            f"the model has {positions} positions, the evaluation reads {amount.least_positions} tokens at once; evaluate a "
            "model with more positions, or measure less of its base, or of itself if it is one (--amount smoke)"
        )
    return _without(amount, kept, f"the model has {positions} positions")


def _within_text(amount: Amount, tokens: int) -> Amount:
    """The lengths of texts for cache and speed that the held-out text has."""
    kept = tuple(n for n in amount.serving_tokens if n <= tokens)
    return _without(amount, {"serving_tokens": kept}, f"the held-out text has {tokens} tokens")


def _without(amount: Amount, kept: dict[str, Any], why: str) -> Amount:
    """``amount`` with these lengths only. Says which others are left out."""
    if dropped := sorted({n for name in kept for n in getattr(amount, name) if n not in kept[name]}):
        print(f"{why}: not measured at {', '.join(map(str, dropped))} tokens", file=sys.stderr)
    return replace(amount, **kept)


@dataclass(frozen=True)
class _Evaluation:
    """dmc: what the model adds to a plain one. before: the report of its base; None: the model is a base. merge_threshold,
    cache_dtype: in place of the model's own. method: how the model keeps what it has read."""

    folder: str
    dmc: DMCConfig | None
    before: dict[str, Any] | None
    heldout: Heldout
    amount: Amount
    merge_threshold: float | None = None
    cache_dtype: str | None = None
    method: Method = field(default_factory=AsItIs)

    def report(self) -> dict[str, Any]:
        """All but the digest of the weights."""
        amount, before, began = self.amount, self.before, time.perf_counter()
        columns = (
            TextColumn("{task.description:14}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        model, plain = self._load(loss_dtype())
        cache_dtype = getattr(model.config, "cache_dtype", None)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("loss", total=self._work())

            def advance(tokens: int) -> None:
                progress.advance(bar, tokens)

            row = self._losses(model, plain, advance) if self.method.acts_while_reading else {}
            progress.update(bar, description="continued")
            row["continued"] = [self._continued(model, plain, tokens, advance) for tokens in amount.recall_tokens]
            progress.update(bar, description="cache, speed")
            if serving_dtype() != loss_dtype():
                del model, plain
                model, plain = self._load(serving_dtype())
            row["serving"] = [self._serving(model, plain, tokens, advance) for tokens in amount.serving_tokens]
            del plain
            row["recall"] = []
            for task, tokens in amount.recall_parts:
                progress.update(bar, description=f"{task}, {tokens}")
                row["recall"].append(self._recall(model, task, tokens, advance))
        return {
            "model": self.folder,
            **({} if before is None else {"base": before["model"], "base_weights": before["weights"]}),
            **({} if self.dmc is None else {"dmc": asdict(self.dmc)}),
            **({} if self.merge_threshold is None else {"merge_threshold": self.merge_threshold}),
            **({} if cache_dtype is None else {"cache_dtype": cache_dtype}),
            **({"baseline": asdict(self.method)} if is_dataclass(self.method) else {}),
            "amount": amount.to_dict(),
            "text": self.heldout.digest,
            "serving_dtype": _name(serving_dtype()),
            "heldout_tokens": len(self.heldout.ids),
            **row,
            "machine": machine(),
            "seconds": time.perf_counter() - began,
        }

    def _load(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """The model, and its base."""
        model = load(self.folder, dtype, self.method.attention)
        if self.merge_threshold is not None:
            model.config.merge_threshold = self.merge_threshold
        if self.cache_dtype is not None:
            model.config.cache_dtype = self.cache_dtype
        return model, None if self.before is None else load(self.before["model"], dtype)

    def _work(self) -> int:
        """Tokens that are read, roughly, as the bar's length."""
        amount, models = self.amount, 1 if self.before is None else 2
        recall = sum(tokens for task, tokens in amount.recall_parts if not _skipped(task, tokens, self.before))
        served = sum(tokens + _DECODING * amount.new_tokens for tokens in amount.serving_tokens)
        losses = models * amount.copies * sum(amount.recall_tokens)
        if self.method.acts_while_reading:
            losses += amount.window_tokens * models * amount.windows + amount.copies * sum(amount.copy_tokens)
        return losses + models * served + amount.samples * recall

    def _losses(self, model: Any, plain: Any, advance: Callable[[int], None]) -> dict[str, Any]:
        amount = self.amount
        windows = self.heldout.windows(amount.windows, amount.window_tokens + 1)
        row = text_loss(model, plain, windows, self.method, advance)
        self._check_finite(row)
        row["copying"] = []
        for tokens in amount.copy_tokens:
            halves = self.heldout.windows(amount.copies, tokens // 2)
            row["copying"].append({"tokens": tokens, "loss": copying_loss(model, halves, self.method, advance)})
        return row

    def _check_finite(self, row: dict[str, Any]) -> None:
        # The base's own was finite when it was measured, and it is the same model.
        if not math.isfinite(row["loss"]) or not math.isfinite(row.get("kl", 0)):
            raise ConfigError(
                f"{self.folder}: its loss is {row['loss']}; its weights are damaged, convert or fetch it again"
            )

    def _continued(self, model: Any, plain: Any, tokens: int, advance: Callable[[int], None]) -> dict[str, Any]:
        windows = self.heldout.windows(self.amount.copies, tokens)
        row = continued_loss(model, plain, windows, self.method, advance)
        self._check_finite(row)
        return {"tokens": tokens, **row}

    def _serving(self, model: Any, plain: Any, tokens: int, advance: Callable[[int], None]) -> dict[str, Any]:
        (text,) = self.heldout.windows(1, tokens)
        row: dict[str, Any] = {"tokens": tokens}
        for prefix, each, method in (("", model, self.method), ("plain_", plain, AsItIs())):
            if each is not None:
                found = serving(each, text, self.amount.new_tokens, method)
                row |= {f"{prefix}{name}": value for name, value in found.items()}
                advance(tokens + _DECODING * self.amount.new_tokens)
        if plain is not None:
            # Where every token keeps a slot, what is smaller is the slot.
            row.setdefault("compression_ratio", row["plain_cache_bytes"] / row["cache_bytes"])
        return row

    def _recall(self, model: Any, task: str, tokens: int, advance: Callable[[int], None]) -> dict[str, Any]:
        row: dict[str, Any] = {"task": task, "tokens": tokens}
        base = None if self.before is None else _of_base(task, tokens, self.before)
        if base is not None and _skipped(task, tokens, self.before):
            return row | {"samples": 0, "correct": 0, "accuracy": None, "counts": False}
        correct = samples = 0
        for index in range(self.amount.samples):
            sample = draw(task, self.heldout.tokenizer, self.heldout.ids, tokens, index)
            correct += recalls(model, sample, self.method)
            samples += 1
            advance(tokens)
            if base is None and samples == PROBE and correct == 0:
                advance(tokens * (self.amount.samples - samples))
                break
        accuracy = correct / samples
        row |= {"samples": samples, "correct": correct, "accuracy": accuracy}
        if base is None:
            return row | {"counts": accuracy >= LEAST_BASE_ACCURACY}
        return row | {
            "base_accuracy": base["accuracy"],
            "over_base": accuracy / base["accuracy"],
            "counts": base["counts"],
        }


def _of_base(task: str, tokens: int, before: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in before["recall"] if (row["task"], row["tokens"]) == (task, tokens))


def _skipped(task: str, tokens: int, before: dict[str, Any] | None) -> bool:
    """Whether the base cannot do the task, so that it says nothing about what was made from it."""
    return before is not None and not _of_base(task, tokens, before)["counts"]


def recall_over_base(report: dict[str, Any]) -> float | None:
    """The mean of accuracy over the base's, of the tasks that count; None where none does."""
    counted = [row["over_base"] for row in report["recall"] if row["counts"]]
    return sum(counted) / len(counted) if counted else None


def machine() -> dict[str, Any]:
    """What the numbers of seconds depend on."""
    import transformers

    return {
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
