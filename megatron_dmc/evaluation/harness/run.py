"""``megatron-dmc evaluate --tasks``: checks all that can be checked, loads the model once, runs lm-eval."""

import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy
import torch
import transformers
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from megatron_dmc.config import ConfigError
from megatron_dmc.errors import in_one_line
from megatron_dmc.evaluation.exported.method import Method
from megatron_dmc.evaluation.harness.datasets import DEFAULT_SAMPLES
from megatron_dmc.evaluation.harness.leaderboard import Prediction, Submission, model_name, press_name
from megatron_dmc.evaluation.harness.long_texts import LONG_TEXTS
from megatron_dmc.evaluation.harness.observed import ObservedLM
from megatron_dmc.evaluation.harness.rows import rows_of
from megatron_dmc.evaluation.harness.ruler_data import Question
from megatron_dmc.evaluation.harness.source import Source, open_source
from megatron_dmc.evaluation.harness.tasks_by_name import (
    HUMAN_EVAL,
    LONG_TEXT_GROUP,
    PAPER,
    check_names,
    leaves,
    load,
    long_text_manager,
    long_text_tasks,
    task_manager,
)
from megatron_dmc.hf.families import register


@dataclass(frozen=True)
class TaskRequest:
    """What is asked for; None of the numbers: lm-eval's own choice, as its command takes it.

    Attributes:
        tasks: names of tasks, groups and tags.
        lengths: of the long-context tasks, tokens of a prompt and its answer.
        limit: documents of each task.
        include: a folder of more tasks.
        runs_code: whether code that the model writes may run.
        merge_threshold, cache_dtype: of a model that merges, in place of its own.
        baseline: how a plain model keeps a context, before its question is read; None: the model as it is.
        leaderboard: where results of the long-context tasks are written in kvpress' form; None: nowhere.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    seed: int | None = None
    include: str | None = None
    runs_code: bool = False
    merge_threshold: float | None = None
    cache_dtype: str | None = None
    baseline: Method | None = None
    leaderboard: str | None = None


def evaluate_tasks(folder: str, request: TaskRequest) -> dict[str, Any]:
    """Scores of a Hugging Face folder's model, or a checkpoint's, with its cache beside each.

    Returns:
        plain values: ``model``, ``lm_eval`` (its version), ``settings``, and ``results``, see :func:`rows_of`.

    Raises:
        ConfigError: the model, a task or a length cannot be taken. Nothing is converted or loaded by then.
    """
    _be_quiet()
    source = open_source(Path(folder))
    source.check_cache_dtype(request.cache_dtype)
    check_lengths(source, request.lengths)
    check_tokenizer(source)
    if request.runs_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    jobs = list(_jobs(source, request))
    _check_examples(jobs, request)
    if request.baseline is not None:
        _check_baseline(source, [task for _, tasks in jobs for item in tasks for task in leaves(item)], request)
    results: list[dict[str, Any]] = []
    written = []
    with source.as_hugging_face() as exported:
        model = _model(exported, request)
        for length, tasks in jobs:
            model.uses.clear()
            model.answers.clear()
            results += rows_of(_run(model, tasks, request), model.uses, length)
            if request.leaderboard is not None and length is not None:
                submission = _submission(folder, model, tasks, length, request)
                written.append(str(submission.write(Path(request.leaderboard))))
    left_out = ("include", "baseline", "leaderboard")
    settings = {name: value for name, value in vars(request).items() if name not in left_out}
    if is_dataclass(request.baseline):
        settings["baseline"] = asdict(request.baseline)
    beside = {} if request.leaderboard is None else {"leaderboard": written}
    return {"model": folder, "lm_eval": version("lm_eval"), "settings": settings, "results": results, **beside}


def _submission(folder: str, model: ObservedLM, tasks: list[Any], length: int, request: TaskRequest) -> Submission:
    """Of the long-context tasks at one length. They are not the official texts, and their data set is not called so."""
    predictions = []
    for task in (task for item in tasks for task in leaves(item)):
        ratio = getattr(
            request.baseline, "compression_ratio", model.uses[task.task_name].report().get("compression_ratio", 1.0)
        )
        for doc, text in model.answers[task.task_name]:
            asked = doc["input"].removeprefix(doc["context"])
            new_tokens = LONG_TEXTS[task.task_name].new_tokens
            question = Question(doc["context"], asked, doc["gen_prefix"], doc["outputs"], task.task_name, new_tokens)
            predictions.append(Prediction(question, text, 1 - 1 / ratio))
    return Submission(
        dataset=LONG_TEXT_GROUP,
        length=length,
        model=model_name(folder),
        press=press_name(getattr(request.baseline, "name", None), hasattr(model.config, "dmc")),
        fraction=1,
        dtype=str(model.model.dtype).removeprefix("torch."),
        predictions=predictions,
    )


def _jobs(source: Source, request: TaskRequest) -> Iterator[tuple[int | None, list[Any]]]:
    """A length, None for tasks that have none, and the tasks that run at it, loaded."""
    metadata = {"pretrained": str(source.tokenizer)}
    seed = DEFAULT_RANDOM_SEED if request.seed is None else request.seed
    known = long_text_tasks()
    others = [name for name in request.tasks if name not in known]
    if request.leaderboard is not None and others:
        raise ConfigError(f"--leaderboard takes the tasks of {LONG_TEXT_GROUP} only; leave {', '.join(others)} out")
    if PAPER in others and request.runs_code and HUMAN_EVAL not in others:
        others.append(HUMAN_EVAL)
    if others:
        manager = task_manager(others, metadata, request.include)
        check_names(manager, others)
    long_texts = [name for name in request.tasks if name in known]
    if long_texts and not request.lengths:
        raise ConfigError(
            f"--tasks {long_texts[0]} reads texts of a length that you choose; add --length 4096, for example"
        )
    if request.lengths and not long_texts:
        raise ConfigError(f"--length has no effect on {', '.join(others)}; leave it out, or add dmc_ruler to --tasks")
    for length in request.lengths:
        texts = {"max_seq_lengths": [length], "num_samples": request.limit or DEFAULT_SAMPLES, "seed": seed}
        yield length, load(long_text_manager(metadata | texts), long_texts, seed=seed, runs_code=request.runs_code)
    if others:
        yield None, load(manager, others, seed=seed, runs_code=request.runs_code)


def _check_examples(jobs: list[tuple[int | None, list[Any]]], request: TaskRequest) -> None:
    for task in (task for _, tasks in jobs for item in tasks for task in leaves(item)):
        if not request.num_fewshot or task.get_config("num_fewshot") == 0:
            continue
        if (count := len(list(task.fewshot_docs()))) < request.num_fewshot:
            raise ConfigError(
                f"--num-fewshot {request.num_fewshot}: {task.task_name} has {count} examples; ask for fewer, or leave it out"
            )


def _check_baseline(source: Source, tasks: list[Any], request: TaskRequest) -> None:
    """Raises ConfigError unless every prompt begins with a context that can be compressed before the rest is known."""
    assert request.baseline is not None
    if request.batch_size > 1:
        raise ConfigError(f"--batch-size {request.batch_size}: a baseline takes one text at a time; leave it out")
    contexts = []
    for task in tasks:
        found = list(islice(task.eval_docs, request.limit))
        known = [doc["context"] for doc in found if _begins_with_context(task, doc)]
        if task.OUTPUT_TYPE != "generate_until" or _examples(task, request) or len(known) < len(found) or not known:
            raise ConfigError(
                f"--baseline: {task.task_name} does not say where its question begins, so no context can be compressed "
                "before it; leave the task out, or take dmc_ruler"
            )
        if (task.get_config("generation_kwargs") or {}).get("do_sample"):
            raise ConfigError(f"--baseline: {task.task_name} draws its answers at random; leave the task out")
        contexts.append(min(known, key=len))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=False)
    request.baseline.check(str(source.folder), min(len(tokenizer(each).input_ids) for each in contexts))


def _begins_with_context(task: Any, doc: dict[str, Any]) -> bool:
    context = doc.get("context")
    return isinstance(context, str) and context != "" and task.fewshot_context(doc, 0).startswith(context)


def _examples(task: Any, request: TaskRequest) -> int:
    """Before each question. A task that is made for none gets none."""
    own = task.get_config("num_fewshot")
    return own or 0 if request.num_fewshot is None or own == 0 else request.num_fewshot


def check_lengths(source: Source, lengths: Sequence[int]) -> None:
    """Raises ConfigError for more tokens than the model reads at once."""
    for length in lengths:
        if source.positions is not None and length > source.positions:
            raise ConfigError(
                f"--length {length}: {source.folder} reads at most {source.positions} tokens at once; ask for that or less"
            )


def check_tokenizer(source: Source) -> None:
    """Raises ConfigError for a tokenizer that cannot be read, or is another model's."""
    try:
        count = len(transformers.AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=False))
    # transformers raises whatever it happens to meet.
    except Exception as error:
        reason = in_one_line(error)
        raise ConfigError(f"{source.tokenizer} holds no tokenizer that can be read: {reason}; save it again") from None
    if source.vocabulary is not None and count > source.vocabulary:
        raise ConfigError(
            f"{source.folder} has {source.vocabulary} tokens, its tokenizer {count}; put the model's own tokenizer there"
        )


def _model(source: Source, request: TaskRequest) -> ObservedLM:
    """An export by this package's classes: no code of the folder is run.

    Raises:
        ConfigError: transformers cannot load it.
    """
    register()
    try:
        # The device that lm-eval's command takes: the first GPU, or else the CPU.
        model = ObservedLM(
            str(source.folder),
            device="cuda:0",
            batch_size=request.batch_size,
            backend="causal",
            trust_remote_code=False,
            baseline=request.baseline,
        )
    # transformers raises whatever it happens to meet.
    except Exception as error:
        raise ConfigError(
            f"{source.folder} cannot be loaded: {in_one_line(error)}; convert or fetch it again"
        ) from None
    if request.merge_threshold is not None:
        model.model.config.merge_threshold = request.merge_threshold
    if request.cache_dtype is not None:
        model.model.config.cache_dtype = request.cache_dtype
    return model


def _run(model: ObservedLM, tasks: list[Any], request: TaskRequest) -> dict[str, Any]:
    """lm-eval's results. What simple_evaluate() does beside this is to describe the machine, which takes it seconds."""
    first, others = (DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED) if request.seed is None else (request.seed, request.seed)
    random.seed(first)
    numpy.random.seed(others)
    torch.manual_seed(others)
    loaded = TaskManager(include_defaults=False).load(tasks)
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", _examples(task, request))
        task.set_fewshot_seed(others)
    return lm_eval.evaluate(
        lm=model,
        task_dict=loaded,
        limit=request.limit,
        log_samples=False,
        confirm_run_unsafe_code=request.runs_code,
    )


def _be_quiet() -> None:
    """Leaves what lm-eval says of texts that it cuts, and its progress bars."""
    # It would fork this process, with its threads and its GPU, to resample scores; one process gives the same numbers.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
