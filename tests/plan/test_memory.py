"""Parameters are the real model's, stage by stage; activations are what autograd really saves."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_dmc.plan.schedule import most_kept, warmup
from megatron_dmc.recipe import ParallelConfig, load_recipe
from tests.support import planning
from tests.support.planning import FULL_70B, LLAMA2_70B, tiny

Elsewhere = Callable[..., Any]

# Llama 2 70B, and its decisions: 80 layers x 8 KV heads x 2 x (8192 weights and an offset).
LLAMA2_70B_WEIGHTS = 68_976_648_192
DECISIONS = 80 * 8 * 2 * 8193


def test_llama2_70b_has_its_number_of_parameters(elsewhere: Elsewhere) -> None:
    pipeline = ("parallel.pipeline_model_parallel_size=8", "training.global_batch_size=32")
    plan = elsewhere(planning.plan, load_recipe(LLAMA2_70B, [*FULL_70B, *pipeline]))
    assert plan.weights == plan.learned == LLAMA2_70B_WEIGHTS + DECISIONS
    # An embedding and an output layer are cut in eight; norms are not.
    first, *middle, last = (stage.weights for stage in plan.stages)
    assert len(set(middle)) == 1
    assert first - middle[0] == 32000 * 8192 // 8
    assert last - middle[0] == 32000 * 8192 // 8 + 8192
    norms = (2 * 80 + 1) * 8192
    assert 8 * (sum(stage.weights for stage in plan.stages) - norms) + norms == plan.weights
    assert plan.checkpoint_weights == 2 * plan.weights
    assert plan.checkpoint_full == 14 * plan.weights


@pytest.mark.parametrize("virtual", [None, 2], ids=["PP2", "PP2-VPP2"])
@pytest.mark.parametrize("shared", [False, True], ids=["untied", "tied"])
def test_every_stage_holds_its_part_of_the_real_model(elsewhere: Elsewhere, virtual: int | None, shared: bool) -> None:
    recipe = tiny(f"model.share_embeddings_and_output_weights={shared}", "training.global_batch_size=8")
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=True,
    )
    stages = elsewhere(planning.stages, replace(recipe, parallel=parallel), 8)
    assert [stage.layers for stage in stages] == [(1, 1) if virtual else (2,)] * 2
    expected = [0, 0]
    for name, shape in elsewhere(planning.real_shapes, recipe).items():
        size = 1
        for length in shape:
            size *= length
        size = size if "norm" in name else size // 2
        if "layers." in name:
            layer = int(name.split("layers.")[1].split(".")[0])
            # Interleaved stages take turns.
            expected[layer % 2 if virtual else layer // 2] += size
        elif "word_embeddings" in name:
            expected[0] += size
            expected[1] += size if shared else 0
        else:
            expected[1] += size
    assert [stage.weights for stage in stages] == expected
    assert [stage.parameters for stage in stages] == [2 * size for size in expected]
    assert [stage.gradients for stage in stages] == [4 * size for size in expected]
    # Shared by the two data-parallel replicas.
    assert [stage.optimizer for stage in stages] == [6 * size for size in expected]


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_what_autograd_saves_on_a_cpu(elsewhere: Elsewhere, recompute: str, window: int) -> None:
    recipe = tiny(f"training.recompute={recompute}", f"dmc.local_window={window}", "training.micro_batch_size=2")
    kept = elsewhere(planning.footprint, recipe, "only", 4).kept
    saved = elsewhere(planning.bytes_saved_on_a_cpu, recipe)
    # Apart from what is saved, memory holds the batch's labels, rotary angles and the like.
    assert saved <= kept <= 1.03 * saved + 70_000


@pytest.mark.parametrize(
    "overrides",
    [("distillation.weight=1", "training.train=adapter"), ("data.reset_at_documents=true",)],
    ids=["adapter-distilled", "documents"],
)
def test_logits_and_packed_documents_are_what_autograd_saves_on_a_cpu(
    elsewhere: Elsewhere, overrides: tuple[str, ...]
) -> None:
    # Logits are as large as all the rest together; a plan takes each sample for one document.
    recipe = tiny("model.vocab_size=2048", *overrides)
    kept = elsewhere(planning.footprint, recipe, "only", 4).kept
    saved = elsewhere(planning.bytes_saved_on_a_cpu, recipe)
    assert saved <= kept <= 1.03 * saved + 70_000


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_what_a_layer_keeps_can_be_counted_by_hand(elsewhere: Elsewhere, recompute: str) -> None:
    """In bytes per token; with the fused kernels of a GPU, whose norms keep their input and one number."""
    hidden, ffn, heads, kv_heads, head_dim = 256, 688, 4, 2, 64
    recipe = tiny(
        *(f"model.hidden_size={hidden}", f"model.ffn_hidden_size={ffn}", f"model.num_attention_heads={heads}"),
        *(f"model.num_query_groups={kv_heads}", f"training.recompute={recompute}"),
    )
    kv = kv_heads * head_dim
    bf16 = 4 * hidden + 3 * ffn  # two norms' inputs and outputs; both halves of SwiGLU's input, its output
    bf16 += (
        (heads * head_dim + 2 * kv) + (heads * head_dim + kv) + 3 * kv
    )  # qkv; rotated q and k; slots, their rotated keys
    bf16 += heads * head_dim  # attention's output
    bf16 += 2 * head_dim  # cosine and sine
    # Norms; omega, alpha, the merge logits and five weights of the pooling; log-sum-exps, unless attention runs again.
    fp32 = 2 + 8 * kv_heads + (heads if recompute == "none" else 0)
    one, two = (elsewhere(planning.footprint, recipe, "middle", count).kept for count in (1, 2))
    assert two - one == pytest.approx(128 * (2 * bf16 + 4 * fp32), rel=0.005)


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.recompute=none",),
        ("training.recompute=full",),
        ("training.train=adapter", "distillation.weight=1"),
        ("distillation.weight=1", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
    ],
    ids=["none", "full", "adapter-distilled", "teacher-TP2"],
)
def test_layers_add_up(elsewhere: Elsewhere, overrides: tuple[str, ...]) -> None:
    recipe = tiny(*overrides)
    whole, made = elsewhere(planning.run_whole, recipe), elsewhere(planning.footprint, recipe, "only", 4)
    assert made.kept == whole.kept
    assert made.sent == pytest.approx(whole.sent)
    assert made.working == pytest.approx(whole.working, rel=0.1)


@pytest.mark.parametrize("layout", [(), ("parallel.context_parallel_size=2",)], ids=["one-rank", "CP2"])
def test_absorbing_keeps_the_weights_of_tokens(elsewhere: Elsewhere, layout: tuple[str, ...]) -> None:
    """The residual slot's means are made again in the backward pass: a layer keeps no key or value more than evicting does."""
    evict, absorb = (
        elsewhere(planning.footprint, tiny(f"dmc.operation={operation}", "dmc.local_window=16", *layout), "middle", 2)
        for operation in ("evict", "absorb")
    )
    tokens, kv_heads = 2 * 128 // (2 if layout else 1), 2
    of_one = 4 * tokens * kv_heads  # a float32 number of every token and KV head
    assert 2 * of_one <= absorb.kept - evict.kept <= 2 * 5 * of_one
    assert absorb.working > evict.working


def test_a_teacher_and_an_adapter_count(elsewhere: Elsewhere) -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    alone = elsewhere(planning.stages, replace(tiny(), parallel=parallel), 2)
    taught = elsewhere(planning.stages, replace(tiny("distillation.weight=1"), parallel=parallel), 2)
    adapter = tiny("training.train=adapter", "distillation.weight=1")
    adapted = elsewhere(planning.stages, replace(adapter, parallel=parallel), 2)
    decisions = 2 * 2 * 4 * (64 + 1)
    for i in range(2):
        assert alone[i].teacher == adapted[i].teacher == 0
        assert taught[i].teacher == alone[i].parameters - 2 * decisions
        assert taught[i].gradients == alone[i].gradients
        assert (adapted[i].gradients, adapted[i].optimizer) == (4 * decisions, 12 * decisions)
    # Teacher and student travel side by side: one more message of 128 x 64 bf16 goes out, and is kept by each of two
    # micro-batches; on the last stage it comes in. There the comparison keeps its gradient by the bf16 logits, where the
    # language-model loss keeps probabilities in float32.
    message, logits = 2 * 128 * 64, 128 * 128
    assert taught[0].activations - alone[0].activations >= 2 * message
    assert message - 2 * logits <= taught[1].activations - alone[1].activations < message


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_context_parallelism_divides_activations(elsewhere: Elsewhere, recompute: str) -> None:
    """Gathered keys and values are not kept; where nothing is recomputed, a second copy of the values is."""
    recipe = tiny(f"training.recompute={recompute}")
    halves = replace(recipe, parallel=ParallelConfig(context_parallel_size=2))
    whole, half = (elsewhere(planning.footprint, one, "middle", 2).kept for one in (recipe, halves))
    assert half == pytest.approx(whole / 2, rel=0.01 if recompute == "full" else 0.07)


def test_gathered_keys_take_memory_however_many_ranks_share_a_sequence(elsewhere: Elsewhere) -> None:
    sizes = (
        "model.hidden_size=256",
        "model.num_query_groups=8",
        "model.ffn_hidden_size=16",
        # Every chunk is longer than the 128 tokens that a kernel's workspace is rounded up to.
        "data.sequence_length=4096",
        "model.max_position_embeddings=4096",
    )

    def working(exchange: str, ranks: int) -> float:
        """In bf16 tensors of a whole sample and all heads."""
        layout = (f"parallel.cp_comm_type={exchange}", f"parallel.context_parallel_size={ranks}")
        return elsewhere(planning.footprint, tiny(*sizes, *layout), "middle", 1).working / (4096 * 256 * 2)

    # Keys and values, raw and pooled: 4 in bf16, their gradients in float32, one of those in the ranks' order to be scattered.
    # On top of them, pooled keys and values and their gradients with 40 channels for 32, while a kernel reads the bias there.
    gathered = 2 * working("all_gather", 8) - working("all_gather", 4)
    assert 4 + 8 + 2 <= gathered <= 4 + 8 + 2 + 4
    # With the other exchange a rank holds a part of everything.
    assert working("a2a", 8) < 0.6 * working("a2a", 4)


@pytest.mark.parametrize("virtual", [None, 2, 4])
def test_warmup_is_megatrons(elsewhere: Elsewhere, virtual: int | None) -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=virtual)
    for stage in range(4):
        for micro_batches in (4, 16):
            ours = warmup(stage, 4, virtual or 1, micro_batches)
            assert ours == elsewhere(planning.megatrons_warmup, parallel, stage, micro_batches)


def test_micro_batches_in_flight() -> None:
    assert [most_kept([1], stage, 4, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [most_kept([1], stage, 4, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert most_kept([1], 0, 1, 8) == 1
    # Interleaved: 2 (p - 1) + (v - 1) p forward passes of half a stage first, and one more before the first backward pass.
    assert most_kept([1, 1], 0, 4, 16) == 11
    assert most_kept([1, 1], 3, 4, 16) == 5
    # The first chunk's share grows once more: its second round of four is complete before any of its first round leaves.
    assert most_kept([1, 0], 0, 4, 16) == 8


def test_calibrate_keeps_its_sums_in_place_of_activations(elsewhere: Elsewhere) -> None:
    """Per layer in float64: 2048 / 2 rows of 2048, 2048 x 2 products with this rank's KV heads, and the sums of both."""
    sizes = (
        "model.hidden_size=2048",
        "model.num_attention_heads=32",
        "training.train=adapter",
        "distillation.weight=1",
        "checkpoint.load_base=base",
    )
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    trained = replace(tiny(*sizes), parallel=parallel)
    (alone,) = elsewhere(planning.stages, trained, 2)
    calibrated = replace(trained, phases=(replace(trained.phases[0], kind="calibrate"),))
    (stage,) = elsewhere(planning.stages, calibrated, 2)
    sums = 4 * 8 * (1024 * 2048 + 2048 * 2 + 2048 + 2 + 1)
    assert alone.activations < sums
    assert stage == replace(alone, activations=sums)
