"""vLLM's Llama, which every family is but for its attention, with DMC's decisions and cache in the attention's place."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from megatron_dmc.ops.decisions import (
    clear_channel,
    neuron_logits,
    omega_from_logits,
    omega_of_absorbed,
    projection_logits,
)
from megatron_dmc.ops.head_norm import head_norm
from megatron_dmc.serving.layer import CompressedAttention
from megatron_dmc.serving.weights import Checked


class DMCAttention(nn.Module):
    """As ``megatron_dmc.hf.attention``: projections, decisions, norms of heads; a tensor-parallel rank's heads.

    Attributes:
        has_qkv_bias, has_head_norms: what the family has.
    """

    has_qkv_bias = False
    has_head_norms = False

    def __init__(self, *, config: Any, prefix: str = "", quant_config: Any = None, **_: Any):
        """Called by vLLM's decoder layer; what it says of biases and of kinds of attention is Llama's."""
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.dmc = config.dmc
        self.neuron = self.dmc["decision_source"] == "neuron"
        self.head_dim = getattr(config, "head_dim", None) or hidden // heads
        self.sizes = [count // ranks * self.head_dim for count in (heads, kv_heads, kv_heads)]
        self.qkv_proj = QKVParallelLinear(
            *(hidden, self.head_dim, heads, kv_heads),
            bias=self.has_qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        if self.has_head_norms:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))
        if not self.neuron:  # rows a_0, b_0, a_1, b_1, ...: cut like the KV heads
            self.decision = ColumnParallelLinear(hidden, 2 * kv_heads, bias=True, prefix=f"{prefix}.decision")
        rotary = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.attn = CompressedAttention(kv_heads // ranks, rotary, f"{prefix}.attn")

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], normed, of several requests -> the same. The cache counts positions itself."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv.split(self.sizes, dim=-1))
        absorbs = self.dmc["operation"] == "absorb"
        biases = self.dmc["decision_bias"], 0.0 if absorbs else self.dmc["decision_bias"]
        if self.neuron:
            decision_logits, omega_logits = neuron_logits(query, key, *biases)
            query, key = clear_channel(query), clear_channel(key)
        else:
            projected, _ = self.decision(hidden_states)
            decision_logits, omega_logits = projection_logits(projected, *biases, self.dmc["decision_scale"])
        if self.has_head_norms:
            query, key = self._normed(query, self.q_norm), self._normed(key, self.k_norm)
        if self.dmc["per_layer"]:
            of_all_heads = tensor_model_parallel_all_gather(decision_logits.contiguous())
            decision_logits = of_all_heads.mean(-1, keepdim=True).expand_as(decision_logits)
        if absorbs:
            omega = omega_of_absorbed(omega_logits)
        else:
            omega = omega_from_logits(omega_logits, self.dmc["omega_floor"])
        out = self.attn(query, key, value, decision_logits, omega)
        return self.o_proj(out.flatten(1))[0]

    def _normed(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """The decisions' own channel has no say in the norm."""
        return head_norm(x, norm.weight, norm.variance_epsilon, last_channel=0.0 if self.neuron else 1.0)


class DMCDecoderLayer(LlamaDecoderLayer):
    attention_class: type[DMCAttention] = DMCAttention

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=self.attention_class)


class DMCForCausalLM(LlamaForCausalLM):
    """A family's class. vLLM's own of Qwen take no layer of another's; all that is not attention is Llama's in them.

    Attributes:
        layer_class: the family's.
    """

    layer_class: type[DMCDecoderLayer] = DMCDecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer_class)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError, one line, for attention weights that are not what ``config.json`` says."""
        checked = Checked(self.config)
        loaded = super().load_weights(checked.passing(weights))
        checked.refuse_what_is_missing()
        return loaded
