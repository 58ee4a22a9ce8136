"""Penalties and averages of a training equal their definitions, which form C and the update."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebbline.tasks.training.anchoring import average_step, length_penalty, outside_penalty

shapes = st.tuples(st.integers(2, 16), st.integers(2, 16), st.integers(1, 6), st.integers(0, 9999))


def drawn(d_out: int, d_in: int, rank: int, seed: int) -> tuple[torch.Tensor, ...]:
    """(A, B, V) in float64; A and B take gradients."""
    generator = torch.Generator().manual_seed(seed)
    a, b, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rank, d_in), (d_out, rank), (d_out, d_in))
    )
    return a.requires_grad_(), b.requires_grad_(), v


@given(shape=shapes)
def test_the_penalties_and_their_gradients_equal_their_definitions(shape):
    a, b, v = drawn(*shape)
    c = v @ v.T / v.norm()
    outside = (torch.eye(len(c), dtype=c.dtype) - c) @ (b @ a)
    for found, defined in (
        (length_penalty(a, b), (b @ a).square().sum()),
        (outside_penalty(a, b, v, float(v.norm())), outside.square().sum()),
    ):
        torch.testing.assert_close(found, defined, rtol=1e-9, atol=1e-9)
        for one, other in zip(
            torch.autograd.grad(found, (a, b)),
            torch.autograd.grad(defined, (a, b), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_without_a_direction_all_of_an_update_is_outside():
    a, b, v = drawn(5, 4, 2, 0)
    assert torch.equal(outside_penalty(a, b, v * 0, 0.0), length_penalty(a, b))


def test_an_average_follows_its_formula_and_a_decay_of_zero_keeps_the_newest_weights():
    first, second = torch.randn(3, 2), torch.randn(3, 2)
    average, newest = {"w": first.clone()}, {"w": first.clone()}
    average_step(average, {"w": second}, 0.9)
    average_step(newest, {"w": second}, 0.0)
    torch.testing.assert_close(average["w"], 0.9 * first + 0.1 * second)
    assert torch.equal(newest["w"], second)
    with pytest.raises(KeyError, match="other"):
        average_step(average, {"other": second}, 0.9)
