"""Whether every parallel layout computes the same retrofit on the machines at hand: ``make cluster-check``.

From one checkpoint of initial weights a few steps in the middle of the compress phase are run, noise on, in one process and
in every layout, and losses, ratios, decision counts and gradient norms are compared step by step.
"""
