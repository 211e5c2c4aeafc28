"""A folder or a file that is not what a conversion takes: the error says what it is, and what to do with that."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dmc.checkpoint import CheckpointError, SavedModel
from megatron_dmc.cli import main
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.to_hf import export_hf
from tests.support.texts import without_privileges


@pytest.fixture
def llama(save_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama and a checkpoint of it by relative paths, ``hf`` and ``run/final``."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o777)
    save_llama(max_shard_size="20KB").rename("hf")
    Path("hf").chmod(0o755)
    for path in Path("hf").iterdir():
        path.chmod(0o644)
    import_hf("hf", "run/final")
    import_hf("hf", "run/.step_1.old")
    return Path("hf")


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(os.listdir())
    capsys.readouterr()
    assert main(arguments) == 1
    assert sorted(os.listdir()) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said.removeprefix("megatron-dmc: ").rstrip("\n")


IS_HUGGING_FACE = (
    "hf is a Hugging Face model, not a checkpoint of megatron_dmc: run megatron-dmc convert-from-hf hf BASE first, and "
    "name BASE"
)


@pytest.mark.usefixtures("llama")
def test_a_hugging_face_folder_where_a_checkpoint_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["convert-to-hf", "hf", "new"], capsys) == IS_HUGGING_FACE
    assert fails(["inspect", "hf"], capsys) == IS_HUGGING_FACE
    # As checkpoint.load_base of a recipe opens it.
    with pytest.raises(CheckpointError, match="is a Hugging Face model"):
        SavedModel.open("hf")


@pytest.mark.usefixtures("llama")
def test_a_file_where_a_folder_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.pt").write_text("weights")
    assert fails(["convert-to-hf", "model.pt", "new"], capsys) == (
        "model.pt is a file, not a folder; name the folder of one checkpoint, such as DIRECTORY/final"
    )
    assert fails(["convert-from-hf", "hf/config.json", "new"], capsys) == (
        "hf/config.json is a file, not a folder; name the folder of a Hugging Face model"
    )


@pytest.mark.usefixtures("llama")
def test_the_folder_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["convert-to-hf", "run", "new"], capsys) == (
        "run is a folder of checkpoints; name one checkpoint, such as run/final"
    )
    assert fails(["convert-from-hf", "run", "new"], capsys) == (
        "run is a folder of checkpoints of megatron_dmc, not a Hugging Face model: use run/final as it is, or run "
        "megatron-dmc convert-to-hf run/final HF_FOLDER"
    )


@pytest.mark.usefixtures("llama")
def test_a_checkpoint_where_a_hugging_face_folder_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["convert-from-hf", "run/final", "new"], capsys) == (
        "run/final is a checkpoint of megatron_dmc, not a Hugging Face model: use run/final as it is, or run "
        "megatron-dmc convert-to-hf run/final HF_FOLDER"
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "{shard}"])
@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("hidden", "cannot be read: Permission denied"),
        ("folder", "is a folder, not a file"),
        ("pipe", "is a named pipe, not a file"),
        ("link", "is a link to nowhere, which does not exist"),
    ],
)
def test_a_file_that_cannot_be_read(llama: Path, name: str, kind: str, problem: str) -> None:
    path = llama / name.format(shard=next(llama.glob("model-00002*")).name)
    replace(path, kind)
    with without_privileges(), pytest.raises(ConfigError) as caught:
        import_hf(llama, "new")
    assert str(caught.value) == f"{path} {problem}"


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("name", ["dmc.json", ".metadata", "common.pt", "__0_0.distcp"])
@pytest.mark.parametrize(
    ("kind", "problem"), [("hidden", "cannot be read: Permission denied"), ("folder", "is a folder, not a file")]
)
def test_a_checkpoints_file_that_cannot_be_read(name: str, kind: str, problem: str) -> None:
    path = Path("run", "final", name)
    replace(path, kind)
    with without_privileges(), pytest.raises(CheckpointError) as caught:
        export_hf("run/final", "new")
    assert str(caught.value) == f"{path} {problem}"


def replace(path: Path, kind: str) -> None:
    if kind == "hidden":
        path.chmod(0)
        return
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["convert-from-hf", "hf"], "{} cannot be made: {}; name another folder"),
        (["convert-to-hf", "run/final"], "{} cannot be made: {}; name another folder"),
        (
            ["preprocess", "--input", "a.txt", "--tokenizer", "hf", "--output"],
            "--output {} cannot be written: {}; choose another --output",
        ),
        (
            ["preprocess", "--input", "a.txt", "--train-tokenizer", "300", "--output"],
            "--output {} cannot be written: {}; choose another --output",
        ),
    ],
)
def test_an_output_inside_a_file(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("some text")
    for output in ("a.txt/x", "a.txt/deep/x"):
        expected = what.format(output, "a.txt is a file, not a folder")
        assert fails([*arguments, output], capsys) == expected


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--input", "{pipe}", "--tokenizer", "hf"],
            "--input {pipe} {is}; name a folder, a text file or a .jsonl file",
        ),
        (["--input", "{pipe}", "--tokenizer", "hf", "--chat"], "--input {pipe} {is}; name a .jsonl file or a folder"),
        (
            ["--input", "a.txt", "--tokenizer", "{pipe}"],
            "--tokenizer {pipe} {is}; name a folder that holds tokenizer.json",
        ),
        (
            ["--input", "a.jsonl", "--tokenizer", "hf", "--chat", "--chat-template", "{pipe}"],
            "--chat-template {pipe} {is}; name a file",
        ),
    ],
)
@pytest.mark.parametrize(("path", "kind"), [("pipe.jsonl", "a named pipe"), ("/dev/null", "a device")])
def test_no_input_is_read_from_a_pipe(
    arguments: list[str], said: str, path: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("pipe.jsonl")
    Path("a.txt").write_text("some text")
    Path("a.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}')
    Path("hf", "chat_template.jinja").write_text("{{ messages[0].content }}")
    wanted = "a folder" if "tokenizer {pipe}" in said else "a file"
    line = fails(["preprocess", *(word.format(pipe=path) for word in arguments), "--output", "new"], capsys)
    assert line == said.format_map({"pipe": path, "is": f"is {kind}, not {wanted}"})


@pytest.mark.usefixtures("llama")
def test_nothing_is_written_into_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    checkpoint = (
        f"{Path('run/final').resolve()} is a checkpoint (it holds dmc.json), which nothing else may be written into; "
        "name another folder"
    )
    for output in ("run/final/hf", "run/final/deep/hf", "run/final/tokenizer/hf"):
        assert fails(["convert-to-hf", "run/final", output], capsys) == f"{output} cannot be made: {checkpoint}"
        # Whatever is read.
        assert fails(["convert-from-hf", "hf", output], capsys) == f"{output} cannot be made: {checkpoint}"
    assert fails(["convert-from-hf", "hf", "hf/run"], capsys) == (
        "hf/run cannot be made: it would lie inside hf, which is read; name another folder"
    )
    Path("way").symlink_to("hf")
    assert "would lie inside hf" in fails(["convert-from-hf", "hf", "way/run"], capsys)
    Path("way").unlink()
    assert sorted(Path().rglob("*")) == before


@pytest.mark.usefixtures("llama")
def test_what_a_killed_conversion_left_is_named_and_stays(caplog: pytest.LogCaptureFixture) -> None:
    left = Path(".new.converting-0123abcd")
    for path in (left, Path(".new.converting-mine"), Path(".new2.converting-0123abcd")):
        path.mkdir()
    export_hf("run/final", "new")
    [said] = [record.getMessage() for record in caplog.records if "killed" in record.getMessage()]
    assert said == f"warning: {left} was left by a killed conversion; remove it unless one writes it now"
    assert left.is_dir() and Path("new/config.json").is_file()
