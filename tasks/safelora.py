"""Safe LoRA (arXiv 2405.16833): project an adapter's update onto the alignment subspace of its base model.

Legend: O = d_out, I = d_in, R = LoRA rank. For one module, V_OI = W_aligned - W_base, the adapter's update is
delta_OI = B_OR A_RI (its scale alpha/r moves neither the cosine nor the choice), and C_OO is the projector:

    approximate   C = V V^T / ||V||_F                     (the paper's Eq. 2; not idempotent, scales with ||V||)
    exact         C = U U^T, U the left singular vectors of V that hold a stated share of its energy

C is never formed: C B = V (V^T B) / ||V||_F costs O(O I R). The gate compares C B A with B A through R x R Gram matrices,
<X A, Y A> = sum((X^T Y) * (A A^T)), in float64, so the O x I product is never formed either and the cosine is exact to
the precision of C B.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from tasks.errors import ProjectionError


@dataclass(frozen=True)
class Projection:
    """One module's outcome. `cosine` is None when the update is zero (there is nothing to project)."""

    projected_OR: torch.Tensor
    cosine: float | None
    norm_ratio: float | None


def project(
    module: str,
    base_OI: torch.Tensor,
    aligned_OI: torch.Tensor,
    lora_A_RI: torch.Tensor,
    lora_B_OR: torch.Tensor,
    projector: Literal["approximate", "exact"] = "approximate",
    energy: float | None = None,
) -> Projection:
    """C B, cos(C B A, B A) and ||C B A|| / ||B A|| of one module; V and C B in float32, the gate in float64.

    Raises ProjectionError when shapes disagree, V is zero, or anything is not finite.
    """
    if base_OI.shape != aligned_OI.shape:
        raise ProjectionError(f"{module}: the base weight is {tuple(base_OI.shape)}, the aligned one {tuple(aligned_OI.shape)}")
    if lora_B_OR.shape[0] != base_OI.shape[0] or lora_A_RI.shape[1] != base_OI.shape[1] or lora_A_RI.shape[0] != lora_B_OR.shape[1]:
        raise ProjectionError(
            f"{module}: an adapter with B {tuple(lora_B_OR.shape)} and A {tuple(lora_A_RI.shape)} does not fit"
            f" a weight of {tuple(base_OI.shape)}; was it trained on another model?"
        )
    v_OI = aligned_OI.float() - base_OI.float()
    b_OR, a_RI = lora_B_OR.float(), lora_A_RI.float()
    for name, tensor in (("aligned - base", v_OI), ("lora_B", b_OR), ("lora_A", a_RI)):
        if not bool(torch.isfinite(tensor).all()):
            raise ProjectionError(f"{module}: {name} holds NaN or infinity; the checkpoint or adapter is damaged")
    norm = torch.linalg.vector_norm(v_OI)
    if norm == 0:
        raise ProjectionError(f"{module}: base and aligned weights are equal, so there is no alignment direction to project onto")
    if projector == "approximate":
        cb_OR = v_OI @ (v_OI.T @ b_OR) / norm
    else:
        u_OK = alignment_basis(v_OI, energy if energy is not None else 1.0)
        cb_OR = u_OK @ (u_OK.T @ b_OR)
    cosine, ratio = gate(cb_OR, b_OR, a_RI)
    return Projection(cb_OR, cosine, ratio)


def gate(cb_OR: torch.Tensor, b_OR: torch.Tensor, a_RI: torch.Tensor) -> tuple[float | None, float | None]:
    """(cosine, norm ratio) of C B A against B A from Gram matrices in float64; (None, None) when B A is zero."""
    a_RI, b_OR, cb_OR = a_RI.double(), b_OR.double(), cb_OR.double()
    gram_RR = a_RI @ a_RI.T

    def inner(x_OR: torch.Tensor, y_OR: torch.Tensor) -> float:
        return float(((x_OR.T @ y_OR) * gram_RR).sum())

    before, after = inner(b_OR, b_OR), inner(cb_OR, cb_OR)
    if before <= 0:
        return None, None
    if after <= 0:
        return 0.0, 0.0
    cosine = inner(cb_OR, b_OR) / (before * after) ** 0.5
    return min(1.0, max(-1.0, cosine)), (after / before) ** 0.5


def alignment_basis(v_OI: torch.Tensor, energy: float) -> torch.Tensor:
    """Orthonormal columns (O, K) spanning V's leading left singular vectors that hold `energy` of ||V||_F^2."""
    u_OK, s_K, _ = torch.linalg.svd(v_OI, full_matrices=False)
    share_K = torch.cumsum(s_K.double() ** 2, 0) / (s_K.double() ** 2).sum()
    keep = int(torch.searchsorted(share_K, energy).item()) + 1
    basis_OK: torch.Tensor = u_OK[:, :keep]
    return basis_OK


def chosen(cosines: dict[str, float | None], threshold: float | None, modules: int | None) -> frozenset[str]:
    """The modules that take C B: cosine <= threshold (as the reference does), or exactly the n lowest, ties by name."""
    known = {name: cosine for name, cosine in cosines.items() if cosine is not None}
    if threshold is not None:
        return frozenset(name for name, cosine in known.items() if cosine <= threshold)
    if modules is not None:
        if modules > len(known):
            raise ProjectionError(f"apply.modules={modules}, but the adapter has {len(known)} modules that can be projected")
        return frozenset(sorted(known, key=lambda name: (known[name], name))[:modules])
    return frozenset()
