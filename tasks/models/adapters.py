"""Put an adapter onto a model, and take it off again.

This is the only module that does so, for `generate`, `evaluate`, training and the checks of
`project`.

Invariant: an adapter is on a model only if the file's tensors equal the model's adapter
parameters one to one, in name and shape. After it is taken off, the model has its own modules
again, and its own biases. PiSSA and OLoRA change the base's weights in place and leave a changed
base. `Residents` notices that by `fingerprint` and loads the base again.
"""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.files import ADAPTER_CONFIG
from ebbline.tasks.models.adapter_file import (
    ABOUT,
    REBUILDS_BASE,
    Adapter,
    AdapterFile,
    plain_lora,
    read_adapter_file,
)
from ebbline.tasks.models.adapter_names import PEFT_PREFIX, matched
from ebbline.tasks.models.model_folder import UNREADABLE
from ebbline.tasks.models.weights import Checkpoint

ON = "default"  # PEFT's name for the adapter
Slots = Sequence[tuple[torch.nn.Module, str, torch.nn.Module]]
# What PEFT and torch raise for a config or for layers that do not fit each other
_UNFIT = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    re.error,  # a rank or alpha pattern that is no regular expression
)


@contextmanager
def with_adapter(model: PreTrainedModel, adapter: Path | None) -> Iterator[Any]:
    """The model with a LoRA adapter on it inside a `with`. Afterwards the model has its own modules
    again.

    Raises ModelError, with the file and the tensor, unless every tensor of the adapter lands.
    """
    if adapter is None:
        yield model
        return
    file = read_adapter_file(adapter)
    _require_computable(file, model)
    slots, replaced = slots_of(model), list[tuple[torch.Tensor, torch.Tensor]]()
    try:
        own = _names(model)
        wrapped = _injected(model, file, on_meta=False)
        fit = _fit(file, wrapped, own, model.name_or_path)
        _require_equal(fit.copies, _own_tensor(slots, model), file, model.name_or_path)
        replaced = _replaced_biases(fit.landing, wrapped)
        _land(fit.landing, wrapped, file)
        yield wrapped.eval().requires_grad_(False)
    finally:
        take_off(model, slots)
        with torch.no_grad():
            for bias, value in replaced:
                bias.copy_(value)


def slots_of(model: torch.nn.Module) -> Slots:
    """Every place of a module in the model, and the module in it."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
    ]


def take_off(model: torch.nn.Module, slots: Slots) -> None:
    """Put the model's own modules back into their places: adapters' wrappers go, and with them
    trained copies of heads and embeddings.

    PEFT's `unload` would leave those copies in the model.
    """
    for parent, name, child in slots:
        if getattr(parent, name) is not child:
            setattr(parent, name, child)
    # PEFT leaves its config on the model, and would warn of a second adapter at the next one.
    if hasattr(model, "peft_config"):
        del model.peft_config


def fitted_by_peft(file: AdapterFile, model: Checkpoint) -> Adapter:
    """A plain LoRA in the naming of a model folder, checked as `with_adapter` checks it.

    Reads the model's config and the weights that the adapter holds copies of. Raises ModelError.
    """
    empty = _empty_model(model)
    own = _names(empty)
    fit = _fit(file, _injected(empty, file, on_meta=True), own, str(model.folder))
    _require_equal(fit.copies, model.read_as, file, str(model.folder))
    copies = {fit.names[name]: file.tensors[name] for name in fit.copies if name not in fit.landing}
    return plain_lora(replace(file, tensors={**fit.landing, **copies}))


def _require_computable(file: AdapterFile, model: PreTrainedModel) -> None:
    """Raises ModelError for an adapter that needs the base's weights as they were, unquantised."""
    remedy = (
        "Measure it with `quantisation: none`, or save it with PEFT's "
        "`path_initial_model_for_weight_conversion`"
    )
    if file.start in REBUILDS_BASE and getattr(model, "is_quantized", False):
        raise ModelError(
            f"{file.folder} was started with init_lora_weights={file.start!r}, which moves part of "
            f"the base weights into A and B, and this base is quantised. {remedy}"
        )
    if file.config.get("use_dora") and getattr(model, "is_loaded_in_8bit", False):
        raise ModelError(
            f"{file.folder} is DoRA, which PEFT does not compute on an int8 base. Measure it with "
            "`quantisation: nf4` or `quantisation: none`"
        )


def _empty_model(model: Checkpoint) -> Any:
    """The model of a folder without its weights, for the names and shapes of its layers."""
    model.require()
    if not model.config:
        raise ModelError(
            f"{model.folder} has no config.json, so the layers that an adapter lands on are not "
            "known; add it"
        )
    try:
        config = AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # names and shapes are those of the unquantised layers
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (*_UNFIT, *UNREADABLE) as error:
        raise ModelError(
            f"{model.folder / 'config.json'} gives no causal language model "
            f"({_first_line(error)}); ebbline cannot tell which layers the adapter lands on"
        ) from error


def _injected(model: Any, file: AdapterFile, on_meta: bool) -> Any:
    """The model with an adapter of the file's config on it, whose tensors are not yet the file's.
    Raises ModelError if PEFT finds no place for it.
    """
    from peft import LoraConfig, get_peft_model  # only stages with an adapter need peft

    known = set(inspect.signature(LoraConfig).parameters)
    unknown = [name for name, value in file.config.items() if value and name not in known | ABOUT]
    if unknown:
        raise ModelError(
            f"`{unknown[0]}` in {file.folder / ADAPTER_CONFIG} is a setting that this version of "
            "PEFT does not know, so it may change what the adapter does. Remove it if it does not"
        )
    settings = {name: file.config[name] for name in known & file.config.keys()}
    rebuilds = file.start in REBUILDS_BASE and not on_meta
    settings |= {
        # Only these starts are computed: they change the base. The file replaces all others.
        "init_lora_weights": file.config["init_lora_weights"] if rebuilds else True,
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "loftq_config": {},
        "peft_type": None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, LoraConfig(**settings), low_cpu_mem_usage=on_meta)
    except torch.cuda.OutOfMemoryError:
        raise
    except _UNFIT as error:
        raise ModelError(
            f"the adapter in {file.folder} cannot be put onto {model.name_or_path}: "
            f"{_first_line(error)}. Was it trained on another model?"
        ) from error


@contextmanager
def without_deprecation() -> Iterator[None]:
    """Without the warning that PEFT reads a property of the model that transformers has renamed."""
    with warnings.catch_warnings():
        message = "`is_gradient_checkpointing` is deprecated"
        warnings.filterwarnings("ignore", message, FutureWarning)
        yield


@dataclass(frozen=True)
class _Fit:
    """`landing` has the file's tensors by the names of the model's adapter parameters. `copies` has
    the base tensor that each other name in the file means; `names` has all of them, as PEFT would
    write them for this model.
    """

    landing: Mapping[str, torch.Tensor]
    copies: Mapping[str, str]
    names: Mapping[str, str]


def _parameters(wrapped: Any) -> dict[str, torch.Tensor]:
    """The adapter's parameters in a model, by the names that PEFT saves. They share its memory."""
    from peft import get_peft_model_state_dict

    found: dict[str, torch.Tensor] = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return found


def _fit(file: AdapterFile, wrapped: Any, own: Sequence[str], model: str) -> _Fit:
    """Match the tensors of a file with the adapter's parameters in a model. `own` are the names of
    the model's own tensors, of which the file may hold copies.

    Raises ModelError unless they are equal one to one, in name and shape.
    """
    expected = _parameters(wrapped)
    copies = {}
    for name in own:
        module, _, kind = name.rpartition(".")
        for saved in (f"{PEFT_PREFIX}{name}", f"{PEFT_PREFIX}{module}.base_layer.{kind}"):
            if saved not in expected:
                copies[saved] = name
    names = matched(file.tensors, expected.keys(), copies.keys())
    missing = sorted(expected.keys() - set(names.values()))
    foreign = sorted(file.tensors.keys() - names.keys())
    if foreign:
        raise ModelError(
            f"{file.weights}: {foreign[0]} fits no adapter parameter of {model} "
            f"({len(foreign)} of its {len(file.tensors)} tensors do not), so it would be left out. "
            f"Was the adapter trained on another model, or its {ADAPTER_CONFIG} changed?"
        )
    if missing:
        raise ModelError(
            f"{file.weights} lacks {missing[0]}, which its {ADAPTER_CONFIG} promises for {model} "
            f"({len(missing)} of {len(expected)} tensors are missing). Was it trained on another "
            "model, or saved in part?"
        )
    landing = {meant: file.tensors[name] for name, meant in names.items() if meant in expected}
    for name, meant in names.items():
        if meant in expected and file.tensors[name].shape != expected[meant].shape:
            raise ModelError(
                f"{file.weights}: {name} has the shape {tuple(file.tensors[name].shape)}, and "
                f"{model} takes {tuple(expected[meant].shape)} there. Was the adapter trained on "
                f"another model, or its {ADAPTER_CONFIG} changed?"
            )
    _require_same_patterns(names, file)
    _require_scales(wrapped, file)
    return _Fit(
        landing, {name: copies[meant] for name, meant in names.items() if meant in copies}, names
    )


def _require_same_patterns(names: Mapping[str, str], file: AdapterFile) -> None:
    """Raises ModelError if a rank or alpha pattern means one layer under the file's names, as in
    the training, and another under the model's. A wrong alpha shows in no shape.
    """
    from peft.utils.other import get_pattern_key

    for setting in ("rank_pattern", "alpha_pattern"):
        patterns = list(file.config.get(setting) or {})
        for name, meant in names.items() if patterns else ():
            trained, here = (
                get_pattern_key(patterns, layer.partition(".lora_")[0].rpartition(PEFT_PREFIX)[2])
                for layer in (name, meant)
            )
            if trained != here and (trained in patterns or here in patterns):
                raise ModelError(
                    f"`{setting}` in {file.folder / ADAPTER_CONFIG} treats {name} otherwise "
                    f"than {meant}, its name in the model; write its patterns for that name"
                )


def _names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def _require_scales(wrapped: Any, file: AdapterFile) -> None:
    from peft.tuners.lora import LoraLayer

    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            scale = module.scaling.get(ON, 0.0)
            if not math.isfinite(scale) or scale == 0:
                raise ModelError(
                    f"{file.folder / ADAPTER_CONFIG} scales the update of "
                    f"{name.removeprefix(PEFT_PREFIX)} by {scale}; correct `lora_alpha` and `r`"
                )


def _require_equal(
    copies: Mapping[str, str],
    base: Callable[[str], torch.Tensor],
    file: AdapterFile,
    model: str,
) -> None:
    """Raises ModelError if a copy of a base tensor in the file differs from the base's own."""
    for name, own in copies.items():
        copy, tensor = file.tensors[name], base(own)
        tensor = tensor.to(copy.device)
        if copy.shape != tensor.shape or not (
            torch.equal(copy.to(tensor.dtype), tensor) or torch.equal(copy, tensor.to(copy.dtype))
        ):
            raise ModelError(
                f"{file.weights}: {name} is not equal to {own} of {model}. The adapter was trained "
                "on another base, or on a resized vocabulary; give that model"
            )


def _own_tensor(slots: Slots, model: Any) -> Callable[[str], torch.Tensor]:
    """A base tensor by its name before the adapter was put on."""
    children = {(id(parent), name): child for parent, name, child in slots}

    def tensor(name: str) -> torch.Tensor:
        *path, last = name.split(".")
        module = model
        for part in path:
            module = children[id(module), part]
        found: torch.Tensor = getattr(module, last).detach()
        return found

    return tensor


def _replaced_biases(
    landing: Mapping[str, torch.Tensor], wrapped: Any
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The base's own biases that the adapter overwrites, each with a copy of its value."""
    own = [name for name in landing if name.endswith(".bias") and ".lora_" not in name]
    parameters = _parameters(wrapped) if own else {}
    return [(parameters[name], parameters[name].clone()) for name in own]


def _land(landing: Mapping[str, torch.Tensor], wrapped: Any, file: AdapterFile) -> None:
    """Copy the tensors into the model, and check that each arrived."""
    parameters = _parameters(wrapped)
    with torch.no_grad():
        for name, tensor in landing.items():
            parameters[name].copy_(tensor)
    for name, parameter in _parameters(wrapped).items():
        wanted = landing[name].to(parameter.device, parameter.dtype)
        if not torch.equal(parameter, wanted) or not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"{file.weights}: {name} did not arrive in the model as it is in the file; its "
                f"values may be beyond the range of {str(parameter.dtype).removeprefix('torch.')}"
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300].rstrip(".") if text else type(error).__name__
