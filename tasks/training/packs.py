"""Which trainings may be one pack: trained at once, in one process, over one frozen base. No torch.
The training is `ebbline.tasks.training.packed`.

A pack's members share the base, the data's content, the rows of a step and the number of steps;
each has a rank, a rate and a seed of its own. To be packed changes no key: members are committed as
the stages they are.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ebbline.tasks.identity import digest
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Request

# Everything else, and whatever a Spec is given later, has to be equal. What is here acts on one
# adapter's own tensors, or picks its rows.
OWN = frozenset(
    {
        "rank",
        "alpha_over_rank",
        "learning_rate",
        "weight_decay",
        "warmup_share",
        "gradient_norm",
        "seed",
    }
)
ROUNDING = 1e-9  # three thirds are one


def packable(spec: TrainSpec) -> bool:
    """LoRA without dropout: masks would be drawn in another order than by itself, and be others."""
    return spec.method == "lora" and spec.dropout == 0


def common(spec: TrainSpec) -> dict[str, Any]:
    """The settings that all members of a pack have."""
    return {name: value for name, value in spec.model_dump(mode="json").items() if name not in OWN}


def pack_name(spec: TrainSpec, contents: Mapping[str, str]) -> str:
    """Equal for trainings that may be one pack; empty for one that is trained alone. `contents`:
    digests of the base and the data.
    """
    return digest({"train": common(spec), "inputs": dict(contents)}) if packable(spec) else ""


def in_packs(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """A batch, in its order: neighbours that belong together and fit on one GPU are a pack, all
    others are by themselves.
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
        pack.append(request)
    if pack:
        yield pack


def fit(shares: Iterable[float]) -> bool:
    """Whether adapters that each take such a share of what the base leaves of a GPU fit there
    together.
    """
    return sum(shares) <= 1 + ROUNDING
