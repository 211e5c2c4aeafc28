"""How much of later tokens' attention every token gets: what a compressed cache must not lose."""

from megatron_dmc.ops.later_attention.api import later_attention
from megatron_dmc.ops.later_attention.types import Tokens

__all__ = ["Tokens", "later_attention"]
