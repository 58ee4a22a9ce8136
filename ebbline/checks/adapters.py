"""Before a study runs: do its own `adapters` fit the models that they are measured on?

An adapter's file is compared with what is known of its model. With a local model it is compared
tensor by tensor. With one that the study makes, or that is in the hub's cache, the shapes of the
matrices are compared. An adapter on the hub is compared by the stage that first reads it.

The first comparison runs in a process of its own (`python -m ebbline.checks.adapters`), because
it imports torch. Standard input is a list of Fit as JSON, standard output a list of messages.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ebbline.checks.jobs import path_of
from ebbline.sweeps.study.adapters.reference import AdapterRef
from ebbline.sweeps.study.references import ModelRef
from ebbline.sweeps.study.study import Model, Study
from ebbline.tasks.errors import EbblineError, ModelError
from ebbline.tasks.headers.files import ADAPTER_CONFIG
from ebbline.tasks.headers.model_header import read_header
from ebbline.tasks.models.brought.folder import adapter_files, lora_shape, misfit, other_base
from ebbline.tasks.models.memory import LIKE_LLAMA, Shape
from ebbline.tasks.models.sizes import header_shape, organism_shape
from ebbline.tasks.specs import TokenizerOf


@dataclass(frozen=True)
class Fit:
    """One adapter to compare. `where` is its place in the study file; `model` is the folder of its
    model, empty if there is none yet.
    """

    where: str
    adapter: str
    model: str
    tokenizer: TokenizerOf | None


def adapter_faults(study: Study) -> list[str]:
    """A line for each local adapter that cannot be measured."""
    faults: list[str] = []
    fits: list[Fit] = []
    for name, reference in study.adapters.items():
        if reference.path is None:
            continue
        model = study.model_of(name)
        try:
            folder = reference.path.located()
            adapter_files(folder)
            shape = _known_shape(study.models[model].aligned, study.models[model])
            if shape is not None and (fault := misfit(lora_shape(folder), shape, model)):
                raise ModelError(f"{folder}: {fault}")
        except EbblineError as error:
            faults.append(f"adapters.{name}: {error}")
            continue
        local = study.models[model].aligned.path
        place = "" if local is None else str(local.located())
        fits.append(Fit(f"adapters.{name}", str(folder), place, reference.tokenizer))
    return faults + _compared(fits)


def base_notes(study: Study) -> Iterator[str]:
    """A note for each local adapter whose config names another base than the model that it is
    measured on: with equal shapes, only a person can tell whether it belongs there.
    """
    for name, reference in study.adapters.items():
        model = study.model_of(name)
        if own := _name_of(study.models[model].aligned):
            try:
                named = _other_base(reference, own, study.models[model].aligned)
            except EbblineError:
                continue  # adapter_faults names a file that cannot be read
            if named:
                yield (
                    f"adapters.{name}: its {ADAPTER_CONFIG} names the base {named}, and it is "
                    f"measured on {own} (models.{model}.aligned)"
                )


def _other_base(reference: AdapterRef, own: str, model: ModelRef) -> str:
    if reference.path is None:
        return ""
    return other_base(reference.path.located(), own, path_of(model))


def _name_of(model: ModelRef) -> str:
    if model.hub is not None:
        return model.hub.id
    return "" if model.path is None else Path(model.path.path).name


def _compared(fits: list[Fit]) -> list[str]:
    if not fits:
        return []
    check = subprocess.run(
        [sys.executable, "-P", "-m", "ebbline.checks.adapters"],
        input=json.dumps([asdict(each) for each in fits]),
        capture_output=True,
        text=True,
        check=False,
    )
    if check.returncode:
        reason = (check.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"the adapters could not be checked: {reason}")
    found: list[str] = json.loads(check.stdout.splitlines()[-1])
    return found


def _known_shape(reference: ModelRef, model: Model) -> Shape | None:
    """The shape of a model that is not a local folder; None where it is not known for certain."""
    if reference.tuned is not None and model.base is not None:
        return _known_shape(model.base, model)
    if reference.organism is not None:
        return organism_shape(reference.organism.size)
    path = None if reference.gguf is not None else path_of(reference)
    if path is None or (reference is model.aligned and reference.path is not None):
        return None  # a local model is compared tensor by tensor
    try:
        header = read_header(path)
    except (ModelError, OSError):  # its own stage says what is wrong
        return None
    return header_shape(header) if header.architecture in LIKE_LLAMA else None


def fault(fit: Fit) -> str:
    """What is wrong with an adapter on its model; empty if nothing is."""
    # They import torch
    from ebbline.tasks.models.adapter_file import plain_lora, read_adapter_file
    from ebbline.tasks.models.brought.adopt import require_tokenizer
    from ebbline.tasks.models.brought.fitted import fitted
    from ebbline.tasks.models.weights import Checkpoint

    adapter, model = Path(fit.adapter), Path(fit.model)
    try:
        file = read_adapter_file(adapter)
        plain_lora(file)
        if not fit.model:
            return ""
        fitted(file, Checkpoint(model))
        require_tokenizer(adapter, model, fit.tokenizer)
        return ""
    except EbblineError as error:
        return f"{fit.where}: {error}"


if __name__ == "__main__":
    messages = [fault(Fit(**each)) for each in json.load(sys.stdin)]
    sys.stdout.write(json.dumps([message for message in messages if message]) + "\n")
