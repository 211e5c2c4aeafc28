"""``megatron-dmc compare``: ways to a smaller cache side by side, on one base and one text."""
