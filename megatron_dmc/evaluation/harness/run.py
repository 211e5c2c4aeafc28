"""``megatron-dmc evaluate --tasks``: checks all that can be checked, loads the model once, runs lm-eval."""

import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
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
from megatron_dmc.evaluation.harness.datasets import DEFAULT_SAMPLES
from megatron_dmc.evaluation.harness.observed import ObservedLM
from megatron_dmc.evaluation.harness.rows import rows_of
from megatron_dmc.evaluation.harness.source import Source, open_source
from megatron_dmc.evaluation.harness.tasks_by_name import (
    HUMAN_EVAL,
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
        merge_threshold: of a model that merges, in place of its own.
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


def evaluate_tasks(folder: str, request: TaskRequest) -> dict[str, Any]:
    """Scores of a Hugging Face folder's model, or a checkpoint's, with its cache beside each.

    Returns:
        plain values: ``model``, ``lm_eval`` (its version), ``settings``, and ``results``, see :func:`rows_of`.

    Raises:
        ConfigError: the model, a task or a length cannot be taken. Nothing is converted or loaded by then.
    """
    _be_quiet()
    source = open_source(Path(folder))
    _check_lengths(source, request)
    _check_tokenizer(source)
    if request.runs_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    jobs = list(_jobs(source, request))
    _check_examples(jobs, request)
    results: list[dict[str, Any]] = []
    with source.as_hugging_face() as exported:
        model = _model(exported, request)
        for length, tasks in jobs:
            model.uses.clear()
            results += rows_of(_run(model, tasks, request), model.uses, length)
    settings = {name: value for name, value in vars(request).items() if name != "include"}
    return {"model": folder, "lm_eval": version("lm_eval"), "settings": settings, "results": results}


def _jobs(source: Source, request: TaskRequest) -> Iterator[tuple[int | None, list[Any]]]:
    """A length, None for tasks that have none, and the tasks that run at it, loaded."""
    metadata = {"pretrained": str(source.tokenizer)}
    seed = DEFAULT_RANDOM_SEED if request.seed is None else request.seed
    known = long_text_tasks()
    others = [name for name in request.tasks if name not in known]
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


def _check_lengths(source: Source, request: TaskRequest) -> None:
    for length in request.lengths:
        if source.positions is not None and length > source.positions:
            raise ConfigError(
                f"--length {length}: {source.folder} reads at most {source.positions} tokens at once; ask for that or less"
            )


def _check_tokenizer(source: Source) -> None:
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
        )
    # transformers raises whatever it happens to meet.
    except Exception as error:
        raise ConfigError(
            f"{source.folder} cannot be loaded: {in_one_line(error)}; convert or fetch it again"
        ) from None
    if request.merge_threshold is not None:
        model.model.config.merge_threshold = request.merge_threshold
    return model


def _run(model: ObservedLM, tasks: list[Any], request: TaskRequest) -> dict[str, Any]:
    """lm-eval's results. What simple_evaluate() does beside this is to describe the machine, which takes it seconds."""
    first, others = (DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED) if request.seed is None else (request.seed, request.seed)
    random.seed(first)
    numpy.random.seed(others)
    torch.manual_seed(others)
    loaded = TaskManager(include_defaults=False).load(tasks)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        # A task that is made for no examples gets none.
        task.set_config("num_fewshot", own or 0 if request.num_fewshot is None or own == 0 else request.num_fewshot)
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
