"""`ebbline project` by itself: adapters that PEFT made, models that transformers saved, and the
outcome loaded by PEFT again.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.commands.project import RECORD, ProjectedAdapter, project
from ebbline.tasks.errors import ModelError, ProjectionError
from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ebbline.tasks.models.adapter_file import read_adapter
from ebbline.tasks.models.loading import load_model
from ebbline.tasks.models.weights import Checkpoint
from tests.tasks.test_safelora import GRAM, by_definition, measured, slack
from tests.tasks.test_weights import Q0, SMALL, Tensors, built, edited, lora
from tests.tiny import Pair
from tests.tolerance import merged, rounding, within

AS_A_COMMAND = """
import sys
from pathlib import Path
from ebbline.cli import main
try:
    main()
finally:
    Path("imported.txt").write_text(" ".join(sys.modules))
"""
LAST = "model.layers.1.self_attn.v_proj"  # by name: every other module is done by then


@pytest.fixture(scope="module")
def pairs(pair, tmp_path_factory) -> dict[str, Pair]:
    """Base and aligned by architecture; "llama" is the one that every folder's tests share."""
    configs = {
        "qwen2": Qwen2Config(**SMALL),
        "tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
        "phi3": Phi3Config(**SMALL),
        "gpt2": GPT2Config(vocab_size=50, n_positions=64, n_embd=64, n_layer=2, n_head=4),
        "neox": GPTNeoXConfig(**SMALL),
        "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
        "narrow": Qwen2Config(**{**SMALL, "hidden_size": 32}),
    }
    return {
        "llama": pair,
        **{name: built(tmp_path_factory.mktemp(name), config) for name, config in configs.items()},
    }


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory) -> Path:
    """One on all 14 projections of the Llama."""
    return lora(
        tmp_path_factory.mktemp("all") / "adapter", pair.aligned, target_modules="all-linear"
    )


def agrees(pair: Pair, adapter: Path, done: ProjectedAdapter, energy: float | None = None) -> None:
    """The merged model is, by the definition, what the adapter makes of it, plus scale (C B - B) A
    in the projected modules.

    Three things are rounded, and each has its bound: C B as it is computed (`slack`), C B as it is
    saved in the adapter's dtype (`rounding`), and W + scale B A of the model that is found and of
    the one that is expected, as PEFT merges them in float32 (`merged`). All else is equal.
    """
    names, tensors = read_adapter(adapter).modules, load_file(done.out / ADAPTER_WEIGHTS)
    folders = (pair.base, *(pair.aligned for _ in range(4)))
    base, aligned, *three = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders
    )
    tuned, before, after = map(PeftModel.from_pretrained, three, (adapter, adapter, done.out))
    before, after = before.merge_and_unload(), after.merge_and_unload()
    moved, bounds = dict[int, torch.Tensor](), dict[int, torch.Tensor]()
    for module, row in done.rows.items():
        layer = tuned.get_submodule(f"base_model.model.{module}")
        embedding = isinstance(layer.get_base_layer(), torch.nn.Embedding)
        a, b = (
            (layer.lora_embedding_A, layer.lora_embedding_B)
            if embedding
            else (layer.lora_A, layer.lora_B)
        )
        a, b = ((x["default"] if embedding else x["default"].weight).double() for x in (a, b))
        transposed = embedding or isinstance(layer.get_base_layer(), Conv1D)
        weights = [model.get_submodule(module).weight.detach() for model in (base, aligned)]
        weights = [weight.T if transposed else weight for weight in weights]
        cb, cosine, ratio = by_definition(*weights, a, b, energy)
        allowed = slack(*weights, a, b, energy)
        within(row.cosine, cosine, allowed.cosine)
        within(row.norm_ratio, ratio, allowed.norm_ratio)
        kept, scale = tensors[names[module].lora_B], layer.scaling["default"]
        if module not in done.projected:
            assert torch.equal(kept.double(), b)
        elif kept.dtype == torch.float32:  # in which it is computed
            within(kept, cb, allowed.projected_OR)
            within((row.cosine, row.norm_ratio), measured(kept, a, b), GRAM)
        else:
            most = cb.abs() + allowed.projected_OR
            within(kept, cb, allowed.projected_OR + rounding(most, kept.dtype))
        change = scale * (kept.double() - b) @ a
        bound = sum(merged(weights[1], a, each, scale) for each in (b, kept))
        weight = id(before.get_submodule(module).weight)  # tied ones are one
        for found, each in ((moved, change), (bounds, bound)):
            found[weight] = found.get(weight, 0) + (each.T if transposed else each)
    for expected, found in zip(before.parameters(), after.parameters(), strict=True):
        if id(expected) in moved:
            within(found, expected.double() + moved.pop(id(expected)), bounds[id(expected)])
        else:
            assert torch.equal(found, expected)
    assert (
        not moved
        and (done.out / ADAPTER_CONFIG).read_bytes() == (adapter / ADAPTER_CONFIG).read_bytes()
    )


def changed(before: Path, after: Path) -> set[str]:
    """The names of the tensors that differ between two adapters."""
    old, new = load_file(before / ADAPTER_WEIGHTS), load_file(after / ADAPTER_WEIGHTS)
    assert old.keys() == new.keys() and all(old[name].dtype == new[name].dtype for name in old)
    return {name for name in old if not torch.equal(old[name], new[name])}


def saved(done: ProjectedAdapter) -> bytes:
    return (done.out / ADAPTER_WEIGHTS).read_bytes()


def asked(pair: Pair, out: Path, *adapters: Path) -> list[str]:
    given = ["--base", pair.base, "--aligned", pair.aligned, "--out", out]
    return [
        "project",
        *map(str, given),
        *(part for each in adapters for part in ("--adapter", str(each))),
    ]


def refused(
    reason: str, pair: Pair, out: Path, *adapters: Path, options: Sequence[object] = ()
) -> None:
    """The command ends with one message and code 1, and leaves everything around `out` as it
    was.
    """
    before = sorted(out.parent.rglob("*"))
    done = CliRunner().invoke(app, [*asked(pair, out, *adapters), *map(str, options)])
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert (
        done.exit_code == 1 and re.search(reason, done.stderr) and "Traceback" not in done.output
    ), done.stderr
    assert sorted(out.parent.rglob("*")) == before


# With a note, without one (""), or either (None: PEFT saves an embedding's own weights beside its
# update)
HANDLED = {
    "rslora": ("llama", {"use_rslora": True}, ""),
    "rank and alpha patterns": (
        "llama",
        {"rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"layers.0": 3}},
        "",
    ),
    "a regex": ("llama", {"target_modules": r".*\.layers\.\d+\.mlp\.(up|down)_proj"}, ""),
    "all-linear": ("llama", {"target_modules": "all-linear"}, ""),
    "B square": ("llama", {"target_modules": ["k_proj"], "r": 32}, ""),
    "bfloat16": ("llama", {"dtype": torch.bfloat16}, ""),
    "float16": ("llama", {"dtype": torch.float16}, ""),
    "tied lm_head": ("tied", {"target_modules": ["lm_head", "q_proj"]}, None),
    "tied embed_tokens": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}, None),
    "both of a tied pair": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}, None),
    "Conv1D": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
        "",
    ),
    # PEFT writes fan_in_fan_out=false into the config of the next two: the last module that it
    # wraps is a Linear.
    "Conv1D and Linear": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}, None),
    "square Conv1D and Linear": ("gpt2", {"target_modules": ["attn.c_proj", "lm_head"]}, None),
    "wte": ("gpt2", {"target_modules": ["wte", "c_attn"]}, None),
    "fused query_key_value": ("neox", {"target_modules": ["query_key_value", "dense"]}, ""),
    "attention beside experts": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}, ""),
}


@pytest.mark.parametrize(("family", "settings", "note"), HANDLED.values(), ids=HANDLED.keys())
def test_the_outcome_is_what_the_definition_says(pairs, tmp_path, family, settings, note):
    given, adapter = pairs[family], lora(tmp_path / "adapter", pairs[family].aligned, **settings)
    for out, rule in {"one": {"modules": 1}, "all": {"threshold": 1.0}}.items():
        (done,) = project([adapter], given.base, given.aligned, tmp_path / out, **rule)
        assert len(done.projected) == (1 if out == "one" else len(done.rows))
        agrees(given, adapter, done)
        names = changed(adapter, done.out)
        assert len(names) == len(done.projected) and all(
            re.search(r"lora_(embedding_)?B", name) for name in names
        )
        assert note is None or (re.search(note, done.notes[0]) if note else not done.notes)


@pytest.mark.parametrize(
    ("family", "settings", "tensor"),
    [
        ("qwen2", {"bias": "all"}, "k_proj.bias"),
        ("qwen2", {"bias": "lora_only"}, "q_proj.base_layer.bias"),
        ("qwen2", {"lora_bias": True}, "q_proj.lora_B.bias"),
        ("llama", {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ("llama", {"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight"),
        ("llama", {"trainable_token_indices": [1, 2]}, "trainable_tokens_delta"),
    ],
)
def test_what_was_trained_beside_b_a_is_an_error_that_names_the_tensor(
    pairs, tmp_path, family, settings, tensor
):
    adapter = lora(tmp_path / "adapter", pairs[family].aligned, **settings)
    reason = f"{adapter / ADAPTER_WEIGHTS}: .*{tensor} was trained beside the LoRA matrices"
    refused(reason, pairs[family], tmp_path / "out", adapter)


def backwards(path: Path) -> None:
    """Write a safetensors file again, its tensors in the opposite order (the library itself
    always sorts them).
    """
    tensors, header, offset = dict(reversed(load_file(path).items())), {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header).encode().ljust(8000)
    path.write_bytes(
        len(raw).to_bytes(8, "little")
        + raw
        + b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    )


def test_neither_shards_nor_the_order_of_tensors_change_anything(pair, adapter, tmp_path):
    for which in ("base", "aligned"):
        model = AutoModelForCausalLM.from_pretrained(getattr(pair, which), dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "whole" / which)
        model.save_pretrained(tmp_path / "parts" / which, max_shard_size="60KB")
        model.float().save_pretrained(tmp_path / "turned" / which)
        backwards(tmp_path / "turned" / which / "model.safetensors")
    backwards(edited(tmp_path / "adapter", adapter) / ADAPTER_WEIGHTS)
    assert len(list((tmp_path / "parts" / "base").glob("*.safetensors"))) > 2
    whole, parts, turned = (
        project(
            [which],
            tmp_path / kind / "base",
            tmp_path / kind / "aligned",
            tmp_path / "out" / kind,
            modules=7,
        )[0]
        for kind, which in (
            ("whole", adapter),
            ("parts", adapter),
            ("turned", tmp_path / "adapter"),
        )
    )
    assert saved(whole) == saved(parts) == saved(turned) and whole.rows == parts.rows == turned.rows
    agrees(Pair(tmp_path / "whole" / "base", tmp_path / "whole" / "aligned"), adapter, whole)


def test_the_rule_takes_exactly_what_it_says(pair, adapter, tmp_path):
    def taken(name: object, **rule: float) -> tuple[bytes, frozenset[str]]:
        (done,) = project([adapter], pair.base, pair.aligned, tmp_path / str(name), **rule)
        return saved(done), done.projected

    (whole,) = project([adapter], pair.base, pair.aligned, tmp_path / "whole", threshold=1.0)
    cosines = sorted(row.cosine for row in whole.rows.values())
    none, one, five, every = (taken(n, modules=n) for n in (0, 1, 5, 14))
    assert [len(modules) for _, modules in (none, one, five, every)] == [0, 1, 5, 14]
    assert every[0] == saved(whole) and changed(adapter, tmp_path / "0") == set()
    at, above = (
        taken("at", threshold=cosines[4]),
        taken("above", threshold=(cosines[4] + cosines[5]) / 2),
    )
    assert at == above == five  # the cosine itself is in
    other = edited(tmp_path / "a", adapter, lora_alpha=80, use_rslora=True)
    (scaled,) = project([other], pair.base, pair.aligned, tmp_path / "scaled", modules=5)
    assert (saved(scaled), scaled.rows) == (five[0], whole.rows)
    assert none[1] < one[1] < five[1] < taken("next", threshold=cosines[5])[1] < every[1]
    assert len(taken("default")[1]) == sum(cosine <= 0.5 for cosine in cosines)


def test_adapters_given_at_once_come_out_as_each_does_alone_and_every_weight_is_read_once(
    pair, tmp_path, monkeypatch
):
    folders = [tmp_path / "runs" / name / "checkpoint-5" for name in "abc"]
    models = pair.base, pair.aligned
    kinds = [
        {"r": 1},
        {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        {"r": 40, "target_modules": "all-linear"},
    ]
    for seed, (folder, settings) in enumerate(zip(folders, kinds, strict=True)):
        lora(folder, pair.aligned, seed=seed, **settings)
    read, reads = Checkpoint.read, Counter[tuple[Path, str]]()
    with monkeypatch.context() as patched:
        patched.setattr(
            Checkpoint,
            "read",
            lambda self, name: (reads.update([(self.folder, name)]), read(self, name))[1],
        )
        together = project(folders, pair.base, pair.aligned, tmp_path / "out", modules=2)
    assert len(reads) == 2 * 14 and set(reads.values()) == {1}
    assert [done.out for done in together] == [
        tmp_path / "out" / f"{name}-checkpoint-5" for name in "abc"
    ]
    for folder, done in zip(folders, together, strict=True):
        (alone,) = project(
            [folder], pair.base, pair.aligned, tmp_path / f"{folder.parent.name}-alone", modules=2
        )
        assert done.projected == alone.projected
        one, other = (load_file(each.out / ADAPTER_WEIGHTS) for each in (done, alone))
        names = changed(folder, done.out)
        assert names == changed(folder, alone.out) and changed(done.out, alone.out) <= names
        for module, lora_of in (given := read_adapter(folder)).modules.items():
            a, b = (given.tensors[name] for name in (lora_of.lora_A, lora_of.lora_B))
            allowed = slack(*(Checkpoint(model).weight(module) for model in models), a, b)
            # Each of the two may be off by that.
            within(done.rows[module].cosine, alone.rows[module].cosine, 2 * allowed.cosine)
            within(one[lora_of.lora_B], other[lora_of.lora_B], 2 * allowed.projected_OR)
        agrees(pair, folder, done)
    refused(
        "checkpoint-5 is given twice",
        pair,
        tmp_path / "twice",
        *folders,
        folders[0] / ".." / "checkpoint-5",
    )


def test_adapters_whose_joined_names_are_alike_stay_distinct(pair, tmp_path):
    folders = [lora(tmp_path / name, pair.aligned) for name in ("a-b/c", "a/b-c", "d/c", "d/b-c")]
    assert (
        len({done.out for done in project(folders, pair.base, pair.aligned, tmp_path / "out")}) == 4
    )


def test_the_default_of_two_adapters_in_a_folder_is_projected_and_the_other_is_named(
    pair, tmp_path
):
    folder = lora(tmp_path / "two", pair.aligned)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair.aligned), folder)
    tuned.add_adapter("other", LoraConfig(target_modules=["v_proj"]))
    tuned.save_pretrained(folder)
    (done,) = project([folder], pair.base, pair.aligned, tmp_path / "out", modules=1)
    assert (
        re.search("two has other adapters in subfolders.*not projected: other", done.notes[0])
        and not (done.out / "other").exists()
    )
    agrees(pair, folder, done)


def test_an_adapter_that_does_not_fit_the_models_says_what_does_not(pairs, adapter, tmp_path):
    pair, moe, out = pairs["llama"], pairs["mixtral"], tmp_path / "out"
    plain = lora(tmp_path / "q", pair.aligned)
    refused(
        f"q cannot be put onto {pairs['phi3'].aligned}: .*q_proj.* not found",
        pairs["phi3"],
        out,
        plain,
    )
    refused(
        "has the shape .* takes .* there. Was the adapter trained on another model",
        pairs["narrow"],
        out,
        adapter,
    )
    experts = lora(
        tmp_path / "experts", moe.aligned, target_parameters=["mlp.experts.gate_up_proj"]
    )
    refused("fused experts.*no single weight matrix.*`target_parameters`", moe, out, experts)
    less = [
        edited(tmp_path / name, getattr(pair, name), lambda tensors: tensors.pop(f"{LAST}.weight"))
        for name in ("base", "aligned")
    ]
    refused(
        f"{tmp_path}/base has no tensor '{LAST}.weight'; the nearest is",
        Pair(less[0], pair.aligned),
        out,
        adapter,
    )
    refused(
        f"{tmp_path}/aligned has no tensor '{LAST}.weight'; the nearest is",
        Pair(pair.base, less[1]),
        out,
        adapter,
    )
    far = Pair(
        edited(tmp_path / "far", pair.base, lambda tensors: tensors[f"{Q0}.weight"].mul_(1e6)),
        pair.aligned,
    )
    refused(
        f"{Q0}: C B is beyond the range of torch.float16.*float32",
        far,
        out,
        lora(tmp_path / "half", pair.aligned, torch.float16),
    )
    words = edited(
        tmp_path / "words",
        pair.base,
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][3:]}),
    )
    head = lora(tmp_path / "head", pair.aligned, target_modules=["lm_head", "q_proj"])
    refused(
        r"lm_head: the base weight is \(\d+, 64\), the aligned one .*same vocabulary",
        Pair(words, pair.aligned),
        out,
        head,
    )
    assert project([plain], words, pair.aligned, out, modules=1)[
        0
    ].projected  # which has nothing on the words


def test_modules_that_alignment_did_not_move_keep_their_update(pair, adapter, tmp_path):
    first = {
        name: tensor
        for name, tensor in load_file(pair.base / "model.safetensors").items()
        if "layers.0." in name
    }
    given = Pair(
        pair.base, edited(tmp_path / "aligned", pair.aligned, lambda tensors: tensors.update(first))
    )
    (done,) = project([adapter], given.base, given.aligned, tmp_path / "out", modules=7)
    assert {
        module for module, row in done.rows.items() if row.cosine is None
    } == done.rows.keys() - done.projected
    assert len(changed(adapter, done.out)) == 7 and not any(
        "layers.0." in name for name in changed(adapter, done.out)
    )
    assert "in 7 of 14 modules base and aligned weights are equal" in done.notes[0]
    refused(
        "8 modules are to be projected, but the adapter has 7",
        given,
        tmp_path / "more",
        adapter,
        options=("--modules", 8),
    )
    refused(
        "base and aligned are equal in every module",
        Pair(pair.base, pair.base),
        tmp_path / "more",
        adapter,
    )


@pytest.mark.parametrize("projector", ["approximate", "exact"])
@pytest.mark.parametrize(
    "where", ["base", "aligned", "lora_A", "lora_B", "lora_B where the models are equal"]
)
def test_a_nan_is_refused_with_the_module_and_where_it_is(
    pair, adapter, tmp_path, where, projector
):
    def damage(tensors: Tensors) -> None:
        tensors[
            f"{LAST}.weight" if which == where else f"base_model.model.{LAST}.{where[:6]}.weight"
        ][3, 1] = float("nan")

    sources, which = (
        {"base": pair.base, "aligned": pair.aligned, "adapter": adapter},
        "adapter" if "lora" in where else where,
    )
    sources[which] = edited(tmp_path / which, sources[which], damage)
    if "equal" in where:
        same = {f"{LAST}.weight": load_file(pair.base / "model.safetensors")[f"{LAST}.weight"]}
        sources["aligned"] = edited(
            tmp_path / "same", pair.aligned, lambda tensors: tensors.update(same)
        )
    message = (
        rf"{tmp_path}/adapter/{ADAPTER_WEIGHTS}: .*{LAST}.{where[:6]}.weight holds NaN or infinity"
        if which == "adapter"
        else rf"{LAST}: (?=.*NaN or infinity).*{tmp_path}/{which}"
    )
    refused(
        message,
        Pair(sources["base"], sources["aligned"]),
        tmp_path / "out",
        sources["adapter"],
        options=("--projector", projector),
    )


def test_the_exact_projector_keeps_its_bases_and_continues_where_it_was_cut_off(
    pair, adapter, tmp_path
):
    def run(
        name: str, which: Path = adapter, cache: Path | None = tmp_path / "cache"
    ) -> ProjectedAdapter:
        return project(
            [which],
            pair.base,
            pair.aligned,
            tmp_path / name,
            projector="exact",
            energy=0.6,
            cache=cache,
            threshold=1.0,
        )[0]

    def kept() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}

    run("half", lora(tmp_path / "lora", pair.aligned, target_modules=r".*layers\.0\..*proj"))
    half, whole, every = kept(), run("whole"), kept()
    assert len(half) == 7 and len(every) == 14 and half.items() < every.items()
    assert (
        saved(whole) == saved(run("again")) == saved(run("without", cache=None)) and kept() == every
    )
    agrees(pair, adapter, whole, energy=0.6)
    damaged = sorted(half)[3]
    damaged.write_bytes(damaged.read_bytes()[:-5])
    options = f"--projector exact --energy 0.6 --cache {tmp_path}/cache".split()
    refused(
        f"{damaged} is a damaged basis; delete it", pair, tmp_path / "out", adapter, options=options
    )


USAGE = {
    "--threshold 0.5 --modules 3": "a threshold or a number of modules, not both",
    "--threshold 2": "a cosine from -1 to 1, not 2",
    "--threshold nan": "a cosine from -1 to 1, not nan",
    "--energy 0.9": "energy is a setting of the exact projector",
    "--projector exact --energy 1": "energy must be a share above 0 and below 1",
    "--base meta-llama/Llama-2-7b-hf": "commit: meta-llama/Llama-2-7b-hf@ and the 40 digits",
    "--aligned meta-llama/Llama-2-7b-hf@main": "meta-llama/Llama-2-7b-hf@ and the 40 digits",
    "--device cuda:99": "cuda:99",
}


@pytest.mark.parametrize("options", USAGE)
def test_what_cannot_be_asked_for_is_refused_before_anything_is_written(
    pair, adapter, tmp_path, options
):
    refused(USAGE[options], pair, tmp_path / "out", adapter, options=options.split())


def test_what_comes_out_is_whole_or_not_there_and_replaces_nothing(pair, adapter, tmp_path):
    (out := tmp_path / "out").mkdir()
    (out / "mine").write_text("here")
    refused(f"{out} exists and is not an empty folder", pair, out, adapter)
    refused(f"{out}/mine exists and is not an empty folder", pair, out / "mine", adapter)
    assert (out / "mine").read_text() == "here"
    (out / "mine").unlink()
    project([adapter], pair.base, pair.aligned, out)
    assert {path.name for path in out.iterdir()} == {
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
        RECORD,
    } and list(tmp_path.iterdir()) == [out]


def test_json_has_what_the_text_has(pair, adapter, tmp_path):
    adapters = adapter, lora(tmp_path / "other", pair.aligned)
    (tmp_path / "other" / "second").mkdir()
    (tmp_path / "other" / "second" / ADAPTER_CONFIG).write_text("{}")
    rule = ["--modules", "1", "--report", str(tmp_path / "page.html"), "--force"]
    text = CliRunner().invoke(app, [*asked(pair, tmp_path / "text", *adapters), *rule])
    done = CliRunner().invoke(app, [*asked(pair, tmp_path / "json", *adapters), *rule, "--json"])
    assert (
        text.exit_code == done.exit_code == 0
        and "the 1 of lowest cosine" in text.stdout.splitlines()[0]
    )
    for record, line in zip(
        json.loads(done.stdout)["adapters"], text.stdout.splitlines()[1:3], strict=True
    ):
        cosines = [row["cosine"] for row in record["modules"].values()]
        out, taken = (
            record["out"].replace("/json/", "/text/"),
            sum(row["projected"] for row in record["modules"].values()),
        )
        assert line == (
            f"{out}: {taken} of {len(cosines)} modules projected; cosines "
            f"{min(cosines):.4f} to {max(cosines):.4f}"
        )
        assert all(note in text.stderr for note in record["notes"])
    assert (
        "not projected: second" in text.stderr
        and "page.html" in text.stdout
        and "page.html" in done.stdout
    )


def test_a_threshold_below_every_cosine_says_from_which_one_on_a_module_is_projected(
    pair, tmp_path
):
    adapter = lora(
        tmp_path / "adapter", pair.aligned, seed=5
    )  # a lowest cosine whose fifth decimal rounds down
    done = CliRunner().invoke(app, [*asked(pair, tmp_path / "none", adapter), "--threshold", "-1"])
    threshold = re.search(
        r"no module was projected; thresholds from (\S+) on project at least one", done.stderr
    )
    assert project(
        [adapter], pair.base, pair.aligned, tmp_path / "one", threshold=float(threshold[1])
    )[0].projected


def test_the_command_in_a_process_of_its_own_writes_the_bytes_that_the_function_does_and_a_report(
    pair, adapter, tmp_path
):
    (done,) = project([adapter], pair.base, pair.aligned, tmp_path / "function", modules=5)
    line = [
        sys.executable,
        "-c",
        AS_A_COMMAND,
        *asked(pair, tmp_path / "command", adapter),
        *"--modules 5 --report seen/page.html".split(),
    ]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        line, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=threads
    )
    assert (
        process.returncode == 0
        and process.stderr == ""
        and "5 of 14 modules projected" in process.stdout
    )
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD):
        assert (tmp_path / "command" / name).read_bytes() == (done.out / name).read_bytes()
    page = (tmp_path / "seen" / "page.html").read_text("utf-8")
    assert not re.search(
        r"""(src|href)=(?!["'](#|data:))|@import|url\((?!["']?(#|data:))""", page
    )  # it asks for nothing
    assert Q0 in page and "5 of 14 modules projected" in page
    assert {path.suffix for path in (tmp_path / "seen").iterdir()} == {".html", ".png", ".pdf"}
    # Their imports take longer than the projection
    imported = set((tmp_path / "imported.txt").read_text().split())
    assert "torch" in imported and not imported & {"transformers", "peft", "huggingface_hub"}


@pytest.mark.parametrize("name", ["../../planted", "{out}/planted", "a/../../../planted", "x\ny"])
def test_a_tensors_name_never_becomes_a_path(pair, adapter, tmp_path, name):
    name = name.format(out=tmp_path)

    def rename(tensors: Tensors) -> None:
        for stored in list(tensors):
            if f"{Q0}." in stored:
                tensors[stored.replace(Q0, name)] = tensors.pop(stored)

    base, aligned, other = (
        edited(tmp_path / "in" / where, source, rename)
        for where, source in (
            ("base", pair.base),
            ("aligned", pair.aligned),
            ("adapter", adapter),
        )
    )
    (tmp_path / "work").mkdir()
    with pytest.raises(ModelError, match="fits no adapter parameter"):
        project([other], base, aligned, tmp_path / "work" / "out", threshold=1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "work"}
    assert not list((tmp_path / "work").iterdir())


def test_an_index_entry_outside_the_models_folder_is_an_error(pair, adapter, tmp_path):
    outside = shutil.copyfile(pair.aligned / "model.safetensors", tmp_path / "outside.safetensors")
    names = list(load_file(outside))
    for place in (str(outside), "../outside.safetensors"):
        aligned = Path(shutil.copytree(pair.aligned, tmp_path / "aligned", dirs_exist_ok=True))
        (aligned / "model.safetensors").unlink()
        index = aligned / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, place)}))
        with pytest.raises(ModelError, match=r"index\.json names the file"):
            project([adapter], pair.base, aligned, tmp_path / "out", threshold=1.0)
        with pytest.raises(ModelError, match=r"index\.json names the file"):
            load_model(aligned, "none", "float32", "cpu")
    assert not (tmp_path / "out").exists()


def test_several_thresholds_have_an_outcome_each_equal_to_one_alone(pair, adapter, tmp_path):
    other = lora(tmp_path / "other", pair.aligned)
    cosines = [row.cosine for row in project([adapter], pair.base, pair.aligned, tmp_path / "x")[
        0].rows.values() if row.cosine is not None]  # fmt: skip
    low, high = sorted(cosines)[2], sorted(cosines)[8]
    found = project(
        [adapter, other], pair.base, pair.aligned, tmp_path / "all", threshold=[low, high]
    )
    assert [each.out.relative_to(tmp_path / "all").as_posix() for each in found] == [
        f"{name}/threshold-{value}" for name in ("adapter", "other") for value in (low, high)
    ]
    assert [len(each.projected) for each in found[:2]] == [3, 9]
    alone = project([adapter], pair.base, pair.aligned, tmp_path / "alone", threshold=high)
    one, same = (load_file(each.out / ADAPTER_WEIGHTS) for each in (alone[0], found[1]))
    assert all(torch.equal(one[name], same[name]) for name in one)
    counted = project([adapter], pair.base, pair.aligned, tmp_path / "n", modules=[1, 2])
    assert [each.out.name for each in counted] == ["modules-1", "modules-2"]
    for settings, fault in (
        ({"threshold": [0.1, 0.1]}, "0.1 is given twice"),
        ({"threshold": [0.1], "modules": [1]}, "not both"),
    ):
        with pytest.raises(ProjectionError, match=fault):
            project([adapter], pair.base, pair.aligned, tmp_path / "no", **settings)
