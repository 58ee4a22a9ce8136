"""`ebbline evaluate`: measure one suite on a model and its adapters, without a study or cluster.

    from ebbline.commands.evaluate import evaluate
    evaluate(
        "llama-2-7b-chat", "refusal", "prompts.csv", "measured",
        adapters=["my-adapter", "safer-adapter"],
    )

The model is loaded once for all adapters. The output has one folder for each adapter, with the
files of a study's stages: completions.sensitive.jsonl (never copied elsewhere), metrics.json,
samples.jsonl, agreement.json. The same call continues an interrupted one.
"""

import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ebbline.commands.measured.backend_check import (
    CHECKED,
    DIFFERENCES,
    differences,
    write_differences,
)
from ebbline.commands.measured.outcome import (
    DONE,
    FILES,
    METRICS_FOLDER,
    NO_ADAPTER,
    Measured,
    files_of,
)
from ebbline.commands.project import distinct_names, located, scratch_beside
from ebbline.sweeps.study.reading.field_faults import faults
from ebbline.sweeps.study.suites import (
    MultipleChoiceSuite,
    OverRefusalSuite,
    RefusalSuite,
    Suite,
    TaskSuite,
    scorers_of,
    stages_of,
    written_metrics,
)
from ebbline.tasks.errors import EbblineError, EvaluationError
from ebbline.tasks.extras import extras_explained
from ebbline.tasks.files import open_private
from ebbline.tasks.identity import content_digest
from ebbline.tasks.inputs import ExpectedInput, InputCheck
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.measuring.completions import (
    repeated_prompts,
    unused_beside_adapter,
)
from ebbline.tasks.measuring.metrics import read_metrics
from ebbline.tasks.measuring.served.place import given_at, require_backends
from ebbline.tasks.models.adapter_file import read_adapter_file
from ebbline.tasks.models.brought.folder import other_base
from ebbline.tasks.models.loading import Residents, load_tokenizer
from ebbline.tasks.models.weights import require_model_folder
from ebbline.tasks.scoring.phrases import SCORERS
from ebbline.tasks.specs import DEFAULT_CHAT, TRANSFORMERS, Chat, GenerateSpec, TokenizerOf
from ebbline.tasks.stage import Context, Source, Stage, spec_payload
from ebbline.tasks.worker import ERROR, error_and_reason


def suite_of(name: str, settings: Mapping[str, Any]) -> Suite:
    """The suite of a name: refusal, over_refusal, task, or any lm-eval task. Raises EvaluationError
    for unknown or invalid settings.
    """
    kinds: Mapping[str, type[RefusalSuite | OverRefusalSuite | TaskSuite]] = {
        "refusal": RefusalSuite,
        "over_refusal": OverRefusalSuite,
        "task": TaskSuite,
    }
    given = {key: value for key, value in settings.items() if value not in (None, ())}
    if name == "harm":
        raise EvaluationError("the suite 'harm' needs a judge, and judges need a study")
    kind = kinds.get(name, MultipleChoiceSuite)
    foreign = sorted(given.keys() - kind.model_fields.keys())
    if foreign:
        raise EvaluationError(
            f"the suite {name!r} has no {' and no '.join(foreign)}; it has "
            f"{sorted(kind.model_fields.keys() - {'kind'})}"
        )
    try:
        if kind is MultipleChoiceSuite:
            is_written = bool(written_metrics(name))
            given |= {"task": name, "kind": "written" if is_written else "multiple_choice"}
        suite = kind(**given)
    except ValidationError as error:
        raise EvaluationError(
            f"the suite {name!r} has invalid settings:\n"
            + "\n".join(f"  {line}" for line in faults(error, kind, given))
        ) from None
    for scorer in scorers_of(suite):
        if scorer not in SCORERS:
            raise EvaluationError(
                f"no scorer {scorer!r}; ebbline has {sorted(SCORERS)}. Judges need a study"
            )
    return suite


def chat_of(date: str | None, template: Path | None, thinking: bool | None) -> Chat:
    """Chat settings from options. Raises EvaluationError for a text that is no date, and for a
    template that cannot be read.
    """
    settings: dict[str, Any] = {} if date is None else {"date": date}
    if template is not None:
        try:
            settings["text"] = template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(
                f"the chat template {template} cannot be read ({type(error).__name__}); give a "
                "Jinja file in UTF-8, such as chat_template.jinja"
            ) from None
        if not settings["text"].strip():
            raise EvaluationError(f"the chat template {template} is empty")
    try:
        return Chat(thinking=thinking, **settings)
    except ValidationError:
        raise EvaluationError(f"{date!r} is not a date; write it as YYYY-MM-DD") from None


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
    chat: Chat = DEFAULT_CHAT,
    tokenizer: TokenizerOf = "model",
    baseline: bool = True,
    device: str = "cpu",
    server: str | None = None,
    check_backend: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> list[Measured]:
    """Measure a suite on a model and on each of its adapters; without `baseline`, on its adapters
    alone. `server` is where the server of the setting `backend` lies: the interpreter of an
    environment with vLLM, or a URL. With `check_backend` transformers completes the prompts too,
    and differences.csv has each prompt whose completion differs. Raises EbblineError when it cannot
    be measured.
    """
    folder, prompt_set = located(model), Path(prompts)
    if not prompt_set.exists():
        raise EvaluationError(f"there is no prompt set at {prompt_set}")
    chosen = suite_of(suite, settings)
    place = _server_of(chosen.backend, server)
    if check_backend and (place is None or isinstance(chosen, MultipleChoiceSuite)):
        raise EvaluationError(
            "--check-backend compares a server's completions with those of transformers; it needs "
            "--backend, --server, and a suite that generates"
        )
    if isinstance(chosen, MultipleChoiceSuite):
        with extras_explained(f"{suite!r}, a task of lm-eval,"):
            import lm_eval  # noqa: F401  # before gigabytes are hashed
    require_model_folder(folder)
    asks_chats = not isinstance(chosen, MultipleChoiceSuite) or chosen.chat_template
    if tokenizer == "adapter" and not adapters:
        raise EvaluationError("--tokenizer adapter needs --adapter")
    named = [*_model_itself(baseline or not adapters), *_named(adapters)]
    own = {None, *(adapter for _, adapter in named if tokenizer == "adapter")}
    for adapter in sorted(own, key=str):  # before gigabytes are hashed
        load_tokenizer(folder, chat, checked=asks_chats, adapter=adapter)
    loading = {
        "quantisation": quantisation,
        "dtype": dtype,
        "chat": chat,
    }
    shared = {
        "model": _source(folder),
        "prompts": _source(prompt_set),
    }  # hashed once: a base model is many gigabytes
    residents, results = Residents(), dict[str, Measured]()
    generated: list[tuple[str, Context, Stage]] = []
    try:
        for name, adapter in named:
            at, inputs = Path(out) / name, dict(shared)
            if adapter is not None:
                inputs["adapter"] = _source(adapter)
            whose = {"tokenizer": "model" if adapter is None else tokenizer}
            stages = stages_of(METRICS_FOLDER, chosen, inputs, {**loading, **whose}, {})
            ctx = Context(
                log=at / "log",
                scratch=at / "scratch",
                device=device,
                residents=residents,
                progress=progress,
                server=place,
                adapters=[path for _, path in named if path is not None],
                contents={role: source.content for role, source in inputs.items()},
            )
            generated += [
                (name, ctx, each) for each in stages.values() if each.kind == GenerateSpec.KIND
            ]
            outputs: dict[str, Path] = {}
            for stage_name, stage in stages.items():
                outputs[stage.lineage] = _run(
                    stage, outputs, at / stage_name.partition(":")[0], ctx
                )
            found = {metric.name: metric for metric in read_metrics(at / METRICS_FOLDER)}
            record = _record(at)
            results[name] = Measured(
                "" if adapter is None else str(adapter),
                at,
                found,
                unused_beside_adapter(record),
                adapter is not None and read_adapter_file(adapter).changes_nothing,
                "" if adapter is None else other_base(adapter, str(model), folder),
                repeated_prompts(record),
            )
        for name, ctx, stage in generated if check_backend else ():
            at = Path(out) / name
            again = Stage(stage.spec.model_copy(update={"backend": TRANSFORMERS}), stage.inputs)
            _run(again, {}, at / CHECKED, ctx)
            rows = differences(at / stage.kind, at / CHECKED)
            write_differences(at / DIFFERENCES, rows)
            results[name] = replace(results[name], differing=len(rows))
    finally:
        residents.clear()  # a server ends now
    return [results[name] for name, _ in named]


def _server_of(backend: str, server: str | None) -> dict[str, Any] | None:
    """Where the server of a backend lies, as Context has it. Raises EvaluationError unless it is
    given where one is needed.
    """
    if (server is None) != (backend == TRANSFORMERS):
        raise EvaluationError(
            "--server says where the server of --backend lies: give both, as in --backend "
            "vllm==0.32.0 --server /opt/vllm/bin/python, or neither"
        )
    if server is None:
        return None
    try:
        place = given_at(server)
        require_backends({backend: place})
    except ValueError as error:
        raise EvaluationError(f"--server {_reason(error)}") from None
    return place.model_dump(mode="json")


def _reason(error: ValueError) -> str:
    """What is wrong with the place of a server, without the place: it may hold a key."""
    found = error.errors(include_input=False)[0]["msg"] if hasattr(error, "errors") else str(error)
    return str(found).removeprefix("Value error, ")


def _model_itself(wanted: bool) -> list[tuple[str, Path | None]]:
    return [(NO_ADAPTER, None)] if wanted else []


def _named(adapters: Sequence[str | Path]) -> Iterable[tuple[str, Path | None]]:
    if not adapters:
        return []
    folders = [located(adapter) for adapter in adapters]
    for folder in folders:
        read_adapter_file(folder)  # a damaged adapter is an error before the model is loaded
    names = [
        f"{folder.resolve().parent.name}-{name}" if name == NO_ADAPTER else name
        for name, folder in zip(distinct_names(folders), folders, strict=True)
    ]
    return zip(names, folders, strict=True)


def _record(place: Path) -> dict[str, Any]:
    """What a measurement recorded of its prompts and its adapter."""
    files = [place / stage / GenerateSpec.PROMPTS for stage in (GenerateSpec.KIND, METRICS_FOLDER)]
    found: dict[str, Any] = json.loads(next(file for file in files if file.exists()).read_text())
    return found


def _source(path: Path) -> Source:
    return Source(content_digest(path), str(path.resolve()))


def _run(stage: Stage, outputs: Mapping[str, Path], out: Path, ctx: Context) -> Path:
    """Run a stage into `out` unless it is done. Raises EvaluationError when `out` holds anything
    else.
    """
    inputs = {
        name: Path(item.location) if isinstance(item, Source) else outputs[item.lineage]
        for name, item in stage.inputs.items()
    }
    mark = {"lineage": stage.lineage, **spec_payload(stage.spec)}
    if (out / DONE).exists():
        written = json.loads((out / DONE).read_text())
        if {**written, FILES: None} != {**mark, FILES: None}:
            raise EvaluationError(
                f"{out} holds another measurement; give another folder with --out, or remove it"
            )
        if files_of(out) != written.get(FILES, files_of(out)):
            raise EvaluationError(
                f"{out} was changed since it was measured; remove it, and it is measured again"
            )
        return out
    if out.exists():
        raise EvaluationError(
            f"{out} exists and is not a finished measurement; remove it, or give another "
            "folder with --out"
        )
    with scratch_beside(out) as scratch:
        return _made(stage, inputs, mark, scratch / "out", out, ctx)


def _made(
    stage: Stage,
    inputs: Mapping[str, Path],
    mark: Mapping[str, Any],
    fresh: Path,
    out: Path,
    ctx: Context,
) -> Path:
    for folder in (fresh, ctx.log):
        folder.mkdir(parents=True, exist_ok=True)
    expected = {
        name: ExpectedInput(Path(item.location), item.content)
        for name, item in stage.inputs.items()
        if isinstance(item, Source)
    }
    try:
        check = InputCheck(expected)
        kind_named(stage.kind).load_function()(stage.spec, inputs, fresh, ctx)
        check.finish()
        check.check_unchanged()
    except EbblineError:
        raise
    # A library's exception may quote a prompt: its text goes to the log, as in a study
    except Exception as error:  # noqa: BLE001
        with open_private(ctx.log / ERROR) as log:
            log.write(traceback.format_exc())
        raise EvaluationError(f"{stage.kind}: {error_and_reason(error, ctx.log)[1]}") from None
    (fresh / DONE).write_text(json.dumps({**mark, FILES: files_of(fresh)}, indent=1))
    fresh.replace(out)
    return out
