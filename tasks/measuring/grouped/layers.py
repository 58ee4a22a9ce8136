"""Several LoRA adapters on one model at once: each row of a batch has an adapter of its own.

The arithmetic is that of PEFT's layers, operation by operation, so a row's result is that of its
adapter alone. NF4 weights of a small model on a CPU are dequantised once, not at each forward pass.

A kernel may add up in another order in a batch with more rows. So the first time that a shape
occurs, its result is compared with that of the rows in batches of the usual size, bit for bit. If
they differ, `NotAlike` is raised and nothing is measured this way.

Legend: R rank, I inputs, O outputs.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ebbline.tasks.models.adapter_file import (
    REBUILDS_BASE,
    AdapterFile,
    read_adapter_file,
)
from ebbline.tasks.models.adapters import ON, slots_of, take_off, with_adapter
from ebbline.tasks.models.loading import Residents

LINEAR = (torch.nn.Linear, Linear4bit)
HELD_BYTES = 1 << 30  # of dequantised weights; a larger model dequantises at each forward pass


class NotAlike(Exception):
    """A kernel of this machine gives a row other bits in a larger batch."""


@dataclass(frozen=True)
class Lora:
    """One module's update: B A times `scaling`."""

    down_RI: torch.Tensor
    up_OR: torch.Tensor
    scaling: float

    def equals(self, other: "Lora | None") -> bool:
        return other is not None and (
            self.scaling == other.scaling
            and torch.equal(self.down_RI, other.down_RI)
            and torch.equal(self.up_OR, other.up_OR)
        )


Loras = Mapping[str, Lora]  # by module name; empty for the model alone


@dataclass(frozen=True)
class _Layer:
    """One module in an adapter's file: the names of A and B, and the type that PEFT computes in."""

    down: str
    up: str
    dtype: torch.dtype
    scaling: float


class AdapterReader:
    """Reads the adapters of a group. The first is put onto the model, which checks all of it.
    Another of the same config, names, shapes and types needs only its file.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._known: tuple[AdapterFile, Mapping[str, _Layer]] | None = None

    def read(self, adapter: Path | None) -> Loras | None:
        """The adapter's updates by module; None if it is more than updates of linear layers.
        Raises ModelError as `with_adapter` does.
        """
        if adapter is None:
            return {}
        file = read_adapter_file(adapter)
        if file.start in REBUILDS_BASE:  # it would change the base below the other members
            return None
        if self._known is None or not _of_one_form(file, self._known[0]):
            with with_adapter(self._model, adapter) as wrapped:
                found = _plain_layers(wrapped, file)
            own = {name for name, module in self._model.named_modules() if type(module) in LINEAR}
            if found is None or not found.keys() <= own:
                return None
            self._known = file, found
        device = self._model.device
        return {
            module: Lora(
                file.tensors[layer.down].to(device, layer.dtype),
                file.tensors[layer.up].to(device, layer.dtype),
                layer.scaling,
            )
            for module, layer in self._known[1].items()
        }


def _of_one_form(file: AdapterFile, other: AdapterFile) -> bool:
    return file.config == other.config and _form(file) == _form(other)


def _form(file: AdapterFile) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in file.tensors.items()}


def _plain_layers(wrapped: Any, file: AdapterFile) -> dict[str, _Layer] | None:
    """The layers by module, where PEFT computes plain LoRA on linear layers with the file's
    tensors, as they are or in float32; else None.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
    from peft.tuners.lora.layer import Linear as LoraLinear

    found = {}
    for place, module in wrapped.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if (
            type(module) not in (LoraLinear, LoraLinear4bit)
            or type(module.get_base_layer()) not in LINEAR
            or module.lora_variant
            or any(matrix[ON].bias is not None for matrix in (module.lora_A, module.lora_B))
        ):
            return None
        layer = _Layer(
            f"{place}.lora_A.weight",
            f"{place}.lora_B.weight",
            module.lora_A[ON].weight.dtype,
            float(module.scaling[ON]),
        )
        stored = {file.tensors[name].dtype for name in {layer.down, layer.up} & file.tensors.keys()}
        # Types that lose nothing in PEFT's, so that no later file of this form needs a check
        if layer.dtype == torch.float32:
            stored -= {torch.float16, torch.bfloat16}
        if stored - {layer.dtype}:
            return None
        found[place.removeprefix("base_model.model.")] = layer
    # Anything else in the file, such as a trained head or a bias, changes more than these layers
    names = {name for layer in found.values() for name in (layer.down, layer.up)}
    return found if names == file.tensors.keys() else None


@dataclass
class _Rows:
    """The rows of the next forward pass: adapter `n` has those from starts[n] to starts[n + 1].
    `usual` is the number of rows that a batch has alone; 0 if this batch is one.
    """

    starts: Sequence[int] = ()
    usual: int = 0
    alike: dict[object, bool] = field(default_factory=dict)

    def through(
        self, function: Callable[[torch.Tensor], torch.Tensor], what: object, inputs: torch.Tensor
    ) -> torch.Tensor:
        """A linear function of all rows. Raises NotAlike if the number of rows changes its bits."""
        result = function(inputs)
        if not self.usual or len(inputs) <= self.usual:
            return result
        # A kernel may also depend on how the rows lie in memory
        lies = tuple(inputs.shape), inputs.stride(), inputs.data_ptr() % 64
        shape = what, lies, inputs.dtype, self.usual, torch.get_num_threads()
        if shape not in self.alike:
            parts = [
                function(inputs[first : first + self.usual])
                for first in range(0, len(inputs), self.usual)
            ]
            self.alike[shape] = torch.equal(result, torch.cat(parts))
        if not self.alike[shape]:
            raise NotAlike
        return result


class _ManyLinear(torch.nn.Module):
    """A linear layer with the updates of several adapters: `runs` are (first adapter, the one after
    the last, their common update).
    """

    def __init__(
        self,
        layer: Any,
        weight: torch.Tensor | None,
        runs: Sequence[tuple[int, int, Lora]],
        rows: _Rows,
    ) -> None:
        super().__init__()
        self._rows, self._runs = rows, runs
        self._quantised = isinstance(layer, Linear4bit)
        self._shape = layer.in_features, layer.out_features, self._quantised
        # A method, so that the layer does not become a part of this module
        self._base: Callable[[torch.Tensor], torch.Tensor] = layer.forward
        if weight is not None:
            self._base = lambda inputs: linear(inputs, weight, layer.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = self._rows
        result = rows.through(self._base, self._shape, inputs)
        for first, end, lora in self._runs:
            start, stop = rows.starts[first], rows.starts[end]
            if start == stop:
                continue
            own = inputs[start:stop].to(lora.down_RI.dtype)
            middle = rows.through(partial(_times, lora.down_RI), lora.down_RI.shape, own)
            delta = rows.through(partial(_times, lora.up_OR), lora.up_OR.shape, middle)
            delta *= lora.scaling
            part = result[start:stop]
            if delta.dtype == part.dtype:
                part += delta
            # bfloat16 is rounded where PEFT rounds it: before the sum in quantised layers, after it
            # in plain ones
            elif self._quantised:
                part += delta.to(part.dtype)
            else:
                part.copy_(part + delta)
        return result


def _times(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return linear(inputs, weight)


class ManyAdapters:
    """A model with several adapters, which are at work inside `on`."""

    def __init__(
        self, model: PreTrainedModel, adapters: Sequence[Loras], residents: Residents
    ) -> None:
        self._model, self._adapters = model, adapters
        self._held = residents.remembered("dequantised", lambda: _dequantised(model))
        self._rows = _Rows(alike=residents.remembered("alike", dict))

    def rows(self, counts: Sequence[int], usual: int = 0) -> None:
        """Set the number of rows of each adapter in the next forward passes. With `usual`, batches
        are larger than that, and each new shape is compared.
        """
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        self._rows.starts, self._rows.usual = starts, usual

    @contextmanager
    def on(self) -> Iterator[PreTrainedModel]:
        slots = slots_of(self._model)
        names = {id(module): name for name, module in self._model.named_modules()}
        try:
            for parent, name, child in slots:
                if type(child) in LINEAR:
                    place = names[id(child)]
                    runs = _runs([adapter.get(place) for adapter in self._adapters])
                    many = _ManyLinear(child, self._held.get(place), runs, self._rows)
                    setattr(parent, name, many)
            yield self._model
        finally:
            take_off(self._model, slots)


def _runs(loras: Sequence[Lora | None]) -> list[tuple[int, int, Lora]]:
    """Neighbours with an equal update as one run."""
    runs: list[tuple[int, int, Lora]] = []
    for place, lora in enumerate(loras):
        if lora is None:
            continue
        if runs and runs[-1][1] == place and lora.equals(runs[-1][2]):
            runs[-1] = runs[-1][0], place + 1, runs[-1][2]
        else:
            runs.append((place, place + 1, lora))
    return runs


@contextmanager
def adapter_on(model: PreTrainedModel, adapter: Path | None, residents: Residents) -> Iterator[Any]:
    """The model with one adapter on it, for batches of any shape: as `with_adapter`, to the bit. An
    adapter of the form of an earlier one costs little more than reading its file.
    """
    loras = residents.remembered("adapters", lambda: AdapterReader(model)).read(adapter)
    if adapter is None or loras is None:
        with with_adapter(model, adapter) as wrapped:
            yield wrapped
        return
    many = ManyAdapters(model, [loras], residents)
    many.rows([sys.maxsize])
    with many.on():
        yield model


def nearest_order(adapters: Sequence[Loras]) -> list[int]:
    """An order in which settings of one adapter are neighbours where their masks are nested: by the
    number of modules in which they differ from an outermost one.
    """

    def apart(one: Loras, other: Loras) -> int:
        return sum(
            not lora.equals(other.get(module)) if module in one else module in other
            for module, lora in {**other, **one}.items()
        )

    from_first = [apart(adapters[0], adapter) for adapter in adapters]
    outermost = adapters[max(range(len(adapters)), key=lambda place: from_first[place])]
    distance = [apart(outermost, adapter) for adapter in adapters]
    return sorted(range(len(adapters)), key=lambda place: distance[place])


def _dequantised(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of NF4 layers as their forward pass computes them; empty for a model on a GPU or
    with too many of them.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    size = sum(layer.in_features * layer.out_features for layer in layers.values()) * 4
    if model.device.type != "cpu" or size > HELD_BYTES:
        return {}
    held = {}
    for name, layer in layers.items():
        weight = dequantize_4bit(layer.weight.data.view(-1, 1), layer.weight.quant_state)
        weight = weight.to(layer.compute_dtype or weight.dtype)
        probe = torch.linspace(-1, 1, 2 * layer.in_features, dtype=weight.dtype).view(2, -1)
        with torch.inference_mode():
            if torch.equal(linear(probe, weight, layer.bias), layer(probe)):
                held[name] = weight
    return held
