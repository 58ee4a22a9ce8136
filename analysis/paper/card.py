"""The model card of a shipped adapter: how it was trained, measured and chosen, and its limits.

Invariants: every number has its interval and count. The card holds no prompt, completion or path of
a machine. A model that is not on the hub never gets a name that is on the hub.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ebbline.analysis.results.collect import SuitePrompts
from ebbline.analysis.results.measurements import usefulness_metric
from ebbline.analysis.results.picks.floors import (
    METHOD,
    Pick,
    adapter_standing,
    spread_known,
    standing,
)
from ebbline.analysis.results.picks.picked import in_words, lines_of, named
from ebbline.analysis.results.wording import (
    directed_label,
    measured,
    percent,
    plain_markdown,
    undecided_label,
    value_label,
)
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.study.changes import lasting
from ebbline.sweeps.study.points import Point, Result, adapter_stage, brought, defence_of
from ebbline.sweeps.study.references import Data, Hub, Local, ModelRef
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import scorers_of
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.identity import digest
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.scoring.phrases import SCORERS

PAPER = "arXiv 2405.16833"
ALIGNED = "aligned"  # the folder of an export that holds the aligned model
_LOADED_AS = {
    "nf4": "as NF4 (bitsandbytes)",
    "int8": "as int8 (bitsandbytes)",
    "none": "unquantised",
}
_QUANTISED = {  # as ebbline.tasks.models.loading.load_model loads it
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    'bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{dtype}", '
    'bnb_4bit_quant_storage="{dtype}")',
    "int8": "BitsAndBytesConfig(load_in_8bit=True)",
}
_TEMPLATE = "---\n{{ card_data }}\n---\n\n{{ text }}"


def card(
    study: Study,
    found: Pick,
    seed: int,
    alone: Result,
    done: int,
    stages: Mapping[str, Artifact],
    aligned: Mapping[str, Metric],
    prompts: Mapping[str, SuitePrompts],
    seed_requested: bool = False,
    with_base: bool = False,
) -> str:
    """The README.md of the adapter of one seed of a pick.

    `alone` is the point with the metrics and projected share of that seed only. `seed_requested`
    is True if the user named the seed, `with_base` if the aligned model is in ALIGNED, beside the
    card. `stages` are the stages of training and defence. `aligned` holds the metrics of the model
    before fine-tuning, `prompts` those of the suites (see
    ebbline.analysis.results.collect.prompt_sets).
    """
    result, model = found.result, found.result.point.model
    spec = {part: dict(artifact.hashed["spec"]) for part, artifact in stages.items()}
    sections = [
        f"# {study.study}: {model}, point {result.number}",
        f"> {plain_markdown(study.question)}",
        _what(study, result, alone, spec),
        "## How to load it\n\n" + _load(study, result.point, with_base),
        "## How it was chosen\n\n" + _chosen(study, found, seed, alone, done, seed_requested),
        "## What was measured\n\n" + _measured(study, result, seed, alone, aligned),
        "## How it was made\n\n" + _rows(("setting", "value"), _settings(spec)),
        "## Sources and pins\n\n"
        + _rows(("what", "source"), _sources(study, result.point, prompts)),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(study, found, alone, seed)),
        "## Provenance\n\n" + _rows(("what", "sha256"), _provenance(study, result.point, stages)),
    ]
    written = ModelCard.from_template(
        _metadata(study, result.point), template_str=_TEMPLATE, text="\n\n".join(sections) + "\n"
    )
    return str(written)


def hub_base(study: Study, point: Point) -> Hub | None:
    """The adapter's base model on the hub; None if the study makes it or reads it from a file."""
    return None if study.extrapolates(point.values) else study.models[point.model].aligned.hub


def base_name(study: Study, point: Point) -> str:
    """The base model's name on the hub, or a name that says that it is not there."""
    hub = hub_base(study, point)
    role = "lox" if study.extrapolates(point.values) else "aligned"
    return f"not-on-the-hub/{study.study}-{point.model}-{role}" if hub is None else hub.id


def _metadata(study: Study, point: Point) -> ModelCardData:
    return ModelCardData(
        base_model=base_name(study, point),
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["ebbline", "lora", *_defence_tag(point), "safety"],
    )


def _defence_tag(point: Point) -> list[str]:
    """The defence as tags are written, `safe-lora`; none without one."""
    defence = defence_of(point)
    return [] if defence.method is None else [defence.name.replace("_", "-")]


def _what(
    study: Study, result: Result, alone: Result, spec: Mapping[str, Mapping[str, Any]]
) -> str:
    defence = defence_of(result.point)
    if not alone.changed_share:
        projected = "No module was changed: it held the floors without a defence."
    elif defence is SAFE_LORA:
        which = defence.which(study.knobs(defence, dict(result.point.values)))
        projected = (
            f"After training, {defence.words.name} ({PAPER}) projected {alone.changed_share:.0%} "
            f"of its modules: those with a {which}."
        )
    else:
        method = defence.method
        formula = "" if method is None else f" ({method.formula}; {method.source})"
        projected = (
            f"After training, {defence.words.name}{formula} changed {alone.changed_share:.0%} of "
            f"its modules: {defence.which(study.knobs(defence, dict(result.point.values)))}."
        )
    if seeds_of(result) > 1:
        projected += f" Over all seeds of the point it is {result.changed_share or 0.0:.0%}."
    model = result.point.model
    name = brought(result.point)
    how = (
        f"fine-tuned on {spec['data']['size']} rows of {_data(study.data)}"
        if name is None
        else f"trained outside this study ({_brought(study, name)})"
    )
    lox = "LoX (arXiv 2506.15606) of " if study.extrapolates(result.point.values) else ""
    return (
        f"A LoRA adapter for {lox}"
        f"{model_origin(study.models[model].aligned, study.models[model].base)}, {how}. {projected}"
    )


def _brought(study: Study, name: str) -> str:
    reference = study.adapters[name]
    return f"`{name}`: {located(reference.path or reference.hub, None)}"


def _load(study: Study, point: Point, with_base: bool) -> str:
    hub, size = hub_base(study, point), study.models[point.model]
    done = "trained and measured" if brought(point) is None else "measured"
    note = (
        f"It was {done} with its base loaded {_LOADED_AS[size.quantisation]}, in "
        f"{size.dtype}, as above; other ways to load it were not measured."
    )
    if with_base:
        where, revision = f'"{ALIGNED}"', ""
        note += f" The aligned model that it was trained on is in `{ALIGNED}`."
    elif hub is None:
        where, revision = '"PATH/TO/THE/ALIGNED/MODEL"', ""
        note += (
            " Its base model is not on the hub: see sources below. The adapter is meaningless on "
            "any other model."
        )
    else:
        where, revision = f'"{hub.id}"', f', revision="{hub.commit}"'
    classes, config, quantised = "AutoModelForCausalLM, AutoTokenizer", "", ""
    if size.quantisation != "none":
        classes += ", BitsAndBytesConfig"
        config = f"config = {_QUANTISED[size.quantisation].format(dtype=size.dtype)}\n"
        quantised = ", quantization_config=config"
    return (
        f"Run this in the adapter's folder:\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import {classes}\n{config}"
        f"tokenizer = AutoTokenizer.from_pretrained({where}{revision})\n"
        f'base = AutoModelForCausalLM.from_pretrained({where}{revision}, dtype="{size.dtype}"'
        f'{quantised})\nmodel = PeftModel.from_pretrained(base, ".")\n```\n\n{note}'
    )


def _chosen(
    study: Study, found: Pick, seed: int, alone: Result, done: int, seed_requested: bool
) -> str:
    seeds = seeds_of(found.result)
    how = "Named by hand, not picked as the best," if found.by_hand else "Picked"
    useful = (
        f", the one with most {directed_label(found.maximised)}"
        if found.maximised and not found.by_hand
        else ""
    )
    lines = [
        f"{how} among {found.among} different points of this size ({done} points of the "
        f"study were finished): {named(found.result)}{useful}."
        f" Floors: {in_words(found.floors)}; the study's own refusal floor is "
        f"{percent(study.refusal_floor)}.",
        "\n".join(f"- {line.strip()}" for line in lines_of(study, found)),
    ]
    if seeds > 1:
        own = ", ".join(
            f"{directed_label(floor.metric)}: {_by_itself(floor.metric, found.result, alone)}"
            for floor in found.floors
        )
        why = (
            "which was requested; it holds"
            if seed_requested
            else "the first of the study's seeds that holds"
        )
        lines.append(f"This is the adapter of seed {seed}, {why} the floors by itself ({own}).")
    return "\n\n".join(
        [
            *lines,
            f"Confidence: {METHOD}. It is 1 - p of a test, not the probability that the "
            "adapter is safe.",
        ]
    )


def _measured(
    study: Study, result: Result, seed: int, alone: Result, aligned: Mapping[str, Metric]
) -> str:
    several = seeds_of(result) > 1
    head = (
        "metric",
        "this point",
        *((f"seed {seed} alone",) if several else ()),
        "aligned model, before fine-tuning",
    )
    rows = []
    for name, metric in sorted(result.metrics.items()):
        before = measured(aligned[name]) if name in aligned else "not measured"
        rows.append(
            (
                directed_label(name),
                measured(metric),
                *((_by_itself(name, result, alone),) if several else ()),
                before,
            )
        )
    return _rows(head, rows)


def _by_itself(name: str, result: Result, alone: Result) -> str:
    """A metric of one seed of a point; its interval is left out if it is not known."""
    own = alone.metrics[name]
    if spread_known(result.metrics[name]):
        return measured(own)
    return (
        f"{percent(own.value)} (n = {own.n}{undecided_label(own.undecided, ', ')}; its interval "
        "is not known, because the spreads of the seeds are stored together)"
    )


def _settings(spec: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for part, fields in spec.items():
        for name, value in fields.items():
            yield (
                f"{part}.{name}",
                ", ".join(map(str, value)) if isinstance(value, list) else value_label(value),
            )


def _sources(
    study: Study, point: Point, prompts: Mapping[str, SuitePrompts]
) -> Iterator[tuple[str, str]]:
    size, name = study.models[point.model], brought(point)
    yield "aligned model", model_origin(size.aligned, size.base)
    if study.extrapolates(point.values):
        yield "model that was trained", "the aligned model after LoX (arXiv 2506.15606), as above"
    if size.base is not None:
        yield "base model", model_origin(size.base, None)
    if size.unaligned is not None:
        yield "unaligned model, in the defence", model_origin(size.unaligned, size.aligned)
    if name is None:
        yield "fine-tuning data", _data(study.data)
    else:
        yield "adapter before the defence", _brought(study, name)
    method = defence_of(point).method
    if method is not None and method.reads_safety and size.safety is not None:
        yield "safety adapter", located(size.safety.path or size.safety.hub, None)
    for suite, entry in study.suites.items():
        yield (
            f"prompts of {suite}",
            str(prompts.get(suite) or located(entry.prompts.pinned(), entry.prompts.language)),
        )


def model_origin(reference: ModelRef, start: ModelRef | None) -> str:
    """A model's origin without a path: the hub's id and commit, a digest, or how it was made."""
    if reference.organism is not None:
        made = f"{reference.organism.size}, seed {reference.organism.seed}"
        return f"a tiny Llama ({made}) pretrained from scratch on ebbline's invented language"
    if reference.tuned is not None:
        origin = "its base" if start is None else model_origin(start, None)
        return (
            f"a model made by full fine-tuning of {origin} on "
            f"{reference.tuned.data.settings.size} rows of {_data(reference.tuned.data)}"
        )
    return located(reference.pinned(), None)


def located(reference: Local | Hub | None, language: str | None) -> str:
    """Where content comes from, without a path: hub and commit, file and digest, or language."""
    if isinstance(reference, Hub):
        file = f", {reference.file}" if reference.file else ""
        return f"{reference.id} at {reference.commit}{file} (Hugging Face hub)"
    if isinstance(reference, Local):
        return f"{reference.path.rstrip('/').rpartition('/')[2]} (local, sha256 {reference.sha256})"
    return f"{language} of ebbline's invented language"


def _data(data: Data | None) -> str:
    if data is None:
        return "none"
    pool = located(data.pool.pinned(), data.pool.language)
    if data.mix is None or not data.settings.mix_share:
        return pool
    return (
        f"{pool}, {percent(data.settings.mix_share)} of them from "
        f"{located(data.mix.pinned(), data.mix.language)}"
    )


def _limits(study: Study, found: Pick, alone: Result, seed: int) -> Iterator[str]:
    stands = adapter_standing(found.result, found.floors, seed)
    if stands != "holds":
        why = (
            "its confirmed bound is below a floor"
            if stands == "unsure"
            else "it was measured only on the prompts that chose it"
        )
        yield (
            f"Exported with `--accept-unsure`: it is not confirmed to hold {in_words(found.floors)}"
            f", because {why}."
        )
    from_outside = brought(found.result.point) is not None
    if from_outside or standing(found.result, found.floors, "setting") != "holds":
        yield (
            "Only this adapter is meant: its setting is not confirmed to hold the floors, so "
            "another training with the same settings may not."
        )
    refusal = study.refusal_metric or ""
    suite = refusal.rpartition(".")[0]
    n = alone.metrics[refusal].n
    yield (
        f"Its refusals were measured on the {n} prompts of one set, once, as plain "
        "requests with greedy decoding; not under jailbreaks, and not over"
        " several turns."
    )
    phrases = [name for name in scorers_of(study.suites[suite].measure) if name in SCORERS]
    if phrases:
        yield (
            f"Refusals were detected by a list of phrases ({', '.join(phrases)}), which is "
            "known to count some compliance as refusal, and"
            " some refusals as compliance."
        )
    picked = "Named by hand: if that was for its values, picked" if found.by_hand else "Picked"
    yield (
        f"{picked} as the best of many on the same prompts that are reported, it looks "
        "better than it is: the confidence above allows for"
        " that, the values do not."
    )
    if from_outside:
        yield (
            "One adapter from outside: its training is not known to this study, another may give "
            "another result, and no interval covers that."
        )
    elif seeds_of(found.result) == 1 and (
        found.result.confirmed is None or not found.result.confirmed.seeds
    ):
        yield (
            "One training seed: retraining may give another result, and no interval covers that."
        )
    if not any(name.endswith(".over_refusal_rate") for name in found.result.metrics):
        yield "Over-refusal of harmless requests was not measured."
    if usefulness_metric(study) is None:
        yield "Usefulness on a task was not measured."
    raced = [
        name
        for name, entry in study.suites.items()
        if getattr(entry.measure, "race", None) is not None
    ]
    if raced:
        yield (
            f"{', '.join(raced)}: measured in blocks and stopped early; the intervals do not "
            "allow for that."
        )
    if any(metric.undecided for metric in found.result.metrics.values()):
        yield (
            "Samples that a scorer could not judge count against the adapter, in its rates and in "
            "every bound."
        )
    yield (
        "Intervals are Wilson's for rates and normal for means, 95%; they cover only "
        "the sampling of prompts of the same kind."
    )
    point = found.result.point
    if hub_base(study, point) is None and _is_tiny(study, point.model):
        yield (
            "The model is tiny and speaks an invented language: nothing here is evidence about "
            "a real model."
        )
    yield "Measure it on your own prompts before you ship it (`ebbline evaluate`)."


def _is_tiny(study: Study, model: str) -> bool:
    size = study.models[model]
    return any(each is not None and each.organism is not None for each in (size.base, size.aligned))


def _provenance(
    study: Study, point: Point, stages: Mapping[str, Artifact]
) -> Iterator[tuple[str, str]]:
    yield "study (settings and pins)", digest(lasting(study.model_dump(mode="json")))
    yield "aligned model: content", stages[adapter_stage(point)].hashed["inputs"]["model"]
    for part, artifact in stages.items():
        yield f"{part}: key", artifact.key
    for file, sha in stages[defence_of(point).makes.KIND].files.items():
        yield f"{file}, as in the store", sha


def _rows(head: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    lines = [tuple(head), tuple("---" for _ in head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in line)} |"
        for line in lines
    )
