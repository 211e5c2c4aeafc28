"""The phase ``calibrate``: the base reads text, and every layer's decision projection learns from its attention.

First the scores of later attention are regressed on the decisions' inputs, which gives the projection. Then, on text that
was not learned from, its predictions are compared with the scores, and one quantile of them all is the threshold.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_dmc.calibration.observation import Observation, StateNorm, observe
from megatron_dmc.calibration.regression import Fit, Sums, gram_rows, solve, summed
from megatron_dmc.calibration.threshold import Histogram, quantile
from megatron_dmc.checkpoint.agreement import gather
from megatron_dmc.errors import DMCError, or_aim_below
from megatron_dmc.model.attention import BaseAttention, DMCSelfAttention
from megatron_dmc.model.compression_loss import merge_fraction_target
from megatron_dmc.model.decision_projection import DecisionProjection
from megatron_dmc.ops.decisions import projection_logits
from megatron_dmc.recipe import PhaseConfig, Recipe

# Logits of alpha per unit of log score: how sure a decision is at the start.
SHARPNESS = 3.0
# Of the hidden states' mean square, on text that tells one token from another.
LEAST_VARIANCE = 1e-4
DAMAGED = "the base is damaged, or its activations are too large for training.bf16"
# Of all decisions, at least, where the ratio is to start near 1: further from their tokens they could not be trained.
LEAST_SHARE_BELOW = 0.005
# Logits of omega per unit of log score. merge: a token that matters outweighs its slot's others. absorb: a token counts as
# much as it is expected to be attended. evict has no weights.
OMEGA_SHARPNESS = {"merge": 8.0, "absorb": 1.0, "evict": 0.0}


class CalibrationError(DMCError, RuntimeError):
    """A base or a text that decisions cannot be learned from. The message says why and what to do."""


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration found; the same on every rank.

    Attributes:
        tokens: that were learned from.
        r2: share of the scores' variance that the projection predicts on other text, [layers].
        merge_fraction: share of tokens that do, on other text.
    """

    tokens: int
    r2: Tensor
    merge_fraction: float


class _Layer:
    """One layer on this rank: its sums, and how well it predicts.

    Attributes:
        errors: of the held-out scores y and their predictions p, float64 [4, kv_heads]: number, sums of y, y^2 and (y - p)^2.
    """

    def __init__(self, attention: DMCSelfAttention, input_layernorm: torch.nn.Module, rows: slice) -> None:
        self.attention, self.input_layernorm, self.rows = attention, input_layernorm, rows
        device, heads = attention.decision.weight.device, len(attention.kv_heads)
        self.sums: Sums | None = Sums.empty(attention.config.hidden_size, heads, rows.stop - rows.start, device)
        self.errors = torch.zeros(4, heads, dtype=torch.float64, device=device)

    def take_sums(self) -> Sums:
        """The sums, which are no longer kept."""
        assert self.sums is not None
        sums, self.sums = self.sums, None
        return sums

    @contextlib.contextmanager
    def watched(self, then: Callable[["_Layer", Observation, BaseAttention], None]) -> Iterator[None]:
        """Within it every forward pass of the base is observed."""
        norm = StateNorm(self.input_layernorm)
        self.attention.observer = lambda seen: then(self, observe(self.attention, seen, norm.last), seen)
        try:
            yield
        finally:
            self.attention.observer = None
            norm.remove()

    @property
    def number(self) -> int:
        """In the whole model, from 0."""
        return self.attention.layer_number - 1

    def problem(self, token_group: dist.ProcessGroup) -> str | None:
        """Why the scores do not determine the decisions; None: they do. The group's ranks call it together."""
        # Not the gram, which is large. A rank sees by its own whether that is finite.
        assert self.sums is not None
        sums = self.sums._replace(gram=self.sums.gram[:0]).over(token_group)
        needed = self.attention.config.hidden_size
        if sums.tokens < needed:
            return (
                f"calibrate saw {int(sums.tokens)} tokens that can be learned from, the regression needs at least "
                f"{needed} (model.hidden_size); give the phase more steps, or longer texts"
            )
        if not bool(torch.isfinite(sums.products).all() & torch.isfinite(self.sums.gram).all()):
            return f"the hidden states or the attention of layer {self.number} are not finite on this text; {DAMAGED}"
        square = summed(self.sums.gram.diagonal(self.rows.start), token_group)
        mean = sums.features[self.rows] / sums.tokens
        # A layer without any hidden states has no such share.
        if not float((square / sums.tokens - mean.square()).sum() / (square / sums.tokens).sum()) >= LEAST_VARIANCE:
            return f"all tokens of the text have nearly the same hidden state in layer {self.number}; name text that varies"
        return None

    def entries(self) -> Iterator[tuple[str, Tensor, int | None]]:
        """What a resumed calibration needs: names, sums, and which of their dimensions is this rank's KV heads or rows."""
        axes = {"targets": 0, "products": 1, "gram": 0}
        for name, value in self.sums._asdict().items() if self.sums is not None else ():
            yield name, value, axes.get(name)
        yield "errors", self.errors, 1


class Calibrator:
    """Sets the decision projections of this rank's part of the model, over the steps of a ``calibrate`` phase.

    Every rank takes part. Nothing but the projections changes.

    Args:
        recipe: checked already.
        phase: of kind calibrate.
        ratio: the compression ratio that the decisions are to start at.
        model_chunks: this rank's.
        step: of the phase, that it begins with; after 0 it needs :meth:`load`.
    """

    def __init__(
        self,
        recipe: Recipe,
        phase: PhaseConfig,
        ratio: float,
        model_chunks: Sequence[torch.nn.Module],
        *,
        step: int = 0,
    ) -> None:
        self.recipe, self.phase, self.ratio = recipe, phase, ratio
        hidden_size, ranks = recipe.model.hidden_size, parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        # The ranks that share a gram's rows, and those that see other tokens of the same layers.
        self._row_group = parallel_state.get_tensor_model_parallel_group() if hidden_size % ranks == 0 else None
        self._token_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        size = gram_rows(hidden_size, ranks)
        rows = slice(0, size) if self._row_group is None else slice(rank * size, (rank + 1) * size)
        every: list[Any] = [layer for chunk in model_chunks for layer in chunk.modules()]
        self.layers = [
            _Layer(layer.self_attention, layer.input_layernorm, rows)
            for layer in every
            if isinstance(getattr(layer, "self_attention", None), DMCSelfAttention)
        ]
        if step >= phase.fit_steps:
            for layer in self.layers:
                layer.take_sums()
        device = next(model_chunks[0].parameters()).device
        self.histogram = Histogram(device)
        # Decisions that take effect, and all.
        self.decisions = torch.zeros(2, dtype=torch.int64, device=device)
        # That were learned from.
        self.tokens = 0

    @contextlib.contextmanager
    def observing(self, step: int) -> Iterator[None]:
        """Within it the base's forward passes of the phase's step ``step`` are learned from, or compared with."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.watched(self._learn if step < self.phase.fit_steps else self._compare))
            yield

    def finish_step(self, step: int) -> CalibrationResult | None:
        """After the forward passes of a step; after the phase's last one the decisions are made, and this says how well.

        Raises:
            CalibrationError: on all ranks, if the text or the base does not determine the decisions.
        """
        if step + 1 == self.phase.fit_steps:
            self._fit()
        return self._choose_threshold() if step + 1 == self.phase.steps else None

    def _learn(self, layer: _Layer, seen: Observation, attention: BaseAttention) -> None:
        learns = seen.learns.expand(seen.scores.shape[:2])
        assert layer.sums is not None
        layer.sums.add(seen.hidden_states[learns], seen.scores[learns], layer.rows)

    def _compare(self, layer: _Layer, seen: Observation, attention: BaseAttention) -> None:
        # What the decisions' logits will be made of, [batch, seq, kv_heads].
        predicted = -layer.attention.decision_logits(*attention[:3])[0] / SHARPNESS
        learns, in_effect = (x.expand(predicted.shape[:2]) for x in (seen.learns, seen.in_effect))
        score, error = seen.scores[learns].double(), (seen.scores - predicted)[learns].double()
        layer.errors += torch.stack(
            [torch.full_like(layer.errors[0], len(score)), score.sum(0), score.square().sum(0), error.square().sum(0)]
        )
        self.histogram.add(predicted[in_effect])
        heads = predicted.shape[-1]
        self.decisions += heads * torch.stack(
            [in_effect.sum(), torch.tensor(in_effect.numel(), device=in_effect.device)]
        )

    def _fit(self) -> None:
        self._agree(next((problem for layer in self.layers if (problem := layer.problem(self._token_group))), None))
        for layer in self.layers:
            # A layer at a time: its sums over all ranks are as large as its own.
            sums = layer.take_sums().over(self._token_group)
            self.tokens = int(sums.tokens)
            self._write(layer.attention.decision, solve(sums, self._row_group))

    @torch.no_grad()
    def _write(self, projection: DecisionProjection, fit: Fit) -> None:
        """The projection of the logits a = k (theta - prediction) and b = k' (prediction - theta), as if theta were 0."""
        dmc = self.recipe.dmc
        projection.set_input_scale(fit.mean_square)
        slopes = fit.weight.new_tensor([-SHARPNESS, OMEGA_SHARPNESS[dmc.operation]])
        # [kv_heads, 2, hidden] and [kv_heads, 2]: rows a_0, b_0, a_1, b_1, ...
        weight, logits = slopes[:, None] * fit.weight.T[:, None], slopes * fit.offset[:, None]
        nothing = torch.zeros(1, 1, 2)
        untrained = torch.cat(
            projection_logits(nothing, dmc.decision_bias, dmc.omega_bias, dmc.decision_scale)
        ).flatten()
        projection.weight.copy_(weight.flatten(0, 1) / projection.input_scale.double() / dmc.decision_scale)
        projection.bias.copy_(((logits - untrained.to(logits)) / dmc.decision_scale).flatten())

    @torch.no_grad()
    def _choose_threshold(self) -> CalibrationResult:
        model, dmc = self.recipe.model, self.recipe.dmc
        errors = torch.zeros(
            4, model.num_layers, model.num_query_groups, dtype=torch.float64, device=self.decisions.device
        )
        for layer in self.layers:
            heads = layer.attention.kv_heads
            errors[:, layer.number, heads.start : heads.stop] += layer.errors
        for sums in (errors, self.histogram.counts, self.decisions):
            dist.all_reduce(sums)
        if not bool(torch.isfinite(errors).all()):
            raise CalibrationError(
                f"the hidden states or the attention of a layer are not finite on this text; {DAMAGED}"
            )
        in_effect, every = self.decisions.tolist()
        fraction = merge_fraction_target(self.ratio)
        if fraction * every >= in_effect:
            raise CalibrationError(
                f"compression ratio {self.ratio:g} is out of reach: the decisions of {in_effect / every:.0%} of the tokens "
                f"take effect within their texts (dmc.local_window {dmc.local_window}); shorten the window, use longer "
                f"texts{or_aim_below(every / max(every - in_effect, 1))}"
            )
        threshold = quantile(self.histogram.counts, max(fraction * every / in_effect, LEAST_SHARE_BELOW))
        slopes = torch.tensor([SHARPNESS, -OMEGA_SHARPNESS[dmc.operation]]) * threshold / dmc.decision_scale
        for layer in self.layers:
            bias = layer.attention.decision.bias
            bias += slopes.to(bias).repeat(len(layer.attention.kv_heads))
        count, total, square, error = errors.unbind(0)
        r2 = 1 - error.sum(-1) / (square - total.square() / count).sum(-1)
        return CalibrationResult(self.tokens, r2.cpu(), fraction)

    def _agree(self, problem: str | None) -> None:
        """Raises the first rank's problem on all ranks, if there is one."""
        first = next(filter(None, gather(problem)), None)
        if first is not None:
            raise CalibrationError(first)

    def state(self) -> dict[str, Any]:
        """Entries of a checkpoint's sharded state dict, to go on from; every rank calls this together."""
        entries: dict[str, Any] = {"tokens": self.tokens}
        for layer in self.layers:
            for name, value, axis in layer.entries():
                if name == "gram" and self._row_group is None:
                    axis = None
                key = f"calibration.layers.{layer.number}.{name}"
                entries[key] = self._sharded(key, summed(value, self._token_group), axis)
        for name, value in (("histogram", self.histogram.counts), ("decisions", self.decisions)):
            key = f"calibration.{name}"
            entries[key] = ShardedTensor.from_rank_offsets(key, summed(value, None), replica_id=dist.get_rank())
        return entries

    def _sharded(self, key: str, value: Tensor, axis: int | None) -> ShardedTensor:
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        token_rank = dist.get_rank(self._token_group)
        if axis is None:
            return ShardedTensor.from_rank_offsets(key, value, replica_id=(0, tensor_rank, token_rank))
        offset = axis, tensor_rank, parallel_state.get_tensor_model_parallel_world_size()
        return ShardedTensor.from_rank_offsets(key, value, offset, replica_id=(0, 0, token_rank))

    def load(self, state: dict[str, Any]) -> None:
        """Takes back :meth:`state`'s entries, loaded: one of the ranks that share a sum has it, the others begin anew."""
        self.tokens = state["tokens"]
        is_first = dist.get_rank(self._token_group) == 0
        for layer in self.layers:
            for name, value, _ in layer.entries():
                value.copy_(state[f"calibration.layers.{layer.number}.{name}"] if is_first else torch.zeros_like(value))
        for name, value in (("histogram", self.histogram.counts), ("decisions", self.decisions)):
            value.copy_(state[f"calibration.{name}"] if dist.get_rank() == 0 else torch.zeros_like(value))
