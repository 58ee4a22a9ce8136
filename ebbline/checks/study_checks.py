"""Check a study before it runs: read every file that is on this machine, as its stages will.

What needs a tokenizer runs in a process of its own (ebbline.checks.with_models), except where torch
is imported already. A study without files of its own costs nothing. `run` remembers in
HOME/checked.json what it has checked, and checks it again only after a change.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from threading import Timer
from typing import Any

from rich.console import Console
from rich.markup import escape

from ebbline.checks.adapters import adapter_faults, base_notes
from ebbline.checks.found import Found, ModelFound, SetFound, TokenLengths
from ebbline.checks.jobs import Jobs, jobs_of, path_of
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.pins import references
from ebbline.sweeps.study.reading.row_sets import located, row_sets
from ebbline.sweeps.study.references import Hub, Local, ModelRef
from ebbline.sweeps.study.study import Model, Study
from ebbline.sweeps.study.suites import MultipleChoiceSuite
from ebbline.tasks.errors import EbblineError, ModelError, PinError, StudyError
from ebbline.tasks.files import write_whole
from ebbline.tasks.headers.gguf_header import read_gguf
from ebbline.tasks.headers.model_header import ModelHeader, read_header
from ebbline.tasks.identity import digest
from ebbline.tasks.models.model_work import size_at
from ebbline.tasks.models.sizes import size_in

Now = Callable[[str], None]
VERSION = 1  # of the checks, for what `run` remembers
REMEMBERED, REMEMBERED_MOST = "checked.json", 100
SLOW_S = 2.0


def check_study(study: Study, now: Now = lambda what: None) -> Found:
    """Everything that the study's files show. `now` is called with what is read next."""
    found = Found()
    _sets(study, found, now)
    broken = _models(study, found, now)
    if study.adapters:
        now("adapters")
    found.faults += adapter_faults(study)
    found.notes += base_notes(study)
    jobs = jobs_of(study)
    jobs = Jobs(tuple(job for job in jobs.models if job.path not in broken), jobs.tasks)
    faulty = {fault.partition(":")[0] for fault in found.faults}
    jobs = Jobs(
        tuple(job.without(faulty) for job in jobs.models),
        tuple(task for task in jobs.tasks if task.where not in faulty),
    )
    if jobs:
        _add_answers(jobs, found, now)
    return found


def require_checked(study: Study, home: Home, now: Now = lambda what: None) -> list[str]:
    """The notes on a study; none for one that was checked before and has not changed. Raises
    StudyError with every fault.
    """
    stamp = _stamp(study)
    if stamp is None:
        return []
    path = home.root / REMEMBERED
    before = _remembered(path)
    if stamp in before:
        return []
    found = check_study(study, now)
    require_no_fault(study, found)
    home.root.mkdir(parents=True, exist_ok=True)
    kept = json.dumps([*before, stamp][-REMEMBERED_MOST:])
    write_whole(path, lambda fresh: fresh.write_text(kept))
    return found.notes


def require_no_fault(study: Study, found: Found) -> None:
    if found.faults:
        lines = "\n".join(f"  {fault}" for fault in found.faults)
        raise StudyError(f"study {study.study!r} would fail:\n{lines}")


@contextmanager
def progress(quiet: bool = False) -> Iterator[Now]:
    """A line that names what is read now. It appears after SLOW_S and disappears at the end."""
    status = Console(stderr=True).status("checking")
    timer = Timer(SLOW_S, status.start)
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield lambda what: status.update(f"checking {escape(what)}")
    finally:
        timer.cancel()
        status.stop()


def _sets(study: Study, found: Found, now: Now) -> None:
    for each in row_sets(study):
        try:
            each.require_in_language()
            path = located(each.reference)
            if path is None:
                continue
            now(f"{each.where}: {path}")
            facts = each.read(path)
            if each.measure is None:
                each.require_enough(facts, path)
        except EbblineError as error:
            found.faults.append(f"{each.where}: {error}")
            continue
        if facts.repeats:
            found.notes.append(
                f"{each.where}: {facts.repeats} of {facts.rows} rows repeat the prompt of an "
                "earlier row. A prompt is asked and counted once"
            )
        if not isinstance(each.measure, MultipleChoiceSuite):
            written = each.reference.path.path if each.reference.path else str(path)
            fields = list(facts.fields)
            found.sets.append(
                SetFound(each.where, written, facts.rows, facts.used, facts.format, fields)
            )


def _models(study: Study, found: Found, now: Now) -> set[str]:
    """Record the models from outside. Returns the paths of those whose files cannot be read."""
    broken: set[str] = set()
    for name, model in study.models.items():
        for role in ("base", "aligned", "unaligned"):
            reference = getattr(model, role)
            if reference is not None:
                broken |= _model(f"models.{name}.{role}", reference, found, now)
        _compare(name, model, study, found, broken)
    for name, judge in study.judges.items():
        if judge.model is not None:
            broken |= _model(f"judges.{name}.model", judge.model, found, now)
    return broken


def _model(where: str, reference: ModelRef, found: Found, now: Now) -> set[str]:
    outside = reference.pinned()
    if outside is None:
        return set()
    path = None
    try:
        path = outside.located() if isinstance(outside, Local) else path_of(reference)
        if path is not None:
            now(f"{where}: {path}")
            if reference.gguf is not None:
                if not read_gguf(path).chat_template:
                    raise ModelError(
                        f"{path} has no chat template (tokenizer.chat_template in its header); "
                        "ebbline studies chat models. Use a file with one, or convert the "
                        "original model folder again"
                    )
            else:
                read_header(path)
    except (ModelError, PinError) as error:
        found.faults.append(f"{where}: {error}")
        return {str(path)}
    name = outside.id if isinstance(outside, Hub) else outside.path
    size = None if path is None else size_in(path)
    if size is None:
        is_hub = isinstance(outside, Hub)
        size = size_at(f"hub:model:{name}@" if is_hub else str(path))
    if path is None:
        found.notes.append(
            f"{where}: {name} is not on this machine, so its first stage checks its files"
        )
    if size.guessed:
        found.notes.append(
            f"{where}: the size of {name} is a guess, which stops no run by its budget; times and "
            "costs may be far off until a stage is measured"
        )
    found.models.append(
        ModelFound(where, name, size.architecture, size.parameters, size.known_from, size.exact)
    )
    return set()


def _compare(name: str, model: Model, study: Study, found: Found, broken: set[str]) -> None:
    """Find target modules that the trained model lacks, or that have another shape in the model
    that the defence subtracts.
    """
    start = model.aligned if model.aligned.tuned is None else model.base
    other = model.unaligned or model.base
    trained = None if start is None else _folder_header(start, broken)
    if trained is None or study.train is None:
        return
    targets = model.train_settings(study.train).target_modules
    own = {key: shape for key, shape in trained.shapes.items() if _module(key) in targets}
    if trained.shapes and not own and targets:
        role = "aligned" if start is model.aligned else "base"
        linear = sorted({_module(key) for key, s in trained.shapes.items() if _is_linear(key, s)})
        found.faults.append(
            f"train.target_modules: {list(targets)}, and models.{name}.{role} "
            f"({trained.architecture}) has none of them; its modules are {', '.join(linear)}"
        )
    compared = None if other is None or other is start else _folder_header(other, broken)
    if compared is None or compared.quantised or trained.quantised:
        return
    for key, shape in own.items():
        if compared.shapes.get(key, shape) != shape:
            role = "base" if other is model.base else "unaligned"
            found.faults.append(
                f"models.{name}.{role}: {key} has the shape {compared.shapes[key]}, and "
                f"{shape} in the aligned model; both must be of one architecture and size"
            )
            return


def _folder_header(reference: ModelRef, broken: set[str]) -> ModelHeader | None:
    """The header of a model folder that is on this machine. GGUF files name their tensors
    otherwise.
    """
    path = path_of(reference)
    if path is None or str(path) in broken or reference.gguf is not None or path.is_file():
        return None
    return read_header(path)


def _module(tensor: str) -> str:
    """`q_proj` for `model.layers.0.self_attn.q_proj.weight`."""
    return tensor.rpartition(".")[0].rpartition(".")[2]


def _is_linear(tensor: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and any(part in f".{tensor}" for part in (".layers.", ".h."))


def _add_answers(jobs: Jobs, found: Found, now: Now) -> None:
    answers = _answers(jobs, now)
    found.faults += answers["faults"]
    found.notes += answers["notes"]
    for each in answers["lengths"]:
        found.add(TokenLengths(**each))


def _answers(jobs: Jobs, now: Now) -> dict[str, Any]:
    if "torch" in sys.modules:
        from ebbline.checks.with_models import answers_to  # imports torch, which is here already

        return asdict(answers_to(jobs, now))
    now("tokenizers and models")
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "ebbline.checks.with_models"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as check,
    ):
        assert check.stdin is not None and check.stdout is not None
        check.stdin.write(json.dumps(asdict(jobs)))
        check.stdin.close()
        for line in check.stdout:
            answer: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
            if "now" in answer:
                now(answer["now"])
            if "found" in answer:
                return dict(answer["found"])
        check.wait()
        errors.seek(0)
        reason = (errors.read().strip().splitlines() or ["no message"])[-1]
    raise ModelError(f"the models and chat templates could not be checked: {reason}")


def _stamp(study: Study) -> str | None:
    """A digest of the study and of the names, sizes and times of its files; None for a study
    without any.
    """
    outside = [reference for _, reference in references(study)]
    if not outside:
        return None
    files = []
    for reference in outside:
        if isinstance(reference, Local):
            try:
                path = reference.located()
            except PinError:
                return ""  # never remembered: the check names the file
            below = [path] if path.is_file() else sorted(path.rglob("*"))
            files += [_file_stamp(each) for each in below if each.is_file()]
    settings = study.model_dump(mode="json", exclude={"budget", "search", "hypothesis", "question"})
    versions = [f"{name} {version(name)}" for name in ("ebbline", "transformers", "tokenizers")]
    return digest({"checks": VERSION, "versions": versions, "study": settings, "files": files})


def _file_stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def _remembered(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []
