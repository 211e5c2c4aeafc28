"""AdamW in the form that megatron-core's checkpoints expect, for machines without Transformer Engine and Apex."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW, to the last bit, with one step count per parameter group in place of one per parameter.

    On a GPU it is torch's fused form: the foreach form, torch's default there, makes one more copy of all parameters.

    Transformer Engine's and Apex's FusedAdam keep ``step`` in the group, and the tensors of a parameter's state all have
    the parameter's shape. megatron-core's reshardable formats are made for that and fail on torch's own AdamW. As in
    FusedAdam, a group without parameters counts no steps.

    Args:
        params: parameters or groups of them.
        adam_w_mode: FusedAdam's name for decoupled weight decay, the only form there is here.
        capturable: FusedAdam's, for CUDA graphs; must be False.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("capturable must be False: the step count is kept on the host")
        if not adam_w_mode:
            raise ValueError("adam_w_mode must be True: weight decay is decoupled")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter].update(
                        exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                    )
            if not parameters:
                continue
            device = parameters[0].device
            # adamw counts up each of them by one.
            steps = torch.full((len(parameters),), group["step"] - 1.0, device=device).unbind()
            adamw(
                parameters,
                [parameter.grad for parameter in parameters],
                [self.state[parameter]["exp_avg"] for parameter in parameters],
                [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
                [],
                list(steps),
                fused=device.type == "cuda" or None,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
