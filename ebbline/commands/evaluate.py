"""Measurements by themselves: one suite on a model and its adapters, and stored completions scored
again; no study, no cluster.

    from ebbline.commands.evaluate import evaluate
    evaluate(
        "llama-2-7b-chat", "refusal", "prompts.csv", "measured",
        adapters=["my-adapter", "safer-adapter"],
    )

The model is loaded once for all adapters. What comes out is what a study's stages write, in a
folder for each adapter: completions.sensitive.jsonl (which stays there), metrics.json,
samples.jsonl, agreement.json. The same call continues one that was cut off.
"""

import csv
import json
import shutil
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.wording import metric_label, percent, settings_label
from ebbline.commands.project import distinct_names, located
from ebbline.sweeps.study.points import keys_of
from ebbline.sweeps.study.study import Study, faults
from ebbline.sweeps.study.suites import (
    MultipleChoiceSuite,
    OverRefusalSuite,
    RefusalSuite,
    Suite,
    TaskSuite,
    scorers_of,
    stages_of,
)
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import EbblineError, EvaluationError
from ebbline.tasks.identity import content_digest
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.measuring import score
from ebbline.tasks.measuring.completions import read_completions
from ebbline.tasks.measuring.metrics import Metric, read_metrics
from ebbline.tasks.measuring.scorers import SCORERS
from ebbline.tasks.models.adapter_file import read_adapter_file
from ebbline.tasks.models.loading import Residents
from ebbline.tasks.models.model_folder import require_model_folder
from ebbline.tasks.specs import GenerateSpec, ScoreSpec
from ebbline.tasks.stage import Context, Source, Stage, spec_payload
from ebbline.tasks.worker import ERROR, described

DONE = "done.json"
NO_ADAPTER = "model"
VERDICTS = ("refused", "partial", "complied", "undecided")


@dataclass(frozen=True)
class Measured:
    """One adapter's outcome (or the model's own, where `adapter` is empty) and the folder that
    holds it.
    """

    adapter: str
    folder: Path
    metrics: Mapping[str, Metric]


def suite_of(name: str, settings: Mapping[str, Any]) -> Suite:
    """The suite that a name means: refusal, over_refusal, task, or any lm-eval task. Raises
    EvaluationError for foreign settings.
    """
    kinds: Mapping[str, type[RefusalSuite | OverRefusalSuite | TaskSuite]] = {
        "refusal": RefusalSuite,
        "over_refusal": OverRefusalSuite,
        "task": TaskSuite,
    }
    given = {key: value for key, value in settings.items() if value not in (None, ())}
    kind = kinds.get(name, MultipleChoiceSuite)
    foreign = sorted(given.keys() - kind.model_fields.keys())
    if foreign:
        raise EvaluationError(
            f"the suite {name!r} has no {' and no '.join(foreign)}; it has "
            f"{sorted(kind.model_fields.keys() - {'kind'})}"
        )
    try:
        suite = kind(task=name, **given) if kind is MultipleChoiceSuite else kind(**given)
    except ValidationError as error:
        raise EvaluationError(
            f"the suite {name!r} cannot be so:\n" + "\n".join(faults(error))
        ) from None
    for scorer in scorers_of(suite):
        if scorer not in SCORERS:
            raise EvaluationError(
                f"no scorer {scorer!r}; ebbline has {sorted(SCORERS)}. Judges need a study"
            )
    return suite


def evaluate(
    model: str | Path,
    suite: str,
    prompts: str | Path,
    out: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    settings: Mapping[str, Any] = {},
    quantisation: str = "none",
    dtype: str = "bfloat16",
    device: str = "cpu",
    batch_size: int = 32,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> list[Measured]:
    """Measure a suite on a model, or on each of its adapters. Raises EbblineError for what cannot
    be measured.
    """
    folder, asked = located(model), Path(prompts)
    if not asked.exists():
        raise EvaluationError(f"there is no prompt set at {asked}")
    chosen = suite_of(suite, settings)
    require_model_folder(folder)
    residents, results = Residents(), []
    shared = {
        "model": _source(folder),
        "prompts": _source(asked),
    }  # hashed once: a base is many gigabytes
    for name, adapter in _named(adapters):
        place, inputs = Path(out) / name, dict(shared)
        if adapter is not None:
            inputs["adapter"] = _source(adapter)
        stages = stages_of(
            "metrics", chosen, inputs, {"quantisation": quantisation, "dtype": dtype}, {}
        )
        ctx = Context(
            log=place / "log",
            scratch=place / "scratch",
            device=device,
            batch_size=batch_size,
            residents=residents,
            progress=progress,
        )
        made: dict[str, Path] = {}
        for stage_name, stage in stages.items():
            made[stage.lineage] = _run(stage, made, place / stage_name.partition(":")[0], ctx)
        found = {metric.name: metric for metric in read_metrics(place / "metrics")}
        results.append(Measured("" if adapter is None else str(adapter), place, found))
    return results


def _named(adapters: Sequence[str | Path]) -> Iterable[tuple[str, Path | None]]:
    if not adapters:
        return [(NO_ADAPTER, None)]
    folders = [located(adapter) for adapter in adapters]
    for folder in folders:
        read_adapter_file(folder)  # a damaged adapter is an error before the model is loaded
    return zip(distinct_names(folders), folders, strict=True)


def _source(path: Path) -> Source:
    return Source(content_digest(path), str(path.resolve()))


def _run(stage: Stage, made: Mapping[str, Path], out: Path, ctx: Context) -> Path:
    """Run a stage into `out`, unless it is there already; a folder of something else is left
    alone.
    """
    inputs = {
        name: Path(item.location) if isinstance(item, Source) else made[item.lineage]
        for name, item in stage.inputs.items()
    }
    mark = {"lineage": stage.lineage, **spec_payload(stage.spec)}
    if (out / DONE).exists():
        if json.loads((out / DONE).read_text()) != mark:
            raise EvaluationError(
                f"{out} holds another measurement; give another folder with --out, or remove it"
            )
        return out
    if out.exists():
        raise EvaluationError(
            f"{out} exists and holds no finished measurement; remove it, or give another "
            "folder with --out"
        )
    fresh = out.with_name(f".{out.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    for folder in (fresh, ctx.log):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        kind_named(stage.kind).load_function()(stage.spec, inputs, fresh, ctx)
    except EbblineError:
        raise
    # A foreign exception may quote an item: its words go to the log, as in a study
    except Exception as error:  # noqa: BLE001
        (ctx.log / ERROR).write_text(traceback.format_exc())
        raise EvaluationError(f"{stage.kind}: {described(error, ctx.log)[1]}") from None
    (fresh / DONE).write_text(json.dumps(mark, indent=1))
    fresh.replace(out)
    return out


def rescore(generations: Mapping[str, Sequence[Path]], spec: ScoreSpec) -> list[dict[str, Any]]:
    """Score stored generations (of one or more blocks each) again, without a model: a row for each
    and each scorer, in counts.
    """
    rows = []
    for name, folders in generations.items():
        completions = [row for folder in folders for row in read_completions(folder)]
        verdicts = score.verdicts_of(spec, completions, {})
        compared = score.compared(verdicts)
        for scorer, found in verdicts.items():
            rate = score.refusal_metrics(spec.measure, [each.verdict for each in found])[0]
            low, high = rate.interval
            kappa = next(
                (
                    pair["kappa"]
                    for pair in compared["pairs"]
                    if {pair["one"], pair["other"]} == {spec.scorer, scorer}
                ),
                None,
            )
            counts = {
                verdict: sum(each.verdict == verdict for each in found) for verdict in VERDICTS
            }
            incoherent = sum(each.incoherent for each in found)
            rows.append(
                {
                    "generation": name,
                    "scorer": scorer,
                    "n": rate.n,
                    **counts,
                    "incoherent": incoherent,
                }
                | {
                    rate.name: rate.value,
                    "low": low,
                    "high": high,
                    f"kappa with {spec.scorer}": kappa,
                }
            )
    return rows


def measure_of(study: Study, suite: str) -> Literal["refusal", "over_refusal"]:
    """What refusals mean in a suite. Raises EvaluationError for one that has none."""
    measure = study.suites[suite].measure if suite in study.suites else None
    if not isinstance(measure, RefusalSuite | OverRefusalSuite):
        known = sorted(
            name
            for name, entry in study.suites.items()
            if isinstance(entry.measure, RefusalSuite | OverRefusalSuite)
        )
        raise EvaluationError(
            f"{study.study} has no suite {suite!r} that counts refusals; it has {known}"
        )
    return measure.kind


def generations_of(view: StudyView, suite: str) -> dict[str, list[Path]]:
    """What to call it -> the folders, of every generation of a suite that a study's points have
    finished.
    """
    study, found = view.study, dict[str, list[Path]]()
    for result in collect(view):
        for seed in study.seeds:
            keys = keys_of(result.keys, f"generate:{suite}", seed)
            if keys:
                name = f"point {result.number} ({settings_label(result.point)} seed={seed})"
                found[name] = [
                    view.home.store.open("generate", key).file(GenerateSpec.COMPLETIONS).parent
                    for key in keys
                ]
    if not found:
        raise EvaluationError(
            f"no point of {study.study} has generated for {suite!r} yet; `ebbline run` does"
        )
    return found


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _agreement(folder: Path) -> object:
    path = folder / "metrics" / ScoreSpec.AGREEMENT
    return json.loads(path.read_text()) if path.exists() else None


def tell(measured: Sequence[Measured], as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "adapter": each.adapter,
                "folder": str(each.folder),
                "agreement": _agreement(each.folder),
            }
            | {
                name: {
                    **asdict(metric),
                    "value": metric.value,
                    "low": metric.interval[0],
                    "high": metric.interval[1],
                }
                for name, metric in each.metrics.items()
            }
            for each in measured
        ]
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("adapter", "metric", "value", "95% interval", "n", "undecided"):
        table.add_column(column, justify="left" if column in ("adapter", "metric") else "right")
    for each in measured:
        for name, metric in each.metrics.items():
            low, high = metric.interval
            interval = f"{percent(low)} to {percent(high)}"
            table.add_row(
                each.folder.name,
                metric_label(name),
                percent(metric.value),
                interval,
                str(metric.n),
                str(metric.undecided),
            )
    console = Console()
    console.print(table)
    for each in measured:
        console.print(f"{each.folder}", highlight=False, soft_wrap=True, markup=False)


def tell_rows(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(list(rows), indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("generation", "scorer") else "right")
    for row in rows:
        table.add_row(
            *(
                "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
                for value in row.values()
            )
        )
    Console().print(table)
