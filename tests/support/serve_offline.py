"""One engine in processes of its own: greedy outputs and figures as JSON, on the last line.

    python serve_offline.py CASE.json '{"tensor_parallel_size": 2}'

With the environment V2, by vLLM's Model Runner V2; with KERNELS, single tokens by Triton's kernels.
"""

import json
import os
import sys
import time
import types
from pathlib import Path

from tests.support.engines import ENVIRONMENT, OPTIONS, asynchronous, params
from tests.support.served import NEW_TOKENS, read

os.environ.update(ENVIRONMENT)


# Its kernels are Triton's. On a CPU Triton's interpreter runs them; Triton has to know before it is imported.
V2 = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
# Beside it: decode's kernels as well.
KERNELS = {"DMC_TEST_KERNELS": "1"}


if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":  # in vLLM's workers, too, which import this module
    import triton.backends

    # vLLM switches Triton off where none of its backends is for the platform: this one is only a name.
    named = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True), compiler=None)
    triton.backends.backends["cpu"] = named

if os.environ.get("DMC_TEST_KERNELS") == "1":
    from megatron_dmc.serving import kernels

    kernels.OF_DEVICES["cpu"] = kernels.TRITON


def main() -> None:
    case, options = read(Path(sys.argv[1])), json.loads(sys.argv[2])
    ranks = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    if ranks > 1:
        # Nobind: vLLM would give each rank a NUMA node of its own.
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    from vllm import LLM

    started = time.monotonic()
    with asynchronous():
        llm = LLM(str(case.folder), **{**OPTIONS, **options})
    print("started in", round(time.monotonic() - started), "s", flush=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in case.prompts]
    outputs = llm.generate(prompts, params(max_tokens=NEW_TOKENS), use_tqdm=False)
    print("answered in", round(time.monotonic() - started), "s", flush=True)
    figures = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    outputs = [list(out.outputs[0].token_ids) for out in outputs]
    config = llm.llm_engine.vllm_config
    caches = [getattr(x, "cache", None) for x in config.compilation_config.static_forward_context.values()]
    seen = {
        "v2": config.use_v2_model_runner,
        "kernels": next((cache.kernels.name for cache in caches if cache and cache.kernels), None),
    }
    print(json.dumps({"outputs": outputs, "figures": figures, **seen}))


if __name__ == "__main__":
    main()
