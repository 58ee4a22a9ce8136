"""Safe LoRA against the plain definition, which forms C and the whole update in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import ProjectionError
from tasks.gate import ModuleRow, chosen
from tasks.safelora import NO_DIRECTION, NO_UPDATE, Update, Workspace, alignment_basis, gate, project_onto
from tasks.safelora import project as project_all

shapes = st.tuples(st.integers(2, 24), st.integers(2, 24), st.integers(1, 8), st.integers(0, 10_000))


def made(d_out: int, d_in: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """(base, aligned, A, B) of random numbers, in the dtype that a checkpoint has them in."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = normal(d_out, d_in)
    return tuple(t.to(dtype) for t in (base, base + 0.1 * normal(d_out, d_in), normal(rank, d_in), normal(d_out, rank)))


def project(module, base, aligned, lora_a, lora_b, projector="approximate", energy=None):
    """One update by either projector."""
    if projector == "approximate":
        return project_all(module, base, aligned, [Update(lora_a, lora_b)])[0]
    return project_onto(module, alignment_basis(module, base, aligned, energy), [Update(lora_a, lora_b)])[0]


def by_definition(base, aligned, lora_a, lora_b, energy=None):
    """(C B, cosine, norm ratio) with C formed, all in float64 (the paper's Eq. 2; its reference repository's gate)."""
    v = aligned.double() - base.double()
    if energy is None:
        c = v @ v.T / torch.linalg.matrix_norm(v)
    else:
        u, s, _ = torch.linalg.svd(v, full_matrices=False)
        shares = torch.cumsum(s**2, 0) / (s**2).sum()
        keep = int((shares < energy).sum()) + 1
        c = u[:, :keep] @ u[:, :keep].T
    before = lora_b.double() @ lora_a.double()
    after = c @ before
    cosine = torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0)
    return c @ lora_b.double(), float(cosine), float(after.norm() / before.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(shape=shapes)
def test_the_approximate_projection_is_what_the_definition_says(dtype, shape):
    tensors = made(*shape, dtype)
    expected, cosine, ratio = by_definition(*tensors)
    found = project("m", *tensors)
    torch.testing.assert_close(found.projected_OR.double(), expected, rtol=1e-4, atol=1e-5)
    assert found.cosine == pytest.approx(cosine, abs=1e-5)
    assert found.norm_ratio == pytest.approx(ratio, rel=1e-4)


@given(shape=shapes, energy=st.floats(0.05, 0.98))
def test_the_exact_projection_is_what_the_definition_says(shape, energy):
    tensors = made(*shape)
    v = tensors[1].double() - tensors[0].double()
    singular = torch.linalg.svdvals(v) ** 2
    shares = torch.cumsum(singular, 0) / singular.sum()
    if float((shares - energy).abs().min()) < 1e-4:
        return  # on the border between two ranks, float32 and float64 may each be right
    expected, cosine, ratio = by_definition(*tensors, energy=energy)
    found = project("m", *tensors, "exact", energy)
    torch.testing.assert_close(found.projected_OR.double(), expected, rtol=1e-3, atol=1e-3)
    assert found.cosine == pytest.approx(cosine, abs=1e-3)
    assert found.norm_ratio == pytest.approx(ratio, abs=1e-3)


@given(shape=shapes)
def test_projecting_twice_by_the_exact_projector_changes_nothing_more(shape):
    base, aligned, lora_a, lora_b = made(*shape)
    once = project("m", base, aligned, lora_a, lora_b, "exact", 0.5).projected_OR
    twice = project("m", base, aligned, lora_a, once, "exact", 0.5).projected_OR
    torch.testing.assert_close(once, twice, rtol=1e-3, atol=1e-4)


def basis_of(v, energy):
    return alignment_basis("m", torch.zeros_like(v), v, energy)


@given(shape=shapes, energy=st.floats(0.05, 0.98))
def test_a_basis_is_orthonormal_and_holds_the_energy_it_states(shape, energy):
    base, aligned, _, _ = made(*shape)
    v = (aligned - base).double()
    basis = alignment_basis("m", base, aligned, energy).double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-5)
    share = float((basis.T @ v).square().sum() / v.square().sum())
    assert share >= energy - 1e-5
    if basis.shape[1] > 1:
        assert float((basis[:, :-1].T @ v).square().sum() / v.square().sum()) < energy + 1e-5


def test_the_alignment_basis_keeps_the_fewest_columns_that_hold_the_energy():
    v = torch.diag(torch.tensor([3.0, 2.0, 1.0]))  # energies 9, 4, 1 of 14
    assert [basis_of(v, energy).shape[1] for energy in (0.1, 0.64, 0.65, 0.92, 0.93, 0.99)] == [1, 1, 2, 2, 3, 3]


def test_an_energy_that_is_met_exactly_takes_no_further_column():
    assert basis_of(torch.diag(torch.tensor([1.0, 1.0])), 0.5).shape[1] == 1


@given(shape=shapes, scale=st.floats(0.01, 100))
def test_the_scale_alpha_over_rank_moves_neither_cosine_nor_ratio(shape, scale):
    base, aligned, lora_a, lora_b = made(*shape)
    plain = project("m", base, aligned, lora_a, lora_b)
    scaled = project("m", base, aligned, lora_a, scale * lora_b)
    assert scaled.cosine == pytest.approx(plain.cosine, abs=1e-5)
    assert scaled.norm_ratio == pytest.approx(plain.norm_ratio, rel=1e-4)
    torch.testing.assert_close(scaled.projected_OR, scale * plain.projected_OR, rtol=1e-4, atol=1e-4 * scale)


@given(shape=shapes)
def test_a_cosine_lies_between_minus_one_and_one_and_the_projector_never_turns_an_update_around(shape):
    found = project("m", *made(*shape))
    assert 0.0 <= found.cosine <= 1.0  # C is positive semi-definite


def test_the_gate_is_exact_where_float32_is_not():
    # The flattened float32 cosine of a wide module is off in its third or fourth digit; the Gram form is not.
    base, aligned, lora_a, lora_b = made(512, 2048, 8, seed=1)
    _, cosine, _ = by_definition(base, aligned, lora_a, lora_b)
    assert project("m", base, aligned, lora_a, lora_b).cosine == pytest.approx(cosine, abs=3e-7)


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
def test_a_number_that_is_none_is_a_projection_error_wherever_it_lies(which, bad):
    tensors = dict(zip(("base", "aligned", "A", "B"), made(6, 5, 2, 0), strict=True))
    tensors[which][1, 1] = bad
    with pytest.raises(ProjectionError, match="layers.0.q_proj: .*(NaN|infinity)"):
        project("layers.0.q_proj", *tensors.values())


def test_equal_weights_have_no_alignment_direction_so_the_update_stays_and_is_never_chosen():
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
    return {name: ModuleRow(cosine, None if cosine is None else 1.0) for name, cosine in cosines.items()}


cosine_maps = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.sampled_from([-0.5, 0.0, 0.1, 0.1, 0.7, None]), max_size=8)


@given(cosine_maps, st.integers(0, 8))
def test_number_mode_takes_exactly_n_modules_and_breaks_ties_by_name(cosines, n):
    known = [name for name in cosines if cosines[name] is not None]
    if n > len(known):
        with pytest.raises(ProjectionError, match=f"{n} modules are to be projected, but the adapter has {len(known)}"):
            chosen(rows(cosines), None, n)
        return
    take = chosen(rows(cosines), None, n)
    assert len(take) == n and take <= set(known)
    for inside in take:
        for outside in set(known) - take:
            assert (cosines[inside], inside) < (cosines[outside], outside)


@given(cosine_maps, st.sampled_from([-0.5, 0.0, 0.1, 0.7, 1.0]))
def test_the_threshold_takes_a_cosine_that_equals_it(cosines, threshold):
    assert chosen(rows(cosines), threshold, None) == {
        name for name, cosine in cosines.items() if cosine is not None and cosine <= threshold
    }


def test_without_a_rule_no_module_is_chosen():
    assert chosen(rows({"a": -1.0}), None, None) == frozenset()


ranks = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@given(shape=shapes, ranks=ranks)
def test_adapters_projected_together_come_out_as_each_does_alone(dtype, shape, ranks):
    base, aligned, _, _ = made(*shape, dtype)
    updates = [Update(*made(*shape[:2], rank, seed)[2:]) for seed, rank in enumerate(ranks)]
    for update, together in zip(updates, project_all("m", base, aligned, updates), strict=True):
        expected, cosine, ratio = by_definition(base, aligned, update.lora_A_RI, update.lora_B_OR)
        torch.testing.assert_close(together.projected_OR.double(), expected, rtol=1e-4, atol=1e-5)
        assert together.cosine == pytest.approx(cosine, abs=1e-5)
        assert together.norm_ratio == pytest.approx(ratio, rel=1e-4)


def test_a_workspace_is_used_again_and_leaves_nothing_of_the_module_before():
    space = Workspace()
    for shape in ((40, 30, 4, 0), (7, 50, 2, 1), (40, 30, 4, 0)):
        base, aligned, lora_a, lora_b = made(*shape)
        (found,) = project_all("m", base, aligned, [Update(lora_a, lora_b)], space)
        torch.testing.assert_close(found.projected_OR.double(), by_definition(base, aligned, lora_a, lora_b)[0], rtol=1e-4, atol=1e-5)


def test_many_blocks_of_rows_add_up_to_the_whole():
    # 3000 x 300 is cut into four blocks; the reference forms C of 3000 x 3000.
    base, aligned, lora_a, lora_b = made(3000, 300, 8, 5, torch.bfloat16)
    assert len(list(Workspace().blocks(3000, 300))) > 3
    expected, cosine, ratio = by_definition(base, aligned, lora_a, lora_b)
    found = project("m", base, aligned, lora_a, lora_b)
    torch.testing.assert_close(found.projected_OR.double(), expected, rtol=1e-5, atol=1e-6)
    assert found.cosine == pytest.approx(cosine, abs=3e-7)
    assert found.norm_ratio == pytest.approx(ratio, rel=1e-6)  # a float32 norm of a million terms would be off by 1e-4


def test_a_weight_stored_transposed_is_projected_as_a_view():
    base, aligned, lora_a, lora_b = made(30, 20, 4, 3)
    plain = project("m", base, aligned, lora_a, lora_b)
    stored = project("m", base.T.contiguous().T, aligned.T.contiguous().T, lora_a, lora_b)
    assert torch.equal(plain.projected_OR, stored.projected_OR) and plain.cosine == stored.cosine


def test_one_damaged_adapter_among_many_is_named():
    base, aligned, lora_a, lora_b = made(6, 5, 2, 0)
    bad = lora_a.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(ProjectionError, match="m: lora_A of runs/b holds NaN or infinity"):
        project_all("m", base, aligned, [Update(lora_a, lora_b, "runs/a"), Update(bad, lora_b, "runs/b")])
