"""``megatron-dmc report``: one page about a run, with its figures, that needs no network and no program but a browser."""
