"""A model there and back: the same logits, the same bits, and refusals that leave nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megatron_dmc.checkpoint import CheckpointError, SavedModel
from megatron_dmc.config import ConfigError, DMCConfig
from megatron_dmc.convert.families import FAMILIES
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.to_checkpoint import placeholder_recipe
from megatron_dmc.convert.to_hf import export_hf
from megatron_dmc.model.model_config import ModelConfig
from megatron_dmc.recipe import recipe_from_dict
from tests.support.llama3_rotary import LLAMA3
from tests.support.llamas import TOKENS, load_megatron, megatron_logits
from tests.support.tensors import assert_same_tensors, hugging_face_tensors

LLAMAS: dict[str, dict[str, Any]] = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 4},
    "MQA": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3},
    "wide-heads": {"head_dim": 16},
    "mistral": {"family": "mistral", "head_dim": 16},
    "qwen2": {"family": "qwen2"},
    "qwen2-tied-MHA": {"family": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"family": "qwen3"},
    "qwen3-tied": {"family": "qwen3", "tie_word_embeddings": True, "vocab_size": 301},
}


@pytest.fixture(params=LLAMAS, ids=list(LLAMAS))
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return LLAMAS[request.param]


def test_both_models_compute_the_same(
    save_llama: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_llama(**settings)
    import_hf(folder, tmp_path / "megatron")
    expected = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(megatron_logits(load_megatron(tmp_path / "megatron")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_there_and_back_keeps_every_bit(
    save_llama: Callable[..., Path], settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_llama(**settings, dtype=dtype)
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf", max_shard_size=20_000)
    import_hf(tmp_path / "hf", tmp_path / "again")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert_same_tensors(hugging_face_tensors(tmp_path / "hf"), hugging_face_tensors(folder))
    first, second = (dict(load_megatron(tmp_path / name, dtype).named_parameters()) for name in ("megatron", "again"))
    assert_same_tensors(first, second)
    assert next(iter(first.values())).dtype == dtype
    assert SavedModel.open(tmp_path / "megatron").info == SavedModel.open(tmp_path / "again").info


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_folder_is_a_plain_model(save_llama: Callable[..., Path], family: str, tmp_path: Path) -> None:
    folder = save_llama(family=family, bos_token_id=1, eos_token_id=2)
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("*.py"))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "hf"))
    assert type(after).__name__ == FAMILIES[family].architecture
    # All that the base's own configuration says is kept.
    kept, said = after.config.to_dict(), before.config.to_dict()
    assert {name for name, value in said.items() if kept[name] != value} == {"_name_or_path"}
    # Byte by byte: transformers itself would have written the same file.
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert torch.equal(before(TOKENS).logits, after(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("one text").input_ids
    # From the base's generation_config.json, not the tokenizer's <|endoftext|>, which is 0.
    assert before.generation_config.eos_token_id == 2
    assert after.generation_config.eos_token_id == before.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, (0, 0)),  # the tokenizer's
        (None, {"eos_token_id": [5, 6], "bos_token_id": 4}, ([5, 6], 4)),
        (None, {"bos_token_id": 4}, (0, 4)),
        ({"temperature": 0.6, "do_sample": True}, {"eos_token_id": 5, "bos_token_id": 4}, (5, 4)),
        ({"eos_token_id": 7}, {"eos_token_id": 5, "bos_token_id": 4}, (7, 4)),
    ],
    ids=["tokenizer", "config", "config-bos", "config-and-generation", "generation-first"],
)
def test_end_tokens_are_kept_whichever_file_names_them(
    save_llama: Callable[..., Path],
    tmp_path: Path,
    generation: dict[str, Any] | None,
    config: dict[str, Any],
    expected: tuple[Any, Any],
) -> None:
    folder = save_llama()
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    content = json.loads((folder / "config.json").read_text())
    del content["eos_token_id"], content["bos_token_id"]
    (folder / "config.json").write_text(json.dumps(content | config))
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "hf" / name).read_text())
        assert (content["eos_token_id"], content["bos_token_id"]) == expected
    assert content.get("temperature") == (generation or {}).get("temperature")


def test_a_model_without_a_tokenizer(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama(eos_token_id=None, bos_token_id=None)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None
    LlamaForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_export_in_another_dtype(save_llama: Callable[..., Path], dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_llama(dtype=torch.float16)
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf", dtype=dtype)
    assert_same_tensors(
        hugging_face_tensors(tmp_path / "hf"),
        {name: tensor.to(dtype) for name, tensor in hugging_face_tensors(folder).items()},
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype


def test_values_that_the_asked_dtype_cannot_hold(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 3.4e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    import_hf(folder, tmp_path / "megatron")
    with pytest.raises(ConfigError, match=r"has values that torch\.bfloat16 cannot hold; ask for another --dtype"):
        export_hf(tmp_path / "megatron", tmp_path / "hf", dtype=torch.bfloat16)
    assert not (tmp_path / "hf").exists()


def test_extra_tensors_of_older_transformers_are_left_out(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama(tie_word_embeddings=True)
    saved = load_file(folder / "model.safetensors")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": saved["model.embed_tokens.weight"].clone(),
    }
    save_file(saved | extra, folder / "model.safetensors")
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    assert_same_tensors(hugging_face_tensors(tmp_path / "hf"), saved)


def test_an_imported_llama_is_a_base(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    import_hf(save_llama(), tmp_path / "megatron")
    saved = SavedModel.open(tmp_path / "megatron")
    assert (saved.info.kind, saved.info.step, saved.info.compression_ratio) == ("weights", 0, None)
    assert not saved.merges and saved.dmc is None
    assert (tmp_path / "megatron" / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_exists_is_not_overwritten(save_llama: Callable[..., Path], tmp_path: Path, there: str) -> None:
    folder, output = save_llama(), tmp_path / "output"
    if there == "file":
        output.write_text("mine")
    elif there == "link":
        output.symlink_to(tmp_path / "elsewhere")
    else:
        output.mkdir()
        (output / "mine").touch()
    for convert in (import_hf, export_hf):
        with pytest.raises(ConfigError, match="output exists"):
            convert(folder, output)
    assert output.is_symlink() or (output.read_text() == "mine" if output.is_file() else (output / "mine").exists())


def test_an_empty_folder_is_filled(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    import_hf(save_llama(), tmp_path / "megatron")
    SavedModel.open(tmp_path / "megatron")


def test_a_failed_conversion_leaves_nothing(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        import_hf(folder, tmp_path / "megatron")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_exceeds_the_vocabulary(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens, its model 100; put the model's own tokenizer there, or resize"):
        import_hf(save_llama(vocab_size=100), tmp_path / "megatron")


def test_weights_that_are_not_finite(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight is not finite everywhere; .* fetch it again"
    ):
        import_hf(folder, tmp_path / "megatron")
    assert not list(tmp_path.iterdir())


def test_a_damaged_generation_config_is_found_before_the_training(
    save_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder, checkpoint = save_llama(), tmp_path / "megatron"
    import_hf(folder, checkpoint)
    for path in (folder, checkpoint / "tokenizer"):
        (path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=f"{folder}/generation_config.json is not JSON"):
        import_hf(folder, tmp_path / "again")
    # The message names the file to mend, not its copy.
    with pytest.raises(ConfigError, match=f"{checkpoint}/tokenizer/generation_config.json is not JSON"):
        export_hf(checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_weights_of_another_size(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama()
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 2048}, "missing from the weights: model.layers.2"),
        ({"num_hidden_layers": 10**9}, "model.num_layers must be <= 2048, got 1000000000"),
        ({"num_hidden_layers": 1}, "in the weights, but not in the model: model.layers.1"),
        ({"intermediate_size": 64}, r"gate_proj.weight has shape \[48, 32\], config.json asks for \[64, 32\]"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=message):
            import_hf(folder, tmp_path / "megatron")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "qwen2",
            "-model.layers.1.self_attn.k_proj.bias",
            "missing from the weights: model.layers.1.self_attn.k_proj.bias",
        ),
        (
            "qwen3",
            "-model.layers.0.self_attn.q_norm.weight",
            "missing from the weights: model.layers.0.self_attn.q_norm",
        ),
        (
            "qwen2",
            "+model.layers.0.self_attn.o_proj.bias",
            "in the weights, but not in the model: model.layers.0.self_attn.o",
        ),
        (
            "llama",
            "+model.layers.0.self_attn.q_norm.weight",
            "in the weights, but not in the model: model.layers.0.self_attn.q",
        ),
        (
            "mistral",
            "+model.layers.0.self_attn.v_proj.bias",
            "in the weights, but not in the model: model.layers.0.self_attn.v",
        ),
    ],
)
def test_tensors_that_are_another_familys(
    save_llama: Callable[..., Path], tmp_path: Path, family: str, change: str, message: str
) -> None:
    folder = save_llama(family=family)
    tensors = load_file(folder / "model.safetensors")
    if change[0] == "-":
        del tensors[change[1:]]
    else:
        tensors[change[1:]] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message) as error:
        import_hf(folder, tmp_path / "megatron")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim", [12, 264])
def test_heads_that_no_kernel_has(save_llama: Callable[..., Path], tmp_path: Path, family: str, head_dim: int) -> None:
    with pytest.raises(
        ConfigError, match=f"must be a multiple of 8 and <= 256, got {head_dim}: .*; such a model cannot be used"
    ):
        import_hf(save_llama(family=family, head_dim=head_dim), tmp_path / "megatron")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "megatron"
    import_hf(save_llama(), checkpoint)
    data = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        export_hf(checkpoint, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="does not exist"):
        export_hf(tmp_path / "nowhere", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_the_placeholder_recipe_passes_the_checks() -> None:
    model = ModelConfig(2, 32, 48, 4, 2, 300, 128)
    for dmc in (None, DMCConfig(decision_source="neuron")):
        recipe = placeholder_recipe(model, dmc)
        assert recipe_from_dict(recipe.to_dict()) == recipe
        assert recipe.merges == (dmc is not None)
