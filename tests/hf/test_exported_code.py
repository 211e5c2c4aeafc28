"""Which modules an export copies, and how: all that the model imports of this package, and nothing else."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

from megatron_dmc.config import ConfigError
from megatron_dmc.hf import export


def body(text: str) -> str:
    """What is left without the imports."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if hasattr(node, "body") and isinstance(node.body, list):
            node.body = [x for x in node.body if not isinstance(x, ast.Import | ast.ImportFrom)]
    return ast.dump(tree)


ENTRY = "megatron_dmc.hf.families.llama"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_copies_are_the_sources(family):
    entry = f"{export.FAMILY_PACKAGE}.{family}"
    code, modules = export.modeling_code(entry), export.needed_modules(entry)
    assert [name for name in modules if name.startswith(export.FAMILY_PACKAGE)] == [entry]
    assert sorted(code) == sorted(f"{export.flat_name(module)}.py" for module in modules)
    for module, (source, _) in modules.items():
        copy = code[f"{export.flat_name(module)}.py"]
        assert source == Path(find_spec(module).origin).read_text()
        assert "megatron_dmc" not in "".join(line for line in copy.splitlines() if "import" in line)
        if module == entry:
            copy = copy[: copy.index("\n\nfrom typing import TYPE_CHECKING  # noqa: E402")]
        assert body(copy) == body(source), module


def test_what_the_model_imports_is_what_is_copied():
    """Python itself says which modules are loaded; packages that define nothing need no copy."""
    listing = f"import sys, {ENTRY}; print(*(x for x in sys.modules if x.startswith('megatron_dmc')))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, timeout=120, check=True)
    assert set(export.needed_modules(ENTRY)) <= set(done.stdout.split())


def test_names_in_the_flat_folder():
    assert export.flat_name("megatron_dmc.hf.modeling_dmc") == "modeling_dmc"
    assert export.flat_name("megatron_dmc.ops.decode.pages") == "dmc_ops_decode_pages"
    assert export.flat_name("megatron_dmc.config") == "dmc_config"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a small package in the real one's place; what is not written is not there."""

    def write(**modules):
        for name, text in modules.items():
            path = tmp_path.joinpath(*name.split("."))
            path = path / "__init__.py" if f"{name}." in " ".join(modules) else path.with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "__init__.py").touch()

    monkeypatch.setattr(export, "files", lambda name: tmp_path)
    return write


def flat(source: str) -> str:
    return export.flat_imports(export.Module.parsed(source, ENTRY))


def test_a_package_that_passes_names_on_is_no_part_of_it(package):
    package(
        **{
            "ops": "",
            "ops.pool": "from megatron_dmc.ops.pool.fast import pool as merge\nfrom megatron_dmc.ops.pool import slow\n"
            "from megatron_dmc.ops.pool.unused import other\n__all__ = ['merge', 'other', 'slow']\n",
            "ops.pool.fast": "def pool(): ...\n",
            "ops.pool.slow": "from .fast import pool\n",
            "ops.pool.unused": "import megatron\ndef other(): ...\n",
            "ops.twice": "from megatron_dmc.ops.pool import merge\n",
            "ops.twice.rest": "",
            "hf.families.llama": "from megatron_dmc.ops.pool import merge, slow as naive\n"
            "from megatron_dmc.ops.twice import merge as again\n",
        }
    )
    assert list(export.needed_modules(ENTRY)) == [
        ENTRY,
        "megatron_dmc.ops.pool.fast",
        "megatron_dmc.ops.pool.slow",
    ]
    code = export.modeling_code(ENTRY)
    assert code["dmc_hf_families_llama.py"].startswith(
        "from .dmc_ops_pool_fast import pool as merge\n"
        "from . import dmc_ops_pool_slow as naive\n"
        "from .dmc_ops_pool_fast import pool as again\n"
    )
    assert code["dmc_ops_pool_slow.py"] == "from .dmc_ops_pool_fast import pool\n"


def test_every_module_is_read_once(package, monkeypatch):
    texts = {"shared": "", "hf.other": "from megatron_dmc.shared import x\n"}
    texts["hf.families.llama"] = "from megatron_dmc.hf.other import y\nfrom megatron_dmc.shared import x\n"
    package(**texts)
    read, source = [], export._source
    monkeypatch.setattr(export, "_source", lambda module: read.append(module) or source(module))
    export.modeling_code(ENTRY)
    assert sorted(read) == [ENTRY, "megatron_dmc.hf.other", "megatron_dmc.shared"]


def test_a_package_that_defines_names_is_copied(package):
    package(
        **{
            "ops.pool": "from megatron_dmc.ops.pool.fast import scan\n\ndef pool():\n    return scan()\n",
            "ops.pool.fast": "def scan(): ...\n",
            "hf.families.llama": "from megatron_dmc.ops.pool import pool, scan\n",
        }
    )
    assert set(export.needed_modules(ENTRY)) >= {"megatron_dmc.ops.pool", "megatron_dmc.ops.pool.fast"}
    assert flat("from megatron_dmc.ops.pool import pool, scan\n") == (
        "from .dmc_ops_pool import pool\nfrom .dmc_ops_pool_fast import scan\n"
    )


def test_imports_anywhere_in_a_module_count(package):
    package(**{"config": "A = B = 1\n", "late": "x = 1\n"})
    source = "import torch\nfrom megatron_dmc.config import (\n    A,\n    B,\n)\n"
    source += "def f():\n    from megatron_dmc.late import x\n"
    assert flat(source) == (
        "import torch\nfrom .dmc_config import A\nfrom .dmc_config import B\ndef f():\n    from .dmc_late import x\n"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os, numpy\n", "line 1 reads 'import os, numpy': an exported model needs torch and transformers only"),
        (
            "\nfrom megatron.core import x\n",
            "line 2 reads 'from megatron.core import x': an exported model needs torch",
        ),
        ("try:\n    import numpy\nexcept ImportError:\n    pass\n", "line 2 reads 'import numpy': an exported"),
        ("try:\n    pass\nexcept ImportError:\n    import triton\n", "line 4 reads 'import triton': an exported"),
        ("def f():\n    import triton.language as tl\n", "line 2 reads 'import triton.language as tl': an exported"),
        ("import megatron_dmc.config\n", "line 1 reads 'import megatron_dmc.config': write it as from megatron_dmc"),
        ("from megatron_dmc.config import *\n", "'from megatron_dmc.config import \\*': name what is imported"),
        ("from megatron_dmc.nowhere import x\n", "megatron_dmc.nowhere, which an export needs, cannot be read"),
    ],
)
def test_what_an_export_cannot_have_is_refused_by_name(package, source, message):
    package(**{"hf.families.llama": "from megatron_dmc.other import y\n", "other": source, "config": ""})
    with pytest.raises(ConfigError, match=message) as error:
        export.modeling_code(ENTRY)
    assert "megatron_dmc.other cannot be exported" in str(error.value) or "nowhere" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_export_runs_where_triton_is_and_where_it_is_not(package, tmp_path):
    """transformers, which refuses a module whose imports are missing, does not ask for what is imported in a try block."""
    text = "try:\n    import triton\n    import triton.language as tl\nexcept ImportError:\n    triton = None\n"
    package(**{"hf.families.llama": "from megatron_dmc.ops.fast import f\n", "ops.fast": text})
    code = export.modeling_code(ENTRY)
    assert code["dmc_ops_fast.py"] == text
    (tmp_path / "copied.py").write_text(text)
    assert get_imports(tmp_path / "copied.py") == []


def test_two_modules_of_one_name_are_refused(package):
    package(
        **{
            "a_b": "",
            "a": "",
            "a.b": "",
            "hf.families.llama": "from megatron_dmc import a_b\nfrom megatron_dmc.a import b\n",
        }
    )
    with pytest.raises(
        ConfigError, match=r"a_b and .*a\.b would both be exported as dmc_a_b.py|a\.b and .*a_b would both"
    ):
        export.modeling_code(ENTRY)
