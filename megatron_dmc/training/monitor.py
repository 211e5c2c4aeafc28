"""What a retrofit writes for TensorBoard: losses, compression ratios against their target, speed and memory."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import psutil
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard.writer import SummaryWriter

from megatron_dmc.config import ConfigError

# Ratios above this one share a colour, so that one extreme head does not flatten the others' colours.
HEATMAP_LIMIT = 64.0
# Beyond this many cells the printed ratios would overlap.
HEATMAP_MOST_PRINTED_CELLS = 128


@dataclass(frozen=True)
class StepRecord:
    """One training step as the monitor and the progress bar show it.

    Compression ratios are tokens per cache slot. None stands for what a phase does not have (no merging: no ratio).

    Attributes:
        step: steps done in the whole run, over all phases.
        phase: the kind of the current phase.
        lm_loss: nats per token, over the global batch.
        compression_loss: the one-sided loss with its coefficient.
        distillation_loss: KL to the teacher, nats per token, without its weight.
        compression_ratio: noise-free, from 1[a > 0]: what inference will do.
        noisy_compression_ratio: of the decisions that training took.
        target_compression_ratio: what the compression loss aims at in this step.
        grad_norm: before clipping.
        tokens_per_second: of the whole run, all ranks together.
        memory_bytes: see :func:`measure_memory_bytes`.
        consumed_samples, consumed_tokens: since the start of the run, resumes included.
        layer_head_ratio: noise-free ratio of each KV head, ``[layers, kv_heads]``, any float dtype and device.
    """

    step: int
    phase: str
    lm_loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    memory_bytes: int
    consumed_samples: int
    consumed_tokens: int
    compression_loss: float | None = None
    distillation_loss: float | None = None
    compression_ratio: float | None = None
    noisy_compression_ratio: float | None = None
    target_compression_ratio: float | None = None
    layer_head_ratio: torch.Tensor | None = None


class Monitor:
    """Writes TensorBoard event files. One rank of a run owns one.

    A log that cannot be written (a full disk) is reported once on stderr and then left out: it never stops a training.

    Args:
        log_dir: folder of the event files, made when missing.
        layers: of the whole model.
        kv_heads: of one layer, over all ranks.
        first_step: the first step this process will write. Points from there on, left by an earlier process that got
            further than its last checkpoint, are dropped; so a resume doubles nothing. 0 drops all earlier points.
        heatmap_interval: steps between two layer x head images; one that is due waits for the next logged step, and the
            run's last step has one. 0 for none.

    Raises:
        ConfigError: ``log_dir`` cannot be written.
    """

    def __init__(
        self, log_dir: str | Path, layers: int, kv_heads: int, *, first_step: int = 0, heatmap_interval: int = 100
    ) -> None:
        self._layers = layers
        self._kv_heads = kv_heads
        self._heatmap_interval = heatmap_interval
        self._last_step = max(first_step - 1, 0)
        self._phase: str | None = None
        self._failed = False
        try:
            self._writer = SummaryWriter(str(log_dir), purge_step=first_step)
            self._writer.add_custom_scalars(_charts())
        except OSError as error:
            raise ConfigError(
                f"monitor.tensorboard: cannot write to {log_dir} ({error.strerror}); "
                "name another folder, or null for none"
            ) from None

    def log_step(self, record: StepRecord, *, last: bool = False) -> None:
        """Writes one step's scalars and, every ``heatmap_interval`` steps and at the run's ``last`` one, the heatmap.

        A layer's ratio can be hundreds of times another's; the share of tokens that it keeps, 1 / ratio, can be read beside
        the others' on one chart.

        Raises:
            ValueError: ``layer_head_ratio`` is not ``[layers, kv_heads]``.
        """
        scalars: dict[str, float | None] = {
            "loss/lm": record.lm_loss,
            "loss/compression": record.compression_loss,
            "loss/distillation": record.distillation_loss,
            "compression_ratio/noise_free": record.compression_ratio,
            "compression_ratio/noisy": record.noisy_compression_ratio,
            "compression_ratio/target": record.target_compression_ratio,
            "train/learning_rate": record.learning_rate,
            "train/gradient_norm": record.grad_norm,
            "train/consumed_samples": record.consumed_samples,
            "train/consumed_tokens": record.consumed_tokens,
            "speed/tokens_per_second": record.tokens_per_second,
            f"memory/{memory_kind()}_bytes": record.memory_bytes,
        }
        ratio = None if record.layer_head_ratio is None else self._check(record.layer_head_ratio)
        if ratio is not None:
            for layer, share in zip(self._numbers(), _mean_share(ratio, axis=1), strict=True):
                scalars[f"kept_share_layer/{layer}"] = float(share)
                scalars[f"compression_ratio_layer/{layer}"] = 1 / float(share)
        self._write_scalars(scalars, record.step)
        if record.phase != self._phase:
            self._phase = record.phase
            self._guard(lambda: self._writer.add_text("train/phase", record.phase, record.step))
        interval = self._heatmap_interval
        due = last or (interval and record.step // interval > self._last_step // interval)
        if ratio is not None and interval and due:
            image = render_heatmap(ratio, record.step, record.target_compression_ratio)
            self._guard(
                lambda: self._writer.add_image("compression_ratio/layer_head", image, record.step, dataformats="HWC")
            )
        self._last_step = record.step

    def log_evaluation(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes held-out results as ``evaluation/<name>``; None stands for what was not measured.

        ``lm_loss`` (nats per token) joins the loss's chart, ``compression_ratio`` the ratio's; ``recall_loss`` and
        ``recall_gap`` (nats per token) have one of their own.
        """
        self._write_scalars({f"evaluation/{name}": value for name, value in values.items()}, step)

    def log_calibration(self, step: int, r2: Sequence[float]) -> None:
        """Writes which part of the scores' variance every layer predicts on other text, as ``calibration_r2_layer/<i>``."""
        self._write_scalars(
            {f"calibration_r2_layer/{name}": x for name, x in zip(self._numbers(), r2, strict=True)}, step
        )

    def flush(self) -> None:
        """Puts everything on disk; a trainer calls it with each checkpoint."""
        self._guard(self._writer.flush)

    def close(self) -> None:
        self._guard(self._writer.close)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _numbers(self) -> list[str]:
        """Of the layers, equally long, so that TensorBoard sorts them."""
        digits = max(2, len(str(self._layers - 1)))
        return [f"{layer:0{digits}d}" for layer in range(self._layers)]

    def _check(self, ratio: torch.Tensor) -> np.ndarray:
        if tuple(ratio.shape) != (self._layers, self._kv_heads):
            raise ValueError(
                f"layer_head_ratio must be [layers, kv_heads] = [{self._layers}, {self._kv_heads}], "
                f"got {list(ratio.shape)}"
            )
        return ratio.detach().double().cpu().numpy()

    def _write_scalars(self, scalars: Mapping[str, float | None], step: int) -> None:
        def write() -> None:
            for tag, value in scalars.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, step)

        self._guard(write)

    def _guard(self, write: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            write()
        except OSError as error:
            self._failed = True
            # a job's log is often a file on the same full disk
            with suppress(OSError):
                print(f"TensorBoard log stopped, training goes on: {error}", file=sys.stderr)


def memory_kind() -> str:
    """What :func:`measure_memory_bytes` measures here: ``peak_cuda``, or ``resident_set`` on a machine without CUDA."""
    return "peak_cuda" if torch.cuda.is_available() else "resident_set"


def measure_memory_bytes() -> int:
    """The most CUDA memory this process held so far, or the process' resident set where there is no CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def render_heatmap(ratio: np.ndarray, step: int, target: float | None = None) -> np.ndarray:
    """The compression ratio of every head as an image; colours are logarithmic, from 1 to a power of two.

    Args:
        ratio: tokens per slot, ``[layers, kv_heads]``.
        step: shown in the title, with the whole model's ratio and the target.

    Returns:
        ``[height, width, 3]``, uint8.
    """
    layers, kv_heads = ratio.shape
    figure = Figure(figsize=(2.6 + min(max(0.42 * kv_heads, 2.6), 14), 1.5 + min(max(0.24 * layers, 2), 14)), dpi=110)
    canvas = FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    limit = _colour_limit(ratio, target)
    image = axes.imshow(ratio, norm=LogNorm(1.0, limit), cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    aim = "" if target is None else f", target {target:.2f}"
    axes.set_title(f"step {step}: CR {1 / _mean_share(ratio):.2f}{aim}", fontsize=10)
    ticks = [2**power for power in range(int(math.log2(limit)) + 1)]
    bar = figure.colorbar(image, ax=axes, ticks=ticks, extend="max" if ratio.max() > limit else "neither")
    bar.ax.set_yticklabels([str(tick) for tick in ticks])
    bar.ax.minorticks_off()
    bar.set_label("tokens per cache slot")
    if ratio.size <= HEATMAP_MOST_PRINTED_CELLS:
        for (layer, head), value in np.ndenumerate(ratio):
            dark = value < math.sqrt(limit)
            text = f"{value:.1f}" if value < 100 else f"{value:.0f}"
            axes.text(head, layer, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _charts() -> dict[str, dict[str, list[str | list[str]]]]:
    """The custom-scalars page: several tags on one chart."""
    ratios = [f"^compression_ratio/{name}$" for name in ("noise_free", "noisy", "target")]
    ratios.append("^evaluation/compression_ratio$")
    return {
        "compression": {
            "compression ratio: achieved and target": ["Multiline", ratios],
            "share of tokens that every layer keeps (1 / ratio)": ["Multiline", ["^kept_share_layer/.*$"]],
        },
        "loss": {
            "language-modelling loss": ["Multiline", ["^loss/lm$", "^evaluation/lm_loss$"]],
            "recall: loss on repeated text, and how far it lies above the base's": [
                "Multiline",
                ["^evaluation/recall_loss$", "^evaluation/recall_gap$"],
            ],
        },
    }


def _mean_share(ratio: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Slots per token. Heads see equally many tokens, so it is the share, not the ratio, that averages over heads."""
    return np.asarray(np.mean(1.0 / ratio, axis=axis))


def _colour_limit(ratio: np.ndarray, target: float | None) -> float:
    """The next power of two above all ratios and twice the target, so that a colour seldom changes its meaning in a run."""
    top = max(float(ratio.max()), 2.0 * (target or 1.0), 2.0)
    return min(2.0 ** math.ceil(math.log2(top)), HEATMAP_LIMIT) if math.isfinite(top) else HEATMAP_LIMIT
