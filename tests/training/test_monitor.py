"""What the monitor writes is read back from the event files; the progress display runs on a real pseudo-terminal."""

import io
import os
import pty
import re
from contextlib import redirect_stderr
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from megatron_dmc.config import ConfigError
from megatron_dmc.training.monitor import Monitor, StepRecord, measure_memory_bytes, memory_kind, render_heatmap
from megatron_dmc.training.progress import TrainingProgress, format_duration
from tests.support.terminal import read_to_end
from tests.support.texts import full_disk

LAYERS, KV_HEADS = 3, 2


def record(step: int, **changes: object) -> StepRecord:
    values = StepRecord(
        step=step,
        phase="compress",
        lm_loss=3.0 - step / 100,
        compression_loss=0.25,
        compression_ratio=1.5,
        noisy_compression_ratio=1.25,
        target_compression_ratio=2.0,
        learning_rate=3e-5,
        grad_norm=0.5,
        tokens_per_second=12345.0,
        memory_bytes=2**30,
        consumed_samples=step * 8,
        consumed_tokens=step * 8 * 64,
        layer_head_ratio=torch.tensor([[1.0, 4.0], [2.0, 2.0], [8.0, 8.0]]),
    )
    return replace(values, **changes)  # type: ignore[arg-type]


def read(log_dir) -> EventAccumulator:
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_scalars_come_back(tmp_path):
    with Monitor(tmp_path, LAYERS, KV_HEADS) as monitor:
        for step in (1, 2):
            monitor.log_step(record(step))
        monitor.log_evaluation(2, {"lm_loss": 1.5})
    events = read(tmp_path)
    assert scalars(events, "loss/lm") == [(1, pytest.approx(2.99)), (2, pytest.approx(2.98))]
    expected = {
        "loss/compression": 0.25,
        "compression_ratio/noise_free": 1.5,
        "compression_ratio/noisy": 1.25,
        "compression_ratio/target": 2.0,
        "train/learning_rate": 3e-5,
        "train/gradient_norm": 0.5,
        "train/consumed_samples": 16,
        "train/consumed_tokens": 1024,
        "speed/tokens_per_second": 12345.0,
        f"memory/{memory_kind()}_bytes": 2**30,
        "evaluation/lm_loss": 1.5,
    }
    for tag, value in expected.items():
        assert scalars(events, tag)[-1] == (2, pytest.approx(value)), tag
    assert len(events.Tensors("train/phase/text_summary")) == 1


def test_layer_ratio_counts_slots_not_ratios(tmp_path):
    with Monitor(tmp_path, LAYERS, KV_HEADS) as monitor:
        monitor.log_step(record(1))
    events = read(tmp_path)
    # Layer 0: 8 tokens take 8 slots in one head and 2 in the other, 16 tokens in 10 slots.
    values = [scalars(events, f"compression_ratio_layer/{layer:02d}")[0][1] for layer in range(LAYERS)]
    assert values == pytest.approx([1.6, 2.0, 8.0])


def test_a_layer_that_merges_everything_leaves_the_others_readable(tmp_path):
    ratio = torch.tensor([[1.0, 4.0], [2.0, 2.0], [400.0, 400.0]])
    with Monitor(tmp_path, LAYERS, KV_HEADS) as monitor:
        monitor.log_step(record(1, layer_head_ratio=ratio))
    events = read(tmp_path)
    # 10 of 16 slots, half, and next to nothing: all on a scale from 0 to 1.
    shares = [scalars(events, f"kept_share_layer/{layer:02d}")[0][1] for layer in range(LAYERS)]
    assert shares == pytest.approx([0.625, 0.5, 0.0025])


def test_a_phase_without_merging_has_no_ratio(tmp_path):
    nothing = dict.fromkeys(("compression_ratio", "noisy_compression_ratio", "target_compression_ratio"))
    with Monitor(tmp_path, LAYERS, KV_HEADS, heatmap_interval=1) as monitor:
        monitor.log_step(record(1, phase="pretrain", compression_loss=None, layer_head_ratio=None, **nothing))
    tags = read(tmp_path).Tags()
    assert "loss/lm" in tags["scalars"] and not tags["images"]
    assert not [tag for tag in tags["scalars"] if "compression" in tag]


def test_achieved_and_target_share_a_chart(tmp_path):
    with Monitor(tmp_path, LAYERS, KV_HEADS) as monitor:
        monitor.log_step(record(1))
        monitor.log_evaluation(1, {"lm_loss": 1.5, "compression_ratio": 1.4})
    events = read(tmp_path)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
    on_first_chart = {tag for tag in events.Tags()["scalars"] if any(re.match(regex, tag) for regex in charts[0])}
    achieved = {f"compression_ratio/{name}" for name in ("noise_free", "noisy", "target")}
    assert on_first_chart == achieved | {"evaluation/compression_ratio"}
    assert {tag for tag in events.Tags()["scalars"] if re.match(charts[1][0], tag)} == {
        f"kept_share_layer/{layer:02d}" for layer in range(LAYERS)
    }


def test_recall_has_a_chart_of_its_own(tmp_path):
    with Monitor(tmp_path, LAYERS, KV_HEADS) as monitor:
        monitor.log_evaluation(0, {"lm_loss": 1.5, "compression_ratio": None, "recall_loss": 0.5, "recall_gap": 0.0})
        monitor.log_evaluation(1, {"lm_loss": 1.5, "compression_ratio": 1.4, "recall_loss": 0.75, "recall_gap": 0.25})
    events = read(tmp_path)
    assert scalars(events, "evaluation/compression_ratio") == [(1, pytest.approx(1.4))]
    assert scalars(events, "evaluation/recall_gap") == [(0, 0.0), (1, 0.25)]
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
    shown = [
        {tag for tag in events.Tags()["scalars"] if any(re.match(regex, tag) for regex in chart)} for chart in charts
    ]
    assert {"evaluation/recall_loss", "evaluation/recall_gap"} in shown
    assert {"evaluation/lm_loss"} in shown


def test_heatmap_is_written_at_its_interval(tmp_path):
    with Monitor(tmp_path, LAYERS, KV_HEADS, heatmap_interval=10) as monitor:
        for step in range(1, 21):
            monitor.log_step(record(step))
    images = read(tmp_path).Images("compression_ratio/layer_head")
    assert [image.step for image in images] == [10, 20]
    picture = Image.open(io.BytesIO(images[0].encoded_image_string))
    assert picture.size == (images[0].width, images[0].height) and min(picture.size) > 200


def test_heatmap_waits_for_a_logged_step(tmp_path):
    with Monitor(tmp_path, LAYERS, KV_HEADS, heatmap_interval=25) as monitor:
        for step in range(10, 110, 10):
            monitor.log_step(record(step))
    assert [image.step for image in read(tmp_path).Images("compression_ratio/layer_head")] == [30, 50, 80, 100]


def test_the_last_step_has_a_heatmap(tmp_path):
    with Monitor(tmp_path / "any", LAYERS, KV_HEADS, heatmap_interval=10) as monitor:
        for step in range(1, 14):
            monitor.log_step(record(step), last=step == 13)
    assert [image.step for image in read(tmp_path / "any").Images("compression_ratio/layer_head")] == [10, 13]
    with Monitor(tmp_path / "none", LAYERS, KV_HEADS, heatmap_interval=0) as monitor:
        monitor.log_step(record(1), last=True)
    assert not read(tmp_path / "none").Tags()["images"]


@pytest.mark.parametrize(("layers", "kv_heads"), [(1, 1), (4, 2), (32, 8), (80, 8), (40, 40)])
def test_heatmap_draws_every_shape(layers, kv_heads):
    ratio = np.full((layers, kv_heads), 2.0)
    plain = render_heatmap(ratio, 1, 4.0)
    ratio[-1, -1] = 4.0
    assert plain.dtype == np.uint8 and plain.ndim == 3 and plain.shape[2] == 3
    changed = render_heatmap(ratio, 1, 4.0)
    assert changed.shape == plain.shape and (changed != plain).any()
    render_heatmap(np.full((layers, kv_heads), 3000.0), 1)


def test_wrong_shape_is_named(tmp_path):
    with Monitor(tmp_path, LAYERS, KV_HEADS) as monitor, pytest.raises(ValueError, match=r"\[3, 2\], got \[2, 3\]"):
        monitor.log_step(record(1, layer_head_ratio=torch.ones(2, 3)))


def test_resume_doubles_nothing(tmp_path):
    with Monitor(tmp_path, LAYERS, KV_HEADS, heatmap_interval=5) as monitor:
        for step in range(1, 16):
            monitor.log_step(record(step))
    # Event files are read in the order of their names, which begin with the second they were opened in.
    (events_file,) = tmp_path.glob("events*")
    events_file.rename(tmp_path / "events.out.tfevents.0")
    # The process got to step 15, its last checkpoint is of step 10.
    with Monitor(tmp_path, LAYERS, KV_HEADS, heatmap_interval=5, first_step=11) as monitor:
        for step in range(11, 13):
            monitor.log_step(record(step, lm_loss=1.0))
    events = read(tmp_path)
    points = scalars(events, "loss/lm")
    assert [step for step, _ in points] == list(range(1, 13))
    assert [value for _, value in points[10:]] == [1.0, 1.0]
    assert [image.step for image in events.Images("compression_ratio/layer_head")] == [5, 10]
    assert len(events.Tensors("train/phase/text_summary")) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_reported_once_and_stops_nothing(tmp_path):
    def train(monitor: Monitor) -> None:
        progress = TrainingProgress(2)
        for step in range(1, 4):
            progress.update(record(step))
            progress.message("saved")
            monitor.log_step(record(step))
            monitor.flush()

    lines = io.StringIO()
    with Monitor(tmp_path / "first", LAYERS, KV_HEADS) as monitor, full_disk(1024), redirect_stderr(lines):
        train(monitor)
    assert lines.getvalue().count("TensorBoard log stopped, training goes on") == 1
    # The job's own log is on the same disk.
    with (
        Monitor(tmp_path / "second", LAYERS, KV_HEADS) as monitor,
        (tmp_path / "log").open("w", buffering=1) as log,
        redirect_stderr(log),
        full_disk(0),
    ):
        train(monitor)


def test_memory_is_of_this_process():
    held = torch.ones(2**24)  # 64 MiB that are really touched
    assert 2**26 < measure_memory_bytes() < 2**40
    assert held[0] == 1


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"monitor.tensorboard: cannot write to .*file"):
        Monitor(tmp_path / "file" / "below", LAYERS, KV_HEADS)


def test_plain_lines_at_most_every_interval(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("megatron_dmc.training.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with TrainingProgress(100, stream=stream, line_interval_seconds=30) as progress:
        for step in range(1, 101):
            now[0] += 1.0
            progress.update(record(step))
        progress.message("saved step_00000100")
    lines = stream.getvalue().splitlines()
    assert [line.split(" | ")[1] for line in lines[:-1]] == [f"step {step}/100" for step in (1, 31, 61, 91, 100)]
    assert lines[1] == "compress | step 31/100 | loss 2.6900 | CR 1.50 (target 2.00) | 12.3k tok/s | ETA 0:01:09"
    assert lines[-1] == "saved step_00000100"
    assert "\x1b" not in stream.getvalue()


def test_plain_line_without_merging():
    stream = io.StringIO()
    with TrainingProgress(100, stream=stream) as progress:
        progress.update(record(1, phase="pretrain", compression_ratio=None))
    assert "CR" not in stream.getvalue() and stream.getvalue().startswith("pretrain | step 1/100 | loss 2.9900 |")


def test_plain_line_of_an_adapter_shows_its_loss():
    stream = io.StringIO()
    with TrainingProgress(100, stream=stream) as progress:
        progress.update(record(1, distillation_loss=0.03125))
    assert " | loss 2.9900 | KL 0.0312 | CR 1.50 (target 2.00) | " in stream.getvalue()


def test_quiet_progress_says_only_what_is_important():
    stream = io.StringIO()
    with TrainingProgress(2, quiet=True, stream=stream) as progress:
        progress.update(record(1))
        progress.message("saved")
        progress.message("warning: missed", important=True)
    assert stream.getvalue() == "warning: missed\n"


def test_other_ranks_are_silent():
    stream = io.StringIO()
    with TrainingProgress(2, enabled=False, stream=stream) as progress:
        progress.update(record(1))
        progress.message("x")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("columns", [80, 120])
def test_bar_on_a_terminal(monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal, TrainingProgress(25000, done_steps=24000, stream=terminal) as progress:
        for step in (24001, 25000):
            progress.update(record(step, lm_loss=2.96, distillation_loss=0.03125))
        progress.message("saved [final]")
    text = read_to_end(reader)
    assert "\x1b[" in text and "saved [final]" in text
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    assert any("starting 24000/25000" in line for line in lines)
    assert any(re.fullmatch(r"compress 25000/25000 \S+ 12.3k tok/s  ETA 0:00:00", line) for line in lines), lines
    assert "loss 2.9600  KL 0.0312  CR 1.50 (target 2.00)" in lines
    assert max(map(len, lines)) <= columns


def test_a_terminal_that_has_gone_stops_nothing(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = pty.openpty()
    # Unbuffered, so that nothing is left to fail when the file is closed.
    terminal = io.TextIOWrapper(os.fdopen(writer, "wb", buffering=0), write_through=True)
    with terminal, TrainingProgress(3, stream=terminal) as progress:
        progress.update(record(1))
        os.close(reader)
        progress.message("saved")
        for step in (2, 3):
            progress.update(record(step))


def test_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal, TrainingProgress(2, stream=terminal) as progress:
        progress.update(record(1))
    text = read_to_end(reader)
    assert text.startswith("compress | step 1/2 |") and "\x1b" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0:00:00"), (65, "0:01:05"), (3 * 3600 - 0.6, "2:59:59"), (183600, "2d 03:00:00")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
