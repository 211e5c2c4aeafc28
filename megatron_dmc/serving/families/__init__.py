"""Families as vLLM runs them, one file each, named as in megatron_dmc.hf.families."""
