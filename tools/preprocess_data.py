"""Text or conversations to a megatron-core indexed dataset, as ``megatron-dmc preprocess`` does it."""

import sys
from collections.abc import Sequence
from pathlib import Path

# So that the tool runs from any folder, and without an installation of the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_dmc.cli import preprocess, run_alone


def main(arguments: Sequence[str] | None = None) -> int:
    return run_alone(preprocess, "preprocess_data.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
