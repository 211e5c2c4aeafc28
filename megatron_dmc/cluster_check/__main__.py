"""``python -m megatron_dmc.cluster_check`` is ``megatron-dmc cluster-check``."""

import sys

from megatron_dmc.cli import cluster_check, run_alone

if __name__ == "__main__":
    sys.exit(run_alone(cluster_check, "cluster-check"))
