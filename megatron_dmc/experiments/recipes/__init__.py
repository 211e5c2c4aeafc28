"""``megatron-dmc recipes``: ways to the same compression ratio side by side."""
