"""Another ratio than the trained one, by request and while the pool is short. (Equal outputs: test_equality.py.)"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import engine, params
from tests.support.served import Served, served_model

CURVE = {"tokens": 100, "ratios": [1.5, 3.0, 6.0], "thresholds": [2.0, 0.5, -1.0]}
UNDER_LOAD = {"free_share": 0.5, "compression_ratio": 6.0}


def thresholds(under_load: Any = None, curve: Any = CURVE, own: float = 0.0) -> Any:
    from types import SimpleNamespace

    from megatron_dmc.serving.ratios import Thresholds

    config = SimpleNamespace(compression_curve=curve, merge_threshold=own)
    return Thresholds.of(config, {} if under_load is None else {"dmc_under_load": under_load})


def test_workers_are_told_of_what_is_new() -> None:
    found = thresholds(own=0.25)
    found.begin("a", None)
    found.begin("b", {"compression_ratio": 3})
    assert found.step({"a": 7, "b": 9}, {"a", "b"}, 10, 20) == {7: 0.25, 9: 0.5}
    assert found.step({"a": 7, "b": 9}, set(), 10, 20) == {}
    # b was preempted, and begins anew in other blocks.
    assert found.step({"a": 7, "b": 5}, {"b"}, 10, 20) == {5: 0.5}
    found.end(["b"])
    # Somebody else of that name asks for nothing.
    found.begin("b", {"something": "else"})
    assert found.step({"b": 5}, {"b"}, 10, 20) == {5: 0.25}


def test_while_the_pool_is_short_those_who_ask_for_nothing_are_compressed_harder() -> None:
    found = thresholds(UNDER_LOAD, own=1.0)
    found.begin("a", None)
    found.begin("b", {"merge_threshold": 2.0})
    firsts = {"a": 7, "b": 9}
    assert found.step(firsts, set(firsts), 100, 100) == {7: 1.0, 9: 2.0}
    assert found.step(firsts, set(), 50, 100) == {}
    assert found.step(firsts, set(), 25, 100) == {7: 0.0}
    assert found.step(firsts, set(), 0, 100) == {7: -1.0}
    assert found.step(firsts, set(), 1, 1000) == {}  # one of a few levels
    assert found.step(firsts, set(), 90, 100) == {7: 1.0}


def test_load_never_compresses_less() -> None:
    found = thresholds({"free_share": 1, "compression_ratio": 1.5}, own=0.5)
    found.begin("a", None)
    assert found.step({"a": 7}, {"a"}, 0, 100) == {7: 0.5}


@pytest.mark.parametrize(
    ("extra", "threshold", "line"),
    [
        ({"compression_ratio": 20}, -1.0, "20 was not measured; the request gets 6"),
        ({"compression_ratio": 1}, 2.0, "1 was not measured; the request gets 1.5"),
        ({"compression_ratio": "six"}, 0.0, "compression_ratio must be a number from 1 on, got 'six'"),
        ({"compression_ratio": math.nan}, 0.0, "compression_ratio must be a number"),
        ({"compression_ratio": -5}, 0.0, "compression_ratio must be a number from 1 on, got -5"),
        ({"merge_threshold": ["a" * 100_000]}, 0.0, "merge_threshold must be a number"),
        ({"merge_threshold": 10**400}, 0.0, "merge_threshold must be a number"),
        ({"compression_ratio": True}, 0.0, "compression_ratio must be a number"),
        ({"compression_ratio": [6] * 10_000}, 0.0, "compression_ratio must be a number"),
        ({"merge_threshold": math.inf}, 0.0, "merge_threshold must be a number"),
        ({"merge_threshold": None}, 0.0, "merge_threshold must be a number"),
        ({"merge_threshold": 0.7, "compression_ratio": 3}, 0.7, "gave both"),
    ],
)
def test_what_cannot_be_had(extra: dict[str, Any], threshold: float, line: str) -> None:
    found = thresholds()
    with told() as records:
        found.begin("a", extra)
        found.begin("b", extra)
    assert found.step({"a": 7}, {"a"}, 9, 9) == {7: threshold}
    (said,) = (message for message in map(logging.LogRecord.getMessage, records) if line in message)
    assert len(said) < 300


@contextmanager
def told() -> Iterator[list[logging.LogRecord]]:
    """What the plugin's logger is given, whatever vLLM does with its own loggers."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.megatron_dmc")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def test_a_name_is_used_again_at_once() -> None:
    """The scheduler tells of the end of one request and of the begin of another of its name in the same step."""
    from types import SimpleNamespace

    from megatron_dmc.serving.connector import DMCConnector

    connector = DMCConnector.__new__(DMCConnector)
    connector.thresholds = thresholds()
    pool = SimpleNamespace(get_num_free_blocks=lambda: 9, num_gpu_blocks=9)
    connector.manager = SimpleNamespace(
        block_pool=pool,
        first_blocks=lambda requests: dict.fromkeys(requests, 7),
        start_step=lambda requests: (1, {7: (0, [])}, []),
    )

    def step(ended: set[str], threshold: float) -> Any:
        new = SimpleNamespace(req_id="x", sampling_params=params(extra_args={"merge_threshold": threshold}))
        scheduled = SimpleNamespace(scheduled_new_reqs=[new], finished_req_ids=ended, num_scheduled_tokens={"x": 5})
        return connector.build_connector_meta(scheduled).thresholds

    assert step(set(), 1.5) == {7: 1.5}
    assert step({"x"}, -2.5) == {7: -2.5}


def test_a_ratio_that_was_never_measured() -> None:
    found = thresholds(curve=None)
    with told() as records:
        found.begin("a", {"compression_ratio": 3})
    assert found.step({"a": 7}, {"a"}, 9, 9) == {7: 0.0}
    assert any("run megatron-dmc ratios on the export" in record.getMessage() for record in records)


@pytest.mark.parametrize(
    ("under_load", "curve", "line"),
    [
        (UNDER_LOAD, None, "needs a measured curve; run megatron-dmc ratios"),
        ({"free_share": 0.5}, CURVE, "must have free_share and compression_ratio"),
        (UNDER_LOAD | {"other": 1}, CURVE, "must have free_share and compression_ratio"),
        ([0.5, 6], CURVE, "must have free_share and compression_ratio"),
        (UNDER_LOAD | {"free_share": 0}, CURVE, "free_share must be above 0 and at most 1, got 0"),
        (UNDER_LOAD | {"free_share": "half"}, CURVE, "free_share must be a number"),
        (UNDER_LOAD | {"compression_ratio": 7}, CURVE, "compression_ratio must be from 1.5 to 6"),
        (UNDER_LOAD | {"compression_ratio": None}, CURVE, "compression_ratio must be a number"),
    ],
)
def test_policies_that_cannot_be(under_load: Any, curve: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        thresholds(under_load, curve)
    assert "\n" not in str(caught.value)


def with_curve(case: Served, folder: Path, curve: dict[str, Any]) -> Served:
    shutil.copytree(case.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"compression_curve": curve}))
    return case._replace(folder=folder)


def test_a_small_pool_compresses_harder(export: Callable[..., Served], tmp_path: Path) -> None:
    curve = {"tokens": 100, "ratios": [1.5, 3.0, 6.0], "thresholds": [60.0, 0.0, -200.0]}
    case = with_curve(export({"local_window": 4}), tmp_path / "export", curve)
    policy = {"dmc_under_load": {"free_share": 1.0, "compression_ratio": 6.0}}
    with engine(case, num_gpu_blocks_override=50, max_model_len=256, additional_config=policy) as running:
        # Who asks for a threshold keeps it, this one the model's own.
        asked = [
            params(max_tokens=len(case.outputs[0]), extra_args=extra)
            for extra in [None] * 4 + [{"merge_threshold": 0.0}]
        ]
        outputs = running.llm.generate([{"prompt_token_ids": x} for x in case.prompts], asked, use_tqdm=False)
        assert list(outputs[-1].outputs[0].token_ids) == case.outputs[-1]
        assert [list(out.outputs[0].token_ids) for out in outputs[:4]] != case.outputs[:4]
        assert running.is_as_at_first()
        running.generate([case.prompts[-1]] * 3)
        assert running.manager.ratio > 1.2 * case.ratios[-1]


def test_the_server_can_have_another_threshold(export: Callable[..., Served]) -> None:
    case = export({"local_window": 4})
    model = served_model({"local_window": 4})
    expected = [
        model.generate(torch.tensor([x]), max_new_tokens=20, do_sample=False, merge_threshold=60.0)[
            0, len(x) :
        ].tolist()
        for x in case.prompts
    ]
    with engine(case, hf_overrides={"merge_threshold": 60.0}) as running:
        assert running.generate(case.prompts, 20) == expected != [out[:20] for out in case.outputs]


def test_a_policy_that_cannot_be_is_refused_at_start(export: Callable[..., Served]) -> None:
    case = export({"local_window": 4})
    with (
        pytest.raises(Exception, match="dmc_under_load needs a measured curve"),
        engine(case, additional_config={"dmc_under_load": UNDER_LOAD}),
    ):
        pass
