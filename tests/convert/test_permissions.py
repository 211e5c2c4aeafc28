"""What a conversion writes may be read by whom the umask lets: one set of permissions for all files, one for all folders."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.to_hf import export_hf
from megatron_dmc.convert.weights import save_tensors


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_permissions(folder: Path, umask: int) -> None:
    for path in (folder, *folder.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(expected), path


def test_both_directions(save_llama: Callable[..., Path], tmp_path: Path, umask: int) -> None:
    import_hf(save_llama(), tmp_path / "megatron")
    assert_permissions(tmp_path / "megatron", umask)
    for name, size in (("one", 10**9), ("shards", 20_000)):
        export_hf(tmp_path / "megatron", tmp_path / name, max_shard_size=size)
        assert_permissions(tmp_path / name, umask)


def test_a_file_of_weights(tmp_path: Path, umask: int) -> None:
    """An adapter's, say."""
    save_tensors({"weight": torch.ones(2)}, tmp_path / "adapter.safetensors")
    assert stat.S_IMODE((tmp_path / "adapter.safetensors").stat().st_mode) == 0o666 & ~umask


def test_an_empty_folder_keeps_its_own(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir(mode=0o710)
    import_hf(save_llama(), tmp_path / "megatron")
    assert oct(stat.S_IMODE((tmp_path / "megatron").stat().st_mode)) == oct(0o710)
