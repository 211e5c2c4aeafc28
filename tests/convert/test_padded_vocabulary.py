"""A vocabulary that tensor parallelism cannot divide is padded: every true token stays what it was, and an export's own."""

import json
import math
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_dmc.checkpoint import SavedModel
from megatron_dmc.checkpoint.vocabulary import fill_added_rows
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.to_hf import export_adapter, export_hf
from megatron_dmc.convert.weights import Weights
from megatron_dmc.inference.generate import generate
from megatron_dmc.inference.loading import load_model
from megatron_dmc.recipe import recipe_from_dict
from tests.support.llamas import TOKENS, load_megatron, megatron_logits
from tests.support.processes import ROOT, run
from tests.support.toy import recipe_values, train, write_recipe, write_text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_there_and_back(save_llama: Callable[..., Path], tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    folder = save_llama(vocab_size=301, tie_word_embeddings=tied, dtype=dtype)
    import_hf(folder, tmp_path / "megatron", pad_vocab_to_multiple_of=8)
    saved = SavedModel.open(tmp_path / "megatron")
    assert (saved.recipe.model.vocab_size, saved.vocabulary) == (304, 301)
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 301
    before, after = Weights(folder), Weights(tmp_path / "hf")
    assert before.shapes == after.shapes and after.dtype == dtype
    for name in before.shapes:
        assert torch.equal(after[name], before[name]), name


def test_no_added_token_wins(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama(vocab_size=301)
    import_hf(folder, tmp_path / "megatron", pad_vocab_to_multiple_of=64)
    plain = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected, found = plain(TOKENS).logits, megatron_logits(load_megatron(tmp_path / "megatron"))
    assert found.shape[-1] == 320
    torch.testing.assert_close(found[..., :301], expected, rtol=0, atol=1e-5)
    mean = expected.mean(-1, keepdim=True).expand(-1, -1, 19)
    torch.testing.assert_close(found[..., 301:], mean, rtol=0, atol=1e-5)
    rise = found.logsumexp(-1) - expected.logsumexp(-1)
    assert bool((rise > 0).all()) and float(rise.max()) < math.log(1 + 19 / 301)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets, and a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    write_text(folder)
    return folder


def retrofit(texts: Path, folder: Path, base: Path, train_: str, vocab_size: int, steps: int = 3) -> Path:
    """The last checkpoint of a short run from a base."""
    values = recipe_values(texts, folder, [{"kind": "compress", "steps": steps, "lr": 5e-3}], decision_bias=0.0)
    values["model"] = {"vocab_size": vocab_size}
    values["checkpoint"]["load_base"] = str(base)
    values["training"]["train"] = train_
    train(write_recipe(folder, values))
    return folder / "checkpoints" / "final"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("multiple", [1, 64], ids=["padded when loaded", "padded when converted"])
def test_an_adapter_of_a_padded_base_is_one_of_the_original(
    save_llama: Callable[..., Path], texts: Path, tmp_path: Path, multiple: int
) -> None:
    folder = save_llama(vocab_size=301)
    import_hf(folder, tmp_path / "base", pad_vocab_to_multiple_of=multiple)
    final = retrofit(texts, tmp_path / "run", tmp_path / "base", "adapter", 320)
    export_adapter(final, tmp_path / "adapter")
    export_hf(final, tmp_path / "merged")
    load = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
    joined, merged = load(tmp_path / "adapter", base=folder), load(tmp_path / "merged")
    assert merged.config.vocab_size == joined.config.vocab_size == 301
    assert torch.equal(logits(joined), logits(merged))
    trained = megatron_logits(load_megatron(final))
    assert trained.shape[-1] == 320
    torch.testing.assert_close(logits(joined), trained[..., :301], rtol=0, atol=1e-5)
    # It decides: its logits are not the plain model's.
    assert not torch.allclose(logits(joined), logits(LlamaForCausalLM.from_pretrained(folder)), atol=1e-2)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(joined.generate(TOKENS, **options), merged.generate(TOKENS, **options))


def test_a_retrofit_of_a_retrofit_knows_the_first_bases_tokens(
    save_llama: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    folder = save_llama(vocab_size=301)
    import_hf(folder, tmp_path / "base")
    first = retrofit(texts, tmp_path / "first", tmp_path / "base", "full", 304)
    second = retrofit(texts, tmp_path / "second", first, "full", 320)
    for checkpoint in (first, second):
        assert SavedModel.open(checkpoint).vocabulary == 301
    export_hf(second, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    trained = megatron_logits(load_megatron(second))
    torch.testing.assert_close(logits(exported), trained[..., :301], rtol=0, atol=1e-5)


def test_tokens_that_the_runs_tokenizer_adds_are_exported(
    save_llama: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    """They are no padding: text has them, and full training teaches them."""
    folder = save_llama(vocab_size=298)
    import_hf(folder, tmp_path / "base")
    final = retrofit(texts, tmp_path / "run", tmp_path / "base", "full", 304)
    export_hf(final, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 300
    adapter = retrofit(texts, tmp_path / "adapter", tmp_path / "base", "adapter", 300)
    # Its base lacks the last two: they are there as the run had them.
    export_hf(adapter, tmp_path / "merged")
    trained = load_megatron(adapter).get_parameter("embedding.word_embeddings.weight")
    assert torch.equal(Weights(tmp_path / "merged")["model.embed_tokens.weight"], trained) and bool(trained[298:].any())
    with pytest.raises(ConfigError, match=r"has 300 tokens, its base 298: .*; export it without --adapter"):
        export_adapter(adapter, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    # Where the base has gone, the loader says it.
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    export_adapter(adapter, tmp_path / "alone")
    with pytest.raises(ValueError, match="its vocab_size is 298, the adapter's is 300"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "alone", base=folder, trust_remote_code=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_generation_never_takes_a_row_that_pads(
    save_llama: Callable[..., Path], texts: Path, tmp_path: Path, temperature: float
) -> None:
    """Not even after a training that has made one of them likely."""
    import_hf(save_llama(vocab_size=301), tmp_path / "base")
    loaded = load_model(retrofit(texts, tmp_path / "run", tmp_path / "base", "full", 304, steps=1))
    with torch.no_grad():
        loaded.model.output_layer.weight[301:] = loaded.model.output_layer.weight[:301].mean(0) * -50
        loaded.model.output_layer.weight[302:] *= -1
    assert int(megatron_logits(loaded.model).argmax(-1).max()) > 300
    seed = torch.Generator().manual_seed(0)
    made = torch.stack(list(generate(loaded, TOKENS, 20, temperature=temperature, generator=seed)))
    assert int(made.max()) < 301


def test_zeros_would_win() -> None:
    """Where all logits are negative, which the mean outlives."""
    model = torch.nn.Module()
    model.output_layer = torch.nn.Linear(4, 8, bias=False)
    hidden = torch.ones(4)
    with torch.no_grad():
        model.output_layer.weight[:5] = torch.full((5, 4), -1.0) + torch.eye(5, 4)
        assert float(model.output_layer(hidden)[:5].max()) < 0
        fill_added_rows([model], 5)
        assert int(model.output_layer(hidden).argmax()) < 5


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
    with pytest.raises(ConfigError, match="its model 100; "):
        import_hf(save_llama(vocab_size=100), tmp_path / "megatron", pad_vocab_to_multiple_of=512)


def test_padding_at_conversion_and_the_message_that_names_it(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    import_hf(save_llama(vocab_size=301), tmp_path / "base")
    recipe = SavedModel.open(tmp_path / "base").info.recipe
    recipe["parallel"]["tensor_model_parallel_size"] = 2
    with pytest.raises(ConfigError) as error:
        recipe_from_dict(recipe)
    for part in ("megatron-dmc convert-from-hf --pad-vocab-to-multiple-of 2", "set it to 302"):
        assert part in str(error.value)
    main = runpy.run_path(str(ROOT / "tools" / "hf_to_megatron.py"))["main"]
    folder = str(save_llama(vocab_size=301))
    assert main([folder, str(tmp_path / "padded"), "--pad-vocab-to-multiple-of", "2"]) == 0
    assert SavedModel.open(tmp_path / "padded").info.recipe["model"]["vocab_size"] == 302
    recipe["model"]["vocab_size"] = 302
    recipe_from_dict(recipe)


@pytest.mark.parametrize("multiple", ["0", "-8", "1025", "1000000000000", "1e12", "1e23", "8.0", "9" * 5000])
def test_a_multiple_that_is_none(tmp_path: Path, multiple: str) -> None:
    """Refused by the flag itself: the folder is not looked at, and torch is not loaded."""
    program = (
        "import sys; from megatron_dmc.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    )
    flag = f"--pad-vocab-to-multiple-of={multiple}"
    done = run("-c", program, "convert-from-hf", tmp_path / "nowhere", tmp_path / "megatron", flag)
    assert (done.returncode, done.stdout) == (2, "False\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("megatron-dmc convert-from-hf: argument --pad-vocab-to-multiple-of: must be a whole ")
    assert f"from 1 to 1024, such as the tensor-parallel size, got '{multiple:.40}" in line and len(line) < 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("multiple", [0, -8, 1025, 10**23])
def test_a_multiple_that_is_none_in_a_program(tmp_path: Path, multiple: int) -> None:
    with pytest.raises(ConfigError, match=rf"pad_vocab_to_multiple_of must be from 1 to 1024, got {multiple}$"):
        import_hf(tmp_path / "nowhere", tmp_path / "megatron", pad_vocab_to_multiple_of=multiple)
