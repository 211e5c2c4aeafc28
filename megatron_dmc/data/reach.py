"""How far documents that stand alone can be compressed: of each, a local window stays as it is."""

import numpy

from megatron_dmc.config import ConfigError
from megatron_dmc.data.indexed_dataset import read_index
from megatron_dmc.errors import or_aim_below
from megatron_dmc.recipe import Recipe


def check_reach(recipe: Recipe) -> None:
    """Raises ConfigError where the training's documents are too short for the target.

    Its loss would press every decision towards merging to the end of the run.
    """
    data, dmc = recipe.data, recipe.dmc
    if not (recipe.merges and data.reset_at_documents):
        return
    lengths = numpy.concatenate([read_index(prefix).document_lengths for prefix in data.train])
    highest = highest_ratio(lengths, data.sequence_length, dmc.local_window)
    if dmc.target_compression_ratio >= highest:
        raise ConfigError(
            f"dmc.target_compression_ratio {dmc.target_compression_ratio:g} is out of reach: under data.reset_at_documents a "
            f"document keeps its first token and its last {dmc.local_window} (dmc.local_window), and those of data.train have "
            f"{lengths.mean():.0f} tokens in the mean; shorten the window{or_aim_below(highest, ', aim well below')}, or "
            "set data.reset_at_documents to false"
        )


def highest_ratio(lengths: numpy.ndarray, sequence_length: int, local_window: int) -> float:
    """Tokens per cache slot if all that may merge does; a little too much, because samples cut documents anywhere.

    Args:
        lengths: int [documents], tokens of each.
        sequence_length: tokens of a sample.
        local_window: see DMCConfig.
    """
    whole, rest = numpy.divmod(lengths.astype(numpy.int64), sequence_length)
    # The first token never merges, the last window stays raw.
    least = local_window + 1
    entries = whole.sum() * min(least, sequence_length) + numpy.minimum(rest, least).sum()
    return float(lengths.sum(dtype=numpy.int64) / entries)
