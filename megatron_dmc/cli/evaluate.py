"""``megatron-dmc evaluate``."""

import argparse
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

from megatron_dmc.baselines.presses import OF_KVPRESS, PIECEWISE, QUANTIZED
from megatron_dmc.cli.common import logit, path
from megatron_dmc.config import ConfigError
from megatron_dmc.files import CHECKPOINT_MARK, why_no_folder, why_nothing_new

HELP = "what a Hugging Face export has kept of its base: loss, recall, cache, speed; or lm-eval's scores of a model (--tasks)"

# The flags of the ways to evaluate, by their names in the parsed options.
_OF_TEXT = ("base", "amount")
_OF_TASKS = ("length", "limit", "num_fewshot", "batch_size", "seed", "include_path", "confirm_run_unsafe_code")
# With --ruler-data of those only these.
_OF_RULER = ("length", "limit")
# Of any number here; a seed of numpy has less than 32 bits.
_MOST_DIGITS = 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=path,
        metavar="FOLDER",
        help="a plain model's Hugging Face folder, or an export of convert-to-hf; with --tasks a checkpoint, too",
    )
    parser.add_argument("--output", required=True, type=path, metavar="FILE.json", help="the report; must not exist")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--compression-ratio",
        type=logit,
        metavar="R",
        help="of an export, another than it was trained for; megatron-dmc ratios measures which it can have",
    )
    other.add_argument(
        "--merge-threshold",
        type=logit,
        metavar="T",
        help="logits: a token merges where its decision logit is above it (default: the export's, which is 0 unless it was "
        "changed)",
    )
    parser.add_argument(
        "--cache-dtype",
        choices=["int8", "fp8", "int4"],
        help="of an export: how its cache stores slots that have left the window (default: the export's; as they are, unless "
        "it was changed)",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="of a plain model: what a method that needs no training keeps of it at this --compression-ratio; with --text "
        f"beside its own report (--base), with --tasks dmc_ruler; one of {', '.join(OF_KVPRESS)}, by the library kvpress; or "
        f"{QUANTIZED}, with --bits: all of its cache, in fewer bits",
    )
    parser.add_argument(
        "--bits", type=int, choices=[8, 4, 2], help=f"of a number in the cache of --baseline {QUANTIZED}"
    )
    text = parser.add_argument_group("on held-out text")
    text.add_argument("--text", type=path, metavar="PREFIX", help="a held-out dataset of megatron-dmc preprocess")
    text.add_argument(
        "--base",
        type=path,
        metavar="FILE.json",
        help="the report of the base that the model was made from, for KL, recall and speed against it; by default the model "
        "is a base",
    )
    text.add_argument(
        "--amount",
        choices=["smoke", "brief", "compare_512", "compare", "default", "full"],
        help="how much is measured of a base, and so of what is compared with it (default, as it is by itself: about ten "
        "minutes for a model of 135 M parameters on two cores)",
    )
    tasks = parser.add_argument_group("on tasks of lm-evaluation-harness (extra [eval])")
    tasks.add_argument(
        "--tasks",
        type=_names,
        metavar="A,B",
        help="tasks and groups of lm-eval; dmc_paper: MMLU and common-sense questions as in the DMC paper; dmc_ruler: long "
        "texts that are made on this machine",
    )
    tasks.add_argument(
        "--ruler-data",
        type=path,
        metavar="FOLDER",
        help="in place of --tasks: the questions of RULER as kvpress has them (the data set simonjegou/ruler), a folder of "
        "files for each --length",
    )
    tasks.add_argument(
        "--leaderboard",
        type=path,
        metavar="FOLDER",
        help="also write the answers and scores as kvpress' leaderboard takes them, with --ruler-data or --tasks dmc_ruler",
    )
    tasks.add_argument(
        "--length", type=_lengths, metavar="N,N", help="of dmc_ruler's texts with their answers, in the model's tokens"
    )
    tasks.add_argument("--limit", type=_positive, metavar="N", help="read only the first N documents of a task")
    tasks.add_argument(
        "--num-fewshot", type=_count, metavar="N", help="solved examples before each question (default: the task's)"
    )
    tasks.add_argument("--batch-size", type=_positive, metavar="N", help="sequences that run together (default: 1)")
    tasks.add_argument("--seed", type=_count, metavar="N", help="of all random choices (default: lm-eval's)")
    tasks.add_argument(
        "--include-path",
        type=path,
        metavar="FOLDER",
        help="where more tasks' YAML files lie; Python functions that they name are run",
    )
    tasks.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        default=None,
        help="let tasks run code that the model writes; dmc_paper then includes HumanEval",
    )


def run(options: argparse.Namespace) -> None:
    """Measures a model as transformers serves it. With --text: its loss on held-out text, how well it copies, whether it
    finds what stands in texts of up to thousands of tokens, the bytes of its cache, and its speed. First the base, then what
    was made from it, with --base. In these tasks no token is generated: an answer counts where each of its tokens is the
    likeliest, as in greedy generation. The model is served in bfloat16 on a GPU and on a CPU that has instructions for it,
    else in float32; losses on a CPU are always taken in float32. With --tasks: the scores that lm-evaluation-harness gives,
    with the compression ratio and the bytes of the cache beside each. With --ruler-data: RULER's scores on its official
    texts."""
    _check_flags(options)
    output = Path(options.output)
    if os.path.lexists(output):
        raise ConfigError(f"--output {output} exists; name a new file, or remove it")
    if output.name == CHECKPOINT_MARK:
        raise ConfigError(f"--output {output}: its folder would count as a checkpoint; give the file another name")
    if (problem := why_nothing_new(output)) is not None:
        raise ConfigError(f"--output {output} cannot be written: {problem}; name another file")
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(options.folder)):
        raise ConfigError(
            f"--output {output} lies in {options.folder}, and would count as a part of the model; name a file elsewhere"
        )
    if options.tasks is not None or options.ruler_data is not None:
        _run_tasks(options, output)
        return
    from megatron_dmc.evaluation.exported.evaluate import evaluate_exported
    from megatron_dmc.evaluation.exported.words import told

    baseline = _baseline(options)
    report = evaluate_exported(
        options.folder,
        options.text,
        base=options.base,
        amount=options.amount,
        merge_threshold=_threshold(options) if baseline is None else None,
        cache_dtype=options.cache_dtype,
        method=baseline,
    )
    try:
        _write(output, report)
    finally:
        # Also where the disk is full by now.
        print(told(report), flush=True)
    print(f"{output}: evaluated {options.folder}")


def _check_flags(options: argparse.Namespace) -> None:
    """Raises ConfigError unless the flags are those of one of the three ways."""
    given = [name for name in ("text", "tasks", "ruler_data") if getattr(options, name) is not None]
    if not given:
        raise ConfigError(
            "nothing to evaluate on: give --text PREFIX, a held-out dataset, or --tasks, such as dmc_ruler"
        )
    if len(given) > 1:
        raise ConfigError(
            f"{_flag(given[0])} and {_flag(given[1])} are two evaluations; run one after the other, each with an --output "
            "of its own"
        )
    if options.baseline is not None:
        _check_baseline(options)
    elif options.bits is not None:
        raise ConfigError(f"--bits has no effect without --baseline {QUANTIZED}; leave it out")
    others = {
        "text": ("leaderboard", *_OF_TASKS),
        "tasks": _OF_TEXT,
        "ruler_data": (*_OF_TEXT, *(name for name in _OF_TASKS if name not in _OF_RULER)),
    }
    for name in others[given[0]]:
        if getattr(options, name) is not None:
            raise ConfigError(f"{_flag(name)} has no effect with {_flag(given[0])}; leave it out")
    if options.ruler_data is not None and options.length is None:
        raise ConfigError("--ruler-data has a folder for each length of its texts; add --length 4096, for example")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_baseline(options: argparse.Namespace) -> None:
    others = ("compression_ratio", "merge_threshold") if options.baseline == QUANTIZED else ("bits",)
    for name in others:
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect with --baseline {options.baseline}; leave it out"
            )
    if options.baseline == QUANTIZED and options.bits is None:
        raise ConfigError(f"--baseline {QUANTIZED} needs the bits of a number; add --bits 4, for example")
    if options.baseline != QUANTIZED and (options.compression_ratio is None or options.compression_ratio <= 1):
        raise ConfigError("--baseline needs a ratio to compress to; add --compression-ratio 4, for example")
    if options.text is not None and options.base is None:
        raise ConfigError(
            "--baseline is measured beside the model's own report; evaluate the model without it first, and name that report "
            "with --base"
        )


def _baseline(options: argparse.Namespace) -> Any:
    """What keeps the model's cache; None: the model itself."""
    if options.baseline is None:
        return None
    if options.baseline == QUANTIZED:
        from megatron_dmc.baselines.quantized import Quantized

        return Quantized(options.bits)
    if options.baseline in PIECEWISE:
        from megatron_dmc.baselines.piecewise import PiecewisePress

        return PiecewisePress(options.compression_ratio, options.baseline)
    from megatron_dmc.baselines.press import Press

    return Press(options.compression_ratio, options.baseline)


def _run_tasks(options: argparse.Namespace, output: Path) -> None:
    # Only looked for: its import takes seconds.
    missing = [name for name in ("lm_eval", "accelerate", "wonderwords") if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise ConfigError(f"--tasks needs {' and '.join(missing)}; run pip install {packages}")
    if options.include_path is not None and (problem := why_no_folder(Path(options.include_path))) is not None:
        raise ConfigError(f"--include-path {options.include_path} {problem}; name a folder with lm-eval's YAML files")
    warnings.simplefilter("ignore")
    try:
        from megatron_dmc.evaluation.harness.leaderboard import check_leaderboard
        from megatron_dmc.evaluation.harness.rows import print_rows
        from megatron_dmc.evaluation.harness.ruler import RulerRequest, evaluate_ruler
        from megatron_dmc.evaluation.harness.run import TaskRequest, evaluate_tasks
    except ImportError as error:
        raise ConfigError(f"--tasks: lm_eval cannot be imported ({error}); install it again") from None

    if options.leaderboard is not None:
        check_leaderboard(options.leaderboard)
    shared: dict[str, Any] = {
        "lengths": options.length or (),
        "limit": options.limit,
        "merge_threshold": _threshold(options) if options.baseline is None else None,
        "cache_dtype": options.cache_dtype,
        "baseline": _baseline(options),
        "leaderboard": options.leaderboard,
    }
    if options.ruler_data is not None:
        report = evaluate_ruler(options.folder, RulerRequest(options.ruler_data, **shared))
    else:
        request = TaskRequest(
            tasks=options.tasks,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size or 1,
            seed=options.seed,
            include=options.include_path,
            runs_code=bool(options.confirm_run_unsafe_code),
            **shared,
        )
        report = evaluate_tasks(options.folder, request)
    try:
        _write(output, report)
    finally:
        print_rows(report)
    for place in report.get("leaderboard", ()):
        print(f"{place}: answers and scores for kvpress' leaderboard")
    print(f"{output}: evaluated {options.folder}")


def _threshold(options: argparse.Namespace) -> float | None:
    """The merge threshold that is asked for; None: the model's own."""
    from megatron_dmc.evaluation.exported.ratios import chosen_threshold

    return chosen_threshold(options.folder, options.compression_ratio, options.merge_threshold)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("names no task; give some, such as dmc_ruler or hellaswag,piqa")
    return names


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(each) for each in text.split(",")))


def _positive(text: str) -> int:
    if (number := _count(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return number


def _count(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > _MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _write(output: Path, report: dict[str, Any]) -> None:
    """The whole file or none; raises ConfigError where another process has written one since this one began."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if os.path.lexists(output):
            raise ConfigError(f"--output {output} has been written by another process meanwhile; name a new file")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
