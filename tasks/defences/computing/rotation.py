"""A random rotation of alignment's directions: Q C Q^T B for Q uniform on the orthogonal group.

Legend: O = d_out, R = rank, M = min(O, R), K = columns of what is turned back. Q is O x O and is
never formed. Only two of its parts matter, and they can be drawn:

1. B = E T with E_OM orthonormal. Q^T E is a uniform random orthonormal frame G_OM, so
   Q^T B = G T.
2. Y = C Q^T B is computed as for any other B. Y = G (G^T Y) + P S, with P orthonormal and
   orthogonal to G.
3. Q maps G to E. Given that, Q P is a uniform random orthonormal frame H in the complement of E.
   So Q Y = E (G^T Y) + H S.

The result has exactly the distribution of Q C Q^T B. The cost is O R^2 beside one projection. With
C = U U^T it is the projection onto a uniform random subspace of as many columns.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

Normals = Callable[[str, int, int], NDArray[np.float64]]
"""(which frame, rows, columns) -> standard normal numbers."""


class Rotation:
    """The part of one random orthogonal Q that acts on B. `normals` draws the frames "into" and
    "back".
    """

    def __init__(self, b_OR: torch.Tensor, normals: Normals) -> None:
        self._normals = normals
        self._from_OM, self._mixed_MR = torch.linalg.qr(b_OR.double().cpu())
        self._to_OM = self._frame("into", *self._from_OM.shape)

    def into(self) -> torch.Tensor:
        """Q^T B, as (O, R) float32."""
        turned_OR: torch.Tensor = self._to_OM @ self._mixed_MR
        return turned_OR.float()

    def back(self, y_OR: torch.Tensor) -> torch.Tensor:
        """Q Y of a matrix Y with at most R columns, as float32."""
        y_OR = y_OR.double().cpu()
        along_MR = self._to_OM.T @ y_OR
        across_OR = y_OR - self._to_OM @ along_MR
        across_OR = across_OR - self._to_OM @ (self._to_OM.T @ across_OR)  # rounding of the first
        turned_OR: torch.Tensor = self._from_OM @ along_MR
        rows, columns = self._from_OM.shape
        width = min(y_OR.shape[1], rows - columns)
        if width == 0:
            return turned_OR.float()
        _, values_K, right_KR = torch.linalg.svd(across_OR, full_matrices=False)
        frame_OK = self._frame("back", rows, width, complement=True)
        rest_KR = values_K[:width, None] * right_KR[:width]
        turned_OR = turned_OR + frame_OK @ rest_KR
        return turned_OR.float()

    def _frame(self, which: str, rows: int, columns: int, complement: bool = False) -> torch.Tensor:
        """A uniform random orthonormal frame, or one in the complement of B's columns."""
        drawn_OK = torch.from_numpy(self._normals(which, rows, columns))
        if complement:
            drawn_OK = drawn_OK - self._from_OM @ (self._from_OM.T @ drawn_OK)
        frame_OK, triangle_KK = torch.linalg.qr(drawn_OK)
        if complement:
            frame_OK = frame_OK - self._from_OM @ (self._from_OM.T @ frame_OK)
        # QR leaves the signs of the columns open; a positive diagonal makes the frame uniform.
        signs_K = torch.where(triangle_KK.diagonal() < 0, -1.0, 1.0).double()
        uniform_OK: torch.Tensor = frame_OK * signs_K
        return uniform_OK
