"""Nothing from a checkpoint's files is run while it is loaded."""

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_dmc.checkpoint import CheckpointError, SavedModel
from tests.support.checkpoints import state

pytestmark = pytest.mark.usefixtures("one_process")


class Attack:
    """Runs ``touch FILE`` when it is unpickled freely."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def attacks_on_metadata(witness: Path) -> dict[str, bytes]:
    command = f"touch {witness}".encode()
    dotted = b"torch.distributed.checkpoint.metadata"
    return {
        "protocol 0": pickle.dumps(Attack(witness), protocol=0),
        "protocol 2": pickle.dumps(Attack(witness), protocol=2),
        "protocol 5": pickle.dumps(Attack(witness), protocol=5),
        "the INST opcode": b"(S'" + command + b"'\nios\nsystem\n.",
        "a dotted path from an allowed module": (
            b"\x80\x04\x8c" + bytes([len(dotted)]) + dotted + b"\x8c\x09os.system\x93\x8c"
            + bytes([len(command)]) + command + b"\x85R."
        ),
        "names fetched from the memo": (
            b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94h\x00h\x01\x93\x8c" + bytes([len(command)]) + command + b"\x85R."
        ),
    }  # fmt: skip


@pytest.mark.parametrize("attack", attacks_on_metadata(Path("unused")))
def test_metadata_that_would_run_code_is_refused(saved: Path, tmp_path: Path, attack: str) -> None:
    witness = tmp_path / "witness"
    data = attacks_on_metadata(witness)[attack]
    with contextlib.suppress(Exception):  # the attack itself works, or the test would say nothing
        pickle.loads(data)
    assert witness.exists() or "dotted" in attack
    witness.unlink(missing_ok=True)

    (saved / ".metadata").write_bytes(data)
    for refused in (lambda: SavedModel.open(saved), lambda: SavedModel.open(saved).load(state())):
        with pytest.raises(CheckpointError, match=r"\.metadata (asks to load|holds the pickle opcode|is damaged)"):
            refused()
    assert not witness.exists()


def test_metadata_may_not_change_what_outlives_it(saved: Path) -> None:
    index = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    # BUILD with (None, {"polluted": None}) calls setattr on what lies below on the stack, here a class.
    attack = index + b"N}\x8c\x08pollutedNs\x86b."
    pickle.loads(attack)
    assert hasattr(MetadataIndex, "polluted")
    del MetadataIndex.polluted
    (saved / ".metadata").write_bytes(attack)
    with pytest.raises(CheckpointError, match=r"\.metadata asks to change <class .*MetadataIndex"):
        SavedModel.open(saved)
    assert not hasattr(MetadataIndex, "polluted")


def test_metadata_may_not_name_files_elsewhere(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"../{saved.name}/{place.relative_path}"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="does not describe"):
        SavedModel.open(saved)


def test_plain_values_that_would_run_code_are_refused(saved: Path, tmp_path: Path) -> None:
    torch.save({"step": Attack(tmp_path / "witness")}, saved / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt.*posix\.system"):
        SavedModel.open(saved).load(state())
    assert not (tmp_path / "witness").exists()


def test_objects_that_would_run_code_are_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # even where the user has weakened torch
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn.startswith("object"))
    data = bytearray((saved / place.relative_path).read_bytes())
    torch.save([Attack(tmp_path / "witness")], tmp_path / "object")
    attack = (tmp_path / "object").read_bytes()
    place.offset, place.length = len(data), len(attack)
    (saved / place.relative_path).write_bytes(bytes(data) + attack)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    SavedModel.open(saved)
    with pytest.raises(CheckpointError, match=r"cannot load .*posix\.system") as raised:
        SavedModel.open(saved).load(state())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "witness").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_number_of_thousands_of_digits_is_one_short_line(saved: Path) -> None:
    (saved / "dmc.json").write_text(f'{{"step": {"9" * 10000}}}')
    with pytest.raises(CheckpointError, match=r"dmc\.json is damaged, it holds a number of thousands of digits$"):
        SavedModel.open(saved)
