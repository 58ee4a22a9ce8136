"""Penalties on an update while it is trained, and averages of weights. Pure functions, with
gradients; no d_out x d_out or d_out x d_in matrix beside V is formed.

Legend: O = d_out, I = d_in, R = rank. The update is B_OR A_RI without its scale, and C_OO is Safe
LoRA's matrix V V^T / ||V||_F with V_OI = W_aligned - W_base.

    AsFT (arXiv 2506.08473)   lambda ||(I - C) B A||_F^2   what leaves alignment's directions
    its control               lambda ||B A||_F^2           what is long, in any direction

AsFT's own code adds the penalty to every micro-batch, after the loss was divided by their number.
So its lambda acts once for each micro-batch. Here a penalty belongs to an optimiser's step.
"""

from collections.abc import Mapping

import torch


def length_penalty(lora_A_RI: torch.Tensor, lora_B_OR: torch.Tensor) -> torch.Tensor:
    """||B A||_F^2 = sum((B^T B) * (A A^T)), as a scalar."""
    return ((lora_B_OR.T @ lora_B_OR) * (lora_A_RI @ lora_A_RI.T)).sum()


def aligned_part(lora_B_OR: torch.Tensor, v_OI: torch.Tensor, v_norm: float) -> torch.Tensor:
    """C B = V (V^T B) / ||V||_F, (O, R). Zero where V is zero: there is no direction to keep to."""
    if v_norm == 0:
        return torch.zeros_like(lora_B_OR)
    v_OI = v_OI.to(lora_B_OR.dtype)
    return v_OI @ (v_OI.T @ lora_B_OR) / v_norm


def outside_penalty(
    lora_A_RI: torch.Tensor, lora_B_OR: torch.Tensor, v_OI: torch.Tensor, v_norm: float
) -> torch.Tensor:
    """||(I - C) B A||_F^2, as a scalar: `length_penalty` of B - C B.

    C is no projector, so for ||V||_F above 1 it may lengthen a part of B; the penalty then
    punishes that too, as AsFT's does.
    """
    return length_penalty(lora_A_RI, lora_B_OR - aligned_part(lora_B_OR, v_OI, v_norm))


@torch.no_grad()
def average_step(
    average: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], decay: float
) -> None:
    """One step of an exponential moving average, in place: e <- decay e + (1 - decay) w.

    It begins with the initial weights. A decay of 0 keeps the newest weights bit for bit. A and B
    are averaged apart, so the average's update is not the average of the updates. Raises KeyError
    when the two have other names.
    """
    if average.keys() != weights.keys():
        raise KeyError(sorted(average.keys() ^ weights.keys())[0])
    for name, tensor in average.items():
        tensor.lerp_(weights[name].to(tensor.dtype), 1.0 - decay)
