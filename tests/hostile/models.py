"""Adapters and models whose files are broken or hostile."""

import json
import struct
from collections.abc import Mapping

from tests.hostile.cases import Case, Content, jsonl, written

DEEP = "[" * 100_000
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
PROMPTS = {"p.jsonl": jsonl({"id": "a", "prompt": "What is a zorp?"})}
LLAMA = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9}


def tensors(**shapes: tuple[int, ...]) -> bytes:
    """A safetensors file of float32 zeros; A and B stand for an adapter's tensors."""
    header, place, data = {}, 0, b""
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        full = NAME.format(name) if name in ("A", "B") else name
        header[full] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, place + size]}
        place, data = place + size, data + bytes(size)
    return whole(header, data)


def whole(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


WEIGHTS = tensors(A=(2, 4), B=(4, 2))


def renamed(name: str) -> bytes:
    sides = {"A": [2, 4], "B": [4, 2]}
    header, place = {}, 0
    for part, shape in sides.items():
        header[name.format(part)] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [place, place + 32],
        }
        place += 32
    return whole(header, bytes(64))


def adapter(config: Content | None = None, weights: Content | None = WEIGHTS) -> dict[str, Content]:
    files: dict[str, Content] = {"bad/adapter_config.json": json.dumps(CONFIG)}
    if config is not None:
        files["bad/adapter_config.json"] = config
    if weights is not None:
        files["bad/adapter_model.safetensors"] = weights
    return files


def changed(**fields: object) -> str:
    return json.dumps({**CONFIG, **fields})


# name -> (files, phrase)
ADAPTERS: dict[str, tuple[Mapping[str, Content], str]] = {
    "empty_folder": ({"bad/readme.txt": "a"}, "bad"),
    "no_weights": (adapter(weights=None), "bad"),
    "no_config": ({"bad/adapter_model.safetensors": WEIGHTS}, "bad"),
    "a_file": ({"bad": "a"}, "bad"),
    "config_empty": (adapter(""), "adapter_config.json"),
    "config_text": (adapter("hello"), "adapter_config.json"),
    "config_list": (adapter("[]"), "adapter_config.json"),
    "config_utf16": (adapter("{}".encode("utf-16")), "adapter_config.json"),
    "config_deep": (adapter(DEEP), "adapter_config.json"),
    "config_digits": (adapter('{"r": ' + "9" * 5000 + "}"), "adapter_config.json"),
    "config_cut": (adapter(changed()[:30]), "adapter_config.json"),
    "config_of_another_kind": (adapter(changed(peft_type="IA3")), "bad"),
    "config_code": (adapter(changed(auto_mapping={"base_model_class": "os.system"})), "bad"),
    "rank_zero": (adapter(changed(r=0)), "bad"),
    "rank_negative": (adapter(changed(r=-2)), "bad"),
    "rank_text": (adapter(changed(r="two")), "bad"),
    "rank_other": (adapter(changed(r=3)), "bad"),
    "alpha_text": (adapter(changed(lora_alpha="four")), "bad"),
    "alpha_nan": (adapter(changed().replace("4", "NaN")), "bad"),
    "targets_number": (adapter(changed(target_modules=7)), "bad"),
    "targets_pattern": (adapter(changed(target_modules="(")), "bad"),
    "weights_empty": (adapter(weights=b""), "adapter_model.safetensors"),
    "weights_text": (adapter(weights="hello"), "adapter_model.safetensors"),
    "weights_cut": (adapter(weights=WEIGHTS[:-7]), "adapter_model.safetensors"),
    "weights_longer": (adapter(weights=WEIGHTS + b"abc"), "adapter_model.safetensors"),
    "weights_header_huge": (
        adapter(weights=struct.pack("<Q", 2**62) + b"{}"),
        "adapter_model.safetensors",
    ),
    "weights_header_text": (adapter(weights=whole(b"hello", b"")), "adapter_model.safetensors"),
    "weights_header_list": (adapter(weights=whole([], b"")), "adapter_model.safetensors"),
    "weights_overlap": (
        adapter(
            weights=whole(
                {
                    NAME.format(part): {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
                    for part in "AB"
                },
                bytes(32),
            )
        ),
        "adapter_model.safetensors",
    ),
    "weights_huge_shape": (
        adapter(
            weights=whole(
                {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, bytes(4)
            )
        ),
        "adapter_model.safetensors",
    ),
    "weights_none": (adapter(weights=tensors()), "bad"),
    "weights_of_other_names": (adapter(weights=tensors(a=(2, 2))), "bad"),
    "weights_pickle": (
        {"bad/adapter_config.json": changed(), "bad/adapter_model.bin": b"\x80\x04cos\nsystem\n"},
        "bad",
    ),
    "name_outside": (adapter(weights=renamed("base_model.model.../../x.lora_{}.weight")), "bad"),
    "name_absolute": (adapter(weights=renamed("base_model.model./etc/x.lora_{}.weight")), "bad"),
    "name_newline": (adapter(weights=renamed("base_model.model.a\nb.lora_{}.weight")), "bad"),
    "name_escape": (adapter(weights=renamed("base_model.model.a\x1b[2J.lora_{}.weight")), "bad"),
    "name_empty": (adapter(weights=renamed("base_model.model..lora_{}.weight")), "bad"),
    "only_a": (adapter(weights=tensors(A=(2, 4))), "bad"),
}
MODELS: dict[str, tuple[Mapping[str, Content], str]] = {
    "empty_folder": ({"bad/readme.txt": "a"}, "bad"),
    "a_file": ({"bad": "a"}, "bad"),
    "config_text": ({"bad/config.json": "hello"}, "config.json"),
    "config_list": ({"bad/config.json": "[]"}, "config.json"),
    "config_deep": ({"bad/config.json": DEEP}, "config.json"),
    "config_utf16": ({"bad/config.json": "{}".encode("utf-16")}, "config.json"),
    "config_code": (
        {
            "bad/config.json": json.dumps({**LLAMA, "auto_map": {"AutoConfig": "evil.Evil"}}),
            "bad/evil.py": "open('marker', 'w')",
        },
        "bad",
    ),
    "index_outside": (
        {
            "bad/config.json": json.dumps(LLAMA),
            "bad/model.safetensors.index.json": json.dumps(
                {"weight_map": {"a": "../../secret.safetensors"}}
            ),
        },
        "plain name inside its folder",
    ),
    "index_absolute": (
        {
            "bad/config.json": json.dumps(LLAMA),
            "bad/model.safetensors.index.json": json.dumps({"weight_map": {"a": "/etc/passwd"}}),
        },
        "plain name inside its folder",
    ),
    "index_text": (
        {"bad/config.json": json.dumps(LLAMA), "bad/model.safetensors.index.json": "hello"},
        "index.json",
    ),
    "weights_text": (
        {"bad/config.json": json.dumps(LLAMA), "bad/model.safetensors": "hello"},
        "model.safetensors",
    ),
    "gguf_text": ({"bad.gguf": "hello"}, "bad.gguf"),
    "gguf_header": ({"bad.gguf": b"GGUF" + bytes(8)}, "bad.gguf"),
    "gguf_counts": ({"bad.gguf": b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62)}, "bad.gguf"),
}
# What shows only when PEFT loads the adapter onto its model (tests/tasks/test_adapters.py)
UNUSED = {
    *("config_code", "targets_number", "targets_pattern", "rank_other"),
    *(name for name in ADAPTERS if name.startswith("name_")),
}
PROJECT = "project --base none --aligned none --out out --adapter bad"
DEFEND = "defend --method scale --knob factor=0.5 --out out --adapter bad"
EVALUATE = "evaluate --model none --suite refusal --prompts p.jsonl --adapter bad"
CASES = [
    Case(
        "defend_adapter_shapes_differ",
        DEFEND,
        "have different ranks",
        written(adapter(weights=tensors(A=(2, 4), B=(4, 3)))),
    ),
    *(
        Case(f"{command}_adapter_{name}", words, phrase, written({**PROMPTS, **files}))
        for command, words in (("project", PROJECT), ("defend", DEFEND))
        for name, (files, phrase) in ADAPTERS.items()
        if name not in UNUSED
    ),
    *(
        Case(
            f"new_model_{name}",
            f"new --model {'bad.gguf' if name.startswith('gguf') else 'bad'} --data p.jsonl "
            "--prompts p.jsonl --task p.jsonl --to out.yaml",
            phrase,
            written({**PROMPTS, **files}),
        )
        for name, (files, phrase) in MODELS.items()
    ),
    *(
        Case(
            f"evaluate_model_{name}",
            "evaluate --model bad --suite refusal --prompts p.jsonl --out out",
            "bad",
            written({**PROMPTS, **files}),
        )
        for name, (files, _) in MODELS.items()
        if not name.startswith("gguf")
    ),
]
