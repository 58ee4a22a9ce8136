"""How far two computations of one thing may differ when they only add in another order; from
arithmetic, never from a machine.

Kernels (MKL, oneDNN, torch's own) differ from one processor to the next, and with them the order of
a sum. For n terms the error is at most gamma(n) times the sum of their magnitudes, whatever the
order (Higham, Accuracy and Stability, 4.2).

Trainings need more than that, because Adam divides a gradient by its own size: an element whose
gradient is only rounding error takes a whole step to either side, so no bound below twice the sum
of the learning rates holds for every element. Where a test compares trainings, `SteadyAdamW` makes
the optimiser's epsilon as large as a gradient. Then a small change of a gradient is a small change
of a step, and a gradient scaled by a wrong factor shows, which Adam would hide.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

Tensors = dict[str, torch.Tensor]
UNIT = 2.0**-24  # float32's unit roundoff
EPSILON = 1e-2  # gradients are clipped to a norm of 1 over some 10,000 elements, so about 1e-2 each

# The root mean square of a gradient's error, as a share of the gradient's own, on
# tests/tiny.py's models.
#   float32   Some 36 products of 128 terms lie on the way forward and back, then a sum over at most
#             512 tokens. The errors are independent, so their squares add up; 6 standard
#             deviations.
#   bfloat16  The sums are float32, and the results of those 36 products are rounded, which is
#             u / sqrt(3) in the mean.
#   int8      The inputs of a linear are rounded to 1/127 of the row's largest. A last bit flips one
#             of some 1e5, so in six steps tens of inputs are off by 2^-7, each in one of some 300
#             tokens: sqrt(64) 2^-7 / sqrt(300), rounded up.
_GRADIENT = {
    "float32": 6 * UNIT * math.sqrt(36 * 128 + 512),
    "bfloat16": 2.0**-8 * math.sqrt(36 / 3),
    "int8": 2.0**-8,
}
# Two runs err, and epsilon at least halves a step's dependence on the rest: 2; over six steps the
# errors may all add up.
_STEPS = 6 * 2


def gamma(terms: int, unit: float = UNIT) -> float:
    """The largest relative error of a sum of so many terms, or of as many roundings one after
    another.
    """
    return terms * unit / (1 - terms * unit)


def rounding(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far each element of `tensor` may move when it is stored in that dtype.

    It is the dtype's unit roundoff (2^-24, bfloat16 2^-8, float16 2^-11) times the element, which
    below the smallest normal number grows no finer.
    """
    numbers = torch.finfo(dtype)
    return numbers.eps / 2 * tensor.double().abs().clamp(min=numbers.tiny)


def merged(
    weight_OI: torch.Tensor,
    lora_a_RI: torch.Tensor,
    lora_b_OR: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """How far each element of W + scale B A may be off, computed in float32.

    In a sum of R + 1 terms each goes through R additions at most. There are four roundings more:
    the product's, the scale's own and the product with it, and the sum with a second update where
    two layers share W.
    """
    b, a = lora_b_OR.double().abs(), lora_a_RI.double().abs()
    return gamma(a.shape[0] + 4) * (weight_OI.double().abs() + abs(scale) * (b @ a))


def within(found: Any, expected: Any, bound: Any) -> None:
    """Asserts of numbers or of tensors that each element is no further off than its bound."""
    tensors = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected, bound))
    one, other, most = (tensor.detach() for tensor in tensors)
    assert one.shape == other.shape
    share = float(((one - other).abs() / most.clamp(min=1e-300)).max())
    assert share <= 1, f"off by {share:.3g} times its bound"


class SteadyAdamW(torch.optim.AdamW):
    """AdamW whose step is no more sensitive to a gradient's rounding than the gradient is."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **{**settings, "eps": EPSILON})


@pytest.fixture
def steady_adam(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every training of the test, in this process, has SteadyAdamW."""
    monkeypatch.setattr(torch.optim, "AdamW", SteadyAdamW)
    yield


def kind(dtype: str = "float32", quantisation: str = "none") -> str:
    """The row of the table above that a training belongs to."""
    return "int8" if quantisation == "int8" and dtype == "float32" else dtype


def root_mean_square(tensors: Tensors) -> float:
    return float(
        torch.cat([tensor.double().flatten() for tensor in tensors.values()]).square().mean().sqrt()
    )


def apart(one: Tensors, other: Tensors, moved: Tensors | None = None) -> float:
    """How far two trainings ended apart: the largest root mean square of a tensor's difference,
    over that of what moved.

    Of an adapter all of B moved, since it begins at zero. Of whole weights give `moved`, the
    changes of the first.
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
    """The most that `apart` may be after six steps of SteadyAdamW."""
    return _STEPS * _GRADIENT[kind(dtype, quantisation)]


def alike_under_adamw() -> float:
    """The most that `apart` may be in float32 where a test cannot reach the optimiser, as on a Ray
    cluster.

    An element whose gradient is below its error takes a step to either side, and ends off by twice
    what it moved. That is a share of some 6 errors of the elements. One such element of B, of 64,
    turns a row of A's gradient by 2 / sqrt(64).
    """
    return 2 * math.sqrt(6 * _GRADIENT["float32"]) + 2 / math.sqrt(64)


def losses_alike_under_adamw(expected: list[float]) -> Any:
    """The elements that go astray are those on which the loss hardly depends.

    It is off by sqrt(6 errors) of what they are off by.
    """
    return pytest.approx(expected, rel=alike_under_adamw() * math.sqrt(6 * _GRADIENT["float32"]))


def losses_alike(expected: list[float], dtype: str = "float32", quantisation: str = "none") -> Any:
    """A loss depends on rounding less than gradients do: half the way lies before it, and it is a
    mean over tokens.
    """
    return pytest.approx(
        expected, rel=alike(dtype, quantisation) / (10 if dtype == "bfloat16" else 1)
    )


def four_deviations(n: int, rate: float = 0.95) -> float:
    """What a rate over n prompts may miss by: other kernels train other models, which err on
    other prompts.
    """
    return 4 * math.sqrt(rate * (1 - rate) / n)
