"""A vocabulary that tensor parallelism cannot divide is padded at conversion: every true token stays what it was."""

import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.from_hf import import_hf, pad_vocabulary
from megatron_dmc.convert.to_hf import export_hf
from megatron_dmc.convert.weights import Weights
from megatron_dmc.recipe import recipe_from_dict
from tests.support.processes import ROOT

TOKENS = torch.arange(2 * 37).mul(7).remainder(301).reshape(2, 37)
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_there_and_back(save_llama: Callable[..., Path], tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    folder = save_llama(vocab_size=301, tie_word_embeddings=tied, dtype=dtype)
    import_hf(folder, tmp_path / "megatron", pad_vocab_to_multiple_of=8)
    assert SavedModel.open(tmp_path / "megatron").recipe.model.vocab_size == 304
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 304
    before, after = Weights(folder), Weights(tmp_path / "hf")
    assert before.shapes.keys() == after.shapes.keys() and after.dtype == dtype
    for name in before.shapes:
        assert torch.equal(after[name][:301] if name in VOCABULARY else after[name], before[name]), name


def test_no_added_token_wins(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama(vocab_size=301)
    import_hf(folder, tmp_path / "megatron", pad_vocab_to_multiple_of=64)
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    plain, padded = LlamaForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected, found = plain(TOKENS, labels=TOKENS), padded(TOKENS, labels=TOKENS)
    assert found.logits.shape[-1] == 320
    torch.testing.assert_close(found.logits[..., :301], expected.logits, rtol=0, atol=1e-5)
    mean = expected.logits.mean(-1, keepdim=True).expand(-1, -1, 19)
    torch.testing.assert_close(found.logits[..., 301:], mean, rtol=0, atol=1e-5)
    assert 0 < found.loss - expected.loss < math.log(1 + 19 / 301)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(padded.generate(TOKENS, **options), plain.generate(TOKENS, **options))


def test_zeros_would_win() -> None:
    """Where all logits are negative, which the mean outlives."""
    weight = torch.full((5, 4), -1.0) + torch.eye(5, 4)
    hidden = torch.ones(4)
    assert (weight @ hidden).max() < 0
    assert int((pad_vocabulary(weight, 3) @ hidden).argmax()) < 5


def test_a_vocabulary_that_fits_stays(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama(vocab_size=304)
    import_hf(folder, tmp_path / "one")
    import_hf(folder, tmp_path / "other", pad_vocab_to_multiple_of=16)
    assert SavedModel.open(tmp_path / "one").info == SavedModel.open(tmp_path / "other").info


def test_added_tokens_are_no_tokens_of_the_folder(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama(vocab_size=301)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 302}))
    with pytest.raises(ConfigError, match="pad_token_id must be null or a token of the model, 0 to 300"):
        import_hf(folder, tmp_path / "megatron", pad_vocab_to_multiple_of=8)
    with pytest.raises(ConfigError, match="vocab_size is 100"):
        import_hf(save_llama(vocab_size=100), tmp_path / "megatron", pad_vocab_to_multiple_of=512)


def test_the_tool_and_the_message_that_names_it(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    import_hf(save_llama(vocab_size=301), tmp_path / "base")
    recipe = SavedModel.open(tmp_path / "base").info.recipe
    recipe["parallel"]["tensor_model_parallel_size"] = 2
    with pytest.raises(ConfigError) as error:
        recipe_from_dict(recipe)
    for part in ("tools/hf_to_megatron.py --pad-vocab-to-multiple-of 2", "set it to 302"):
        assert part in str(error.value)
    main = runpy.run_path(str(ROOT / "tools" / "hf_to_megatron.py"))["main"]
    folder = str(save_llama(vocab_size=301))
    assert main([folder, str(tmp_path / "padded"), "--pad-vocab-to-multiple-of", "2"]) == 0
    assert SavedModel.open(tmp_path / "padded").info.recipe["model"]["vocab_size"] == 302
    recipe["model"]["vocab_size"] = 302
    recipe_from_dict(recipe)


@pytest.mark.parametrize("multiple", [0, -8])
def test_a_multiple_that_is_none(
    save_llama: Callable[..., Path], tmp_path: Path, multiple: int, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "tools" / "hf_to_megatron.py"))["main"]
    assert main([str(save_llama()), str(tmp_path / "megatron"), f"--pad-vocab-to-multiple-of={multiple}"]) == 1
    assert f"pad_vocab_to_multiple_of must be an integer >= 1, got {multiple}\n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
