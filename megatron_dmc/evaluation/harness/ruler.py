"""``megatron-dmc evaluate --ruler-data``: RULER's questions from files, asked as kvpress' evaluation asks them.

A context is read by itself, as it is in the chat template; a baseline compresses it then. Question and the beginning of the
answer follow in one piece, the answer is greedy. So an official score needs the official data only.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_dmc.config import ConfigError
from megatron_dmc.evaluation.exported.method import AsItIs, Method
from megatron_dmc.evaluation.exported.model import load
from megatron_dmc.evaluation.harness.leaderboard import Prediction, Submission, model_name, press_name, string_match
from megatron_dmc.evaluation.harness.observed import CacheUse, held_by, plain_sizes, read_in_two
from megatron_dmc.evaluation.harness.ruler_data import Question, first_of_each_task, read_questions, tokens_of
from megatron_dmc.evaluation.harness.run import check_lengths, check_tokenizer
from megatron_dmc.evaluation.harness.source import Source, open_source

DATASET = "ruler"


@dataclass(frozen=True)
class RulerRequest:
    """What is asked for.

    Attributes:
        data: a folder with one of each length.
        lengths: names of folders in it.
        limit: questions of each task; None: all.
        merge_threshold, cache_dtype: of a model that merges, in place of its own.
        baseline: how a plain model keeps a context; None: the model as it is.
        leaderboard: where results are written in kvpress' form; None: nowhere.
    """

    data: str
    lengths: tuple[int, ...]
    limit: int | None = None
    merge_threshold: float | None = None
    cache_dtype: str | None = None
    baseline: Method | None = None
    leaderboard: str | None = None


def evaluate_ruler(folder: str, request: RulerRequest) -> dict[str, Any]:
    """Scores of a Hugging Face folder's model, or a checkpoint's, with its cache beside each.

    Returns:
        plain values: ``model``, ``settings``, and ``results``, rows as of ``rows_of``; ``string_match`` is 0 to 100.

    Raises:
        ConfigError: the model or the data cannot be taken. Nothing is converted or loaded by then.
    """
    source = open_source(Path(folder))
    source.check_cache_dtype(request.cache_dtype)
    check_lengths(source, request.lengths)
    check_tokenizer(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=False)
    found = {length: read_questions(Path(request.data), length) for length in request.lengths}
    chosen = {length: first_of_each_task(questions, request.limit) for length, questions in found.items()}
    _check_questions(source, tokenizer, chosen, request)
    results, written = [], []
    with source.as_hugging_face() as exported:
        attention = None if request.baseline is None else request.baseline.attention
        model = load(exported.folder, "auto", attention)
        if request.merge_threshold is not None:
            model.config.merge_threshold = request.merge_threshold
        if request.cache_dtype is not None:
            model.config.cache_dtype = request.cache_dtype
        for length, questions in chosen.items():
            predictions, uses = _predict(model, tokenizer, questions, request.baseline or AsItIs())
            results += _rows(predictions, uses, length)
            if request.leaderboard is not None:
                submission = Submission(
                    dataset=DATASET,
                    length=length,
                    model=model_name(folder),
                    press=press_name(getattr(request.baseline, "name", None), hasattr(model.config, "dmc")),
                    fraction=len(questions) / len(found[length]),
                    dtype=str(model.dtype).removeprefix("torch."),
                    predictions=predictions,
                )
                written.append(str(submission.write(Path(request.leaderboard))))
    settings = {name: value for name, value in vars(request).items() if name not in ("baseline", "leaderboard")}
    if is_dataclass(request.baseline):
        settings["baseline"] = asdict(request.baseline)
    return {"model": folder, "settings": settings, "results": results, "leaderboard": written}


def _check_questions(source: Source, tokenizer: Any, chosen: dict[int, list[Question]], request: RulerRequest) -> None:
    """The longest question of each task must fit, and the shortest context must leave something to keep."""
    shortest = []
    for length, questions in chosen.items():
        for task in {each.task for each in questions}:
            mine = sorted((each for each in questions if each.task == task), key=lambda each: len(each.context))
            shortest.append(len(tokens_of(tokenizer, mine[0])[0]))
            needed = sum(map(len, tokens_of(tokenizer, mine[-1]))) + mine[-1].max_new_tokens
            if source.positions is not None and needed > source.positions:
                raise ConfigError(
                    f"--length {length}: {task} needs {needed} tokens with this tokenizer, {source.folder} reads at most "
                    f"{source.positions} at once; ask for a shorter length"
                )
    if request.baseline is not None:
        request.baseline.check(str(source.folder), min(shortest))


def _predict(
    model: Any, tokenizer: Any, questions: list[Question], method: Method
) -> tuple[list[Prediction], dict[str, CacheUse]]:
    """Answers in the questions' order, and the cache by task, when a question is in it."""
    uses: defaultdict[str, CacheUse] = defaultdict(CacheUse)
    predictions = []
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(questions))
        for question in questions:
            progress.update(bar, description=question.task)
            text, use = answer(model, tokenizer, question, method)
            uses[question.task].add(use)
            ratio = getattr(method, "compression_ratio", use.plain_slots / use.slots)
            predictions.append(Prediction(question, text, 1 - 1 / ratio))
            progress.advance(bar)
    return predictions, uses


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: Question, method: Method) -> tuple[str, CacheUse]:
    """The text that follows, greedily, and the cache that it follows from.

    Raises:
        ConfigError: the model's weights are damaged.
    """
    context, asked = tokens_of(tokenizer, question)
    prompt = torch.tensor(context + asked, device=model.device)
    logits, cache = read_in_two(method, model, prompt, len(context))
    if not bool(torch.isfinite(logits).all()):
        raise ConfigError("the model's logits are not finite; its weights are damaged, convert or fetch it again")
    slots, nbytes = plain_sizes(model.config, model.dtype)
    plain = len(prompt) * slots, len(prompt) * nbytes
    held = held_by(method, model, cache, plain[0])
    use = CacheUse(1, len(prompt), held[0], plain[0], held[1], plain[1])
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    made = [int(logits[-1].argmax())]
    # kvpress looks for an end from the second token on.
    while len(made) < question.max_new_tokens and (len(made) == 1 or made[-1] not in ends):
        logits, cache = method.extend(model, torch.tensor(made[-1:], device=model.device), cache)
        made.append(int(logits[-1].argmax()))
    return str(tokenizer.decode(made, skip_special_tokens=True)), use


def _rows(predictions: list[Prediction], uses: dict[str, CacheUse], length: int) -> list[dict[str, Any]]:
    scores = string_match(predictions)
    whole = CacheUse()
    for use in uses.values():
        whole.add(use)
    parts = [*((task, score, uses[task]) for task, score in scores.items())]
    parts.append((DATASET, sum(scores.values()) / len(scores), whole))
    return [
        {
            "task": task,
            "length": length,
            "version": None,
            "num_fewshot": 0,
            "samples": use.sequences,
            "metric": "string_match",
            "filter": "none",
            "value": score,
            "stderr": None,
            "higher_is_better": True,
            **use.report(),
        }
        for task, score, use in parts
    ]
