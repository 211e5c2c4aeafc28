"""The attention layer as vLLM sees it: where its cache lies, and how a call of it reaches the backend."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import attention  # noqa: F401  (its operator)
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend

from megatron_dmc.serving import kernels
from megatron_dmc.serving.backend import DMCBackend, DMCImpl
from megatron_dmc.serving.header import Header
from megatron_dmc.serving.spec import DMCSpec
from megatron_dmc.serving.worker_cache import WorkerCache


class CompressedAttention(nn.Module, AttentionLayerBase):
    """Takes tokens in and lets them attend to their requests' slots.

    Attributes:
        rotary: vLLM's, whose table has the cosine and sine of every position.
        cache: the worker's; None until vLLM has allocated it, while it measures memory.
    """

    def __init__(self, kv_heads: int, rotary: Any, prefix: str):
        super().__init__()
        config = get_current_vllm_config()
        self.layer_name = prefix
        self.rotary = rotary
        self.header = Header.of_model(config.model_config, config.cache_config.block_size)
        self.kv_heads = kv_heads
        self.impl = DMCImpl()
        self.cache: WorkerCache | None = None
        # vLLM binds its view of this layer's part here; the cache has one view of all layers.
        self.kv_cache = torch.tensor([])
        config.compilation_config.static_forward_context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return DMCBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> DMCSpec:
        return DMCSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.kv_heads,
            # As vLLM counts: half of a slot is its key. Codes are bytes.
            head_size=self.header.slot_bytes // 2 // self.header.stored_as.itemsize,
            dtype=self.header.stored_as,
            header_blocks=self.header.blocks,
            reserved_slots=self.header.reserved_slots,
            near_pages=self.header.near_cells,
            local_window=self.header.layout.local_window,
            most_tokens_at_once=vllm_config.scheduler_config.max_num_batched_tokens,
            longest=self.header.longest,
            by_kernels=kernels.serve(self.header, current_platform.device_type),
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, decision_logits: Tensor, omega: Tensor) -> Tensor:
        """Attention of several requests' new tokens, which the backend tells apart.

        The call goes through vLLM's own attention operator, at which it splits graphs. That operator takes three tensors:
        what decides lies behind the key as two float32 per head, in as many channels as that is.

        Args:
            query: [tokens, heads, head_dim], before rotary embedding.
            key, value: [tokens, kv_heads, head_dim], before rotary embedding.
            decision_logits: float32 [tokens, kv_heads]; a token merges where its request's threshold is lower.
            omega: float32 [tokens, kv_heads].

        Returns:
            As query.
        """
        decision = torch.stack([decision_logits, omega], dim=-1).view(key.dtype)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        torch.ops.vllm.unified_attention_with_output(
            query, torch.cat([key, decision], dim=-1), value, out, _encode_layer_name(self.layer_name)
        )
        return out
