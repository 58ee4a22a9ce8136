"""Bounds for the difference of two computations that add in different orders. They come from
arithmetic, never from one machine's results.

Kernels (MKL, oneDNN, torch's own) and their order of additions differ between processors. For n
terms the error is at most gamma(n) times the sum of their magnitudes, in any order (Higham,
Accuracy and Stability of Numerical Algorithms, 4.2).

Trainings need a further step, because Adam divides a gradient by its own size. An element whose
gradient is only rounding error moves by a whole step in either direction. So no bound below twice
the sum of the learning rates holds for every element. Tests that compare trainings use
`SteadyAdamW`, whose epsilon is as large as a gradient. With it, a small change of a gradient is a
small change of a step. It also shows a gradient with a wrong factor, which Adam would hide.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

Tensors = dict[str, torch.Tensor]
UNIT = 2.0**-24  # float32's unit roundoff
EPSILON = 1e-2  # gradients have a norm of at most 1 over about 10,000 elements: about 1e-2 each

# The root mean square of a gradient's error, relative to the gradient's, for tests/tiny.py's
# models. float32   About 36 products of 128 terms in the forward and backward pass, then a sum over
# at most 512 tokens. The errors are independent, so their squares add up; 6 standard deviations.
# bfloat16  Sums are float32, and the results of the 36 products are rounded, by u / sqrt(3) in the
# mean. int8      The inputs of a linear layer are rounded to 1/127 of the row's largest. An error
# in the last bit changes one input in about 1e5. In six steps tens of inputs are off by 2^-7, each
# in one of about 300 tokens: sqrt(64) 2^-7 / sqrt(300), rounded up.
_GRADIENT = {
    "float32": 6 * UNIT * math.sqrt(36 * 128 + 512),
    "bfloat16": 2.0**-8 * math.sqrt(36 / 3),
    "int8": 2.0**-8,
}
# Both runs have errors, and epsilon at least halves a step's sensitivity: 2 for each step. The
# errors of six steps may add up.
_STEPS = 6 * 2


def gamma(terms: int, unit: float = UNIT) -> float:
    """The largest relative error of a sum of that many terms, or of that many roundings."""
    return terms * unit / (1 - terms * unit)


def rounding(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest change of each element of `tensor` when it is stored in `dtype`.

    It is the dtype's unit roundoff (2^-24, bfloat16 2^-8, float16 2^-11) times the element, or
    times the smallest normal number for smaller elements.
    """
    numbers = torch.finfo(dtype)
    return numbers.eps / 2 * tensor.double().abs().clamp(min=numbers.tiny)


def merged(
    weight_OI: torch.Tensor,
    lora_a_RI: torch.Tensor,
    lora_b_OR: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The error bound of each element of W + scale B A in float32.

    In a sum of R + 1 terms, each term is in at most R additions. Four more roundings: the product,
    the scale, the product with the scale, and the sum with a second update where layers share W.
    """
    b, a = lora_b_OR.double().abs(), lora_a_RI.double().abs()
    return gamma(a.shape[0] + 4) * (weight_OI.double().abs() + abs(scale) * (b @ a))


def within(found: Any, expected: Any, bound: Any) -> None:
    """Assert that each element, of numbers or tensors, differs by at most its bound."""
    tensors = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected, bound))
    one, other, most = (tensor.detach() for tensor in tensors)
    assert one.shape == other.shape
    share = float(((one - other).abs() / most.clamp(min=1e-300)).max())
    assert share <= 1, f"off by {share:.3g} times its bound"


class SteadyAdamW(torch.optim.AdamW):
    """AdamW with an epsilon that makes a step no more sensitive to rounding than its gradient."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **{**settings, "eps": EPSILON})


@pytest.fixture
def steady_adam(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use SteadyAdamW for every training of the test in this process."""
    monkeypatch.setattr(torch.optim, "AdamW", SteadyAdamW)
    yield


def kind(dtype: str = "float32", quantisation: str = "none") -> str:
    """The row of _GRADIENT for a training."""
    return "int8" if quantisation == "int8" and dtype == "float32" else dtype


def root_mean_square(tensors: Tensors) -> float:
    return float(
        torch.cat([tensor.double().flatten() for tensor in tensors.values()]).square().mean().sqrt()
    )


def apart(one: Tensors, other: Tensors, moved: Tensors | None = None) -> float:
    """The difference of two trainings: the largest root mean square of a tensor's difference,
    divided by the root mean square of the trained change.

    In an adapter the trained change is B, which begins at zero. For whole weights, `moved` holds
    the changes of the first training.
    """
    assert one.keys() == other.keys()
    scale = root_mean_square(
        moved or {name: tensor for name, tensor in one.items() if "lora_B" in name}
    )
    return (
        max(root_mean_square({name: one[name].double() - other[name].double()}) for name in one)
        / scale
    )


def alike(dtype: str = "float32", quantisation: str = "none") -> float:
    """The bound of `apart` after six steps of SteadyAdamW."""
    return _STEPS * _GRADIENT[kind(dtype, quantisation)]


def alike_under_adamw() -> float:
    """The bound of `apart` in float32 where a test cannot replace the optimiser, as on a Ray
    cluster.

    An element whose gradient is smaller than its error may step in either direction and ends off by
    twice its change. The share of these elements is about 6 times the gradient's error. One such
    element of B among 64 changes a row of A's gradient by 2 / sqrt(64).
    """
    return 2 * math.sqrt(6 * _GRADIENT["float32"]) + 2 / math.sqrt(64)


def losses_alike_under_adamw(expected: list[float]) -> Any:
    """Losses that are equal where a test cannot replace the optimiser.

    The loss hardly depends on the elements with a wrong step. Its error is theirs times the root of
    6 times the gradient's error.
    """
    return pytest.approx(expected, rel=alike_under_adamw() * math.sqrt(6 * _GRADIENT["float32"]))


def losses_alike(expected: list[float], dtype: str = "float32", quantisation: str = "none") -> Any:
    """Losses that are equal up to rounding.

    A loss has smaller errors than gradients: it needs only the forward pass, and is a mean over
    tokens.
    """
    return pytest.approx(
        expected, rel=alike(dtype, quantisation) / (10 if dtype == "bfloat16" else 1)
    )


def four_deviations(n: int, rate: float = 0.95) -> float:
    """Four standard deviations of a rate over n prompts.

    Different kernels train different models, which fail on different prompts.
    """
    return 4 * math.sqrt(rate * (1 - rate) / n)
