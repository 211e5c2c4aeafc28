"""Generates from an exported folder. Needs torch and transformers only."""

import argparse
import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = '''def read_lines(path):
    """Returns the lines of a text file."""
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print the text and the measurements as JSON")
    parsed = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(parsed.folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(parsed.folder, trust_remote_code=True).eval()
    prompt = tokenizer(parsed.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.generate(prompt, max_new_tokens=2)  # the first call pays for imports and allocations
        torch.manual_seed(0)
        began = time.perf_counter()
        made = model.generate(
            prompt,
            min_new_tokens=parsed.new_tokens,
            max_new_tokens=parsed.new_tokens,
            do_sample=True,
            temperature=0.7,
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - began
    text = tokenizer.decode(made.sequences[0], skip_special_tokens=True)
    if not parsed.json:
        print(text)
        return
    json.dump(
        {
            "text": text,
            "tokens": made.sequences.shape[1],
            "tokens_per_second": parsed.new_tokens / seconds,
            "cache_bytes": cache_bytes(made.past_key_values),
        },
        sys.stdout,
    )


def cache_bytes(cache) -> int:
    """Bytes that a cache holds: the compressed one says it, a plain one is its layers' tensors."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


if __name__ == "__main__":
    main()
