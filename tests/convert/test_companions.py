"""What lies beside a model's weights travels with it: from Hugging Face to a checkpoint, and back."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_dmc.checkpoint import copy_tokenizer
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.to_hf import export_hf
from megatron_dmc.hf.export import FAMILY_PACKAGE, modeling_code

KEPT = (
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.model", "spiece.model"),
    *("qwen.tiktoken", "tekken.json", "vocab.txt", "sentencepiece.bpe.model", "tokenization_own.py", "helpers.py"),
    *("preprocessor_config.json", "processor_config.json", "LICENSE", "NOTICE.txt", "USE_POLICY.md", "README.md"),
    "assets/vocabulary.txt",
)
LEFT_OUT = (
    *(
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "other.index.json",
        "optimizer.pt",
        "rng_state_0.pth",
        "model.gguf",
    ),
    *("trainer_state.json", "training_args.bin", "events.out.tfevents.1.host", "adapter_config.json", "data.idx"),
    *(".gitattributes", ".cache/huggingface/download", "custom_generate/generate.py", "__pycache__/x.pyc"),
    *("original/consolidated.00.pth", "original/params.json", "checkpoint-5/config.json", "checkpoint-5/vocab.txt"),
    "step_00000003/dmc.json",
)


def write(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_there_and_back(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama()
    own = files(folder) - {"model.safetensors", "config.json"}
    write(folder, KEPT + LEFT_OUT)
    (folder / "adapter_config.json").unlink()  # which an import refuses
    import_hf(folder, tmp_path / "megatron")
    assert files(tmp_path / "megatron" / "tokenizer") == own | set(KEPT)
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    assert files(tmp_path / "hf") == own | set(KEPT) | {"model.safetensors", "config.json"}
    for name in KEPT:
        assert (tmp_path / "hf" / name).read_text() == f"content of {name}"


def test_named_chat_templates_work_after_the_export(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_llama()
    templates = {"default": "{{ messages[0].content }}", "tool_use": "tools: {{ messages[0].content }}"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported.chat_template == templates


def test_what_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "model", KEPT + LEFT_OUT)
    copy_tokenizer(tmp_path / "model", tmp_path / "copy")
    assert files(tmp_path / "copy") == set(KEPT)
    copy_tokenizer(tmp_path / "nowhere", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_the_models_own_code_is_not_its_tokenizers(tmp_path: Path) -> None:
    """An export of ours brings its modeling code, which the next export writes anew."""
    folder = tmp_path / "model"
    write(folder, ("vocab.txt",))
    for name, text in modeling_code(f"{FAMILY_PACKAGE}.llama").items():
        (folder / name).write_text(text)
    auto_map = {
        "AutoConfig": "dmc_hf_families_llama.C",
        "AutoModel": "dmc_hf_families_llama.M",
        "AutoTokenizer": [None, "own.T"],
    }
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    (folder / "own.py").write_text("from . import shared\nfrom .dmc_config import DMCConfig\n")
    (folder / "shared.py").write_text("")
    copy_tokenizer(folder, tmp_path / "copy")
    assert files(tmp_path / "copy") == {"vocab.txt", "own.py", "shared.py", "dmc_config.py", "dmc_errors.py"}


def test_files_that_are_too_large(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, ("vocab.txt", "corpus.txt"))
    os.truncate(folder / "corpus.txt", 1 << 30)  # takes no space
    copy_tokenizer(folder, tmp_path / "copy")
    assert files(tmp_path / "copy") == {"vocab.txt"}


def test_links(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, ("LICENSE", "additional_chat_templates/one.jinja"))
    write(tmp_path, ("secret.txt", "secrets/key.txt", "shared/tokenizer.json"))
    (folder / "NOTICE").symlink_to("LICENSE")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "keys").symlink_to(tmp_path / "secrets")
    (folder / "additional_chat_templates" / "two.jinja").symlink_to(tmp_path / "secret.txt")
    (folder / "vocab.txt").symlink_to("nowhere")
    (folder / "tokenizer.json").symlink_to(tmp_path / "shared" / "tokenizer.json")
    os.mkfifo(folder / "pipe")
    copy_tokenizer(folder, tmp_path / "copy")
    assert files(tmp_path / "copy") == {"LICENSE", "NOTICE", "additional_chat_templates/one.jinja", "tokenizer.json"}
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    """All of its files are links to where the cache keeps them."""
    hub = tmp_path / "models--meta--llama"
    snapshot = hub / "snapshots" / "0123"
    write(hub / "blobs", ("1", "2"))
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/1")
    (snapshot / "additional_chat_templates" / "tool_use.jinja").symlink_to("../../../blobs/2")
    (snapshot / "notes.txt").symlink_to("../../../elsewhere")
    (tmp_path / "elsewhere").write_text("secret")
    copy_tokenizer(snapshot, tmp_path / "copy")
    assert files(tmp_path / "copy") == {"LICENSE", "additional_chat_templates/tool_use.jinja"}


@pytest.mark.parametrize(
    "content", ["", "[", '{"auto_map": 3}', '{"auto_map": {"AutoModel": [1, {"a": 2}]}}', "[" * 10**5]
)
def test_a_damaged_configuration_does_not_matter(tmp_path: Path, content: str) -> None:
    write(tmp_path / "model", ("own.py",))
    (tmp_path / "model" / "config.json").write_text(content)
    copy_tokenizer(tmp_path / "model", tmp_path / "copy")
    assert files(tmp_path / "copy") == {"own.py"}
