"""The counted work of stages that read an adapter, from its training or from its file."""

from functools import lru_cache
from pathlib import Path

from ebbline.tasks.errors import ModelError
from ebbline.tasks.models.brought.folder import lora_shape
from ebbline.tasks.specs import AdapterSpec, TrainSpec
from ebbline.tasks.stage import Input, Source, stage_of

ASSUMED_RANK = 16  # of an adapter on the hub


def lora_of(adapter: Input) -> tuple[Input, TrainSpec] | None:
    """(the model of an adapter, its rank and modules as settings of a training).

    None for an input that no stage makes.
    """
    stage = stage_of(adapter)
    if stage is None:
        return None
    if isinstance(stage.spec, TrainSpec):
        return stage.inputs["model"], stage.spec
    source = stage.inputs.get("source")
    if isinstance(stage.spec, AdapterSpec) and isinstance(source, Source):
        return stage.inputs["model"], as_training(source.location)
    return None


def as_training(location: str) -> TrainSpec:
    """The rank and the modules of an adapter from outside, as settings of a training.

    One on the hub counts with ASSUMED_RANK and all modules of a layer. So does a damaged one: the
    stage that reads it says what is wrong.
    """
    try:
        return _from_file(location)
    except ModelError:
        return TrainSpec(rank=ASSUMED_RANK)


@lru_cache(maxsize=256)
def _from_file(location: str) -> TrainSpec:
    found = lora_shape(Path(location))
    if not found.layers:
        raise ModelError(f"{location} holds no LoRA matrices")
    return TrainSpec(rank=found.rank, target_modules=found.target_modules)
