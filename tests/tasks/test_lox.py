"""LoX writes a whole model: every matrix by its formula, everything else bit for bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebbline.tasks.defences.lox.extrapolate import run
from ebbline.tasks.errors import ModelError
from ebbline.tasks.specs import LoxSpec
from tests.tiny import context, fresh


def made(folder, pair, **settings):
    out = fresh(folder)
    inputs = {"model": pair.aligned, "base": pair.base}
    run(LoxSpec(**settings), inputs, out, context(folder.with_name(folder.name + "-ctx")))
    return out / LoxSpec.MODEL


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_every_matrix_is_extrapolated_by_its_leading_directions_and_vectors_stay(tmp_path, pair):
    found = weights(made(tmp_path / "lox", pair, factor=1.25, directions=3))
    base, aligned = weights(pair.base), weights(pair.aligned)
    assert found.keys() == aligned.keys()
    for name, tensor in aligned.items():
        if tensor.ndim != 2:
            assert torch.equal(found[name], tensor)
            continue
        u, s, w = torch.linalg.svd(tensor.double() - base[name].double(), full_matrices=False)
        expected = tensor + 1.25 * (u[:, :3] * s[:3]) @ w[:3]
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_factor_of_zero_is_the_aligned_model_bit_for_bit(tmp_path, pair):
    folder = made(tmp_path / "lox", pair, factor=0.0)
    for file in pair.aligned.iterdir():
        if file.suffix == ".safetensors":
            found, own = load_file(folder / file.name), load_file(file)
            assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
        else:
            assert (folder / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(128, 64, dtype=torch.int8), r"up_proj\.weight is stored as torch\.int8"),
        (torch.zeros(2, 128, 64), r"up_proj\.weight has the shape \(2, 128, 64\)"),
    ],
    ids=["quantised", "stacked"],
)
def test_a_weight_that_is_no_plain_matrix_is_an_error_that_names_it(
    tmp_path, pair, tensor, message
):
    damaged = fresh(tmp_path / "aligned")
    for file in pair.aligned.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors = weights(damaged) | {"model.layers.0.mlp.up_proj.weight": tensor}
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    inputs = {"model": damaged, "base": pair.base}
    out, ctx = fresh(tmp_path / "out"), context(tmp_path / "ctx")
    with pytest.raises(ModelError, match=message):
        run(LoxSpec(factor=1.0), inputs, out, ctx)
