"""What is not a Megatron-LM checkpoint of a Llama, or is a damaged one: one line, nothing run, nothing written."""

import io
import os
import pathlib
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.from_megatron import import_megatron
from tests.support.megatron_files import SIZES, legacy, random_parameters, save

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


class Runs:
    """A pickle that runs a command where it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def refused(folder: Path, message: str, **settings: Any) -> None:
    """One line, with ``message`` in it, and the output is not there."""
    output = folder.parent / "output"
    with pytest.raises(ConfigError) as error:
        import_megatron(folder, output, **settings)
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert len(str(error.value)) < 500
    assert not output.exists() and not list(folder.parent.glob(".output*"))


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Saves a file anew, with other content."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("model", Runs("touch {}"), "posix.system"),
        ("args", Runs("touch {}"), "posix.system"),
        ("args", pathlib.PurePosixPath("a"), "pathlib"),
        # megatron-core allows it for its own files, in the whole process.
        ("beside", torch.serialization.LoadEndianness.LITTLE, "torch.serialization.LoadEndianness"),
        ("beside", Runs, "tests.convert.test_foreign_megatron.Runs"),
    ],
    ids=["model", "args", "path", "enumeration", "class"],
)
def test_no_other_class_is_loaded(tmp_path: Path, place: str, value: Any, named: str) -> None:
    trace = tmp_path / "trace"
    if isinstance(value, Runs):
        value.command = value.command.format(trace)
    path = save(tmp_path / "release")

    def change(content: dict[str, Any]) -> None:
        if place == "model":
            content["model"]["decoder.final_layernorm._extra_state"] = value
        elif place == "args":
            content["args"].data_path = value
        else:
            content[place] = value

    changed(path, change)
    refused(tmp_path / "release", f"{path} holds {named}")
    assert not trace.exists()


def test_what_others_have_allowed_is_not_allowed_here_and_stays_allowed_there(tmp_path: Path) -> None:
    path = save(tmp_path / "release")
    changed(path, lambda content: content.update(other=pathlib.PosixPath("a")))
    with torch.serialization.safe_globals([pathlib.PosixPath]):
        before = set(torch.serialization.get_safe_globals())
        assert pathlib.PosixPath in before
        refused(
            tmp_path / "release",
            "holds pathlib.PosixPath, which the reading of a model does not need; nothing of it was run",
        )
        assert set(torch.serialization.get_safe_globals()) == before


def _drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["model"].pop(name)


def _put(name: str, value: torch.Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["model"].update({name: value})


def _argument(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: setattr(content["args"], name, value)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no args": (lambda content: content.pop("args"), "holds no args, which tell the model's sizes"),
    "args of another kind": (lambda content: content.update(args={"num_layers": 2}), "holds no args"),
    "no model": (lambda content: content.pop("model"), "holds no model; fetch it again"),
    "interleaved": (lambda content: content.update(model0=content.pop("model")), "an interleaved pipeline"),
    "model in itself": (lambda content: content["model"].update(a=content["model"]), "holds a model without end"),
    "missing": (_drop(QKV), f"missing from the weights: {QKV}; fetch it again"),
    "extra": (_put("decoder.layers.2.x", torch.ones(2)), "but not in the model: decoder.layers.2.x; this model"),
    "both spellings": (
        _put("decoder.layers.0.input_layernorm.weight", torch.ones(32)),
        "not in the model: decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
    ),
    "wrong shape": (_put(QKV, torch.ones(64, 31)), f"{QKV} has shape [64, 31], its args ask for [64, 32]"),
    "integers": (_put(QKV, torch.ones(64, 32, dtype=torch.int32)), f"{QKV} is torch.int32; only floating-point"),
    "sparse": (_put(QKV, torch.ones(64, 32).to_sparse()), f"missing from the weights: {QKV}"),
    "NaN": (_put(QKV, torch.full((64, 32), float("nan"))), f"{QKV} is not finite everywhere; it is damaged"),
    "more layers": (_argument("num_layers", 3), "missing from the weights: decoder.layers.2.input_layernorm.weight, "),
    "fewer layers": (_argument("num_layers", 1), "but not in the model: decoder.layers.1."),
    "another vocabulary": (_argument("padded_vocab_size", 320), "has shape [304, 32], its args ask for [320, 32]"),
    "no size": (_argument("hidden_size", None), "hidden_size must be a whole number >= 1, got None"),
    "a size that is a tensor": (
        _argument("hidden_size", torch.ones(3)),
        "hidden_size must be a whole number >= 1, got",
    ),
    "a word that is a tensor": (_argument("swiglu", torch.ones(3)), "swiglu is a Tensor"),
    "boundless": (_argument("num_layers", 10**9), "num_layers must be <= 2048"),
    "learned positions": (
        _argument("position_embedding_type", "learned_absolute"),
        "position_embedding_type 'learned_absolute' is not supported; only 'rope' is",
    ),
    "experts": (_argument("num_experts", 8), "num_experts 8 is not supported; only None is"),
    "scaled positions": (_argument("use_rope_scaling", True), "use_rope_scaling True is not supported"),
    "first stage": (_argument("dmc_is_stage_one", True), "dmc_is_stage_one is set: "),
    "no window": (_argument("dmc_window_size", -1), "dmc_window_size must be a number of tokens, got -1"),
    "no epsilon": (lambda content: delattr(content["args"], "norm_epsilon"), "layernorm_epsilon must be a number > 0"),
    "ranks that are not there": (_argument("tensor_model_parallel_size", 2), "there are 1 mp_rank folders"),
    "pipeline": (_argument("pipeline_model_parallel_size", 2), "pipeline_model_parallel_size 2 is not supported"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_does_not_fit(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    changed(save(tmp_path / "release"), change)
    refused(tmp_path / "release", message)


def test_files_that_are_damaged(tmp_path: Path) -> None:
    path = save(tmp_path / "release")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(
        tmp_path / "release", f"{path} is no whole file of torch.save: cut short, or of another format; fetch it again"
    )
    path.write_bytes(pickle.dumps({"args": 1}))
    refused(tmp_path / "release", f"{path} is no whole file of torch.save")
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    path.write_bytes(buffer.getvalue())
    refused(tmp_path / "release", f"{path} holds no Megatron-LM checkpoint")
    # The pickle inside the zip, cut in two.
    middle = whole.index(b"checkpoint_version")
    path.write_bytes(whole[:middle] + b"\0" * 200 + whole[middle + 200 :])
    refused(tmp_path / "release", f"{path} ")
    path.unlink()
    refused(tmp_path / "release", f"{path} does not exist; name the folder of a Megatron-LM checkpoint")


def test_folders_that_do_not_say_which(tmp_path: Path) -> None:
    release = tmp_path / "release"
    refused(release, "release does not exist; name the folder of a Megatron-LM checkpoint")
    release.mkdir()
    refused(release, "release holds no mp_rank_00/model_optim_rng.pt")
    save(release / "iter_0000001")
    save(release / "iter_0000002")
    refused(release, "holds several iterations (iter_0000001, iter_0000002) and no latest_checkpointed_iteration.txt")
    (release / "latest_checkpointed_iteration.txt").write_text("3")
    refused(release, "latest_checkpointed_iteration.txt names '3', which is not there")
    (release / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    refused(release, "latest_checkpointed_iteration.txt names '../elsewhere', which is not there")
    save(release)
    refused(release, "holds weights of its own and iter_0000001")


def test_folders_of_ranks_that_are_not_joined(tmp_path: Path) -> None:
    release = tmp_path / "release"
    save(release, ranks=2)
    (release / "mp_rank_00").rename(release / "mp_rank_02")
    refused(release, "holds mp_rank_01, mp_rank_02, and others are missing; fetch the checkpoint again")
    (release / "mp_rank_01").rename(release / "mp_rank_00_001")
    refused(release, "mp_rank_00_001: pipeline stages and experts are not joined")
    distributed = tmp_path / "distributed"
    (distributed / "iter_0000001").mkdir(parents=True)
    (distributed / "iter_0000001" / ".metadata").touch()
    refused(
        distributed, "is a distributed checkpoint (torch_dist), which is not read; save it with --ckpt-format torch"
    )


def test_ranks_that_disagree(tmp_path: Path) -> None:
    save(tmp_path / "release", ranks=2)
    other = tmp_path / "release" / "mp_rank_01" / "model_optim_rng.pt"
    changed(other, lambda content: content["model"]["decoder.final_layernorm.weight"].add_(1))
    refused(tmp_path / "release", "the ranks hold different decoder.final_layernorm.weight")


def test_an_old_order_of_rows_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "release", form=legacy)
    changed(path, lambda content: content.update(checkpoint_version=1.0))
    refused(tmp_path / "release", "has checkpoint_version 1.0; 2.0 and newer are read")


def test_a_tokenizer_of_another_model(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    small = replace(SIZES, vocab_size=100)
    save(tmp_path / "release", random_parameters(small), padded_vocab_size=100)
    refused(tmp_path / "release", "its model 100", tokenizer=save_llama())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("window_size", (8, 0), "window_size is a tuple"),
        ("num_experts", [8], "num_experts is a list"),
        ("dmc_is_stage_one", [1], "dmc_is_stage_one is a list"),
        ("no_rope_freq", 4, "no_rope_freq 4 is not supported"),
        ("qk_l2_norm", True, "qk_l2_norm True is not supported"),
        ("softmax_type", "off-by-one", "softmax_type 'off-by-one' is not supported"),
        ("apply_residual_connection_post_layernorm", True, "apply_residual_connection_post_layernorm True"),
        ("glu_linear_offset", 1.0, "glu_linear_offset 1.0 is not supported"),
        ("rotary_base", 10**400, "rotary_base must be a number > 0"),
        ("tensor_model_parallel_size", torch.ones(2), "tensor_model_parallel_size is tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_arguments_that_make_another_model(tmp_path: Path, name: str, value: Any, message: str) -> None:
    save(tmp_path / "release", **{name: value})
    refused(tmp_path / "release", message)


def test_a_byte_that_is_not_what_was_written(tmp_path: Path) -> None:
    """Every weight is still finite: only the sum of the record tells."""
    path = save(tmp_path / "release")
    data = bytearray(path.read_bytes())
    place = data.index(random_parameters()["embedding.word_embeddings.weight"].view(torch.uint8).numpy().tobytes()[:64])
    data[place : place + 64] = bytes(64)
    path.write_bytes(data)
    refused(tmp_path / "release", "is damaged, or was saved without checksums (")


def test_a_float8_weight_among_others(tmp_path: Path) -> None:
    path = save(tmp_path / "release")

    def narrow(content: dict[str, Any]) -> None:
        content["model"][QKV] = content["model"][QKV].to(torch.float8_e4m3fn)

    changed(path, narrow)
    refused(tmp_path / "release", "only floating-point weights are supported")


def test_ranks_that_do_not_belong_together(tmp_path: Path) -> None:
    def copied(change: Callable[[dict[str, Any]], Any]) -> Path:
        folder = tmp_path / f"of-{len(list(tmp_path.iterdir()))}"
        save(folder, ranks=2)
        changed(folder / "mp_rank_01" / "model_optim_rng.pt", change)
        return folder

    refused(copied(lambda content: content.update(iteration=1)), "differ in iteration")
    refused(copied(lambda content: setattr(content["args"], "dmc_init_val", 3.0)), "differ in dmc_init_val")
    folder = tmp_path / "twice"
    first = save(folder, ranks=2)
    (folder / "mp_rank_01" / "model_optim_rng.pt").write_bytes(first.read_bytes())
    refused(folder, "two ranks hold the same part of")
    folder = tmp_path / "swapped"
    save(folder, ranks=2)
    for rank in range(2):
        path = folder / f"mp_rank_{rank:02}" / "model_optim_rng.pt"
        changed(path, lambda content, rank=rank: setattr(content["args"], "rank", 1 - rank))
    refused(folder, "was saved by rank 1")


def test_ours_and_hugging_faces_are_told_apart(tmp_path: Path) -> None:
    for name, message in (("dmc.json", "already; use it as it is"), ("config.json", "megatron-dmc convert-from-hf")):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).write_text("{}")
        refused(folder, message)


def test_a_weight_that_is_there_twice(tmp_path: Path) -> None:
    path = save(tmp_path / "release")
    norm = "decoder.final_layernorm.weight"
    changed(path, lambda content: content["model"].update({"decoder": {"final_layernorm.weight": torch.zeros(32)}}))
    refused(tmp_path / "release", f"the model holds {norm} twice")


def test_an_iteration_that_is_a_tensor(tmp_path: Path) -> None:
    """It cannot be compared, and says nothing: both ranks are of one run by all that can be read."""
    folder = tmp_path / "release"
    save(folder, ranks=2)
    for rank in range(2):
        changed(
            folder / f"mp_rank_{rank:02}" / "model_optim_rng.pt",
            lambda content: content.update(iteration=torch.ones(2)),
        )
    import_megatron(folder, tmp_path / "output")
    assert (tmp_path / "output" / "dmc.json").is_file()
