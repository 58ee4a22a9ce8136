"""A corpus of adapters, saved by PEFT and then edited as other tools and accidents leave them.

`MEASURED` has the adapters that are measured; `tests.tasks.adapter_merge` computes the expected
numbers. `REJECTED` has the adapters that are an error, with its words.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.tasks.test_weights import SMALL, lora
from tests.tiny import word_tokenizer

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path], object]
P = "base_model.model."
IDS = torch.tensor([[1, 8, 9, 10, 11, 12, 3, 4]])
ALL = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """PEFT's settings for the training, and what was done to the saved folder."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    edit: Edit = lambda folder: None
    model: str = "untied"
    says: str = ""


def build_models(folder: Path) -> dict[str, Path]:
    """Random models with a tokenizer: biases in attention, tied and untied heads, Conv1D."""
    sizes = {**SMALL, "vocab_size": 56, "tie_word_embeddings": False}  # 54 have a token
    configs = {
        "untied": Qwen2Config(**sizes),
        "tied": Qwen2Config(**{**sizes, "tie_word_embeddings": True}),
        "narrow": Qwen2Config(**{**sizes, "hidden_size": 32}),
        "deep": Qwen2Config(**{**sizes, "num_hidden_layers": 3}),
        "conv1d": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    }
    for name, config in configs.items():
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in configs}


def make(case: Case, models: Mapping[str, Path], folder: Path) -> tuple[Path, Path]:
    """The edited adapter, and the adapter as PEFT saved it."""
    saved = lora(folder / "saved", models[case.model], **{"target_modules": ALL, **case.settings})
    shutil.copytree(saved, folder / "adapter")
    case.edit(folder / "adapter")
    return folder / "adapter", saved


def tensors(change: Callable[[Tensors], object]) -> Edit:
    def edit(folder: Path) -> None:
        found = load_file(folder / ADAPTER_WEIGHTS)
        change(found)
        save_file(found, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    return edit


def renamed(rename: Callable[[str], str]) -> Edit:
    def change(found: Tensors) -> None:
        for name in list(found):
            found[rename(name)] = found.pop(name)

    return tensors(change)


def config(**settings: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / ADAPTER_CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return edit


def one(folder_tensors: Tensors, part: str) -> str:
    """The first name with this part."""
    return next(name for name in sorted(folder_tensors) if part in name)


def set_one(part: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def change(found: Tensors) -> None:
        found[one(found, part)] = value(found[one(found, part)]).contiguous()

    return tensors(change)


def without(part: str) -> Edit:
    def change(found: Tensors) -> None:
        for name in [name for name in found if part in name]:
            del found[name]

    return tensors(change)


def in_dtype(dtype: torch.dtype) -> Edit:
    return tensors(
        lambda found: found.update({name: each.to(dtype) for name, each in found.items()})
    )


def files(**contents: str) -> Edit:
    """Other files beside the adapter, as TRL, Unsloth and Axolotl write them."""
    return lambda folder: [
        (folder / name.replace("__", ".")).write_text(text) for name, text in contents.items()
    ]


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def text_part(prefix: str, head: str = "lm_head") -> Edit:
    return renamed(
        lambda name: name.replace(f"{P}model.", f"{P}{prefix}").replace(f"{P}lm_head", f"{P}{head}")
    )


def only_pickled(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")


def sharded(folder: Path) -> None:
    found = load_file(folder / ADAPTER_WEIGHTS)
    names = sorted(found)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file(
            {name: found[name] for name in part},
            folder / f"adapter_model-{number:05}-of-00002.safetensors",
        )
    (folder / ADAPTER_WEIGHTS).unlink()


def truncated(folder: Path) -> None:
    path = folder / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-20])


MEASURED = {
    "plain": Case(),
    "rank and alpha patterns": Case(
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3}}
    ),
    "rslora": Case({"use_rslora": True, "r": 8}),
    "dora": Case({"use_dora": True}),
    "dora with rslora": Case({"use_dora": True, "use_rslora": True}),
    "pissa": Case({"init_lora_weights": "pissa"}),
    "olora": Case({"init_lora_weights": "olora"}),
    "eva": Case({}, config(init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.99})),
    "loftq settings left from a plain start": Case({}, config(loftq_config={"loftq_bits": 4})),
    "orthogonal": Case({"init_lora_weights": "orthogonal"}),
    "gaussian": Case({"init_lora_weights": "gaussian"}),
    "every linear layer": Case({"target_modules": "all-linear"}),
    "a pattern": Case({"target_modules": r".*\.layers\.\d+\.mlp\.(up|down)_proj"}),
    "some layers": Case({"layers_to_transform": [1]}),
    "excluded modules": Case({"exclude_modules": ["v_proj"]}),
    "saved head": Case({"modules_to_save": ["lm_head"]}),
    "saved head and embedding": Case({"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved norms": Case({"modules_to_save": ["input_layernorm"]}),
    "all biases": Case({"bias": "all"}),
    "biases of lora modules": Case({"bias": "lora_only"}),
    "biases of its own": Case({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "tokens": Case({"trainable_token_indices": [8, 9]}),
    "tokens of both": Case({"trainable_token_indices": {"embed_tokens": [8, 9], "lm_head": [5]}}),
    "adapted embedding": Case({"target_modules": ["embed_tokens", "q_proj"]}),
    "adapted head": Case({"target_modules": ["lm_head", "q_proj"]}),
    "tied, saved head": Case({"modules_to_save": ["lm_head"]}, model="tied"),
    "tied, tokens": Case({"trainable_token_indices": [8, 9]}, model="tied"),
    "tied, adapted embedding": Case({"target_modules": ["embed_tokens", "q_proj"]}, model="tied"),
    "tied, adapted head": Case({"target_modules": ["lm_head", "q_proj"]}, model="tied"),
    "Conv1D": Case(
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, model="conv1d"
    ),
    "float16": Case({}, in_dtype(torch.float16)),
    "bfloat16": Case({}, in_dtype(torch.bfloat16)),
    "float64": Case({}, in_dtype(torch.float64)),
    "unsloth": Case(
        {},
        both(
            config(
                auto_mapping={"base_model_class": "Qwen2ForCausalLM", "unsloth_fixed": True},
                unsloth_version="2025.9.1",
                base_model_name_or_path="unsloth/some-model-bnb-4bit",
            ),
            files(README__md="a card", added_tokens__json="{}"),
        ),
    ),
    "axolotl": Case({}, files(config__json="{}", axolotl_config__yml="adapter: qlora")),
    "trl": Case({}, files(training_args__bin="pickled", trainer_state__json="{}")),
    "pickle beside it": Case({}, files(adapter_model__bin="pickled")),
    "compiled": Case({}, renamed(lambda name: name.replace(P, f"{P}_orig_mod."))),
    "compiled, with an alpha pattern": Case(
        {"alpha_pattern": {r"self_attn\.v_proj": 3}},
        renamed(lambda name: name.replace(P, f"{P}_orig_mod.")),
    ),
    "compiled before peft": Case({}, renamed(lambda name: f"_orig_mod.{name}")),
    "each layer compiled": Case(
        {}, renamed(lambda name: name.replace("layers.0.", "layers.0._orig_mod."))
    ),
    "ddp": Case({}, renamed(lambda name: f"module.{name}")),
    "ddp and compiled": Case({}, renamed(lambda name: name.replace(P, f"{P}module._orig_mod."))),
    "fsdp": Case({}, renamed(lambda name: name.replace("mlp.", "mlp._fsdp_wrapped_module."))),
    "without peft's prefix": Case({}, renamed(lambda name: name.removeprefix(P))),
    "text part before 4.52": Case(
        {"modules_to_save": ["lm_head"]},
        text_part("language_model.model.", "language_model.lm_head"),
    ),
    "text part since 4.52": Case(
        {"modules_to_save": ["lm_head"]}, text_part("model.language_model.")
    ),
}

NAN, DAMAGED = float("nan"), "the adapter is damaged"
REJECTED = {
    "NaN": Case({}, set_one("lora_B", lambda t: t * NAN), says="lora_B.weight holds NaN"),
    "infinity": Case({}, set_one("lora_A", lambda t: t / 0), says="lora_A.weight holds NaN or inf"),
    "NaN in a head": Case(
        {"modules_to_save": ["lm_head"]},
        set_one("lm_head", lambda t: t * NAN),
        says="lm_head.weight holds NaN",
    ),
    "empty tensor": Case({}, set_one("lora_B", lambda t: t[:0]), says="is empty"),
    "rank 0 in the file": Case({}, set_one("lora_B", lambda t: t[:, :0]), says="is empty"),
    "rank 0": Case({}, config(r=0), says="`r` in .* is 0, not a whole number above 0"),
    "rank 0 in the pattern": Case({}, config(rank_pattern={"q_proj": 0}), says="`rank_pattern`"),
    "no rank": Case({}, config(r=None), says="`r` in .* is None"),
    "alpha 0": Case({}, config(lora_alpha=0), says="`lora_alpha` in .* is 0, not a number above"),
    "alpha NaN": Case({}, config(lora_alpha=NAN), says="`lora_alpha` in .* is nan"),
    "another rank": Case({}, config(r=8), says="has the shape .* takes .* there"),
    "transposed": Case({}, set_one("lora_A", lambda t: t.T), says="has the shape"),
    "integers": Case({}, set_one("lora_A", lambda t: t.to(torch.int8)), says="stored as int8"),
    "a tensor is missing": Case({}, without("layers.1.mlp.down_proj.lora_B"), says="lacks .*_B"),
    "a layer is missing": Case({}, without("layers.1."), says=r"lacks .*layers\.1\..*6 of 12"),
    "a target is missing": Case({}, without("v_proj"), says=r"lacks .*v_proj.*4 of 12"),
    "no LoRA": Case({}, without("lora_"), says="holds no LoRA matrices"),
    "a foreign tensor": Case(
        {}, tensors(lambda t: t.update({f"{P}x.y": torch.ones(2)})), says="x.y fits no adapter par"
    ),
    "a path": Case(
        {},
        tensors(lambda t: t.update({f"{P}../../x.lora_A.weight": torch.ones(2)})),
        says="fits no adapter parameter",
    ),
    "foreign layers": Case(
        {}, renamed(lambda n: n.replace("layers.1", "layers.9")), says=r"layers\.9\..* fits no"
    ),
    "half under another prefix": Case(
        {}, renamed(lambda n: n.replace("model.layers.0.mlp", "other.layers.0.mlp")), says="fits no"
    ),
    "half in the text part": Case(
        {},
        renamed(lambda n: n.replace(f"{P}model", f"{P}model.language_model") if "mlp" in n else n),
        says="mlp.* fits no",
    ),
    "halves of two transformers": Case(
        {},
        renamed(
            lambda n: n.replace(
                f"{P}model.",
                f"{P}model.language_model." if "mlp" in n else f"{P}language_model.model.",
            )
        ),
        says="fits no",
    ),
    "two names for one layer": Case(
        {},
        tensors(
            lambda t: t.update(
                {n.replace(P, f"{P}module."): v.clone() for n, v in t.items() if "q_proj" in n}
            )
        ),
        says="q_proj.* fits no",
    ),
    "the raw state dict": Case(
        {}, renamed(lambda n: n.replace("lora_A.", "lora_A.default.")), says="default.* fits no"
    ),
    "an adapter over an adapter": Case({}, renamed(lambda n: f"{P}{n}"), says="fits no"),
    "no magnitudes": Case({"use_dora": True}, without("magnitude"), says="lacks .*magnitude"),
    "magnitudes without dora": Case(
        {"use_dora": True}, config(use_dora=False), says="magnitude_vector fits no"
    ),
    "a bias is missing": Case({"bias": "all"}, without("k_proj.bias"), says="lacks .*k_proj.bias"),
    "tokens are missing": Case(
        {"trainable_token_indices": [8, 9]}, without("trainable_tokens"), says="lacks .*token"
    ),
    "other tokens": Case(
        {"trainable_token_indices": [8, 9]},
        config(trainable_token_indices=[8, 9, 10]),
        says="has the shape",
    ),
    "another base's embedding": Case(
        {"target_modules": ["embed_tokens", "q_proj"]},
        set_one("base_layer", lambda t: t + 1),
        says="embed_tokens.base_layer.weight is not equal to model.embed_tokens.weight",
    ),
    "a resized vocabulary": Case(
        {},
        tensors(lambda t: t.update({f"{P}model.embed_tokens.weight": torch.ones(70, 64)})),
        says="embed_tokens.weight is not equal.*resized vocabulary",
    ),
    "a resized saved head": Case(
        {"modules_to_save": ["lm_head"]},
        set_one("lm_head", lambda t: torch.cat([t, t[:3]])),
        says="lm_head.weight has the shape",
    ),
    "targets that the model lacks": Case(
        {}, config(target_modules=["query_key_value"]), says="cannot be put onto .*query_key_value"
    ),
    "a setting of a later PEFT": Case(
        {}, config(use_wora=True), says="`use_wora` in .* does not know"
    ),
    "pissa by random vectors": Case({}, config(init_lora_weights="pissa_niter_4"), says="moves"),
    "an alpha that was another layer's": Case(
        {"alpha_pattern": {"layers.0.mlp.down_proj": 32}},
        renamed(lambda n: n.replace("layers.0.", "layers.0._orig_mod.")),
        says="`alpha_pattern` in .* treats .* otherwise than",
    ),
    "a switch as text": Case(
        {}, config(use_rslora="false"), says="`use_rslora` in .* is 'false', which is neither"
    ),
    "a pattern that is no expression": Case(
        {}, config(alpha_pattern={"(": 4}), says="cannot be put onto .*unterminated"
    ),
    "loftq": Case({}, config(init_lora_weights="loftq"), says="loftq.* Retrain it from a plain"),
    "corda": Case({}, config(init_lora_weights="corda"), says="path_initial_model_for_weight_conv"),
    "lora-ga": Case({}, config(init_lora_weights="lora_ga"), says="moves part of the base"),
    "an unknown start": Case({}, config(init_lora_weights="new"), says="ebbline does not know"),
    "replicated layers": Case({}, config(layer_replication=[[0, 2]]), says="`layer_replication`"),
    "activated lora": Case({}, config(alora_invocation_tokens=[1]), says="`alora_invocation"),
    "another kind": Case({}, config(peft_type="VERA"), says="is an adapter of type VERA"),
    "only pickled": Case({}, only_pickled, says="pickled adapter_model.bin"),
    "shards": Case({}, sharded, says="lacks .*adapter_model.safetensors"),
    "truncated": Case({}, truncated, says="cannot be read as safetensors"),
    "config is not JSON": Case({}, files(adapter_config__json="{"), says="is not JSON"),
    "no config": Case(
        {}, lambda folder: (folder / ADAPTER_CONFIG).unlink(), says="lacks adapter_config.json"
    ),
    "beyond float32": Case(
        {},
        both(in_dtype(torch.float64), set_one("lora_A", lambda t: t * 1e300)),
        says="did not arrive.*beyond the range of float32",
    ),
}


OTHER_KINDS = {
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}
