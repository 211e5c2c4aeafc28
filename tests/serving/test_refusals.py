"""What cannot be served is refused in one line, before anything is loaded or at the weight that is wrong."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.engines import engine
from tests.support.served import Served, save, served_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(served_model({"local_window": 4}), tmp_path_factory.mktemp("export"))


def config_of(folder: Path, **options: Any) -> Any:
    """What vLLM makes of its arguments; no engine is started."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(folder), skip_tokenizer_init=True, **options).create_engine_config()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "speculative": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "--speculative-config cannot be 'ngram' for a model with DMC: a rejected token that was merged",
    ),
    "connector": (
        {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
        "--kv-transfer-config cannot be 'OffloadingConnector' for a model with DMC",
    ),
    "offloading": ({"kv_offloading_size": 1.0}, "--kv-offloading-size cannot be 1.0 for a model with DMC"),
    "decode-context": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        "--decode-context-parallel-size cannot be 2 for a model with DMC",
    ),
    "prefill-context": (
        {"prefill_context_parallel_size": 2},
        "--prefill-context-parallel-size cannot be 2 for a model with DMC",
    ),
    "ubatches": ({"enable_dbo": True}, "--enable-dbo cannot be True for a model with DMC"),
    "kv-heads": (
        {"tensor_parallel_size": 4},
        "--tensor-parallel-size cannot be 4 for a model with DMC: it must divide the model's 2 KV heads",
    ),
    "fp8-of-another-form": (
        {"kv_cache_dtype": "fp8_e5m2"},
        "--kv-cache-dtype cannot be 'fp8_e5m2' for a model with DMC",
    ),
    "other-cache": (
        {"kv_cache_dtype": "bfloat16", "dtype": "float32"},
        "--kv-cache-dtype cannot be 'bfloat16' for a model with DMC: it is fp8, or the model's float32; for int8 and int4",
    ),
    "cache-dtype": (
        {"hf_overrides": {"cache_dtype": "int3"}},
        "cache_dtype cannot be 'int3' for a model with DMC: it is int8, fp8, int4, or null for the model's own dtype",
    ),
    "pages-too-small-for-a-ring": (
        {"kv_cache_dtype": "fp8", "dtype": "float32", "block_size": 2},
        "--block-size cannot be 2 for a model with DMC: pages of 2 slots in fp8 are too small for one in torch.float32;",
    ),
    "pooling": ({"runner": "pooling"}, "--runner cannot be 'pooling' for a model with DMC"),
    "embedding": ({"convert": "embed"}, "--runner cannot be 'pooling' for a model with DMC"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_is_refused_in_one_line(folder: Path, case: str) -> None:
    options, line = REFUSED[case]
    with pytest.raises(ValueError) as error:
        config_of(folder, **options)
    assert line in str(error.value)


def test_what_is_served_is_not_refused(folder: Path) -> None:
    config = config_of(folder, kv_cache_dtype="bfloat16", dtype="bfloat16", tensor_parallel_size=2)
    assert config.kv_transfer_config.kv_connector == "DMCConnector"
    assert config.cache_config.block_size == 16
    assert config_of(folder, block_size=32).cache_config.block_size == 32


def test_the_command_line_chooses_how_slots_are_stored(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path, cache_dtype="int4")
    for option, stored in (("fp8", "fp8"), ("fp8_e4m3", "fp8"), ("bfloat16", None), ("auto", "int4")):
        config = config_of(tmp_path, dtype="bfloat16", kv_cache_dtype=option)
        assert config.model_config.hf_config.cache_dtype == stored
        # vLLM itself takes no part in it.
        assert config.cache_config.cache_dtype == "auto"


@dataclass(frozen=True)
class Platform:
    """As vLLM's, of devices that are not here."""

    device_type: str
    capability: int = 0

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"

    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    def is_cuda_alike(self) -> bool:
        return self.is_cuda()

    def has_device_capability(self, least: int) -> bool:
        return self.capability >= least

    def get_device_name(self) -> str:
        return "a GPU"


@pytest.mark.parametrize(
    ("platform", "dtype", "lines"),
    [
        (Platform("cpu"), torch.float32, []),
        (Platform("cuda", 90), torch.bfloat16, []),
        (Platform("cuda", 90), torch.float32, ["--dtype cannot be 'float32'"]),
        (Platform("cuda", 75), torch.float16, ["the device cannot be 'a GPU'"]),
        (Platform("xpu"), torch.bfloat16, ["the device cannot be 'xpu'"]),
    ],
    ids=str,
)
def test_devices_that_attention_has_no_kernel_for(platform: Platform, dtype: torch.dtype, lines: list[str]) -> None:
    from megatron_dmc.serving.config import of_the_device

    found = [str(each) for each in of_the_device(platform, dtype)]
    assert [a.startswith(b) for a, b in zip(found, lines, strict=True)] == [True] * len(lines)


@pytest.fixture
def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_dmc.serving import kernels

    monkeypatch.setattr(kernels, "NEEDED", {"cpu"})


@pytest.mark.parametrize(("longest", "size"), [(1024, 16), (8000, 32), (100_000, 64), (500_000, 128)])
def test_a_header_fits_into_one_block_of_the_default_size(
    tmp_path: Path, folder: Path, kernels_on_a_cpu: None, longest: int, size: int
) -> None:
    """A cell of 16 slots has 512 words here, 39 of them before the page table."""
    copied(folder, tmp_path, max_position_embeddings=longest)
    assert config_of(tmp_path, dtype="float32").cache_config.block_size == size
    assert config_of(tmp_path, dtype="float32", block_size=128).cache_config.block_size == 128
    if size > 16:
        with pytest.raises(ValueError) as error:
            config_of(tmp_path, dtype="float32", block_size=size // 2)
        line = f"--block-size cannot be {size // 2} for a model with DMC: a request of {longest} "
        assert line in str(error.value) and f"needs blocks of {size};" in str(error.value)


def test_a_request_too_long_for_any_header_is_refused(tmp_path: Path, folder: Path, kernels_on_a_cpu: None) -> None:
    copied(folder, tmp_path, max_position_embeddings=10**6)
    with pytest.raises(ValueError, match=r"--max-model-len cannot be 1000000 .* even of 128 slots"):
        config_of(tmp_path, dtype="float32")


def test_without_kernels_a_header_may_be_several_blocks(tmp_path: Path, folder: Path) -> None:
    copied(folder, tmp_path, max_position_embeddings=10**6)
    assert config_of(tmp_path, dtype="float32").cache_config.block_size == 128
    assert config_of(tmp_path, dtype="float32", block_size=8).cache_config.block_size == 8


def test_prefix_caching_is_switched_off_with_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        config = config_of(folder, enable_prefix_caching=True)
        config_of(folder, enable_prefix_caching=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert config.cache_config.enable_prefix_caching is False
    assert len([x for x in caplog.messages if "prefix caching is switched off" in x]) == 1


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"decision_temperature": 1}, "unknown DMC setting decision_temperature"),
    "value": ({"local_window": -1}, "local_window must be >= 0, got -1"),
    "source": ({"decision_source": "oracle"}, "decision_source must be one of neuron, projection, got 'oracle'"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_exports_own_settings_are_read(folder: Path, tmp_path: Path, case: str) -> None:
    settings, line = SETTINGS[case]
    copied(folder, tmp_path, dmc=settings)
    with pytest.raises(ValueError) as error:
        config_of(tmp_path)
    assert line in str(error.value)


def test_an_adapter_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"adapter\.safetensors holds the decisions only"):
        config_of(tmp_path)


LAYER = "model.layers.1.self_attn"
HOSTILE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], dict[str, Any], str]] = {
    "missing": (
        lambda weights: weights.pop(f"{LAYER}.decision.bias"),
        {},
        f"{LAYER}.decision.bias is missing from the model's weights; export it again",
    ),
    "infinite": (
        lambda weights: weights[f"{LAYER}.decision.weight"][3].fill_(float("nan")),
        {},
        f"{LAYER}.decision.weight holds numbers that are not finite: no token could be decided on; export it again",
    ),
    "decisions-of-other-heads": (
        lambda weights: weights.update({f"{LAYER}.decision.weight": torch.zeros(8, 64)}),
        {},
        f"{LAYER}.decision.weight has shape [8, 64], config.json asks for [4, 64]; export it again",
    ),
    "heads": (
        lambda weights: None,
        {"num_key_value_heads": 4},
        "self_attn.decision.bias has shape [4], config.json asks for [8]; export it again",
    ),
    "decisions-of-a-neuron": (
        lambda weights: None,
        {"dmc": {"decision_source": "neuron"}},
        "self_attn.decision.bias has no place where decision_source is neuron; export the model again",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_weights_that_are_not_the_configurations(folder: Path, tmp_path: Path, case: str) -> None:
    spoil, values, line = HOSTILE[case]
    copied(folder, tmp_path, **values)
    weights = load_file(tmp_path / "model.safetensors")
    spoil(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as error, engine(Served(tmp_path, [], [], [])):
        pass
    assert line in str(error.value) and "\n" not in str(error.value)


def copied(folder: Path, to: Path, **values: Any) -> None:
    """A folder's files, with other values in its config.json."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **values}))
