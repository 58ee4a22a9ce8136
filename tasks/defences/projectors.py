"""Safe LoRA (arXiv 2405.16833): project an adapter's update onto the alignment subspace of its base
model.

Legend: O = d_out, I = d_in, R = LoRA rank, P = rows of a block, N = sum of the ranks of several
adapters, K = columns of a basis. For one module, V_OI = W_aligned - W_base, and the adapter's
update is delta_OI = B_OR A_RI. Its scale alpha/r changes neither the cosine nor the choice. C_OO is
the projector:

    approximate   C = V V^T / ||V||_F  (the paper's Eq. 2; not idempotent, scales with ||V||)
    exact         C = U U^T, U the left singular vectors of V that hold a stated share of its energy

C is never formed: C B = V (V^T B) / ||V||_F costs O(O I R). V is formed in blocks of rows, and each
block is used for V^T B and ||V||_F while it is in the processor's cache. V and C B are float32. The
squares of blocks are added in float64, since one long float32 sum is wrong in the third digit.

The O x I products are never formed either. The gate compares C B A with B A through R x R Gram
matrices in float64: <X A, Y A> = sum((X^T Y) * (A A^T)).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ebbline.tasks.defences.gate import NO_DIRECTION, NO_UPDATE
from ebbline.tasks.errors import ProjectionError

# Of V. With the rows of both weights, a block fits in a core's second-level cache.
BLOCK_BYTES = 1 << 20
NARROW = 32  # with fewer columns, (T V^T) is faster than (V T^T)


@dataclass(frozen=True)
class Update:
    """One adapter's update of one module: delta_OI = B_OR A_RI, without its scale.

    Messages name it `adapter`.
    """

    lora_A_RI: torch.Tensor
    lora_B_OR: torch.Tensor
    adapter: str = "the adapter"


@dataclass(frozen=True)
class Projection:
    """The projection of one module: C B, cos(C B A, B A) and ||C B A|| / ||B A||.

    A module without a cosine is never projected, and `reason` says why.
    """

    projected_OR: torch.Tensor
    cosine: float | None
    norm_ratio: float | None
    reason: str = ""


class Workspace:
    """One float32 buffer for every module's V: new memory for each V costs more than its use."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._buffer = torch.empty(0, device=self.device)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        """An uninitialised (rows, columns) matrix, in the memory of the previous one."""
        if self._buffer.numel() < rows * columns:
            self._buffer = torch.empty(rows * columns, device=self.device)
        return self._buffer[: rows * columns].view(rows, columns)

    def blocks(self, rows: int, columns: int) -> Iterator[slice]:
        """Row ranges of a matrix that fit in a processor's cache; all rows on an accelerator."""
        step = rows if self.device.type != "cpu" else max(16, BLOCK_BYTES // (4 * columns))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def project(
    module: str,
    base_OI: torch.Tensor,
    aligned_OI: torch.Tensor,
    updates: Sequence[Update],
    workspace: Workspace | None = None,
    models: tuple[str, str] = ("base", "aligned"),
) -> list[Projection]:
    """Project every update of one module by the approximate projector, from one read of the
    weights.

    Weights may have any float dtype. `models` are the names of the two models in messages. Where V
    is zero there is no direction: the updates are returned unchanged, with the reason. Raises
    ProjectionError for shapes that do not fit and for values that are not finite.
    """
    space = workspace or Workspace()
    check_shapes(module, base_OI, aligned_OI, updates)
    rows, columns = base_OI.shape
    b_NO = _stacked(updates, space)
    t_NI = torch.zeros(b_NO.shape[0], columns, device=space.device)
    v_OI, squares = space.matrix(rows, columns), 0.0
    for block in space.blocks(rows, columns):
        v_PI = _difference(base_OI[block], aligned_OI[block], v_OI[block])
        t_NI.addmm_(b_NO[:, block], v_PI)
        squares += _squares(v_PI)
    norm = _norm_of_difference(module, squares, base_OI, aligned_OI, models)
    if norm == 0:
        return _unprojected(module, updates)
    t_NI /= norm
    return _gated(module, _times(v_OI, t_NI, space), updates)


def project_onto(
    module: str,
    basis_OK: torch.Tensor,
    updates: Sequence[Update],
    workspace: Workspace | None = None,
) -> list[Projection]:
    """Project every update of one module by the exact projector: C B = U (U^T B), U = `basis_OK`.

    Raises ProjectionError as `project` does.
    """
    space = workspace or Workspace()
    for update in updates:
        _check_update(module, update, basis_OK.shape[0], None)
    if basis_OK.shape[1] == 0:
        return _unprojected(module, updates)
    basis_OK = basis_OK.to(space.device, torch.float32)
    projected_NO = (_stacked(updates, space) @ basis_OK) @ basis_OK.T
    return _gated(module, projected_NO, updates)


def gate(
    cb_OR: torch.Tensor, b_OR: torch.Tensor, a_RI: torch.Tensor
) -> tuple[float | None, float | None]:
    """(cosine, norm ratio) of C B A and B A, from Gram matrices in float64.

    Both are None when B A is zero, and NaN when a product is not finite.
    """
    a_RI, b_OR, cb_OR = a_RI.double(), b_OR.double(), cb_OR.double()
    gram_RR = a_RI @ a_RI.T

    def inner(x_OR: torch.Tensor, y_OR: torch.Tensor) -> float:
        return float(((x_OR.T @ y_OR) * gram_RR).sum())

    before, after = inner(b_OR, b_OR), inner(cb_OR, cb_OR)
    if before <= 0:
        return None, None
    if after <= 0:
        return 0.0, 0.0
    if not math.isfinite(before + after):
        return math.nan, math.nan
    cosine = inner(cb_OR, b_OR) / math.sqrt(before) / math.sqrt(after)
    return min(1.0, max(-1.0, cosine)), math.sqrt(after) / math.sqrt(before)


def alignment_basis(
    module: str,
    base_OI: torch.Tensor,
    aligned_OI: torch.Tensor,
    energy: float,
    device: str = "cpu",
    models: tuple[str, str] = ("base", "aligned"),
) -> torch.Tensor:
    """The leading left singular vectors of V, as (O, K) float32: the fewest that hold `energy`.

    The energy of V is ||V||_F^2, the sum of its squared singular values. The vectors come from the
    float64 eigendecomposition of V's smaller Gram matrix: V V^T, or V^T V with U = V W / S. A Gram
    matrix squares the singular values, which is accurate enough for a share below one. K is 0 when
    V is zero.

    Raises ProjectionError as `project` does.
    """
    check_shapes(module, base_OI, aligned_OI, ())
    v_OI = _difference(
        base_OI.to(device), aligned_OI.to(device), torch.empty(base_OI.shape, device=device)
    ).double()
    norm = _norm_of_difference(module, float((v_OI * v_OI).sum()), base_OI, aligned_OI, models)
    if norm == 0:
        return torch.empty(base_OI.shape[0], 0)
    tall = v_OI.shape[0] > v_OI.shape[1]
    values_M, vectors_MM = torch.linalg.eigh(v_OI.T @ v_OI if tall else v_OI @ v_OI.T)
    values_M, vectors_MM = values_M.flip(0).clamp(min=0.0), vectors_MM.flip(1)
    share_M = torch.cumsum(values_M, 0) / values_M.sum()
    # The factor lets a share that is met up to rounding count as met.
    keep = min(
        int(torch.searchsorted(share_M, energy * (1 - 1e-12)).item()) + 1, int((values_M > 0).sum())
    )
    basis_OK = vectors_MM[:, :keep]
    if tall:
        basis_OK = (v_OI @ basis_OK) / values_M[:keep].sqrt()
    kept_OK: torch.Tensor = basis_OK.float().contiguous().cpu()
    return kept_OK


def check_shapes(
    module: str, base_OI: torch.Tensor, aligned_OI: torch.Tensor, updates: Sequence[Update]
) -> None:
    """Raises ProjectionError unless the shapes of the two weights and every update fit."""
    if base_OI.ndim != 2 or base_OI.shape != aligned_OI.shape:
        raise ProjectionError(
            f"{module}: the base weight is {tuple(base_OI.shape)}, the aligned one "
            f"{tuple(aligned_OI.shape)};"
            " Safe LoRA subtracts two matrices of one shape"
            + (
                ". Do the two models have the same vocabulary? Resize one, or leave this module out"
                if _vocabulary(module)
                else ""
            )
        )
    for update in updates:
        _check_update(module, update, *base_OI.shape)


def _vocabulary(module: str) -> bool:
    return module.rpartition(".")[2] in (
        "lm_head",
        "embed_tokens",
        "wte",
        "embed_in",
        "embed_out",
        "word_embeddings",
    )


def _check_update(module: str, update: Update, d_out: int, d_in: int | None) -> None:
    a_RI, b_OR = update.lora_A_RI, update.lora_B_OR
    if (
        b_OR.shape[0] != d_out
        or a_RI.shape[0] != b_OR.shape[1]
        or (d_in is not None and a_RI.shape[1] != d_in)
    ):
        raise ProjectionError(
            f"{module}: B {tuple(b_OR.shape)} and A {tuple(a_RI.shape)} of "
            f"{update.adapter} do not fit"
            f" a weight of {(d_out, d_in or a_RI.shape[1])}; was it trained on another model?"
        )


def _stacked(updates: Sequence[Update], space: Workspace) -> torch.Tensor:
    """All B^T concatenated, (N, O)."""
    return torch.cat(
        [update.lora_B_OR.to(space.device, torch.float32).T for update in updates]
    ).contiguous()


def _difference(
    base_PI: torch.Tensor, aligned_PI: torch.Tensor, out_PI: torch.Tensor
) -> torch.Tensor:
    """aligned - base in float32. float64 weights are subtracted before the rounding."""
    base_PI, aligned_PI = base_PI.to(out_PI.device), aligned_PI.to(out_PI.device)
    if base_PI.dtype == aligned_PI.dtype and base_PI.dtype.itemsize >= 4:
        return torch.sub(aligned_PI, base_PI, out=out_PI)
    # Widened to float32 first: a bfloat16 difference would be rounded.
    return out_PI.copy_(aligned_PI).sub_(base_PI)


def _squares(v_PI: torch.Tensor) -> float:
    """The sum of squares: in float32 for a block, in float64 for a matrix on an accelerator."""
    if v_PI.device.type != "cpu":
        return float(torch.linalg.vector_norm(v_PI, dtype=torch.float64)) ** 2
    flat = v_PI.view(-1)
    return float(torch.dot(flat, flat))


def _norm_of_difference(
    module: str,
    squares: float,
    base_OI: torch.Tensor,
    aligned_OI: torch.Tensor,
    models: tuple[str, str],
) -> float:
    if not squares < math.inf:  # also true for NaN
        bad = [
            name
            for name, weight in zip(models, (base_OI, aligned_OI), strict=True)
            if not bool(torch.isfinite(weight).all())
        ]
        raise ProjectionError(
            f"{module}: the weight holds NaN or infinity in {' and '.join(bad or models)}; "
            "is the download complete?"
        )
    return math.sqrt(squares)


def _unprojected(module: str, updates: Sequence[Update]) -> list[Projection]:
    for update in updates:
        _require_finite(module, update)
    return [Projection(update.lora_B_OR.float(), None, None, NO_DIRECTION) for update in updates]


def _require_finite(module: str, update: Update) -> None:
    parts = {"lora_A": update.lora_A_RI, "lora_B": update.lora_B_OR}
    damaged = [name for name, tensor in parts.items() if not bool(torch.isfinite(tensor).all())]
    if damaged:
        raise ProjectionError(
            f"{module}: {' and '.join(damaged)} of {update.adapter} holds NaN or infinity; "
            "the adapter is damaged"
        )


def _times(v_OI: torch.Tensor, t_NI: torch.Tensor, space: Workspace) -> torch.Tensor:
    """V T^T, transposed: (N, O)."""
    rows, columns = v_OI.shape
    if t_NI.shape[0] >= NARROW:
        return (v_OI @ t_NI.T.contiguous()).T
    product_NO = torch.empty(t_NI.shape[0], rows, device=space.device)
    for block in space.blocks(rows, columns):
        product_NO[:, block] = t_NI @ v_OI[block].T
    return product_NO


def _gated(module: str, projected_NO: torch.Tensor, updates: Sequence[Update]) -> list[Projection]:
    found, start = [], 0
    for update in updates:
        rank = update.lora_B_OR.shape[1]
        cb_OR = projected_NO[start : start + rank].T.cpu()
        start += rank
        cosine, ratio = gate(cb_OR, update.lora_B_OR, update.lora_A_RI)
        if cosine is not None and ratio is not None and not math.isfinite(cosine + ratio):
            _require_finite(module, update)
            raise ProjectionError(
                f"{module}: the norm of C B A is not finite in float64; are the weights of "
                f"{update.adapter} too large?"
            )
        found.append(Projection(cb_OR, cosine, ratio, NO_UPDATE if cosine is None else ""))
    return found
