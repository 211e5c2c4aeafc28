"""A checkpoint of Megatron-LM, such as the paper's authors have released -> a checkpoint of this project."""

import functools
import itertools
import logging
import re
from pathlib import Path

import torch
from torch import Tensor

from megatron_dmc.checkpoint import copy_tokenizer
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.folders import check_companions, check_output, keep_special_tokens, new_folder, special_tokens
from megatron_dmc.convert.from_hf import warn_without_tokenizer
from megatron_dmc.convert.hf_config import check_exportable
from megatron_dmc.convert.megatron_arguments import differences, parse_arguments
from megatron_dmc.convert.megatron_file import FILE, MegatronFile
from megatron_dmc.convert.megatron_names import is_weight, join, shape_of_rank, spellings
from megatron_dmc.convert.progress import Written
from megatron_dmc.convert.rows import Row
from megatron_dmc.convert.safetensors_file import is_finite
from megatron_dmc.convert.single_process import shapes_only, single_process
from megatron_dmc.convert.to_checkpoint import check_multiple, write_model
from megatron_dmc.data.tokenizer import check_own_vocabulary, load_tokenizer
from megatron_dmc.errors import first_names
from megatron_dmc.files import CHECKPOINT_MARK, why_no_folder
from megatron_dmc.recipe import check_head_dim

logger = logging.getLogger(__name__)

_LATEST = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d{2,3})(_\d{3})?(_\d{3})?")
# Characters of the file that names an iteration.
_MOST_READ = 100


def import_megatron(
    folder: str | Path, output: str | Path, *, tokenizer: str | Path | None = None, pad_vocab_to_multiple_of: int = 1
) -> Written:
    """Writes a weights-only checkpoint; a model that was trained with the authors' code keeps its decisions.

    Tensor-parallel ranks are joined, pipeline stages are refused. Nothing but tensors and plain values is unpickled. Weights
    pass one after the other: the largest needs memory twice.

    Args:
        folder: with ``mp_rank_00/model_optim_rng.pt``, or with ``iter_*`` folders of which the latest is taken.
        output: must not exist, or be empty. It appears when it is whole.
        tokenizer: a Hugging Face folder with the model's tokenizer, which Megatron-LM does not keep; None: without.
        pad_vocab_to_multiple_of: as :func:`import_hf`'s.

    Raises:
        ConfigError: the folder is incomplete or damaged, its files hold more than a checkpoint needs, or its model is not one
            that this package can represent.
        CheckpointError: the checkpoint cannot be written.
    """
    folder, output = Path(folder), Path(output)
    check_output(output, folder, *([] if tokenizer is None else [Path(tokenizer)]))
    check_multiple(pad_vocab_to_multiple_of)
    files = [MegatronFile(path) for path in _files(folder)]
    first = files[0]
    try:
        model, dmc = parse_arguments(first.arguments)
        check_head_dim(model, dmc)
        check_exportable(model)
        ranks = first.arguments.get("tensor_model_parallel_size", 1)
        if type(ranks) is not int or ranks != len(files):
            raise ConfigError(
                f"tensor_model_parallel_size is {ranks!r:.40}, and there are {len(files)} mp_rank folders; fetch the "
                "checkpoint again"
            )
    except ConfigError as error:
        raise ConfigError(f"{first.path}: {error}") from None
    for file in files[1:]:
        _check_same_run(file, first)
    _check_order(files)
    weights = [t for file in files for name, t in file.tensors.items() if is_weight(name)]
    dtypes = {t.dtype for t in weights if _is_supported(t.dtype)}
    dtype = functools.reduce(torch.promote_types, sorted(dtypes, key=str)) if dtypes else torch.float32
    source = None if tokenizer is None else Path(tokenizer)
    tokens = {}
    if source is not None:
        check_companions(source)
        check_own_vocabulary(load_tokenizer(source), model.vocab_size)
        tokens = special_tokens(source, model.vocab_size)

    with single_process():
        shapes = {name: tuple(p.shape) for name, p in shapes_only(model, dmc, dtype).named_parameters()}
        names = [_names(file, shapes, len(files)) for file in files]

        def parameter(row: Row) -> Tensor:
            parts = [file.read(name[row.megatron]) for file, name in zip(files, names, strict=True)]
            whole = join(row.megatron, parts)
            if whole is not None and whole.shape != parts[0].shape and parts[0].dim() > 1 and _repeats(parts):
                raise ConfigError(
                    f"{folder}: two ranks hold the same part of {row.megatron}; fetch the checkpoint again"
                )
            if whole is None:
                raise ConfigError(f"{folder}: the ranks hold different {row.megatron}; fetch the checkpoint again")
            if not is_finite(whole):
                raise ConfigError(f"{folder}: {row.megatron} is not finite everywhere; it is damaged, fetch it again")
            return whole

        with new_folder(output) as temporary:
            written = write_model(
                temporary,
                parameter,
                model,
                dmc,
                dtype=dtype,
                pad_vocab_to_multiple_of=pad_vocab_to_multiple_of,
            )
            if source is not None:
                copy_tokenizer(source, temporary / "tokenizer")
                keep_special_tokens(temporary / "tokenizer", tokens, model.vocab_size)
    if source is None:
        logger.warning(
            "warning: there is no tokenizer (--tokenizer HF_FOLDER copies one): inspect and generate do not work with %s "
            "until one is saved in %s",
            *(output, output / "tokenizer"),
        )
    else:
        warn_without_tokenizer(source, output)
    return written


def _names(file: MegatronFile, shapes: dict[str, tuple[int, ...]], ranks: int) -> dict[str, str]:
    """Of our parameters in a file; raises ConfigError unless they are there, in their shapes, and nothing else is."""
    unused = {name: tensor for name, tensor in file.tensors.items() if is_weight(name)}
    found, missing = {}, []
    for name, shape in shapes.items():
        spelled = next((other for other in spellings(name) if other in unused), None)
        if spelled is None:
            missing.append(name)
            continue
        tensor, expected = unused.pop(spelled), shape_of_rank(name, shape, ranks)
        if tuple(tensor.shape) != expected:
            raise ConfigError(
                f"{file.path}: {spelled} has shape {list(tensor.shape)}, its args ask for {list(expected)}; fetch it again"
            )
        if not _is_supported(tensor.dtype):
            raise ConfigError(f"{file.path}: {spelled} is {tensor.dtype}; only floating-point weights are supported")
        found[name] = spelled
    if missing:
        raise ConfigError(f"{file.path}: missing from the weights: {first_names(missing)}; fetch it again")
    if unused:
        raise ConfigError(
            f"{file.path}: in the weights, but not in the model: {first_names(sorted(unused))}; this model is not supported"
        )
    return found


def _is_supported(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _check_same_run(file: MegatronFile, first: MegatronFile) -> None:
    """Raises ConfigError for a file of another checkpoint than the first."""
    wrong = differences(first.arguments, file.arguments)
    if file.iteration != first.iteration:
        wrong.append("iteration")
    if wrong:
        raise ConfigError(f"{file.path} and {first.path} differ in {wrong[0]}; fetch the checkpoint again")


def _check_order(files: list[MegatronFile]) -> None:
    """Raises ConfigError for files in other folders than their ranks' own. (Megatron-LM's converter saves all as rank 0.)"""
    given = [file.arguments.get("rank") for file in files]
    saved_by = [rank for rank in given if type(rank) is int]
    places = [rank % len(files) for rank in saved_by]
    if len(set(places)) == len(files) and places != sorted(places):
        raise ConfigError(f"{files[0].path} was saved by rank {saved_by[0]}; fetch the checkpoint again")


def _repeats(parts: list[Tensor]) -> bool:
    return any(torch.equal(a, b) and bool(a.any()) for a, b in itertools.combinations(parts, 2))


def _files(folder: Path) -> list[Path]:
    """The file of every tensor-parallel rank, in their order."""
    folder = _iteration(folder)
    ranks = sorted(path.name for path in folder.iterdir() if _RANK.fullmatch(path.name))
    if staged := next((name for name in ranks if name.count("_") > 2), None):
        raise ConfigError(
            f"{folder / staged}: pipeline stages and experts are not joined; save the checkpoint with "
            "--pipeline-model-parallel-size 1, with Megatron-LM's own converter"
        )
    if ranks != [f"mp_rank_{i:02}" for i in range(len(ranks))]:
        raise ConfigError(f"{folder} holds {first_names(ranks)}, and others are missing; fetch the checkpoint again")
    return [folder / name / FILE for name in ranks]


def _iteration(folder: Path) -> Path:
    """The folder with the ranks: this one, or the iteration that it names as its latest."""
    if (problem := why_no_folder(folder)) is not None:
        raise ConfigError(f"{folder} {problem}; name the folder of a Megatron-LM checkpoint")
    if (folder / CHECKPOINT_MARK).exists():
        raise ConfigError(f"{folder} is a checkpoint of megatron_dmc already; use it as it is")
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder} is a Hugging Face folder; convert it with megatron-dmc convert-from-hf")
    iterations = sorted(path for path in folder.iterdir() if re.fullmatch(r"iter_\d{7}|release", path.name))
    if any(_RANK.fullmatch(path.name) for path in folder.iterdir()):
        if iterations:
            raise ConfigError(
                f"{folder} holds weights of its own and {iterations[0].name}; name {iterations[0]}, or move it elsewhere"
            )
        return folder
    if (folder / _LATEST).is_file():
        with (folder / _LATEST).open(encoding="utf-8", errors="replace") as file:
            named = file.read(_MOST_READ).strip()
        name = f"iter_{int(named):07}" if re.fullmatch(r"\d{1,7}", named, re.ASCII) else named
        chosen = next((path for path in iterations if path.name == name), None)
        if chosen is None:
            raise ConfigError(
                f"{folder / _LATEST} names {named[:40]!r}, which is not there; name the folder of an iteration"
            )
    elif len(iterations) > 1:
        listed = first_names([path.name for path in iterations])
        raise ConfigError(f"{folder} holds several iterations ({listed}) and no {_LATEST}; name one of them")
    else:
        chosen = iterations[0] if iterations else folder
    if any(_RANK.fullmatch(path.name) for path in chosen.iterdir()):
        return chosen
    if (chosen / ".metadata").exists():
        raise ConfigError(
            f"{chosen} is a distributed checkpoint (torch_dist), which is not read; save it with --ckpt-format torch"
        )
    raise ConfigError(f"{chosen} holds no mp_rank_00/{FILE}; name the folder of a Megatron-LM checkpoint")
