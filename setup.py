"""Packaging metadata. Settings of the tools stand in pyproject.toml, tested versions in constraints.txt."""

import re
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    match = re.search(
        r'^__version__ = "([^"]+)"$', (ROOT / "megatron_dmc/__init__.py").read_text("utf-8"), re.MULTILINE
    )
    if match is None:
        raise RuntimeError("megatron_dmc/__init__.py has no __version__")
    return match.group(1)


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text("utf-8") if readme.is_file() else ""


setup(
    name="megatron-dmc",
    version=version(),
    description="Retrofit pretrained LLMs with Dynamic Memory Compression on NVIDIA megatron-core",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_dmc", "megatron_dmc.*"]),
    package_data={"megatron_dmc": ["py.typed", "evaluation/harness/tasks/*.yaml", "report/page.*"]},
    # For `megatron-dmc quickstart` and `recipes` outside a checkout (megatron_dmc/experiments/places.py).
    data_files=[
        (f"share/megatron-dmc/examples/{name}", sorted(glob(f"examples/{name}/*.yaml", root_dir=ROOT)))
        for name in ("quickstart", "smollm2", "compare")
    ],
    entry_points={
        "console_scripts": ["megatron-dmc = megatron_dmc.cli:main"],
        "vllm.general_plugins": ["megatron_dmc = megatron_dmc.serving:register"],
    },
    install_requires=[
        "matplotlib",
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        "omegaconf>=2.4",
        "psutil",  # megatron-core's dist_checkpointing hangs without it and does not declare it
        "rich",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "torch>=2.6",
    ],
    extras_require={
        "hf": ["jinja2>=3.1.6", "transformers>=5.0,<6"],  # jinja2 runs chat templates
        "gguf": [
            "accelerate",
            "gguf",
            "transformers>=5.0,<6",
        ],  # models as GGUF files; transformers reads them with both
        # accelerate: lm-eval's models need it. wonderwords: the words of the long-context tasks.
        "eval": ["accelerate", "lm_eval>=0.4.13,<0.5", "transformers>=5.0,<6", "wonderwords"],
        "report": ["plotly>=7,<8"],  # the page of megatron-dmc report; it is written whole into the page
        # In an environment of its own: it takes older versions of transformers only.
        "kvpress": ["kvpress>=0.5.5,<0.6", "transformers>=5.0,<6"],
        "vllm": ["vllm>=0.32,<0.34"],  # `vllm serve` of an export; the same range stands in megatron_dmc/serving
        "gpu": ["transformer-engine[pytorch]>=2.6"],  # no flash-attn: attention runs on torch's own flash kernels
        "dev": ["hypothesis", "mypy", "pytest", "pytest-xdist", "ruff"],
    },
)
