"""A Hugging Face Llama's folder as a GGUF file, as llama.cpp's converter writes it."""

import json
from pathlib import Path
from typing import Any

import numpy
from gguf import GGUFWriter
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(
    folder: Path,
    file: Path,
    *,
    architecture: str = "llama",
    more: dict[str, numpy.ndarray] | None = None,
    leave_out: str = "",
    says: dict[str, int] | None = None,
) -> None:
    """Writes config.json, model.safetensors and the byte-level BPE of tokenizer.json as one file of float32 tensors.

    Args:
        more: further tensors.
        leave_out: the name of one of the folder's tensors.
        says: sizes that the header has in place of config.json's.
    """
    config = json.loads((folder / "config.json").read_text())
    writer, header = GGUFWriter(file, architecture), config | (says or {})
    writer.add_context_length(header["max_position_embeddings"])
    writer.add_embedding_length(header["hidden_size"])
    writer.add_block_count(header["num_hidden_layers"])
    writer.add_feed_forward_length(header["intermediate_size"])
    writer.add_head_count(header["num_attention_heads"])
    writer.add_head_count_kv(header["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name == leave_out:
            continue
        writer.add_tensor(*_renamed(name, tensor, config))
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str, tensor: numpy.ndarray, config: dict[str, Any]) -> tuple[str, numpy.ndarray]:
    if name in WHOLE:
        return WHOLE[name], tensor
    _, _, layer, rest = name.split(".", 3)
    part = rest.removesuffix(".weight")
    if part in ("self_attn.q_proj", "self_attn.k_proj"):
        # llama.cpp rotates pairs of neighbours, transformers the two halves of a head.
        heads = config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
        halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
        tensor = numpy.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
    return f"blk.{layer}.{NAMES[part]}.weight", tensor


def _add_tokenizer(writer: GGUFWriter, tokenizer: dict[str, Any]) -> None:
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    # 3: control, 1: normal.
    writer.add_token_types([3 if index in special else 1 for _, index in vocabulary])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
