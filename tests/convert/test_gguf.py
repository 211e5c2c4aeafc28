"""A GGUF file becomes the model that it was written from, or is refused in one line before anything is written."""

import importlib.util
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dmc.convert.gguf import check_gguf, import_gguf
from megatron_dmc.data.tokenizer import load_tokenizer, train_tokenizer
from tests.support.gguf_files import write_gguf
from tests.support.llamas import TOKENS, load_megatron, megatron_logits, save_random_base
from tests.support.processes import PRODUCT, run
from tests.support.texts import fails
from tests.support.toy import TEXT


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_random_base(folder, tie_word_embeddings=True)
    train_tokenizer(TEXT, 300, folder)
    return folder


@pytest.fixture(scope="module")
def gguf(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(llama, file)
    return file


def test_the_model_and_its_tokenizer_come_through(llama: Path, gguf: Path, tmp_path: Path) -> None:
    done = run(*PRODUCT, "convert-from-hf", gguf, tmp_path / "base")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'base'}: converted from {gguf}; ")
    assert not done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
    network = load_megatron(tmp_path / "base")
    torch.testing.assert_close(megatron_logits(network), expected, rtol=1e-4, atol=1e-4)
    before, after = load_tokenizer(llama), load_tokenizer(tmp_path / "base" / "tokenizer")
    assert after.tokenize("The cat sat on the mat; 42.") == before.tokenize("The cat sat on the mat; 42.")
    assert after.eod == before.eod


def test_another_architecture(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "other.gguf", architecture="qwen2")
    fails(
        r"other\.gguf: architecture 'qwen2' is not supported; only llama is",
        import_gguf,
        tmp_path / "other.gguf",
        tmp_path / "out",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_truncated_file(gguf: Path, tmp_path: Path, kept: float) -> None:
    content = gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(kept * len(content))])
    fails(
        r"cut\.gguf is no whole GGUF file \(.+\); fetch it again",
        import_gguf,
        tmp_path / "cut.gguf",
        tmp_path / "out",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_what_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("a text of some length, which is no model at all" * 9)
    fails(r"text\.gguf is no whole GGUF file", check_gguf, tmp_path / "text.gguf")
    fails(r"nothing\.gguf does not exist; name a GGUF file", check_gguf, tmp_path / "nothing.gguf")


def test_scaled_frequencies_are_refused_not_left_out(llama: Path, tmp_path: Path) -> None:
    """transformers' reader drops the tensor in silence: the model would be another one."""
    write_gguf(llama, tmp_path / "a.gguf", more={"rope_freqs.weight": numpy.ones(4, numpy.float32)})
    fails(r"scaled rotary frequencies \(rope_freqs.weight\) are not read", check_gguf, tmp_path / "a.gguf")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    save_random_base(tmp_path / "llama", tie_word_embeddings=True, vocab_size=280)
    train_tokenizer(TEXT, 300, tmp_path / "llama")
    write_gguf(tmp_path / "llama", tmp_path / "a.gguf")
    fails("its tokenizer has 300 tokens, its model 280", check_gguf, tmp_path / "a.gguf")


def test_tensors_that_are_not_the_models(llama: Path, tmp_path: Path) -> None:
    more = {"blk.0.attn_q.bias": numpy.zeros(32, numpy.float32)}
    write_gguf(llama, tmp_path / "a.gguf", more=more)
    fails(r"a\.gguf holds blk\.0\.attn_q\.bias, which a plain Llama does not have", check_gguf, tmp_path / "a.gguf")
    lacks = tmp_path / "lacks.gguf"
    write_gguf(llama, lacks, leave_out="model.layers.1.mlp.up_proj.weight")
    fails(
        r"its tensors are not those that its header describes: blk\.1\.ffn_up\.weight is absent, expected 48 x 32",
        import_gguf,
        lacks,
        tmp_path / "o",
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"num_hidden_layers": 1}, r"blk\.1\.attn_k\.weight is 16 x 32, expected absent; fetch the file again"),
        ({"num_hidden_layers": 3}, r"blk\.2\.attn_k\.weight is absent, expected 16 x 32"),
        ({"num_key_value_heads": 1}, r"blk\.0\.attn_k\.weight is 16 x 32, expected 8 x 32"),
        ({"intermediate_size": 95}, r"blk\.0\.ffn_down\.weight is 32 x 48, expected 32 x 95"),
        ({"hidden_size": 60}, r"blk\.0\.attn_k\.weight is 16 x 32, expected 30 x 60"),
        ({"num_attention_heads": 0}, r"holds no llama\.attention\.head_count; fetch it again"),
    ],
    ids=str,
)
def test_a_header_of_another_model(llama: Path, tmp_path: Path, says: dict[str, int], message: str) -> None:
    """transformers' reader forgets layers that the header does not count."""
    write_gguf(llama, tmp_path / "a.gguf", says=says)
    fails(message, check_gguf, tmp_path / "a.gguf")


def test_the_packages_that_read_it(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails("needs gguf and accelerate; run pip install gguf accelerate", check_gguf, gguf)
