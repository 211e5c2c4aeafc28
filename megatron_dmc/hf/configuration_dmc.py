"""What the configuration of a model with Dynamic Memory Compression has beyond its family's."""

from typing import Any, ClassVar

from megatron_dmc.config import DMCConfig
from megatron_dmc.hf.curve import CompressionCurve, check_threshold
from megatron_dmc.ops.decode.codes import check_cache_dtype

# Before a family's model type, where it merges.
DMC_TYPE = "dmc_"


class DMCConfiguration:
    """DMC's settings (Nawrot et al., ICML 2024, arXiv 2403.09636). Stands before a family's configuration among the bases.

    transformers gives every configuration class a constructor that lists its fields, unless its body has one: a family's says
    ``__init__ = DMCConfiguration.__init__``.

    Args:
        dmc: the settings of the retrofit, as DMCConfig.to_dict() gives them; missing ones have DMCConfig's defaults, but
            ``omega_floor`` is 2^-7 where others are given, as it was before it was a setting.
        prefill_chunk_tokens: a longer prompt goes through the layers in pieces of so many tokens. (The name is not
            prefill_chunk_size, because generate() has a setting of that name.)
        merge_threshold: logits. A token merges where its decision logit is above it: a higher one compresses less. 0: as the
            model was trained.
        compression_curve: which threshold gives which ratio, as ``megatron-dmc ratios`` measured it; None: not measured.
        cache_dtype: "int8", "fp8" or "int4": the cache stores slots that have left the window in codes, and attention sees
            what these give back. None: as they are.
        kwargs: the family's.

    Raises:
        ValueError: a setting that this model does not have; the message names it.
    """

    # The family's.
    rope_parameters: Any
    num_attention_heads: int
    num_key_value_heads: int | None
    # A family's plan knows no decision weight: never sharded.
    base_model_tp_plan: ClassVar[dict[str, str]] = {}

    # What attention here has not, and how a configuration says that it is not there.
    must_be: ClassVar[dict[str, Any]] = {"sliding_window": None, "attention_bias": False, "attention_dropout": 0}
    # Defaults of the family that no model with DMC may have, and its own ones.
    replaced_defaults: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        dmc: dict[str, Any] | None = None,
        prefill_chunk_tokens: int = 4096,
        merge_threshold: float = 0.0,
        compression_curve: dict[str, Any] | None = None,
        cache_dtype: str | None = None,
        **kwargs: Any,
    ):
        self.dmc = DMCConfig.from_dict(dmc or {}).to_dict()
        if (
            isinstance(prefill_chunk_tokens, bool)
            or not isinstance(prefill_chunk_tokens, int)
            or prefill_chunk_tokens < 1
        ):
            raise ValueError(f"prefill_chunk_tokens must be an integer >= 1, got {prefill_chunk_tokens!r}")
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.merge_threshold = check_threshold("merge_threshold", merge_threshold)
        self.compression_curve = (
            None if compression_curve is None else CompressionCurve.from_dict(compression_curve).to_dict()
        )
        self.cache_dtype = check_cache_dtype("cache_dtype", cache_dtype)
        super().__init__(**{**self.replaced_defaults, **kwargs})
        self._refuse_what_attention_lacks()

    def threshold_of(self, compression_ratio: float) -> float:
        """The merge threshold for a ratio, in texts as long as those of the curve; raises ValueError where it is not known."""
        if self.compression_curve is None:
            raise ValueError(
                "compression_ratio: it has not been measured which merge threshold gives it; run megatron-dmc ratios on the "
                "export, or give a merge_threshold"
            )
        return CompressionCurve.from_dict(self.compression_curve).threshold(compression_ratio)

    def _refuse_what_attention_lacks(self) -> None:
        for name, value in self.must_be.items():
            found = getattr(self, name, value)
            if found != value:
                raise ValueError(f"{name} must be {value} in a DMC model, got {found!r}")
        rotary = self.rope_parameters or {}
        if rotary.get("rope_type", "default") in ("dynamic", "longrope"):
            raise ValueError(
                f"rope_type {rotary['rope_type']!r} is not supported: its frequencies change with the length, "
                "and cached slots are already rotated"
            )
        if rotary.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor must be 1, got {rotary['partial_rotary_factor']!r}")
        layer_types = getattr(self, "layer_types", None) or ()
        if any(kind != "full_attention" for kind in layer_types):
            raise ValueError(f"layer_types must all be full_attention, got {layer_types!r}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads ({kv_heads}) must divide num_attention_heads ({heads})")
