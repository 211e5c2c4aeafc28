"""Peak memory and speed of a conversion, both ways, at any model's sizes; by default Llama 2 70B's, cut to 2 layers, bfloat16.

    PYTHONPATH=. python benchmarks/conversion_memory.py FOLDER      # needs about 14 GB there, and removes them

A random model is written to FOLDER and converted to a checkpoint and back, each in a process of its own. Its peak is the
growth of all resident memory, mapped files included, over what the process had before, after a tiny model's conversion has
loaded what every conversion needs. The bound is twice the largest parameter and --allowed; what came back must be what
was written, to the last bit. Exits 1 otherwise. Linux only.
"""

import argparse
import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import write_results

from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.hf_config import write_config
from megatron_dmc.convert.mapping import hugging_face_shapes, rows
from megatron_dmc.convert.to_hf import export_hf
from megatron_dmc.convert.weights import Weights, write_weights
from megatron_dmc.model.model_config import ModelConfig

DTYPE = torch.bfloat16
CONVERSIONS = {"from HF": import_hf, "to HF": export_hf}
TINY = ModelConfig(1, 64, 64, 8, 8, 64, 64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where it writes, and removes what it wrote")
    for name, size in (
        ("layers", 2),
        ("hidden", 8192),
        ("ffn", 28672),
        ("heads", 64),
        ("kv-heads", 8),
        ("vocab", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--allowed", type=int, default=2**30, help="bytes beside twice the largest parameter")
    parser.add_argument("--json", action="store_true", help="print one JSON object; no table, no file of results")
    parser.add_argument("--measure", choices=CONVERSIONS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Of the tokenizers that these models have not.
    logging.disable(logging.WARNING)
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.output)))
        return 0
    sizes = ModelConfig(
        *(options.layers, options.hidden, options.ffn, options.heads, options.kv_heads, options.vocab),
        max_position_embeddings=4096,
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=options.folder) as temporary:
        found = convert_both_ways(sizes, Path(temporary), options.allowed)
    if options.json:
        print(json.dumps(found))
    else:
        print(table(found))
        settings = {name: value for name, value in found.items() if name != "conversions"}
        measured = [{"conversion": name} | each for name, each in found["conversions"].items()]
        write_results("conversion_memory", measured, sizes=asdict(sizes), **settings)
    return 0 if found["same"] and all(each["peak"] <= found["bound"] for each in found["conversions"].values()) else 1


def convert_both_ways(sizes: ModelConfig, folder: Path, allowed: int) -> dict[str, Any]:
    total = write_random(sizes, folder / "hf")
    largest = max(sum(map(math.prod, row.shapes(sizes))) for row in rows(sizes, None)) * DTYPE.itemsize
    found: dict[str, Any] = {"bytes": total, "largest": largest, "bound": 2 * largest + allowed, "conversions": {}}
    source = folder / "hf"
    for name, output in zip(CONVERSIONS, (folder / "checkpoint", folder / "back"), strict=True):
        command = [sys.executable, "-W", "ignore", __file__, str(source), "--measure", name, "--output", str(output)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found["conversions"][name] = json.loads(done.stdout)
        source = output
    shutil.rmtree(folder / "checkpoint")
    written, back = Weights(folder / "hf"), Weights(folder / "back")
    found["same"] = written.shapes == back.shapes and all(
        torch.equal(written[name].view(torch.int16), back[name].view(torch.int16)) for name in written.shapes
    )
    return found


def write_random(sizes: ModelConfig, folder: Path) -> int:
    """A plain Llama of random weights; returns their bytes."""
    folder.mkdir()
    shapes = dict(hugging_face_shapes(sizes, None))
    config = write_config(sizes, None, dtype=DTYPE, special_tokens={})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    seed = torch.Generator().manual_seed(0)
    # In float32 first it would be twice as large.
    tensors: Iterator[Any] = ((name, torch.empty(s, dtype=DTYPE).normal_(generator=seed)) for name, s in shapes.items())
    write_weights(folder, shapes, tensors, dtype=DTYPE, max_shard_size=5 * 10**9)
    return sum(map(math.prod, shapes.values())) * DTYPE.itemsize


def measure(name: str, source: Path, output: Path) -> dict[str, float]:
    """Peak bytes and seconds of one conversion in this process."""
    with tempfile.TemporaryDirectory() as temporary:
        write_random(TINY, Path(temporary, "hf"))
        import_hf(Path(temporary, "hf"), Path(temporary, "checkpoint"))
        export_hf(Path(temporary, "checkpoint"), Path(temporary, "back"))
    # Sets the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, begin = resident("VmRSS"), time.perf_counter()
    CONVERSIONS[name](source, output)
    return {"peak": resident("VmHWM") - before, "seconds": time.perf_counter() - begin}


def resident(field: str) -> int:
    """Bytes, of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def table(found: dict[str, Any]) -> str:
    lines = [f"weights {found['bytes'] / 1e9:.2f} GB, largest {found['largest'] / 1e9:.2f} GB"]
    for name, each in found["conversions"].items():
        speed = found["bytes"] / each["seconds"] / 1e9
        lines.append(f"{name:8} peak {each['peak'] / 1e9:.2f} of {found['bound'] / 1e9:.2f} GB, {speed:.2f} GB/s")
    lines.append("back to the last bit" if found["same"] else "what came back DIFFERS")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
