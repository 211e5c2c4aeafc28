"""vLLM with DMC against vLLM with the plain model, in the same bytes of keys and values.

    PYTHONPATH=. .venv-vllm/bin/python benchmarks/serving.py                       # 8 layers, minutes on two cores
    PYTHONPATH=. .venv-vllm/bin/python benchmarks/serving.py --layers 30 --prompts 512 2048 --requests 60
    PYTHONPATH=. .venv-vllm/bin/python benchmarks/serving.py --model FOLDER --export FOLDER ... --text FILE

Models of SmolLM2-135M's shape with random weights (the output layer its own, or every token would answer itself) and
random prompts, or a model and its exports and prompts cut out of a text (``.txt``, or ``.jsonl`` with "text").
Drawn decisions are a random projection's, with biases at which the heads differ as in a trained model (half of them near
1.5, a few above 20, the mean as asked). The pool holds ``--plain-requests`` mean requests of the plain model. Each engine
runs in a process of its own; they take turns.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from decode import SIZES, appending_rates
from torch import Tensor, nn

from megatron_dmc.ops.decode.codes import CACHE_DTYPES, Codes

# vLLM reads them when it is imported. One process: the steps can be looked at.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def save_models(layers: int, ratios: list[float], folder: Path) -> dict[str, Path]:
    """The plain model and an export for each ratio, with the same weights; by name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_dmc.hf import export
    from megatron_dmc.hf.families.llama import DMCLlamaConfig, DMCLlamaForCausalLM

    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": layers, "tie_word_embeddings": False, "eos_token_id": None}
    torch.manual_seed(1)
    plain = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    # A hidden state is then mainly its own token's: decisions do not hang on the prompt, and answers do not settle.
    plain.model.embed_tokens.weight.data.normal_()
    plain.save_pretrained(folder / "plain")
    found = {"plain": folder / "plain"}
    for ratio in ratios:
        dmc = {"local_window": 16, "decision_bias": 0.0, "target_compression_ratio": ratio}
        model = DMCLlamaForCausalLM(DMCLlamaConfig(**sizes, dmc=dmc)).eval()
        model.load_state_dict(plain.state_dict(), strict=False)
        set_decisions(model, ratio)
        at = found[f"CR {ratio:g}"] = folder / f"export_{len(found)}"
        model.save_pretrained(at)
        export.write_modeling_code(at)
    return found


@torch.no_grad()
def set_decisions(model: Any, ratio: float) -> None:
    """Random decisions with a bias for every head: so many of a random text's tokens append, layer by layer."""
    heads = model.config.num_key_value_heads
    rates = appending_rates(ratio, model.config.num_hidden_layers * heads, skewed=True)
    rates = rates[torch.randperm(len(rates))].view(-1, heads)

    def set_bias(projection: nn.Linear, inputs: tuple[Tensor, ...], of_layer: Tensor) -> None:
        projection.weight.normal_()
        logits = (inputs[0] @ projection.weight[0::2].T).flatten(0, -2)
        for head, rate in enumerate(of_layer.tolist()):
            projection.bias[2 * head] = -logits[:, head].quantile(rate)
        projection.weight[1::2] = 0

    hooks = [
        layer.self_attn.decision.register_forward_pre_hook(lambda *seen, of=of_layer: set_bias(*seen, of))
        for layer, of_layer in zip(model.model.layers, rates, strict=True)
    ]
    model(torch.randint(model.config.vocab_size, (4, 512)), use_cache=False)
    for hook in hooks:
        hook.remove()


def draw_prompts(folder: Path, text: Path | None, lengths: list[int]) -> list[list[int]]:
    """Random tokens, or pieces of a text."""
    generator = torch.Generator().manual_seed(2)
    if text is None:
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
    from tokenizers import Tokenizer

    words = text.read_text(encoding="utf-8")
    if text.suffix == ".jsonl":
        words = "\n".join(json.loads(line)["text"] for line in words.splitlines())
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(words[: 8 * sum(lengths) + 10**6]).ids
    starts = [int(torch.randint(len(tokens) - n, (1,), generator=generator)) for n in lengths]
    return [tokens[start : start + n] for start, n in zip(starts, lengths, strict=True)]


@torch.no_grad()
def own_ratio(folder: Path, text: Path | None, tokens: int) -> float:
    """Of the export's own cache after one prompt."""
    from transformers import AutoConfig

    from megatron_dmc.hf.families import dmc_classes

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = dmc_classes(config.model_type.removeprefix("dmc_"))[1].from_pretrained(folder)
    prompt = torch.tensor(draw_prompts(folder, text, [tokens]))
    return float(model(prompt, use_cache=True).past_key_values.compression_ratio)


class Watched:
    """An engine, and what each of its steps did."""

    def __init__(self, folder: str, options: argparse.Namespace):
        from vllm import EngineArgs, LLMEngine

        config = json.loads((Path(folder) / "config.json").read_text())
        self.dmc, self.dtype = "dmc" in config, getattr(torch, options.dtype)
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        rows = config["num_hidden_layers"] * config["num_key_value_heads"]
        plain_bytes = slot_bytes = 2 * width * self.dtype.itemsize
        coded = {"cache_dtype": options.cache_dtype} if self.dmc and options.cache_dtype else {}
        if coded:
            slot_bytes = Codes(options.cache_dtype, width).slot_bytes
        block_size = options.block_size if self.dmc else options.plain_block_size
        pool = options.plain_requests * (sum(options.prompts) / 2 + options.new_tokens) * plain_bytes
        blocks = int(pool // (block_size * slot_bytes))
        self.kv_bytes, self.rows = blocks * block_size * rows * slot_bytes, rows
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=folder,
                dtype=options.dtype,
                max_model_len=options.prompts[1] + options.new_tokens,
                max_num_seqs=options.requests,
                max_num_batched_tokens=options.step_tokens,
                block_size=block_size,
                num_gpu_blocks_override=blocks + 1,  # one is vLLM's null block
                enable_prefix_caching=False,
                enforce_eager=True,
                skip_tokenizer_init=True,
                hf_overrides=coded,
            )
        )
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.now = common.CLOCKS[options.clock]

    def serve(self, prompts: list[list[int]], new_tokens: int, rate: float | None = None) -> dict[str, Any]:
        """Greedy answers to prompts, all given at once or ``rate`` of them in a second.

        The figures are those of the scheduler and of the engine's outputs.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=new_tokens)
        begin = self.now()
        due = {str(i): begin + (i / rate if rate else 0) for i in range(len(prompts))}
        waiting = list(due)
        arrived: dict[str, list[float]] = {name: [] for name in due}
        with self._steps() as steps:
            while waiting or self.engine.has_unfinished_requests():
                while waiting and due[waiting[0]] <= self.now():
                    name = waiting.pop(0)
                    self.engine.add_request(name, {"prompt_token_ids": prompts[int(name)]}, sampling)
                if not self.engine.has_unfinished_requests():
                    time.sleep(0.001)
                    continue
                before = self.now()
                outputs = self.engine.step()
                after = self.now()
                steps[-1] |= {"seconds": after - before, **self._held()}
                for out in outputs:
                    times = arrived[out.request_id]
                    times += [after] * (len(out.outputs[0].token_ids) - len(times))
            total = self.now() - begin
        return self._figures(steps, due, arrived, total)

    @contextmanager
    def _steps(self) -> Iterator[list[dict[str, Any]]]:
        """What the scheduler decides from now on."""
        steps: list[dict[str, Any]] = []
        schedule = self.scheduler.schedule

        def schedules(*args: Any, **kwargs: Any) -> Any:
            out = schedule(*args, **kwargs)
            steps.append(
                {
                    "running": len(self.scheduler.running),
                    "waiting": len(self.scheduler.waiting),
                    "requests": len(out.num_scheduled_tokens),
                    "tokens": out.total_num_scheduled_tokens,
                    "preempted": len(out.preempted_req_ids or ()),
                }
            )
            return out

        self.scheduler.schedule = schedules
        try:
            yield steps
        finally:
            self.scheduler.schedule = schedule

    def _held(self) -> dict[str, int]:
        """Tokens and slots of all heads, as the workers report them, and slots for which there is memory."""
        if not self.dmc:
            return {}
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        uses = list(manager.use.values())
        pages = sum(manager.spec.header_blocks + use.blocks for use in uses)
        return {
            "held_tokens": self.rows * sum(use.tokens for use in uses),
            "held_slots": sum(use.slots for use in uses),
            "used_slots": self.rows * pages * manager.spec.block_size,
        }

    def _figures(
        self,
        steps: list[dict[str, Any]],
        due: dict[str, float],
        arrived: dict[str, list[float]],
        total: float,
    ) -> dict[str, Any]:
        count = sum(map(len, arrived.values()))
        first = [times[0] - due[name] for name, times in arrived.items()]
        between = [b - a for times in arrived.values() for a, b in itertools.pairwise(times)]
        running = [step["running"] for step in steps]
        while_short = [step["running"] for step in steps if step["waiting"]]
        decoding = [step for step in steps if step["tokens"] == step["requests"]]
        held, slots, used = (sum(s.get(n, 0) for s in steps) for n in ("held_tokens", "held_slots", "used_slots"))
        return {
            "most at once": max(running),
            "mean at once": statistics.mean(running),
            "mean while others wait": statistics.mean(while_short) if while_short else None,
            "tokens/s": count / total,
            "decode tokens/s": sum(s["requests"] for s in decoding) / max(sum(s["seconds"] for s in decoding), 1e-9),
            "decode step ms": common.median_ms([s["seconds"] for s in decoding]) if decoding else None,
            "total s": total,
            "steps": len(steps),
            "first p50 s": _quantile(first, 0.5),
            "first p99 s": _quantile(first, 0.99),
            "between p50 ms": 1000 * _quantile(between, 0.5),
            "between p99 ms": 1000 * _quantile(between, 0.99),
            "preemptions": sum(s["preempted"] for s in steps),
            "KV bytes": self.kv_bytes,
            "compression ratio": held / slots if slots else None,
            "tokens per slot of memory": held / used if used else None,
        }


def _quantile(values: list[float], part: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(part))


def prompt_lengths(options: argparse.Namespace) -> list[int]:
    shortest, longest = options.prompts
    drawn = torch.randint(shortest, longest + 1, (options.requests,), generator=torch.Generator().manual_seed(4))
    return drawn.tolist()


def serve(options: argparse.Namespace) -> None:
    """In a process of its own: prints the figures as its last line."""
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(options.threads)
    watched = Watched(options.serve, options)
    torch.set_num_threads(options.threads)
    prompts = draw_prompts(Path(options.serve), options.text, prompt_lengths(options))
    watched.serve([prompts[0][:64]], 4)  # what is allocated or compiled once
    figures = watched.serve(prompts, options.new_tokens, options.rate)
    print("\n" + json.dumps(figures), flush=True)


def measured(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    line = common.in_own_process(__file__, [*sys.argv[1:], "--serve", str(folder)], environment)
    figures: dict[str, Any] = json.loads(line)
    print(
        f"{name}: {figures['mean at once']:.1f} requests at once, {figures['tokens/s']:.1f} tokens/s, "
        f"{figures['total s']:.1f} s",
        flush=True,
    )
    return figures


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure over the rounds that have it."""
    known = {name: [each[name] for each in rounds if each[name] is not None] for name in rounds[0]}
    return {name: statistics.median(values) if values else None for name, values in known.items()}


def compared(seen: dict[str, list[dict[str, Any]]], own: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each engine; ratios to the plain one in the same round, medians over the rounds."""
    rows = []
    for name, rounds in seen.items():
        row = {"engine": name, **medians(rounds), "export's own ratio": own.get(name)}
        for figure in ("most at once", "mean at once", "mean while others wait", "tokens/s", "decode tokens/s"):
            pairs = [(a[figure], b[figure]) for a, b in zip(rounds, seen["plain"], strict=True)]
            known = [a / b for a, b in pairs if a and b]
            row[f"{figure} over plain"] = statistics.median(known) if known else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of the random model; SmolLM2-135M has 30")
    parser.add_argument("--ratio", type=float, nargs="+", default=[4.0, 8.0], help="compression ratios")
    parser.add_argument("--model", type=Path, help="a plain model's folder, with --export")
    parser.add_argument("--export", type=Path, nargs="+", help="its exports' folders")
    parser.add_argument("--text", type=Path, help="what prompts are cut from, .txt or .jsonl, with --model")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prompts", type=int, nargs=2, default=[512, 1024], help="shortest and longest, tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rate", type=float, help="requests that arrive in a second; all at once by default")
    parser.add_argument("--plain-requests", type=float, default=2.0, help="mean requests for which there is memory")
    parser.add_argument("--step-tokens", type=int, default=512, help="max_num_batched_tokens")
    parser.add_argument("--block-size", type=int, default=16, help="with DMC")
    parser.add_argument("--plain-block-size", type=int, default=32)
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="of DMC's kept slots")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    common.add_timing_options(parser)
    parser.set_defaults(rounds=2)
    options = parser.parse_args()
    if (options.model is None) != (options.export is None) or (options.text and not options.model):
        parser.error("--model and --export go together, and --text with them")
    if options.serve:
        return serve(options)
    with tempfile.TemporaryDirectory() as folder:
        if options.model:
            folders = {"plain": options.model, **{each.resolve().name: each for each in options.export}}
        else:
            folders = save_models(options.layers, options.ratio, Path(folder))
        tokens = sum(options.prompts) // 2
        own = {name: own_ratio(each, options.text, tokens) for name, each in folders.items() if name != "plain"}
        seen: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
        for _ in range(options.rounds):
            for name, each in folders.items():
                seen[name].append(measured(name, each, options))
    hidden = {"serve", "model", "export", "text"}
    settings = {name: value for name, value in vars(options).items() if name not in hidden}
    common.report("serving", "vLLM, plain and with DMC", compared(seen, own), **settings)


if __name__ == "__main__":
    main()
