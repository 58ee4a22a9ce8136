"""Which trainings may form a pack: trained at once, in one process, over one frozen base. The
training itself is `ebbline.tasks.training.packed`. Imports no torch.

Members share the base, the data's content, the rows of a step and the number of steps. Rank,
learning rate and seed may differ.

Invariant: packing changes no key. Each member is committed as a stage of its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ebbline.tasks.identity import digest
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Request

# Settings that may differ between members: they act on one adapter's tensors, or choose its rows.
# All other fields of a Spec, also future ones, must be equal.
OWN_SETTINGS = frozenset(
    {
        "rank",
        "alpha_over_rank",
        "learning_rate",
        "weight_decay",
        "warmup_share",
        "gradient_norm",
        "penalty_weight",
        "ema_decay",
        "seed",
    }
)
ROUNDING = 1e-9  # three shares of 1/3 must fit


def packable(spec: TrainSpec) -> bool:
    """Whether a training may be packed: LoRA without dropout.

    In a pack, dropout masks would be drawn in another order than in a training alone.
    """
    return spec.method == "lora" and spec.dropout == 0


def common(spec: TrainSpec) -> dict[str, Any]:
    """The settings that are equal for all members of a pack."""
    settings = spec.model_dump(mode="json")
    return {name: value for name, value in settings.items() if name not in OWN_SETTINGS}


def pack_name(spec: TrainSpec, contents: Mapping[str, str]) -> str:
    """A name that is equal for trainings that may form a pack; empty for one that may not.

    `contents` holds the digests of the base and the data.
    """
    return digest({"train": common(spec), "inputs": dict(contents)}) if packable(spec) else ""


def in_packs(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Split a batch into packs, in order.

    Neighbours with one pack name that fit on one GPU form a pack; every other request is alone.
    """
    pack: list[Request] = []
    for request in requests:
        if pack and (
            request.pack != pack[0].pack
            or not request.pack
            or not fit(one.pack_share for one in [*pack, request])
        ):
            yield pack
            pack = []
        if request.pack:
            pack.append(request)
        else:
            yield [request]
    if pack:
        yield pack


def fit(shares: Iterable[float]) -> bool:
    """Whether adapters fit on one GPU; each share is of the memory that the base leaves free."""
    return sum(shares) <= 1 + ROUNDING
