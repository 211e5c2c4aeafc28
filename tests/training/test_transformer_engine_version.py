"""FP8 needs a Transformer Engine that looks whether a cached weight has its transpose."""

import sys
from pathlib import Path

import megatron.core.utils
import pytest
import torch

from megatron_dmc.training.build import why_no_fp8


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("2.5.0", "Transformer Engine is older than 2.6 (pip install -U 'megatron-dmc[gpu]')"),
        ("2.6.0", None),
        ("2.13.0", None),
    ],
)
def test_older_engines_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, why: str | None
) -> None:
    # A package of that version, and a Hopper GPU: neither is here.
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
    (package / "pytorch" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(megatron.core.utils, "_te_version", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    try:
        assert why_no_fp8() == why
    finally:
        for name in ("transformer_engine", "transformer_engine.pytorch"):
            sys.modules.pop(name, None)
