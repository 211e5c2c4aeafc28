"""Floating-point operations of a training step, by the usual convention.

A matrix product costs 2 per weight and token, its backward pass twice that (the gradient of the inputs, the gradient of the
weights: a frozen weight has only the first). Attention is causal: half of all pairs, 2 for the score and 2 for the value per
channel and pair, backward twice that; a local window changes nothing, near and far pairs are all pairs. The pooling and the
decisions' scans are left out: below 0.1 % of a layer.
"""

from dataclasses import dataclass

from megatron_dmc.model.model_config import ModelConfig
from megatron_dmc.recipe import Recipe


@dataclass(frozen=True)
class Work:
    """Operations of one sample.

    Attributes:
        model: what learning needs: forward, backward, a teacher's forward pass.
        recomputed: forward passes that are run again to save memory.
    """

    model: float
    recomputed: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.model + other.model, self.recomputed + other.recomputed)

    def __mul__(self, count: float) -> "Work":
        return Work(self.model * count, self.recomputed * count)


def layer_weights(model: ModelConfig, *, projects: bool) -> int:
    """Weights of a layer's matrices; ``projects``: with those of the decisions' projection."""
    heads = model.num_attention_heads + 2 * model.num_query_groups
    attention = model.hidden_size * model.head_dim * (heads + model.num_attention_heads)
    decisions = 2 * model.num_query_groups * model.hidden_size if projects else 0
    return attention + 3 * model.hidden_size * model.ffn_hidden_size + decisions


def _layer_forward(recipe: Recipe) -> tuple[float, float]:
    """Operations of one layer's forward pass: of its matrices, and of attention."""
    model, seq = recipe.model, recipe.data.sequence_length
    projects = recipe.merges and recipe.dmc.has_projection
    linear = 2.0 * layer_weights(model, projects=projects) * seq
    return linear, 2.0 * seq**2 * model.num_attention_heads * model.head_dim


def forward_share(recipe: Recipe) -> float:
    """What a step of ``calibrate`` does of a training step's work: one forward pass, with attention's scores once more."""
    model, training = recipe.model, recipe.training
    linear, attention = _layer_forward(recipe)
    forward = (linear + 1.5 * attention) * model.num_layers + _output_forward(recipe)
    whole = step_work(recipe)
    return forward * training.global_batch_size / (whole.model + whole.recomputed)


def layer_work(recipe: Recipe) -> Work:
    """One transformer layer."""
    linear, attention = _layer_forward(recipe)
    forward = linear + attention
    backward = (1 if recipe.trains_adapter else 2) * linear + 2 * attention
    again = {"none": 0.0, "selective": attention, "full": forward}[recipe.training.recompute]
    return Work(forward * _passes(recipe) + backward, again)


def output_work(recipe: Recipe) -> Work:
    """The output layer; the embedding is a lookup."""
    forward = _output_forward(recipe)
    return Work(forward * _passes(recipe) + (1 if recipe.trains_adapter else 2) * forward)


def _output_forward(recipe: Recipe) -> float:
    return 2.0 * recipe.model.hidden_size * recipe.model.vocab_size * recipe.data.sequence_length


def step_work(recipe: Recipe) -> Work:
    """The whole model, one global batch."""
    return (layer_work(recipe) * recipe.model.num_layers + output_work(recipe)) * recipe.training.global_batch_size


def _passes(recipe: Recipe) -> int:
    """Forward passes: the student's and a teacher's."""
    return 2 if recipe.distills else 1
