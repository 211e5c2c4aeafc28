"""What every process of vLLM runs: cheap, quiet, and never in the way of other models."""

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.exports import plain_model
from tests.support.processes import ROOT, run
from tests.support.served import NEW_TOKENS, random_prompts


def test_vllm_finds_it() -> None:
    (entry,) = [x for x in entry_points(group="vllm.general_plugins") if x.name == "megatron_dmc"]
    assert entry.value == "megatron_dmc.serving:register"


def test_every_family_is_served() -> None:
    import importlib

    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    from megatron_dmc.hf.families import FAMILIES, dmc_classes

    load_general_plugins()
    for family in FAMILIES:
        name = dmc_classes(family)[1].__name__
        assert name in ModelRegistry.get_supported_archs()
        assert hasattr(importlib.import_module(f"megatron_dmc.serving.families.{family}"), name)


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.31.9", False),
        ("0.32.0", True),
        ("0.33.1.dev5+g12", True),
        ("0.34.0rc1", False),
        ("1.0", False),
        ("dev", False),
    ],
)
def test_versions(version: str, supported: bool) -> None:
    from megatron_dmc.serving.plugin import is_supported

    assert is_supported(version) is supported


def test_the_extra_names_the_same_versions() -> None:
    from megatron_dmc.serving.plugin import VERSIONS

    ((first, end),) = re.findall(r'"vllm>=([\d.]+),<([\d.]+)"', (ROOT / "setup.py").read_text())
    assert tuple(tuple(map(int, version.split("."))) for version in (first, end)) == VERSIONS


ELSEWHERE = """
import vllm
vllm.__version__ = {version!r}
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins
{before}
load_general_plugins()
print("DMCLlamaForCausalLM" in ModelRegistry.get_supported_archs(), "LlamaForCausalLM" in ModelRegistry.get_supported_archs())
"""


@pytest.mark.parametrize(
    ("version", "before", "line"),
    [
        (
            "0.31.0",
            "",
            "cannot be served by vLLM 0.31.0, only by 0.32 or later and before 0.34; install 'vllm>=0.32,<0.34'",
        ),
        (
            "0.32.0",
            "import sys; sys.modules['vllm.model_executor.models.config'] = None",
            "models with DMC cannot be served here: ",
        ),
    ],
    ids=["version", "error"],
)
def test_where_it_cannot_work_it_says_so_once_and_others_are_served(version: str, before: str, line: str) -> None:
    done = run("-c", ELSEWHERE.format(version=version, before=before))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False True"
    assert len([x for x in (done.stdout + done.stderr).splitlines() if line in x]) == 1
    assert "Traceback" not in done.stderr


def test_a_plain_model_is_served_as_before(tmp_path: Path) -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.support.engines import OPTIONS, params

    # Of a width that vLLM's own attention has on a CPU.
    model = LlamaForCausalLM(LlamaConfig(**{**plain_model().config.to_dict(), "head_dim": 32})).eval()
    model.save_pretrained(tmp_path)
    (prompt,) = random_prompts((70,))
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, 70:].tolist()
    options = {**OPTIONS, "max_model_len": 256, "block_size": 32}
    llm = LLM(str(tmp_path), **options)
    try:
        config = llm.llm_engine.vllm_config
        assert config.kv_transfer_config is None and config.cache_config.enable_prefix_caching
        for _ in range(2):  # the second time from the prefix cache
            (out,) = llm.generate([{"prompt_token_ids": prompt}], params(max_tokens=NEW_TOKENS), use_tqdm=False)
            assert list(out.outputs[0].token_ids) == expected
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
