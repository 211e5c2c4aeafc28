"""New folders of a conversion: whole or absent, and nothing is overwritten."""

from pathlib import Path

import pytest

from megatron_dmc.checkpoint import copy_tokenizer
from megatron_dmc.config import ConfigError
from megatron_dmc.convert import folders
from megatron_dmc.convert.folders import check_output, new_folder, special_tokens


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with new_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
        assert folder.parent == target.parent and not target.exists()
    assert (target / "inner" / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full", "interrupted"]
)
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


def test_an_interruption_says_what_has_become_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt, match="nothing was written"), new_folder(target):
        raise KeyboardInterrupt

    def interrupted(path: Path) -> None:
        if path == tmp_path:
            raise KeyboardInterrupt

    # The last thing that is done, when the folder has its name.
    monkeypatch.setattr(folders, "flush_to_disk", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"^{target} is whole$"), new_folder(target) as folder:
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "new"


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(OSError), new_folder(target) as folder:
        (folder / "file").write_text("new")
        target.mkdir()
        (target / "file").write_text("old")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("target", [".", "..", "/", "/proc"])
def test_a_folder_that_a_new_one_cannot_replace_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    inner = tmp_path / "empty"
    inner.mkdir()
    monkeypatch.chdir(inner)
    with pytest.raises(ConfigError, match="cannot be replaced by a new folder; name one inside it"):
        check_output(Path(target))


def test_tokens_of_a_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    assert special_tokens(tmp_path, 280) == {}
    copy_tokenizer(tokenizer_folder, tmp_path)
    assert special_tokens(tmp_path, 280) == {"bos_token_id": 0, "eos_token_id": 0}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "bos_token_id": 4, "temperature": 0.6}')
    assert special_tokens(tmp_path, 280) == {"bos_token_id": 4, "eos_token_id": [5, 6]}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        special_tokens(tmp_path, 280)
