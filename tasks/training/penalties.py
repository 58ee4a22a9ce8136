"""The penalty of a training: which one acts, on which matrices, and V for AsFT's.

Legend: O = d_out, I = d_in. V_OI = W_aligned - W_base, from the two models that a study names. It
does not follow the model that is trained, so LoX before the training leaves it as it is. The models
are read module by module. Each V is kept in the training's `dtype` on its device; its norm is of
the exact difference, and products are in float32.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ebbline.tasks.errors import TrainingError
from ebbline.tasks.models.adapter_names import unwrapped
from ebbline.tasks.models.loading import DTYPES
from ebbline.tasks.models.weights import Checkpoint
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.training.anchoring import length_penalty, outside_penalty

A, B = ".lora_A.", ".lora_B."


@dataclass(frozen=True)
class Contrast:
    """The folders of the two models whose difference is alignment."""

    base: Path
    aligned: Path


def contrast_in(inputs: Mapping[str, Path]) -> Contrast | None:
    """The two models among a training's inputs; None for a training that does not read them."""
    return Contrast(inputs["base"], inputs["aligned"]) if "base" in inputs else None


@dataclass(frozen=True)
class ModuleAlignment:
    """V of one module and its norm. A norm of 0 means that alignment left the module as it was."""

    v_OI: torch.Tensor
    norm: float


class Penalty:
    """weight * sum over modules of ||(I - C) B A||_F^2 with `alignments`, else of ||B A||_F^2."""

    def __init__(
        self, weight: float, alignments: Mapping[str, ModuleAlignment] | None = None
    ) -> None:
        self._weight, self._alignments = weight, alignments

    def gradients(
        self, module: str, lora_A_RI: torch.Tensor, lora_B_OR: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of one module's penalty with respect to A and B, in float32."""
        with torch.enable_grad():
            a_RI, b_OR = (
                tensor.detach().float().requires_grad_() for tensor in (lora_A_RI, lora_B_OR)
            )
            if self._alignments is None:
                value = length_penalty(a_RI, b_OR)
            else:
                own = self._alignments[module]
                value = outside_penalty(a_RI, b_OR, own.v_OI, own.norm)
            a_gradient, b_gradient = torch.autograd.grad(self._weight * value, (a_RI, b_OR))
        return a_gradient, b_gradient

    def add_gradients(self, named: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Add the penalty's gradients to those of the matrices, which are given by name."""
        for module, (a_RI, b_OR) in pairs_in(named).items():
            found = self.gradients(module, a_RI, b_OR)
            for matrix, gradient in zip((a_RI, b_OR), found, strict=True):
                gradient = gradient.to(matrix.dtype)
                matrix.grad = gradient if matrix.grad is None else matrix.grad.add_(gradient)


def penalty_of(
    spec: TrainSpec, alignments: Mapping[str, ModuleAlignment] | None = None
) -> Penalty | None:
    """The penalty of a training; None where none acts. Raises TrainingError for AsFT's without
    `alignments`.
    """
    if not spec.penalised:
        return None
    if not spec.reads_alignment:
        return Penalty(spec.penalty_weight)
    if alignments is None:
        raise TrainingError("the penalty asft needs V of each module")
    return Penalty(spec.penalty_weight, alignments)


def module_of(name: str) -> str:
    """The module of a LoRA matrix by the matrix's name. Raises TrainingError for another tensor."""
    for part in (A, B):
        module, found, _ = unwrapped(name).partition(part)
        if found:
            return module
    raise TrainingError(
        f"a penalty acts on the matrices A and B of linear modules, and {name} is none; leave "
        "its module out of train.target_modules, or leave train.penalty out"
    )


def pairs_in(
    named: Iterable[tuple[str, torch.nn.Parameter]],
) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Module -> its A and B, in the order of the modules' names."""
    found: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, tensor in named:
        found.setdefault(module_of(name), {})[A if A in name else B] = tensor
    return {module: (found[module][A], found[module][B]) for module in sorted(found)}


def alignments_for(
    spec: TrainSpec, names: Iterable[str], contrast: Contrast | None, device: str
) -> dict[str, ModuleAlignment] | None:
    """V of each module that a training with AsFT's penalty changes; None for another training.

    `names` are its trained tensors. Raises TrainingError without the two models, when they are
    equal in all these modules, and as `alignments_of` does.
    """
    if not spec.reads_alignment:
        return None
    found = alignments_of(spec, modules_in(names), contrast, device)
    require_difference(any(own.norm for own in found.values()))
    return found


def modules_in(names: Iterable[str]) -> list[str]:
    """The modules of LoRA matrices, sorted."""
    return sorted({module_of(name) for name in names})


def require_difference(found: bool) -> None:
    if not found:
        raise TrainingError(
            "base and aligned are equal in every module that is trained; train.penalty asft needs "
            "two models that differ by alignment"
        )


def alignments_of(
    spec: TrainSpec, modules: Iterable[str], contrast: Contrast | None, device: str
) -> dict[str, ModuleAlignment]:
    """V of each module. Raises ModelError for weights that are missing or quantised.

    Raises TrainingError without the two models, for shapes that differ, and for weights that are
    not finite.
    """
    if contrast is None:
        raise TrainingError("the penalty asft reads the models `base` and `aligned`; give both")
    models = [Checkpoint(contrast.base), Checkpoint(contrast.aligned)]
    found = {}
    for module in modules:
        base_OI, aligned_OI = (
            (model.weight(module).T if model.is_conv1d(module) else model.weight(module)).to(device)
            for model in models
        )
        if base_OI.shape != aligned_OI.shape:
            raise TrainingError(
                f"{module}: the base weight is {tuple(base_OI.shape)}, the aligned one "
                f"{tuple(aligned_OI.shape)}; train.penalty needs two models of one shape"
            )
        v_OI = aligned_OI.float() - base_OI.float()
        norm = float(torch.linalg.vector_norm(v_OI, dtype=torch.float64))
        if not math.isfinite(norm):
            raise TrainingError(
                f"{module}: the weight holds NaN or infinity in {contrast.base} or "
                f"{contrast.aligned}; is the download complete?"
            )
        found[module] = ModuleAlignment(v_OI.to(DTYPES[spec.dtype]), norm)
    return found
