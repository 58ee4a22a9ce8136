"""Controls: what they hold equal to their partner is equal, and what they draw is random and the
same everywhere.
"""

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebbline.tasks.defences.computing.draws import normals, order
from ebbline.tasks.defences.computing.factors import Factors, effect, norm
from ebbline.tasks.defences.computing.rotation import Rotation
from ebbline.tasks.defences.controls.random_modules import RandomModules
from ebbline.tasks.defences.controls.random_subspace import RandomSubspace, rotated
from ebbline.tasks.defences.controls.registry import CONTROLS, controls_of
from ebbline.tasks.defences.controls.shrink_matched import ShrinkMatched
from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.method import Measured
from ebbline.tasks.defences.methods.registry import METHODS, method_named
from ebbline.tasks.defences.methods.safe_lora import PROJECTED
from tests.tasks.test_safelora import made, project

GOLDEN = Path(__file__).parents[1] / "golden" / "draws.json"
SAFE_LORA = method_named("safe_lora")
shapes = st.tuples(st.integers(2, 24), st.integers(2, 24), st.integers(1, 8), st.integers(0, 9999))


def frames(draw: int):
    return lambda which, rows, columns: normals(which, draw, "module", rows, columns)


def measured(tensors, energy: float | None, draw: int = 0) -> Measured:
    """One module with its projection and one rotated projection, as they are kept."""
    base, aligned, a, b = tensors
    by = partial(project, projector="approximate" if energy is None else "exact", energy=energy)
    rotation = Rotation(b, frames(draw))
    kept = {
        PROJECTED: by("m", base, aligned, a, b).projected_OR,
        rotated(draw): rotation.back(by("m", base, aligned, a, rotation.into()).projected_OR),
    }
    return Measured("m", Factors(a, b, 2.0), kept)


def length(update: Factors) -> float:
    """||dW||_F of the whole product, in float64."""
    return float(update.scale * (update.lora_B_OR.double() @ update.lora_A_RI.double()).norm())


@pytest.mark.parametrize("energy", [None, 0.5])
@pytest.mark.parametrize("control", [ShrinkMatched(), RandomSubspace()], ids=lambda x: x.name)
@given(shape=shapes)
def test_a_norm_control_has_its_partners_length_in_every_module(control, energy, shape):
    module = measured(made(*shape), energy)
    partner = SAFE_LORA.defended(module, {})
    found = control.controlled(SAFE_LORA, module, {}, 0)
    assert found.lora_B_OR.dtype == torch.float32
    assert length(found) == pytest.approx(length(partner), rel=1e-6, abs=1e-30)


def test_the_length_is_of_the_update_not_of_b():
    """With an A that weighs the two columns of B differently, ||B|| would match something else."""
    a, b = torch.diag(torch.tensor([10.0, 0.1])), torch.eye(2)
    module = Measured("m", Factors(a, b), {PROJECTED: torch.diag(torch.tensor([0.0, 1.0]))})
    found = ShrinkMatched().controlled(SAFE_LORA, module, {}, 0)
    assert length(found) == pytest.approx(0.1, rel=1e-6)
    assert float(found.lora_B_OR.norm()) != pytest.approx(1.0, rel=0.5)


def whole(rotation: Rotation, y: torch.Tensor, seed: int) -> torch.Tensor:
    """A d_out x d_out orthogonal matrix that does to B and Y what the rotation does."""
    d_out = len(y)
    generator = torch.Generator().manual_seed(seed)
    sources = torch.cat([rotation.into().double(), y.double()], 1)
    targets = torch.cat([rotation.back(rotation.into()).double(), rotation.back(y).double()], 1)
    rank = int(torch.linalg.matrix_rank(sources, rtol=1e-5))
    u, s, w = torch.linalg.svd(sources, full_matrices=False)
    images = targets @ w.T[:, :rank] / s[:rank]

    def completed(part: torch.Tensor) -> torch.Tensor:
        rest = torch.randn(d_out, d_out, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(torch.cat([part, rest], 1)[:, :d_out])[0] * 1.0

    left, right = completed(images), completed(u[:, :rank])
    for one, part in ((left, images), (right, u[:, :rank])):
        one[:, :rank] = part  # QR may turn a column round
    return left @ right.T


@given(shape=shapes)
def test_a_rotated_projection_is_that_of_one_orthogonal_matrix(shape):
    """Q is rebuilt from what it did, is orthogonal, and gives Q C Q^T B with C formed."""
    base, aligned, _, b = made(*shape)
    v = aligned.double() - base.double()
    c = v @ v.T / v.norm()
    rotation = Rotation(b, frames(shape[3] % 5))
    y = (c @ rotation.into().double()).float()
    q = whole(rotation, y, shape[3])
    eye = torch.eye(len(b), dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, eye, rtol=0, atol=2e-3)
    expected = q @ c @ q.T @ b.double()
    torch.testing.assert_close(
        rotation.back(y).double(), expected, rtol=0, atol=4e-3 * float(expected.norm())
    )


@given(shape=shapes)
def test_a_rotation_by_the_identity_is_safe_lora(shape):
    base, aligned, a, b = made(*shape)
    own = torch.linalg.qr(b.double())[0]
    expected = project("m", base, aligned, a, b).projected_OR

    def frame(which: str, rows: int, columns: int) -> np.ndarray:
        if which == "into":
            return own.numpy()
        across = expected.double() - own @ (own.T @ expected.double())
        across = across - own @ (own.T @ across)
        return torch.linalg.svd(across, full_matrices=False)[0][:, :columns].numpy()

    rotation = Rotation(b, frame)
    torch.testing.assert_close(rotation.into(), b, rtol=1e-5, atol=1e-5)
    found = rotation.back(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.norm()))


def test_a_rotation_spreads_a_direction_over_all_others():
    """The mean of (q^T e)^2 over draws is 1 / d_out, for every e: no direction is preferred."""
    d_out, draws = 6, 400
    b = torch.eye(d_out)[:, :1]
    squares = torch.stack([Rotation(b, frames(n)).into().flatten() ** 2 for n in range(draws)])
    deviation = (2 * (d_out - 1) / (d_out**2 * (d_out + 2)) / draws) ** 0.5
    assert float((squares.mean(0) - 1 / d_out).abs().max()) < 5 * deviation


def test_the_mean_of_rotated_projections_is_a_multiple_of_the_update():
    """The mean of Q C Q^T B over all Q is trace(C) / d_out B: the rest has no preferred side."""
    base, aligned, _, b = made(6, 8, 2, 0)
    v = aligned.double() - base.double()
    c = v @ v.T / v.norm()
    rotations = [Rotation(b, frames(draw)) for draw in range(400)]
    drawn = torch.stack([each.back(c @ each.into().double()).double() for each in rotations])
    expected, deviation = c.trace() / 6 * b.double(), drawn.std(0) / 400**0.5
    assert float(((drawn.mean(0) - expected).abs() / deviation).max()) < 5


ROWS = {
    **{f"layers.{n}.q_proj": ModuleRow(0.1 * n, 0.1) for n in range(6)},
    **{f"layers.{n}.up_proj": ModuleRow(0.2 * n, 0.1) for n in range(4)},
    "layers.9.q_proj": ModuleRow(None, None, "the update is zero"),
}


@given(number=st.integers(0, 10), draw=st.integers(0, 50))
def test_random_modules_are_as_many_of_each_type_and_have_a_cosine(number, draw):
    partner = SAFE_LORA.chosen(ROWS, {"threshold": None, "modules": number})
    found = RandomModules().chosen(partner, ROWS, draw)
    kinds = [Counter(each.rpartition(".")[2] for each in names) for names in (partner, found)]
    assert kinds[0] == kinds[1] and all(ROWS[each].cosine is not None for each in found)


def test_draws_differ_from_each_other_and_are_equal_everywhere():
    """Orders and raw bits are equal on every machine; log and cos may round."""
    partner = SAFE_LORA.chosen(ROWS, {"threshold": None, "modules": 5})
    found = {
        "order": [order("random_modules", draw, sorted(ROWS)) for draw in range(3)],
        "modules": [sorted(RandomModules().chosen(partner, ROWS, draw)) for draw in range(3)],
        "normals": [normals("into", draw, "layers.0.q_proj", 3, 2).tolist() for draw in range(3)],
    }
    if os.environ.get("EBBLINE_REFRESH_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert found["order"] == golden["order"] and found["modules"] == golden["modules"]
    np.testing.assert_allclose(found["normals"], golden["normals"], rtol=1e-12)
    assert len({tuple(each) for each in found["order"]}) == 3
    assert len({np.asarray(each).tobytes() for each in found["normals"]}) == 3


def test_normal_numbers_are_normal():
    numbers = normals("into", 0, "m", 200, 100)
    assert abs(numbers.mean()) < 5 / 20000**0.5 and abs(numbers.var() - 1) < 5 * (2 / 20000) ** 0.5
    assert abs(float(np.mean(numbers**4)) - 3) < 5 * (96 / 20000) ** 0.5


def test_every_control_has_a_partner_and_those_without_gate_and_projector_have_none():
    assert {each.name for each in CONTROLS} == {
        name for method in METHODS for name in method.controls
    }
    assert [each.name for each in controls_of(method_named("drop"))] == ["random_modules"]
    assert not controls_of(method_named("scale"))


@given(shape=shapes, other=st.integers(0, 9999))
def test_the_share_that_scaling_explains_is_that_of_the_best_multiple(shape, other):
    """1 - min_a ||X - a dW||^2 / ||X||^2, by least squares over whole matrices."""
    _, _, a, b = made(*shape)
    second = made(shape[0], shape[1], 2, other)
    old, new = Factors(a, b, 2.0), Factors(second[2], second[3], 0.5)
    found = effect(old, new)
    one, two = (x.scale * (x.lora_B_OR.double() @ x.lora_A_RI.double()) for x in (old, new))
    for target, share in ((two, found.result_explained), (two - one, found.change_explained)):
        best = float((target * one).sum() / (one * one).sum())
        left = float((target - best * one).norm() ** 2 / target.norm() ** 2)
        assert share == pytest.approx(1 - left, abs=1e-6)
    assert found.norm_ratio == pytest.approx(float(two.norm() / one.norm()), rel=1e-6)
    assert found.norm_before == pytest.approx(norm(old), rel=1e-12)
    for factor in (0.0, 0.3):
        assert effect(old, old.times(factor)).change_explained == pytest.approx(1.0, abs=1e-5)
    assert effect(old, old).change_explained is None
