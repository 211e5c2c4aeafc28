"""What a DMC model changes in vLLM's settings, and which of them it cannot be served with."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from megatron_dmc.hf.adapter import ADAPTER_FILE, lacks_its_base
from megatron_dmc.ops.decode.codes import CACHE_DTYPES, check_cache_dtype
from megatron_dmc.serving import kernels
from megatron_dmc.serving.header import Header
from megatron_dmc.serving.plugin import logger
from megatron_dmc.serving.ratios import Thresholds

# What vLLM calls float8_e4m3fn.
_FP8 = ("fp8", "fp8_e4m3")


class Refused(NamedTuple):
    """A setting that a DMC model cannot be served with; printed as one line."""

    setting: str
    value: Any
    remedy: str

    def __str__(self) -> str:
        return f"{self.setting} cannot be {self.value!r} for a model with DMC: {self.remedy}"


class DMCSettings(VerifyAndUpdateConfig):
    """vLLM calls it once for each configuration that it builds for one of our architectures.

    Both functions raise ValueError, one line, for what is refused.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        _refuse(_of_the_model(model_config))

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        from vllm.config import KVTransferConfig
        from vllm.platforms import current_platform

        _refuse(_of_the_engine(vllm_config))
        _choose_cache_dtype(vllm_config.model_config, vllm_config.cache_config)
        _refuse(_of_the_blocks(vllm_config.model_config, vllm_config.cache_config))
        Thresholds.of(vllm_config.model_config.hf_config, vllm_config.additional_config)
        if not current_platform.is_cpu():
            logger.warning(
                "megatron-dmc: serving has been tried on CPUs only; compare a few answers with the export's own generate()"
            )
        elif vllm_config.lora_config is not None:
            logger.warning(
                "megatron-dmc: on a CPU vLLM applies a LoRA also to requests without one that share its batch; give every "
                "request one, or serve the base by itself"
            )
        cache = vllm_config.cache_config
        if cache.enable_prefix_caching:
            logger.warning(
                "megatron-dmc: prefix caching is switched off: a slot of several tokens is no prefix's alone"
            )
            cache.enable_prefix_caching = False
        if not cache.user_specified_block_size:
            # As if it were asked for, or the platform would choose another one afterwards.
            cache.block_size, cache.user_specified_block_size = default_block_size(vllm_config.model_config), True
        # kv_producer: with kv_both vLLM keeps every freed block back for a step when it schedules asynchronously.
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector="DMCConnector",
            kv_connector_module_path="megatron_dmc.serving.connector",
            kv_role="kv_producer",
        )


def _own_dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _choose_cache_dtype(model: Any, cache: Any) -> None:
    """What --kv-cache-dtype says goes before the export's own; vLLM itself must not take part in it."""
    if cache.cache_dtype in _FP8:
        model.hf_config.cache_dtype = "fp8"
    elif cache.cache_dtype == _own_dtype(model):
        model.hf_config.cache_dtype = None
    cache.cache_dtype = "auto"


def default_block_size(model: Any) -> int:
    """The smallest in whose blocks a header fits, since kernels ask for that; else the largest. model: vLLM's ModelConfig."""
    fitting = (size for size in kernels.BLOCK_SIZES if _header_blocks(model, size) == 1)
    return next(fitting, kernels.BLOCK_SIZES[-1])


def _header_blocks(model: Any, block_size: int) -> int:
    return Header.of_model(model, block_size).blocks


def _refuse(found: Iterator[Refused]) -> None:
    for refused in found:
        raise ValueError(str(refused))


def _of_the_model(model: Any) -> Iterator[Refused]:
    if lacks_its_base(model.model):
        yield Refused(
            "model",
            model.model,
            f"{ADAPTER_FILE} holds the decisions only; load it with base= and save_pretrained both",
        )
    try:
        check_cache_dtype("cache_dtype", model.hf_config.cache_dtype)
    except ValueError:
        remedy = f"it is {', '.join(CACHE_DTYPES)}, or null for the model's own dtype"
        yield Refused("cache_dtype", model.hf_config.cache_dtype, remedy)
    if model.runner_type != "generate":
        yield Refused(
            "--runner", model.runner_type, "it was retrofitted to generate text; leave --runner and --convert out"
        )
    if model.enable_sleep_mode:
        yield Refused("--enable-sleep-mode", True, "requests' slots would be lost in sleep; leave it out")


def of_the_device(platform: Any, dtype: torch.dtype) -> Iterator[Refused]:
    """platform: vLLM's. What torch's attention to chunks of prompts asks for."""
    if platform.is_cpu():
        return
    if not platform.is_cuda_alike():
        yield Refused("the device", platform.device_type, "only CPUs and what CUDA or ROCm drives can be used")
    elif platform.is_cuda() and not platform.has_device_capability(80):
        yield Refused(
            "the device", platform.get_device_name(), "attention asks for compute capability 8.0 (A100) or more"
        )
    if dtype == torch.float32:
        yield Refused("--dtype", "float32", "attention on a GPU takes bfloat16 or float16; leave it out")


def _of_the_engine(config: Any) -> Iterator[Refused]:
    from vllm.platforms import current_platform

    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    yield from of_the_device(current_platform, model.dtype)
    if config.speculative_config is not None:
        method = config.speculative_config.method
        reason = "a rejected token that was merged cannot be taken out of its slot; leave it out"
        yield Refused("--speculative-config", method, reason)
    # Before the connector: offloading would be set up as one.
    if cache.kv_offloading_size is not None:
        yield Refused("--kv-offloading-size", cache.kv_offloading_size, "slots stay where they are; leave it out")
    if config.kv_transfer_config is not None:
        connector = config.kv_transfer_config.kv_connector
        yield Refused(
            "--kv-transfer-config",
            connector,
            "its place is taken: it tells vLLM what requests really hold; leave it out",
        )
    for name in ("decode", "prefill"):
        size = getattr(parallel, f"{name}_context_parallel_size")
        if size > 1:
            yield Refused(
                f"--{name}-context-parallel-size", size, "a slot lies on one rank; use --tensor-parallel-size"
            )
    if parallel.use_ubatching:
        yield Refused("--enable-dbo", True, "a step's tokens are taken in together; leave it and --ubatch-size out")
    kv_heads, ranks = model.get_total_num_kv_heads(), parallel.tensor_parallel_size
    if kv_heads % ranks:
        yield Refused("--tensor-parallel-size", ranks, f"it must divide the model's {kv_heads} KV heads")
    own = _own_dtype(model)
    if cache.cache_dtype not in ("auto", own, *_FP8):
        remedy = f'it is fp8, or the model\'s {own}; for int8 and int4 use --hf-overrides \'{{"cache_dtype": "int4"}}\''
        yield Refused("--kv-cache-dtype", cache.cache_dtype, remedy)


def _of_the_blocks(model: Any, cache: Any) -> Iterator[Refused]:
    """Where nothing fits into a block, or where kernels would be left out for its size."""
    from vllm.platforms import current_platform

    size, device = cache.block_size, current_platform.device_type
    if cache.user_specified_block_size:
        try:
            _header_blocks(model, size)
        except ValueError as error:
            yield Refused("--block-size", size, f"{error}; leave it out")
    least = default_block_size(model)
    if device not in kernels.NEEDED or kernels.of(Header.of_model(model, least), device) is None:
        return
    if _header_blocks(model, least) > 1:
        yield Refused(
            "--max-model-len",
            model.max_model_len,
            f"a request's state must fit into one block, even of {least} slots; use a shorter one",
        )
    elif cache.user_specified_block_size and _header_blocks(model, size) > 1:
        yield Refused(
            "--block-size",
            size,
            f"a request of {model.max_model_len} tokens needs blocks of {least}; leave it out, or use a shorter "
            "--max-model-len",
        )
