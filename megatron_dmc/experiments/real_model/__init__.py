"""``megatron-dmc quickstart --model``: one real model, from nothing to a table."""
