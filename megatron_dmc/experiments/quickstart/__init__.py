"""``megatron-dmc quickstart``: the whole job on a small model and real text."""
