"""Generates from an exported folder, as a program that needs torch and transformers only.

``python generate.py FOLDER NEW_TOKENS`` prints JSON: the text, its tokens, tokens per second, and the bytes of its cache.
"""

import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = '''def read_lines(path):
    """Returns the lines of a text file."""
'''


def generate(folder: str, new_tokens: int) -> dict[str, Any]:
    """Samples so many tokens after PROMPT."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.generate(prompt, max_new_tokens=2)  # the first call pays for imports and allocations
        torch.manual_seed(0)
        began = time.perf_counter()
        made = model.generate(
            prompt,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.7,
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - began
    return {
        "text": tokenizer.decode(made.sequences[0], skip_special_tokens=True),
        "tokens": made.sequences.shape[1],
        "tokens_per_second": new_tokens / seconds,
        "cache_bytes": cache_bytes(made.past_key_values),
    }


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds: the compressed one's ``nbytes``, or the sum of a plain one's tensors."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


if __name__ == "__main__":
    json.dump(generate(sys.argv[1], int(sys.argv[2])), sys.stdout)
