"""Documents that are too short for a target compression ratio."""

import numpy
import pytest
import torch

from megatron_dmc.data import check_reach
from megatron_dmc.data.reach import highest_ratio
from megatron_dmc.errors import or_aim_below
from megatron_dmc.model.compression_loss import takes_effect
from megatron_dmc.recipe import recipe_from_dict
from tests.support.texts import fails
from tests.support.toy import recipe_values, write_text


@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_highest_ratio_is_that_of_all_decisions_in_effect(window):
    lengths = numpy.random.default_rng(0).integers(1, 70, 50).astype(numpy.int32)
    merged = 0
    for length in lengths:
        for begin in range(0, length, 16):
            positions = torch.arange(min(16, length - begin))
            merged += int(takes_effect(positions, positions.flip(0), window).sum())
    assert highest_ratio(lengths, 16, window) == pytest.approx(lengths.sum() / (lengths.sum() - merged), rel=1e-12)


def test_a_target_that_documents_cannot_reach_is_refused(tmp_path):
    write_text(tmp_path)
    values = recipe_values(tmp_path, tmp_path / "run", [{"kind": "compress", "steps": 1, "lr": 1e-3}], local_window=8)
    values["dmc"]["target_compression_ratio"] = 3.6
    check_reach(recipe_from_dict(values))
    values["data"]["reset_at_documents"] = True
    check_reach(recipe_from_dict(values | {"dmc": values["dmc"] | {"local_window": 0}}))
    fails("target_compression_ratio 3.6 is out of reach: .* aim well below", check_reach, recipe_from_dict(values))
    assert or_aim_below(7.5294) == ", or aim below 7.529"
    # There is no such ratio.
    assert or_aim_below(1.0) == or_aim_below(0.99) == ""
