"""The leading directions of alignment: V = sum_i s_i u_i w_i^T, with the largest s_i first.

Legend: O = d_out, I = d_in, K = directions, P = rows of a block. V_OI = W_aligned - W_base. The
decomposition comes from V's smaller Gram matrix in float64, as the exact projector's basis does,
and costs as much.
"""

from dataclasses import dataclass

import torch

from ebbline.tasks.defences.projectors import check_shapes
from ebbline.tasks.errors import ProjectionError


@dataclass(frozen=True)
class Directions:
    """The leading singular triplets of V, in float64: u as columns, s descending, w as rows."""

    left_OK: torch.Tensor
    values_K: torch.Tensor
    right_KI: torch.Tensor

    def first(self, count: int) -> "Directions":
        return Directions(self.left_OK[:, :count], self.values_K[:count], self.right_KI[:count])

    def components(self, lora_A_RI: torch.Tensor, lora_B_OR: torch.Tensor) -> torch.Tensor:
        """c_i = u_i^T (B A) w_i of an update without its scale, as (K,) float64."""
        left_KR = self.left_OK.T @ lora_B_OR.double()
        right_RK = lora_A_RI.double() @ self.right_KI.T
        return (left_KR * right_RK.T).sum(1)


def leading_directions(
    module: str, base_OI: torch.Tensor, aligned_OI: torch.Tensor, count: int, device: str = "cpu"
) -> Directions:
    """The `count` leading triplets of V; fewer where V's rank is smaller, none where V is zero.

    Directions of equal singular values are any basis of their space. Raises ProjectionError for
    shapes that do not fit, and for values that are not finite.
    """
    check_shapes(module, base_OI, aligned_OI, ())
    v_OI = aligned_OI.to(device).double() - base_OI.to(device).double()
    if not bool(torch.isfinite(v_OI).all()):
        raise ProjectionError(f"{module}: the weight holds NaN or infinity in base or aligned")
    wide = v_OI.shape[0] <= v_OI.shape[1]
    squares_M, vectors_MM = torch.linalg.eigh(v_OI @ v_OI.T if wide else v_OI.T @ v_OI)
    squares_M, vectors_MM = squares_M.flip(0), vectors_MM.flip(1)
    # A Gram matrix squares the values: below this share of the largest they are rounding.
    kept = int((squares_M > 1e-14 * len(squares_M) * squares_M[0]).sum()) if squares_M[0] > 0 else 0
    kept = min(kept, count)
    values_K, near_MK = squares_M[:kept].sqrt(), vectors_MM[:, :kept]
    far_K = (v_OI.T if wide else v_OI) @ near_MK / values_K
    left_OK, right_IK = (near_MK, far_K) if wide else (far_K, near_MK)
    return Directions(left_OK.cpu(), values_K.cpu(), right_IK.T.contiguous().cpu())


def extrapolated(
    module: str,
    base_OI: torch.Tensor,
    aligned_OI: torch.Tensor,
    count: int,
    factor: float,
    device: str = "cpu",
) -> torch.Tensor:
    """LoX (arXiv 2506.15606): W_aligned + factor * SVD_count(V), in the aligned weight's dtype.

    It strengthens alignment's `count` leading directions *before* a fine-tuning. V itself stays
    that of the unchanged models. A factor or a count of 0 returns the weight bit for bit. Raises
    ProjectionError as `leading_directions` does, and when the dtype cannot hold the result.
    """
    if factor == 0 or count == 0:
        return aligned_OI
    found = leading_directions(module, base_OI, aligned_OI, count, device)
    added_OI = (found.left_OK * (factor * found.values_K)) @ found.right_KI
    moved_OI = (aligned_OI.double().cpu() + added_OI).to(aligned_OI.dtype)
    if not bool(torch.isfinite(moved_OI).all()):
        raise ProjectionError(f"{module}: the extrapolated weight exceeds {aligned_OI.dtype}")
    return moved_OI
