"""Tasks of lm-evaluation-harness on an export, a base or a checkpoint, with the cache's compression beside each score.

Only the modules of this folder import ``lm_eval``, which the extra ``eval`` brings.
"""
