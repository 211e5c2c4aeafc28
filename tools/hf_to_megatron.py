"""A Hugging Face Llama folder to a checkpoint of this project, as ``megatron-dmc convert-from-hf`` does it."""

import sys
from collections.abc import Sequence
from pathlib import Path

# So that the tool runs from any folder, and without an installation of the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_dmc.cli import convert_from_hf, run_alone


def main(arguments: Sequence[str] | None = None) -> int:
    return run_alone(convert_from_hf, "hf_to_megatron.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
