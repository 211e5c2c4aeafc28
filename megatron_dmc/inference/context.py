"""The compressed cache of a whole megatron-core model, handed through it as its inference context."""

from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.ops.decode import LayerCache, Sequences, bytes_of
from megatron_dmc.ops.rotary import rotation


class DMCInferenceContext:
    """Give it to ``GPTModel.forward(..., inference_context=...)``: prefill, later chunks and single steps are the same call.

    Args:
        dmc: the model's configuration.
        max_sequence_length: positions for which rotary embeddings are made, prompt and answer together.
        only_last_logits: the model returns a call's last logits only, [batch, 1, vocabulary]: a long prompt's would
            take more memory than its cache.
    """

    def __init__(self, dmc: DMCConfig, max_sequence_length: int, *, only_last_logits: bool = False) -> None:
        self.dmc = dmc
        self.max_sequence_length = max_sequence_length
        self.layers: dict[int, LayerCache] = {}
        # What they know together, and the tokens of every sequence that each has taken in.
        self.shared: dict[torch.device, Sequences] = {}
        self.taken: dict[int, int] = {}
        # What megatron-core asks of a context; its base class changed between 0.16 and 0.17, these names did not.
        self.sequence_len_offset = 0
        self.materialize_only_last_token_logits = only_last_logits
        self.config = SimpleNamespace(materialize_only_last_token_logits=only_last_logits)

    def is_static_batching(self) -> bool:
        """megatron-core's other kind has a paged cache of its own."""
        return True

    def is_dynamic_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        """Chunks and steps take the same path."""
        return False

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decision_logits: Tensor,
        omega: Tensor,
        *,
        angles: Tensor,
    ) -> Tensor:
        """One layer's attention, which DMCSelfAttention calls.

        Args:
            layer_number: counted from 1, as megatron-core does.
            query: [batch, seq, heads, head_dim]; key, value: [batch, seq, kv_heads, head_dim]; before rotary embedding.
            decision_logits, omega: [batch, seq, kv_heads].
            angles: rotary angles of all positions, [1, max_sequence_length, 1, head_dim].

        Returns:
            [batch, seq, heads, head_dim].

        Raises:
            ValueError: the text is longer than max_sequence_length.
        """
        if layer_number not in self.layers:
            self.layers[layer_number] = LayerCache(**self.dmc.cache_settings(), shared=self.shared)
            self.taken[layer_number] = 0
        first, seq = self.taken[layer_number], key.shape[1]
        if first + seq > self.max_sequence_length:
            raise ValueError(f"the text is longer than max_sequence_length ({self.max_sequence_length})")
        cos, sin = rotation(angles[:, first : first + seq], query.dtype)
        out = self.layers[layer_number].attend(query, key, value, decision_logits > 0, omega, cos, sin)
        self.taken[layer_number] = first + seq
        return out

    @property
    def nbytes(self) -> int:
        """Bytes held by all of this rank's layers."""
        return bytes_of(*self.shared.values()) + sum(layer.nbytes for layer in self.layers.values())

    @property
    def slots(self) -> Tensor:
        """Slots in use, int64 [layers, batch, kv_heads]."""
        return torch.stack([self.layers[number].slots for number in sorted(self.layers)])
