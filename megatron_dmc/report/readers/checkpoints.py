"""The folder of any run of ``megatron-dmc retrofit``, or its folder of checkpoints."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.files import checkpoint_below, checkpoints_in
from megatron_dmc.report.curves import event_folders
from megatron_dmc.report.readers.values import facts
from megatron_dmc.report.run import Row, Run

_SIZES = ("family", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")


def folder_of_checkpoints(run: Path) -> Path | None:
    """Of a run: itself, or ``checkpoints`` in it. None: there is no checkpoint in either."""
    return next((each for each in (run, run / "checkpoints") if checkpoints_in(each)), None)


def read(run: Path, folder: Path) -> Run:
    """Of the checkpoints in ``folder``. Raises ConfigError where none can be read."""
    # They import torch.
    from megatron_dmc.checkpoint.folder import read_info
    from megatron_dmc.evaluation.inspect import checkpoints_below
    from megatron_dmc.recipe import recipe_from_dict

    whole = [row for row in checkpoints_below(folder) if "damaged" not in row]
    if not whole:
        raise ConfigError(f"{folder}: no checkpoint there can be read; megatron-dmc inspect {folder} says why")
    newest = checkpoint_below(folder)
    assert newest is not None
    recipe = recipe_from_dict(read_info(folder / whole[-1]["name"]).recipe)
    # The folders that a run and its folder of checkpoints keep curves in, and where the recipe says that they are.
    around = run.absolute().parent
    places = [run / "tensorboard", around / "tensorboard", around.parent / "tensorboard" / run.absolute().name]
    places += [Path(recipe.monitor.tensorboard)] if recipe.monitor.tensorboard is not None else []
    return Run(
        run,
        "a run of megatron-dmc retrofit",
        rows=[_row(row) for row in whole],
        facts=facts(asdict(recipe.model), *_SIZES),
        curves=next((found for place in places if (found := event_folders(place))), {}),
        training=["megatron-dmc retrofit RECIPE"],
        models=[newest],
        text=[run / "data" / "valid", *map(Path, recipe.data.valid)],
    )


def _row(values: dict[str, Any]) -> Row:
    target = values["target_at_step"]
    return Row(
        values["name"],
        "dmc" if target is not None else "base",
        "DMC" if target is not None else "base",
        values["compression_ratio"],
        target=target,
        step=values["step"],
    )
