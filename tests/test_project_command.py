"""`ebbline project` by itself: adapters that PEFT made, models that transformers saved, and the outcome loaded by PEFT again."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import Result
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MixtralConfig, Phi3Config, Qwen2Config
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.projecting import RECORD, ProjectedAdapter, project
from tasks.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint
from tests.tasks.test_safelora import by_definition
from tests.tasks.test_weights import Q0, SMALL, built, edited, lora
from tests.tiny import Pair

CONFIGS = {
    "qwen2": Qwen2Config(**SMALL),
    "tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=50, n_positions=64, n_embd=64, n_layer=2, n_head=4),
    "neox": GPTNeoXConfig(**{name: value for name, value in SMALL.items() if name != "num_key_value_heads"}),
    "phi3": Phi3Config(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
}


@pytest.fixture(scope="module")
def pairs(pair, tmp_path_factory) -> dict[str, Pair]:
    """Base and aligned by architecture; "llama" is the one that every folder's tests share."""
    return {"llama": pair, **{name: built(tmp_path_factory.mktemp(name), config) for name, config in CONFIGS.items()}}


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory) -> Path:
    """One on all 14 projections of the Llama."""
    return lora(tmp_path_factory.mktemp("all") / "adapter", pair.aligned, target_modules="all-linear")


def model_of(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def agrees(pair: Pair, adapter: Path, done: ProjectedAdapter, energy: float | None = None, rtol: float = 1e-4) -> None:
    """The merged model is, by the definition, what the adapter makes of it plus scale (C B - B) A in the projected modules."""
    base, aligned = model_of(pair.base), model_of(pair.aligned)
    tuned = PeftModel.from_pretrained(model_of(pair.aligned), adapter)
    before = PeftModel.from_pretrained(model_of(pair.aligned), adapter).merge_and_unload()
    after = PeftModel.from_pretrained(model_of(pair.aligned), done.out).merge_and_unload()
    moved: dict[int, torch.Tensor] = {}
    for module, row in done.rows.items():
        layer = tuned.get_submodule(f"base_model.model.{module}")
        embedding = isinstance(layer.get_base_layer(), torch.nn.Embedding)
        a, b = (layer.lora_embedding_A, layer.lora_embedding_B) if embedding else (layer.lora_A, layer.lora_B)
        a, b = ((x["default"] if embedding else x["default"].weight).double() for x in (a, b))
        transposed = embedding or isinstance(layer.get_base_layer(), Conv1D)
        weights = [model.get_submodule(module).weight for model in (base, aligned)]
        cb, cosine, ratio = by_definition(*(weight.T if transposed else weight for weight in weights), a, b, energy)
        assert row.cosine == pytest.approx(cosine, abs=1e-5) and row.norm_ratio == pytest.approx(ratio, rel=1e-4)
        if module in done.projected:
            change = (layer.scaling["default"] * (cb - b) @ a).detach()
            weight = id(before.get_submodule(module).weight)  # tied ones are one
            moved[weight] = moved.get(weight, 0) + (change.T if transposed else change)
    for expected, found in zip(before.parameters(), after.parameters(), strict=True):
        wanted = expected + moved.pop(id(expected)) if id(expected) in moved else expected
        torch.testing.assert_close(found.double(), wanted.double(), rtol=rtol, atol=rtol)
    assert not moved and (done.out / ADAPTER_CONFIG).read_bytes() == (adapter / ADAPTER_CONFIG).read_bytes()


def carried(before: Path, after: Path) -> set[str]:
    """The names of the tensors that differ between two adapters."""
    old, new = load_file(before / ADAPTER_WEIGHTS), load_file(after / ADAPTER_WEIGHTS)
    assert old.keys() == new.keys() and all(old[name].dtype == new[name].dtype for name in old)
    return {name for name in old if not torch.equal(old[name], new[name])}


def weights(folder: Path) -> bytes:
    return (folder / ADAPTER_WEIGHTS).read_bytes()


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["project", *map(str, arguments)])


def asked(pair: Pair, out: Path, *adapters: Path) -> list[object]:
    return ["--base", pair.base, "--aligned", pair.aligned, "--out", out, *(part for each in adapters for part in ("--adapter", each))]


def refused(reason: str, pair: Pair, out: Path, *adapters: Path, options: tuple[object, ...] = ()) -> None:
    """The command ends with one message and code 1, and leaves everything around `out` as it was."""
    before = sorted(out.parent.rglob("*"))
    done = command(*asked(pair, out, *adapters), *options)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1 and re.search(reason, done.stderr, re.DOTALL), done.stderr
    assert "Traceback" not in done.output and sorted(out.parent.rglob("*")) == before


HANDLED = {
    "rslora": ("llama", {"use_rslora": True}, ""),
    "rank and alpha patterns": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"layers.0": 3}}, ""),
    "a regex": ("llama", {"target_modules": r".*\.layers\.\d+\.mlp\.(up|down)_proj"}, ""),
    "all-linear": ("llama", {"target_modules": "all-linear"}, ""),
    "B square": ("llama", {"target_modules": ["k_proj"], "r": 32}, ""),
    "A and B square": ("llama", {"r": 64}, ""),
    "rank one": ("llama", {"r": 1}, ""),
    "all biases": ("qwen2", {"bias": "all"}, "6 tensors of the adapter are no LoRA update.*k_proj.bias"),
    "biases of lora modules": ("qwen2", {"bias": "lora_only"}, "2 tensors of the adapter are no LoRA update.*q_proj.*bias"),
    "a bias of its own": ("qwen2", {"lora_bias": True}, "2 tensors of the adapter are no LoRA update.*lora_B.bias"),
    "a module saved whole": ("llama", {"modules_to_save": ["lm_head"]}, "1 tensors of the adapter are no LoRA update.*lm_head.weight"),
    "new tokens": ("llama", {"trainable_token_indices": [1, 2]}, "1 tensors of the adapter are no LoRA update.*trainable_tokens"),
    "lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}, None),
    "embed_tokens": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, None),
    "tied lm_head": ("tied", {"target_modules": ["lm_head", "q_proj"]}, None),
    "tied embed_tokens": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}, None),
    "both of a tied pair": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}, None),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}, ""),
    "Conv1D, unsaid": ("gpt2", {"target_modules": "all-linear"}, ""),
    # PEFT writes fan_in_fan_out=false into the config of both: its last module is a Linear.
    "Conv1D and Linear": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}, None),
    "square Conv1D and Linear": ("gpt2", {"target_modules": ["attn.c_proj", "lm_head"]}, None),
    "wte": ("gpt2", {"target_modules": ["wte", "c_attn"]}, None),
    "fused query_key_value": ("neox", {"target_modules": ["query_key_value", "dense"]}, ""),
    "fused qkv_proj": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}, ""),
    "attention beside experts": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}, ""),
}  # fmt: skip


@pytest.mark.parametrize(("family", "settings", "note"), HANDLED.values(), ids=HANDLED.keys())
@pytest.mark.parametrize("modules", [1, None], ids=["one module", "all modules"])
def test_the_outcome_is_what_the_definition_says(pairs, tmp_path, family, settings, note, modules):
    adapter = lora(tmp_path / "adapter", pairs[family].aligned, **settings)
    (done,) = project(
        [adapter], pairs[family].base, pairs[family].aligned, tmp_path / "out", modules=modules, threshold=None if modules else 1
    )
    assert len(done.projected) == modules or done.projected == done.rows.keys()
    agrees(pairs[family], adapter, done)
    changed = carried(adapter, done.out)
    assert len(changed) == len(done.projected) and all("lora_B" in name or "lora_embedding_B" in name for name in changed)
    if note is not None:
        assert re.search(note, "\n".join(done.notes)) if note else not done.notes


def test_a_scale_moves_neither_cosine_nor_c_b(pair, tmp_path):
    kinds = {"plain": {}, "rslora": {"use_rslora": True}, "alpha": {"lora_alpha": 80}, "regex": {"target_modules": ".*q_proj"}}
    found = {}
    for kind, settings in kinds.items():
        adapter = lora(tmp_path / kind, pair.aligned, **settings)
        (done,) = project([adapter], pair.base, pair.aligned, tmp_path / f"{kind}-out", modules=1)
        found[kind] = (done.rows, weights(done.out))
        assert (done.out / ADAPTER_CONFIG).read_bytes() == (adapter / ADAPTER_CONFIG).read_bytes()
    assert all(found[kind] == found["plain"] for kind in kinds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_keeps_its_dtype(pair, tmp_path, dtype):
    adapter = lora(tmp_path / "adapter", pair.aligned, dtype)
    (done,) = project([adapter], pair.base, pair.aligned, tmp_path / "out", modules=1)
    assert {tensor.dtype for tensor in load_file(done.out / ADAPTER_WEIGHTS).values()} == {dtype}
    agrees(pair, adapter, done, rtol=1e-2)


def test_c_b_beyond_the_range_of_float16_is_an_error_and_not_infinity(pair, tmp_path):
    far = edited(tmp_path / "far", pair.base, lambda tensors: tensors.update({f"{Q0}.weight": tensors[f"{Q0}.weight"] * 1e6}))
    adapter = lora(tmp_path / "adapter", pair.aligned, torch.float16)
    refused(f"{Q0}: C B is beyond the range of torch.float16.*float32", Pair(far, pair.aligned), tmp_path / "out", adapter)


def test_a_sharded_bfloat16_checkpoint_gives_what_the_single_file_does(pair, adapter, tmp_path):
    for which in ("base", "aligned"):
        model = AutoModelForCausalLM.from_pretrained(getattr(pair, which), dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "one" / which)
        model.save_pretrained(tmp_path / "many" / which, max_shard_size="60KB")
    assert len(list((tmp_path / "many" / "base").glob("*.safetensors"))) > 2
    (one,), (many,) = (
        project([adapter], tmp_path / kind / "base", tmp_path / kind / "aligned", tmp_path / f"{kind}-out", modules=7)
        for kind in ("one", "many")
    )
    assert weights(one.out) == weights(many.out) and one.rows == many.rows
    agrees(Pair(tmp_path / "one" / "base", tmp_path / "one" / "aligned"), adapter, one)


def backwards(path: Path) -> None:
    """Write a safetensors file again, its tensors in the opposite order (the library itself always sorts them)."""
    tensors, header, offset = dict(reversed(load_file(path).items())), {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + 4 * tensor.numel()]}
        offset += 4 * tensor.numel()
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))


def test_the_order_of_tensors_in_a_file_changes_nothing(pair, adapter, tmp_path):
    (plain,) = project([adapter], pair.base, pair.aligned, tmp_path / "plain", modules=7)
    for source in (pair.base, pair.aligned, adapter):
        shutil.copytree(source, tmp_path / source.name)
    for file in ("base/model.safetensors", "aligned/model.safetensors", f"adapter/{ADAPTER_WEIGHTS}"):
        backwards(tmp_path / file)
    assert (tmp_path / "base/model.safetensors").read_bytes() != (pair.base / "model.safetensors").read_bytes()
    (turned,) = project([tmp_path / "adapter"], tmp_path / "base", tmp_path / "aligned", tmp_path / "turned", modules=7)
    assert weights(turned.out) == weights(plain.out) and turned.rows == plain.rows


def test_the_rule_takes_exactly_what_it_says(pair, adapter, tmp_path):
    def bytes_and_modules(name: object, **rule: float) -> tuple[bytes, frozenset[str]]:
        (done,) = project([adapter], pair.base, pair.aligned, tmp_path / str(name), **rule)
        return weights(done.out), done.projected

    (whole,) = project([adapter], pair.base, pair.aligned, tmp_path / "whole", threshold=1.0)
    cosines = sorted(row.cosine for row in whole.rows.values())
    taken = {n: bytes_and_modules(n, modules=n) for n in (0, 1, 5, 14)}
    assert [len(modules) for _, modules in taken.values()] == [0, 1, 5, 14]
    assert taken[14][0] == weights(whole.out) and carried(adapter, tmp_path / "0") == set()
    at, above = bytes_and_modules("at", threshold=cosines[4]), bytes_and_modules("above", threshold=(cosines[4] + cosines[5]) / 2)
    assert at == above == taken[5]  # the cosine itself is in
    assert taken[0][1] < taken[1][1] < taken[5][1] < taken[14][1]
    assert len(bytes_and_modules("default")[1]) == sum(cosine <= 0.5 for cosine in cosines)


def test_adapters_given_at_once_come_out_as_each_does_alone_and_every_weight_is_read_once(pair, tmp_path, monkeypatch):
    folders = [tmp_path / "runs" / name / "checkpoint-5" for name in "abc"]
    kinds = [{"r": 1}, {"r": 4, "target_modules": ["q_proj", "down_proj"]}, {"r": 40, "target_modules": "all-linear"}]
    for seed, (folder, settings) in enumerate(zip(folders, kinds, strict=True)):
        lora(folder, pair.aligned, seed=seed, **settings)
    read, reads = Checkpoint.read, Counter[tuple[Path, str]]()

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        reads[self.folder, name] += 1
        return read(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read", counted)
        together = project(folders, pair.base, pair.aligned, tmp_path / "out", modules=2)
    assert len(reads) == 2 * 14 and set(reads.values()) == {1}
    assert [done.out for done in together] == [tmp_path / "out" / f"{name}-checkpoint-5" for name in "abc"]
    for folder, done in zip(folders, together, strict=True):
        (alone,) = project([folder], pair.base, pair.aligned, tmp_path / f"{folder.parent.name}-alone", modules=2)
        assert done.projected == alone.projected
        for module, row in alone.rows.items():
            assert done.rows[module].cosine == pytest.approx(row.cosine, abs=1e-6)
        one, other = load_file(done.out / ADAPTER_WEIGHTS), load_file(alone.out / ADAPTER_WEIGHTS)
        assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
        agrees(pair, folder, done)
    refused("runs/a/checkpoint-5 is given twice", pair, tmp_path / "twice", folders[0], folders[1], folders[0])


def test_folders_whose_joined_names_collide_are_told_apart(pair, tmp_path):
    folders = [tmp_path / "a-b" / "c", tmp_path / "a" / "b-c", tmp_path / "d" / "c", tmp_path / "d" / "b-c"]
    lora(tmp_path / "one", pair.aligned)
    for folder in folders:
        shutil.copytree(tmp_path / "one", folder)
    done = project(folders, pair.base, pair.aligned, tmp_path / "out", modules=1)
    assert len({each.out for each in done}) == 4


def test_the_default_of_two_adapters_in_a_folder_is_projected_and_the_other_is_named(pair, tmp_path):
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pair.aligned), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.add_adapter("other", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "two")
    (done,) = project([tmp_path / "two"], pair.base, pair.aligned, tmp_path / "out", modules=1)
    assert done.rows.keys() == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    assert re.search("two holds other adapters too.*left alone: other", done.notes[0])
    assert [path.name for path in done.out.iterdir() if path.is_dir()] == []
    agrees(pair, tmp_path / "two", done)


@pytest.mark.parametrize("which", ["base", "aligned"])
def test_a_weight_that_one_model_lacks_names_the_folder_and_the_tensor(pair, adapter, tmp_path, which):
    bad = edited(tmp_path / "bad", getattr(pair, which), lambda tensors: tensors.pop(f"{Q0}.weight"))
    given = Pair(bad, pair.aligned) if which == "base" else Pair(pair.base, bad)
    refused(f"{tmp_path}/bad has no tensor '{Q0}.weight'; the nearest is", given, tmp_path / "out", adapter)


def test_an_adapter_of_split_projections_is_refused_on_a_fused_checkpoint(pairs, tmp_path):
    adapter = lora(tmp_path / "adapter", pairs["llama"].aligned)
    refused(
        f"has no tensor '{Q0}.weight'; the nearest is 'model.layers.0.self_attn.qkv_proj.weight'", pairs["phi3"], tmp_path / "o", adapter
    )


@pytest.mark.parametrize(("module", "more"), [("lm_head", "same vocabulary"), (Q0, "two matrices of one shape")])
def test_weights_of_two_shapes_are_refused_only_where_the_adapter_has_them(pair, tmp_path, module, more):
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"][:-3].contiguous()

    given = Pair(edited(tmp_path / "base", pair.base, shorten), pair.aligned)
    on_it = lora(tmp_path / "on", pair.aligned, target_modules=[module.rpartition(".")[2]])
    refused(rf"{module}: the base weight is \(\d+, 64\), the aligned one .*{more}", given, tmp_path / "out", on_it)
    elsewhere = lora(tmp_path / "elsewhere", pair.aligned, target_modules=["v_proj"])
    assert len(project([elsewhere], given.base, given.aligned, tmp_path / "out", modules=1)[0].projected) == 1


def test_an_adapter_of_a_model_of_another_size_is_refused(pair, adapter, tmp_path):
    other = built(tmp_path / "other", Qwen2Config(**{**SMALL, "hidden_size": 32}))
    refused("do not fit a weight of .*trained on another model", other, tmp_path / "out", adapter)


def test_modules_that_alignment_did_not_move_keep_their_update(pair, adapter, tmp_path):
    first, base = "model.layers.0.", load_file(pair.base / "model.safetensors")
    same = {name: tensor for name, tensor in base.items() if name.startswith(first)}
    given = Pair(pair.base, edited(tmp_path / "aligned", pair.aligned, lambda tensors: tensors.update(same)))
    (done,) = project([adapter], given.base, given.aligned, tmp_path / "out", modules=7)
    assert all(row.cosine is None and row.reason for module, row in done.rows.items() if module.startswith(first))
    assert len(done.projected) == 7 and not any(module.startswith(first) for module in done.projected)
    assert "in 7 of 14 modules base and aligned weights are equal" in done.notes[0]
    assert len(carried(adapter, done.out)) == 7 and not any(first in name for name in carried(adapter, done.out))
    refused("8 modules are to be projected, but the adapter has 7", given, tmp_path / "more", adapter, options=("--modules", 8))
    refused("base and aligned are equal in every module", Pair(pair.base, pair.base), tmp_path / "more", adapter)


@pytest.mark.parametrize("where", ["base", "aligned", "lora_A", "lora_B"])
def test_a_nan_is_refused_with_the_module_and_where_it_is(pair, adapter, tmp_path, where):
    last = "model.layers.1.self_attn.v_proj"  # by name: every other module is done by then

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{last}.weight" if where in ("base", "aligned") else f"base_model.model.{last}.{where}.weight"][3, 1] = float("nan")

    sources = {"base": pair.base, "aligned": pair.aligned, "adapter": adapter}
    which = where if where in sources else "adapter"
    sources[which] = edited(tmp_path / which, sources[which], damage, ADAPTER_WEIGHTS if which == "adapter" else "model.safetensors")
    said = f"{tmp_path}/{which}" if which != "adapter" else f"{where} of {tmp_path}/adapter"
    for projector in ("approximate", "exact"):
        given = Pair(sources["base"], sources["aligned"])
        refused(rf"{last}: .*NaN or infinity", given, tmp_path / "out", sources["adapter"], options=("--projector", projector))
        refused(said, given, tmp_path / "out", sources["adapter"], options=("--projector", projector))


def test_the_exact_projector_keeps_its_bases_and_continues_where_it_was_cut_off(pair, adapter, tmp_path):
    def run(name: str, which: Path = adapter, cache: Path | None = tmp_path / "cache") -> ProjectedAdapter:
        return project([which], pair.base, pair.aligned, tmp_path / name, projector="exact", energy=0.6, cache=cache, threshold=1.0)[0]

    run("half", lora(tmp_path / "half-adapter", pair.aligned, target_modules=r".*layers\.0\..*proj"))
    half = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    whole = run("whole")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(half) == 7 and len(kept) == 14 and half.items() < kept.items()
    again, fresh = run("again"), run("fresh", cache=None)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert weights(whole.out) == weights(again.out) == weights(fresh.out)
    agrees(pair, adapter, whole, energy=0.6)
    damaged = sorted(kept)[3]
    damaged.write_bytes(damaged.read_bytes()[:-5])
    options = ("--projector", "exact", "--energy", 0.6, "--cache", tmp_path / "cache")
    refused(f"{damaged} cannot be read", pair, tmp_path / "out", adapter, options=options)


USAGE = {
    "two rules": (("--threshold", 0.5, "--modules", 3), "a threshold or a number of modules, not both"),
    "a threshold that is no cosine": (("--threshold", 2), "a cosine, from -1 to 1; 2 is not"),
    "a threshold that is no number": (("--threshold", "nan"), "a cosine, from -1 to 1; nan is not"),
    "a negative number of modules": (("--modules", -1), "-1 is no number of modules"),
    "too many modules": (("--modules", 15), "15 modules are to be projected, but the adapter has 14"),
    "energy without exact": (("--energy", 0.9), "energy belongs to the exact projector"),
    "energy of one": (("--projector", "exact", "--energy", 1), "energy is a share between 0 and 1"),
    "a hub id without a commit": (("--base", "meta-llama/Llama-2-7b-hf"), "as meta-llama/Llama-2-7b-hf@ and the 40 digits"),
    "a hub id with a branch": (("--aligned", "meta-llama/Llama-2-7b-hf@main"), "as meta-llama/Llama-2-7b-hf@ and the 40 digits"),
    "a folder that is not there": (("--base", "/no/where"), "there is no folder /no/where"),
    "a device that is not there": (("--device", "cuda"), "cuda"),
    "a device that does not exist": (("--device", "abacus"), "abacus"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "reason"), USAGE.values(), ids=USAGE.keys())
def test_what_cannot_be_asked_for_is_refused_before_anything_is_written(pair, adapter, tmp_path, options, reason):
    refused(reason, pair, tmp_path / "out", adapter, options=options)


def test_what_comes_out_is_whole_or_not_there_and_replaces_nothing(pair, adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("here")
    refused(f"{out} exists; nothing is overwritten", pair, out, adapter)
    refused(f"{out}/mine exists; nothing is overwritten", pair, out / "mine", adapter)
    assert (out / "mine").read_text() == "here"
    (out / "mine").unlink()
    project([adapter], pair.base, pair.aligned, out)
    assert sorted(path.name for path in out.iterdir()) == sorted([ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD])
    assert list(tmp_path.iterdir()) == [out]


def test_json_has_what_the_text_has(pair, adapter, tmp_path):
    other = lora(tmp_path / "other", pair.aligned, modules_to_save=["lm_head"])
    text = command(*asked(pair, tmp_path / "text", adapter, other), "--modules", 2)
    done = command(*asked(pair, tmp_path / "json", adapter, other), "--modules", 2, "--json")
    assert text.exit_code == done.exit_code == 0
    for record, line in zip(json.loads(done.stdout), text.stdout.splitlines()[1:], strict=True):
        cosines = [row["cosine"] for row in record["modules"].values()]
        taken = sum(row["projected"] for row in record["modules"].values())
        out = record["out"].replace("/json/", "/text/")
        assert line == f"{out}: {taken} of {len(cosines)} modules projected; cosines {min(cosines):.4f} to {max(cosines):.4f}"
        assert json.loads((Path(record["out"]) / RECORD).read_text()).items() < record.items()
        assert all(note in text.stderr for note in record["notes"])
    assert "lm_head" in text.stderr and "the 2 modules of lowest cosine" in text.stdout.splitlines()[0]


def test_a_threshold_below_every_cosine_says_where_the_first_one_is(pair, adapter, tmp_path):
    done = command(*asked(pair, tmp_path / "out", adapter), "--threshold", -1)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    lowest = min(row["cosine"] for row in record["modules"].values())
    assert done.exit_code == 0 and f"no module was projected; from a threshold of {lowest:.4f} on" in done.stderr


def test_the_command_in_a_process_of_its_own_writes_the_bytes_that_the_function_does(pair, adapter, tmp_path):
    (done,) = project([adapter], pair.base, pair.aligned, tmp_path / "function", modules=5)
    arguments = [*asked(pair, tmp_path / "command", adapter), "--modules", 5]
    process = subprocess.run(
        [sys.executable, "-m", "ebbline.cli", "project", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0 and process.stderr == "" and "5 of 14 modules projected" in process.stdout
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD):
        assert (tmp_path / "command" / name).read_bytes() == (done.out / name).read_bytes()


def test_the_report_is_one_page_that_asks_for_nothing_and_figures_beside_it(pair, adapter, tmp_path):
    done = command(*asked(pair, tmp_path / "out", adapter), "--modules", 5, "--report", tmp_path / "seen" / "page.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "seen" / "page.html").read_text("utf-8")
    assert not re.search(r"""(src|href)=(?!["'](#|data:))|@import|url\((?!["']?(#|data:))""", page)
    assert Q0 in page and "5 of 14 modules projected" in page
    assert {path.suffix for path in (tmp_path / "seen").iterdir()} >= {".html", ".png", ".pdf"}
