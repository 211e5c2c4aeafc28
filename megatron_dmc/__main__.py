"""``python -m megatron_dmc`` is ``megatron-dmc``."""

import sys

from megatron_dmc.cli import main

if __name__ == "__main__":
    sys.exit(main())
