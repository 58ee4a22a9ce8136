"""An update as two factors, and what two updates of one module have in common.

Legend: O = d_out, I = d_in, R = rank. An update is dW_OI = scale * B_OR A_RI. It is never formed:
<B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T)), in float64. So a norm below is ||dW||_F, which is not
||B||_F.
"""

import math
from dataclasses import dataclass

import torch

from ebbline.tasks.errors import ProjectionError


@dataclass(frozen=True)
class Factors:
    """dW = scale * B A of one module. PEFT's scale is alpha / r, or alpha / sqrt(r) for rsLoRA."""

    lora_A_RI: torch.Tensor
    lora_B_OR: torch.Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Raises ProjectionError for an A and a B of two ranks."""
        if self.lora_B_OR.shape[1] != self.lora_A_RI.shape[0]:
            raise ProjectionError(
                f"an A of the shape {tuple(self.lora_A_RI.shape)} and a B of the shape "
                f"{tuple(self.lora_B_OR.shape)} have different ranks; the adapter is damaged. Save "
                "it again from its training"
            )

    @property
    def rank(self) -> int:
        return self.lora_A_RI.shape[0]

    def with_b(self, b_OR: torch.Tensor) -> "Factors":
        return Factors(self.lora_A_RI, b_OR, self.scale)

    def times(self, factor: float) -> "Factors":
        """factor * dW, in B: the computation is float32, and a factor of 1 changes no bit."""
        return self.with_b(self.lora_B_OR.float() * factor)

    def baked(self) -> "Factors":
        """The same update with a scale of 1."""
        return Factors(self.lora_A_RI, self.lora_B_OR.float() * self.scale)

    def joined(self, other: "Factors") -> "Factors":
        """The sum of two updates of one scale: B = [B1 B2], A = [A1; A2], rank R1 + R2.

        Raises ProjectionError when the shapes or scales differ.
        """
        one, two = (self.lora_B_OR, self.lora_A_RI), (other.lora_B_OR, other.lora_A_RI)
        if one[0].shape[0] != two[0].shape[0] or one[1].shape[1] != two[1].shape[1]:
            raise ProjectionError(
                f"updates of {(one[0].shape[0], one[1].shape[1])} and "
                f"{(two[0].shape[0], two[1].shape[1])} cannot be added"
            )
        if self.scale != other.scale:
            raise ProjectionError(f"updates of scales {self.scale} and {other.scale} are not baked")
        a_RI, b_OR = (
            torch.cat([one[1].float(), two[1].float()]),
            torch.cat([one[0].float(), two[0].float()], dim=1),
        )
        return Factors(a_RI, b_OR, self.scale)


def inner(one: Factors, two: Factors) -> float:
    """<dW1, dW2>, the sum of the products of their elements."""
    b_RR = one.lora_B_OR.double().T @ two.lora_B_OR.double()
    a_RR = one.lora_A_RI.double() @ two.lora_A_RI.double().T
    return one.scale * two.scale * float((b_RR * a_RR).sum())


def norm(update: Factors) -> float:
    """||dW||_F."""
    return math.sqrt(max(0.0, inner(update, update)))


@dataclass(frozen=True)
class Effect:
    """What a defence did to one module's update, from old = dW and new = dW'.

    With c = cos(dW', dW) and q = ||dW'|| / ||dW||, the best multiple of dW explains

        of the result  dW'        c^2
        of the change  dW' - dW   (q c - 1)^2 / (q^2 - 2 q c + 1)

    as shares of the squared norm: 1 - min_a ||X - a dW||^2 / ||X||^2. A short dW' of any direction
    has a change that is nearly a deletion, and scaling explains nearly all of it. `cosine` and the
    shares are None where a norm in their denominator is zero.
    """

    norm_before: float
    norm_after: float
    cosine: float | None
    norm_ratio: float | None
    result_explained: float | None
    change_explained: float | None


def effect(old: Factors, new: Factors) -> Effect:
    """Compare two updates of one module."""
    before, after, both = inner(old, old), inner(new, new), inner(old, new)
    before, after = max(0.0, before), max(0.0, after)
    ratio = math.sqrt(after) / math.sqrt(before) if before else None
    cosine = _bounded(both / math.sqrt(before) / math.sqrt(after)) if before and after else None
    changed = before - 2 * both + after
    # Below rounding, the two are equal: there is no change to explain.
    of_change = (
        min(1.0, (both - before) ** 2 / before / changed)
        if before and changed > 1e-14 * (before + after)
        else None
    )
    return Effect(
        math.sqrt(before),
        math.sqrt(after),
        cosine,
        ratio,
        None if cosine is None else cosine**2,
        of_change,
    )


def _bounded(cosine: float) -> float:
    return min(1.0, max(-1.0, cosine))
