"""The decisions that a model takes about a text."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.hf_config import read_config
from megatron_dmc.data.tokenizer import Tokenizer, check_own_vocabulary, load_tokenizer
from megatron_dmc.evaluation.exported.evaluate import Heldout
from megatron_dmc.evaluation.exported.model import extend, load
from megatron_dmc.evaluation.harness.source import open_source
from megatron_dmc.evaluation.inspect import read_tokens
from megatron_dmc.hf.cache import DMCCache
from megatron_dmc.report.fates import Decisions, fates, slots

TOKENS = 200


def read_decisions(folder: Path, texts: Sequence[Path]) -> Decisions:
    """One forward pass over the first tokens of a held-out text.

    Args:
        folder: an export, or a checkpoint, which is exported into a temporary folder first.
        texts: path prefixes of datasets; the first that is there is read, or else Python's own sources.

    Raises:
        DMCError: the model cannot be read, or does not merge.
    """
    with _export(folder) as export:
        config, dmc = read_config(export)
        if dmc is None:
            raise ConfigError(f"{folder} is a plain model, which decides nothing")
        tokenizer = load_tokenizer(export)
        check_own_vocabulary(tokenizer, config.vocab_size)
        ids, source = _text(tokenizer, texts, min(TOKENS, config.max_position_embeddings))
        alpha = decide(load(export), ids)
    found = [[fates(head, dmc.local_window, dmc.operation) for head in layer.T.tolist()] for layer in alpha]
    return Decisions(
        str(folder),
        source,
        dmc.local_window,
        dmc.operation,
        [tokenizer.detokenize([token]) for token in ids.tolist()],
        found,
        [[len(ids) / slots(head) for head in layer] for layer in found],
    )


@torch.inference_mode()
def decide(model: Any, ids: Tensor) -> Tensor:
    """Which tokens merge, bool [layers, tokens, kv_heads], as the model decides while it takes a text, int64 [tokens], in."""
    cache = DMCCache(model.config)
    given: list[list[Tensor]] = [[] for _ in cache.layers]

    def noting(attend: Callable[..., Tensor], alphas: list[Tensor]) -> Callable[..., Tensor]:
        def attend_and_note(query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, *rest: Any, **named: Any) -> Any:
            alphas.append(alpha[0].cpu())
            return attend(query, key, value, alpha, *rest, **named)

        return attend_and_note

    for layer, alphas in zip(cache.layers, given, strict=True):
        layer.attend = noting(layer.attend, alphas)
    extend(model, ids, cache, last_only=True)
    return torch.stack([torch.cat(alphas) for alphas in given])


@contextlib.contextmanager
def _export(folder: Path) -> Iterator[Path]:
    with open_source(folder).as_hugging_face() as source:
        yield source.folder


def _text(tokenizer: Tokenizer, texts: Sequence[Path], count: int) -> tuple[Tensor, str]:
    for prefix in texts:
        if prefix.with_name(f"{prefix.name}.idx").is_file():
            (window,) = Heldout.open(str(prefix), tokenizer, count).windows(1, count)
            return window, "held-out text"
    return read_tokens(tokenizer, None, count), "the sources of Python's standard library"
