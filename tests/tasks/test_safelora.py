"""Safe LoRA equals its definition, which forms C and the whole update in float64.

Tolerances bound float32's rounding for sums in any order (`slack`). With inputs of +1 and -1
(`signs`) no product and no sum is rounded.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebbline.tasks.defences.gate import NO_DIRECTION, NO_UPDATE, ModuleRow, chosen
from ebbline.tasks.defences.projectors import (
    Update,
    Workspace,
    alignment_basis,
    gate,
    project_onto,
)
from ebbline.tasks.defences.projectors import project as project_all
from ebbline.tasks.errors import ProjectionError
from tests.tolerance import UNIT, gamma, within

# The gate's Gram form is float64. Its square root is off by 1e-8 near zero, elsewhere by less.
GRAM = 1e-8
shapes = st.tuples(
    st.integers(2, 24), st.integers(2, 24), st.integers(1, 8), st.integers(0, 10_000)
)


def made(
    d_out: int, d_in: int, rank: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """(base, aligned, A, B) of random numbers, in a checkpoint's dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = normal(d_out, d_in)
    return tuple(
        t.to(dtype)
        for t in (base, base + 0.1 * normal(d_out, d_in), normal(rank, d_in), normal(d_out, rank))
    )


def project(module, base, aligned, lora_a, lora_b, projector="approximate", energy=None):
    """The projection of one update by either projector."""
    if projector == "approximate":
        return project_all(module, base, aligned, [Update(lora_a, lora_b)])[0]
    return project_onto(
        module, alignment_basis(module, base, aligned, energy), [Update(lora_a, lora_b)]
    )[0]


def by_definition(base, aligned, lora_a, lora_b, energy=None):
    """(C B, cosine, norm ratio) with C formed, in float64 (the paper's Eq. 2, and the gate of its
    reference repository).
    """
    v = aligned.double() - base.double()
    if energy is None:
        c = v @ v.T / torch.linalg.matrix_norm(v)
    else:
        u, s, _ = torch.linalg.svd(v, full_matrices=False)
        shares = torch.cumsum(s**2, 0) / (s**2).sum()
        keep = int((shares < energy).sum()) + 1
        c = u[:, :keep] @ u[:, :keep].T
    cb = c @ lora_b.double()
    return cb, *measured(cb, lora_a, lora_b)


def measured(cb, lora_a, lora_b):
    """(cosine, norm ratio) of C B A and B A, with both products formed."""
    before, after = (x.double() @ lora_a.double() for x in (lora_b, cb))
    cosine = torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0)
    return float(cosine), float(after.norm() / before.norm())


@dataclass(frozen=True)
class Slack:
    """The largest allowed errors of C B (by element), of the cosine and of the norm ratio."""

    projected_OR: torch.Tensor
    cosine: float
    norm_ratio: float

    def holds(self, found, expected_OR, cosine, ratio) -> None:
        within(found.projected_OR, expected_OR, self.projected_OR)
        within(found.cosine, cosine, self.cosine)
        within(found.norm_ratio, ratio, self.norm_ratio)


def slack(base, aligned, lora_a, lora_b, energy=None) -> Slack:
    """The error bounds for either projector, from the errors that turn C B and scale it."""
    v, b, a = aligned.double() - base.double(), lora_b.double(), lora_a.double()
    cb = by_definition(base, aligned, lora_a, lora_b, energy)[0]
    if energy is None:
        # V^T B has O terms, V (V^T B) has I. 8 covers single roundings: of V (twice), B, the norm
        # and the quotient.
        turned = v.abs() @ (v.abs().T @ b.abs()) / torch.linalg.matrix_norm(v)
        turned *= gamma(sum(v.shape) + 8)
        # ||V|| is the root of a sum of O I squares. All squares are positive, so the sum has a
        # relative error; the root halves it.
        scaled = gamma(v.numel() / 2 + 2) * cb.abs()
    else:
        turned, scaled = _turned_basis(v, b, energy), torch.zeros_like(cb)
    error = turned + scaled + 1e-30
    before, after = float((b @ a).norm()), float((cb @ a).norm())
    # An error turns C B A by at most its norm / `after`.
    angle = 2 * float((turned @ a.abs()).norm()) / after
    return Slack(error, angle + GRAM, float((error @ a.abs()).norm()) / before + GRAM)


def _turned_basis(v, b, energy) -> torch.Tensor:
    """The error bound for the exact projector: the rounding of U and of two products, and of V,
    which turns its subspace (Wedin).
    """
    u, s, _ = torch.linalg.svd(v, full_matrices=False)
    keep = int((torch.cumsum(s**2, 0) / (s**2).sum() < energy).sum()) + 1
    # None if the basis spans the whole space, which no error can turn.
    beyond = [*s.tolist(), 0.0][keep] if keep < v.shape[0] else None
    turned = (
        0.0
        if beyond is None
        else 2 * UNIT * float(s.norm()) / max(float(s[keep - 1]) - beyond, 1e-12)
    )
    # U^T B has O terms, U (U^T B) has K, and U is rounded in both. The product of two rows of |U|
    # is at most the product of their norms, for any basis of the subspace. V's rounding moves a
    # column of C B by a share of B's column.
    norms = u[:, :keep].norm(dim=1, keepdim=True) + turned
    return gamma(v.shape[0] + keep + 4) * norms @ (norms.T @ b.abs()) + turned * b.norm(dim=0)


def signs(*shape: int, seed: int) -> torch.Tensor:
    """Random +1 and -1. Sums and products of thousands of them are exact in float32."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(shape=shapes)
def test_the_approximate_projection_equals_its_definition(dtype, shape):
    tensors = made(*shape, dtype)
    slack(*tensors).holds(project("m", *tensors), *by_definition(*tensors))


@given(shape=shapes, energy=st.floats(0.05, 0.98))
def test_the_exact_projection_equals_its_definition(shape, energy):
    tensors = made(*shape)
    v = tensors[1].double() - tensors[0].double()
    singular = torch.linalg.svdvals(v) ** 2
    shares = torch.cumsum(singular, 0) / singular.sum()
    if float((shares - energy).abs().min()) < 1e-4:
        return  # at the border between two ranks, float32 and float64 may differ
    expected = by_definition(*tensors, energy=energy)
    slack(*tensors, energy).holds(project("m", *tensors, "exact", energy), *expected)


@given(shape=shapes)
def test_the_exact_projector_is_idempotent(shape):
    base, aligned, lora_a, lora_b = made(*shape)
    once = project("m", base, aligned, lora_a, lora_b, "exact", 0.5).projected_OR
    twice = project("m", base, aligned, lora_a, once, "exact", 0.5).projected_OR
    columns = min(shape[:2])
    # U is the same, so the errors are the rounding of its K columns and of two products.
    assert float((once - twice).norm()) <= gamma(shape[0] + columns + 4) * columns * float(
        lora_b.norm()
    )


def basis_of(v, energy):
    return alignment_basis("m", torch.zeros_like(v), v, energy)


@given(shape=shapes, energy=st.floats(0.05, 0.98))
def test_a_basis_is_orthonormal_and_holds_the_energy_it_states(shape, energy):
    base, aligned, _, _ = made(*shape)
    v = (aligned - base).double()
    basis = alignment_basis("m", base, aligned, energy).double()
    # Each element of U is rounded. This moves a product of two unit columns by at most two
    # roundings, and the share of the energy by two for each column. One more rounding covers the
    # earlier errors in float64.
    within(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), gamma(3))
    most = gamma(2 * basis.shape[1] + 1)
    share = float((basis.T @ v).square().sum() / v.square().sum())
    assert share >= energy - most
    if basis.shape[1] > 1:
        assert float((basis[:, :-1].T @ v).square().sum() / v.square().sum()) < energy + most


def test_the_alignment_basis_keeps_the_fewest_columns_that_hold_the_energy():
    v = torch.diag(torch.tensor([3.0, 2.0, 1.0]))  # energies 9, 4, 1 of 14
    assert [basis_of(v, energy).shape[1] for energy in (0.1, 0.64, 0.65, 0.92, 0.93, 0.99)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]


def test_an_energy_that_is_met_exactly_takes_no_further_column():
    assert basis_of(torch.diag(torch.tensor([1.0, 1.0])), 0.5).shape[1] == 1


@given(shape=shapes, scale=st.floats(0.01, 100))
def test_the_scale_alpha_over_rank_changes_neither_cosine_nor_ratio(shape, scale):
    base, aligned, lora_a, lora_b = made(*shape)
    plain = project("m", base, aligned, lora_a, lora_b)
    scaled = project("m", base, aligned, lora_a, scale * lora_b)
    bound = slack(base, aligned, lora_a, lora_b)  # for each of the two
    within(scaled.cosine, plain.cosine, 2 * bound.cosine)
    within(scaled.norm_ratio, plain.norm_ratio, 2 * bound.norm_ratio)
    within(scaled.projected_OR.double() / scale, plain.projected_OR, 2 * bound.projected_OR)


@given(shape=shapes)
def test_a_cosine_is_never_negative_and_at_most_one(shape):
    found = project("m", *made(*shape))
    assert 0.0 <= found.cosine <= 1.0  # C is positive semi-definite


def test_the_gate_is_accurate_to_float64():
    # V and B are signs, and ||V|| is 1024, so C B is exact. Only the gate's error remains.
    base, aligned, lora_a, lora_b = (
        torch.zeros(512, 2048),
        signs(512, 2048, seed=1),
        made(512, 2048, 8, 1)[2],
        signs(512, 8, seed=2),
    )
    expected, cosine, ratio = by_definition(base, aligned, lora_a, lora_b)
    found = project("m", base, aligned, lora_a, lora_b)
    assert torch.equal(found.projected_OR.double(), expected)
    assert (found.cosine, found.norm_ratio) == pytest.approx(
        (cosine, ratio), rel=1e-11
    )  # in float32 a million terms would be off by 1e-6 or more


def test_an_update_of_zero_has_no_cosine_and_is_never_chosen():
    base, aligned, lora_a, lora_b = made(6, 5, 2, 0)
    found = project("m", base, aligned, lora_a, torch.zeros_like(lora_b))
    assert (found.cosine, found.norm_ratio) == (None, None)
    assert gate(lora_b, lora_b, torch.zeros_like(lora_a)) == (None, None)
    assert found.reason == NO_UPDATE
    assert chosen(rows({"m": None, "n": 0.2}), 1.0, None) == {"n"}


def test_an_update_that_the_projection_removes_has_a_cosine_of_zero():
    v = torch.zeros(4, 3)
    v[0, 0] = 1.0
    lora_b = torch.zeros(4, 1)
    lora_b[3, 0] = 1.0
    found = project("m", torch.zeros(4, 3), v, torch.ones(1, 3), lora_b)
    assert (found.cosine, found.norm_ratio) == (0.0, 0.0)


@pytest.mark.parametrize("which", ["base", "aligned", "A", "B"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_value_in_any_tensor_is_a_projection_error(which, bad):
    tensors = dict(zip(("base", "aligned", "A", "B"), made(6, 5, 2, 0), strict=True))
    tensors[which][1, 1] = bad
    with pytest.raises(ProjectionError, match="layers.0.q_proj: .*(NaN|infinity)"):
        project("layers.0.q_proj", *tensors.values())


def test_equal_weights_have_no_alignment_direction_and_leave_the_update_unchanged():
    base, _, lora_a, lora_b = made(6, 5, 2, 0)
    for projector, energy in (("approximate", None), ("exact", 0.9)):
        found = project("m", base, base.clone(), lora_a, lora_b, projector, energy)
        assert (found.cosine, found.norm_ratio, found.reason) == (None, None, NO_DIRECTION)
        assert torch.equal(found.projected_OR, lora_b)


@pytest.mark.parametrize(("part", "shape"), [(1, (5, 6)), (2, (2, 6)), (3, (5, 2)), (2, (3, 5))])
def test_shapes_that_do_not_fit_are_a_projection_error_that_shows_them(part, shape):
    tensors = list(made(6, 5, 2, 0))
    tensors[part] = torch.ones(shape)
    with pytest.raises(ProjectionError, match="m: ") as caught:
        project("m", *tensors)
    assert str(shape) in str(caught.value)


def rows(cosines):
    return {
        name: ModuleRow(cosine, None if cosine is None else 1.0) for name, cosine in cosines.items()
    }


cosine_maps = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.sampled_from([-0.5, 0.0, 0.1, 0.1, 0.7, None]),
    max_size=8,
)


@given(cosine_maps, st.integers(0, 8))
def test_a_number_of_modules_chooses_exactly_that_many_and_breaks_ties_by_name(cosines, n):
    possible = [name for name in cosines if cosines[name] is not None]
    if n > len(possible):
        with pytest.raises(
            ProjectionError,
            match=f"{n} modules are to be projected, but the adapter has {len(possible)}",
        ):
            chosen(rows(cosines), None, n)
        return
    names = chosen(rows(cosines), None, n)
    assert len(names) == n and names <= set(possible)
    for inside in names:
        for outside in set(possible) - names:
            assert (cosines[inside], inside) < (cosines[outside], outside)


@given(cosine_maps, st.sampled_from([-0.5, 0.0, 0.1, 0.7, 1.0]))
def test_a_threshold_chooses_a_cosine_equal_to_it(cosines, threshold):
    assert chosen(rows(cosines), threshold, None) == {
        name for name, cosine in cosines.items() if cosine is not None and cosine <= threshold
    }


def test_without_a_rule_no_module_is_chosen():
    assert chosen(rows({"a": -1.0}), None, None) == frozenset()


ranks = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@given(shape=shapes, ranks=ranks)
def test_adapters_projected_together_equal_each_one_alone(dtype, shape, ranks):
    base, aligned, _, _ = made(*shape, dtype)
    updates = [Update(*made(*shape[:2], rank, seed)[2:]) for seed, rank in enumerate(ranks)]
    for update, together in zip(updates, project_all("m", base, aligned, updates), strict=True):
        tensors = base, aligned, update.lora_A_RI, update.lora_B_OR
        slack(*tensors).holds(together, *by_definition(*tensors))


def test_a_reused_workspace_keeps_nothing_of_the_previous_module():
    space = Workspace()
    for shape in ((40, 30, 4, 0), (7, 50, 2, 1), (40, 30, 4, 0)):
        base, aligned, lora_a, lora_b = made(*shape)
        (found,) = project_all("m", base, aligned, [Update(lora_a, lora_b)], space)
        slack(base, aligned, lora_a, lora_b).holds(
            found, *by_definition(base, aligned, lora_a, lora_b)
        )


def test_many_blocks_of_rows_give_the_result_of_one():
    # 4096 x 256 is split into four blocks; the reference forms C of 4096 x 4096. All values are
    # signs and ||V|| is 1024, so nothing is rounded.
    base, lora_a, lora_b = (
        signs(4096, 256, seed=5).bfloat16(),
        signs(8, 256, seed=7),
        signs(4096, 8, seed=8),
    )
    aligned = base + signs(4096, 256, seed=6).bfloat16()
    assert len(list(Workspace().blocks(4096, 256))) > 3
    expected, cosine, ratio = by_definition(base, aligned, lora_a, lora_b)
    found = project("m", base, aligned, lora_a, lora_b)
    assert torch.equal(found.projected_OR.double(), expected)
    assert (found.cosine, found.norm_ratio) == pytest.approx((cosine, ratio), rel=1e-11)


def test_the_squares_of_blocks_add_up_in_float64():
    # V is 1 in the first block and 2^-7 below it. One long float32 sum would lose the later
    # squares.
    rows, columns = 4096, 256
    v = torch.cat([torch.ones(1024, columns), torch.full((rows - 1024, columns), 2.0**-7)])
    lora_a, lora_b = torch.ones(1, columns), torch.zeros(rows, 1)
    lora_b[0] = 1.0  # V^T B is 1 everywhere, so ||V|| alone decides
    found = project("m", torch.zeros_like(v), v, lora_a, lora_b)
    _, _, ratio = by_definition(torch.zeros_like(v), v, lora_a, lora_b)
    missing = (rows - 1024) / 1024 * 2.0**-14 / 2  # the norm's error without them: 9e-5
    assert found.norm_ratio == pytest.approx(ratio, rel=gamma(columns + 4))
    assert gamma(columns + 4) < missing / 5


def test_a_transposed_view_of_a_weight_gives_the_same_projection():
    base, aligned, lora_a, lora_b = made(30, 20, 4, 3)
    plain = project("m", base, aligned, lora_a, lora_b)
    stored = project("m", base.T.contiguous().T, aligned.T.contiguous().T, lora_a, lora_b)
    assert torch.equal(plain.projected_OR, stored.projected_OR) and plain.cosine == stored.cosine


def test_the_error_names_the_damaged_adapter_among_several():
    base, aligned, lora_a, lora_b = made(6, 5, 2, 0)
    bad = lora_a.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(ProjectionError, match="m: lora_A of runs/b holds NaN or infinity"):
        project_all(
            "m", base, aligned, [Update(lora_a, lora_b, "runs/a"), Update(bad, lora_b, "runs/b")]
        )
