"""The checks that need tokenizers and models' code, in a process that may import torch.

    python -P -m ebbline.checks.with_models    standard input: a list of jobs as JSON

Standard output has a line of JSON before each check, {"now": "..."}, and at the end {"found": ...}.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from ebbline.checks.found import TokenLengths
from ebbline.checks.jobs import Jobs, ModelJob, SetJob, TaskJob
from ebbline.sweeps.study.suites import Suite, prompts_of
from ebbline.tasks.chat.probes import probe, require_trainable
from ebbline.tasks.chat.template import encode_prompts
from ebbline.tasks.chat.training_rows import encode, unsupported
from ebbline.tasks.data.conversations import order_of, read_conversations
from ebbline.tasks.data.formats.chats import Conversation
from ebbline.tasks.errors import DataError, EbblineError, ModelError
from ebbline.tasks.headers.model_header import read_header
from ebbline.tasks.models.convert import save_tokenizer_of
from ebbline.tasks.models.loading import load_tokenizer
from ebbline.tasks.models.model_folder import require_loadable
from ebbline.tasks.models.weights import Checkpoint
from ebbline.tasks.paths import check_named_files
from ebbline.tasks.specs import Chat

NAMED = 3  # rows that a message names
MOST = 20_000  # rows of a set that are rendered


@dataclass
class Answers:
    """What the jobs found."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lengths: list[TokenLengths] = field(default_factory=list)


def answers_to(jobs: Jobs, now: Callable[[str], None]) -> Answers:
    """Do the jobs in order; `now` is called with what is checked next."""
    with _quiet():
        return _answers(jobs, now)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers shows a bar and a report for each model, though it loads no weights here."""
    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def _answers(jobs: Jobs, now: Callable[[str], None]) -> Answers:
    found = Answers()
    whole: set[str] = set()
    for job in jobs.models:
        now(f"{job.where}: {job.path}")
        try:
            if job.path not in whole:
                _require_model(job)
                whole.add(job.path)
            if job.chat is not None:
                tokenizer = _tokenizer(job)
                for each in job.sets:
                    now(f"{each.where} with the tokenizer of {job.where}")
                    _check_set(each, job, tokenizer, found)
        except EbblineError as error:
            found.faults.append(f"{job.where}: {error}")
        except Exception as error:  # noqa: BLE001  # of a library; a stage may well do without it
            found.notes.append(f"{job.where}: could not be checked ({type(error).__name__})")
    for task in jobs.tasks:
        now(f"{task.where}: {task.task}")
        try:
            _check_task(task)
        except EbblineError as error:
            found.faults.append(f"{task.where}: {error}")
    return found


def _require_model(job: ModelJob) -> None:
    path = Path(job.path)
    if not path.is_dir():
        return  # the driver has read the header of a GGUF file
    if job.loaded:
        require_loadable(
            AutoModelForSequenceClassification if job.classifier else AutoModelForCausalLM, path
        )
    else:
        check_named_files(path)
        Checkpoint(path).require_whole()


def _tokenizer(job: ModelJob) -> Any:
    """The tokenizer of a model, as a stage would load it."""
    path, chat = Path(job.path), Chat.model_validate(job.chat)
    if path.is_dir():
        tokenizer = load_tokenizer(path, chat, job.checked)
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer_of(path, Path(folder))
            tokenizer = load_tokenizer(Path(folder), chat, job.checked)
    rows = read_header(path).embeddings
    if rows is not None and len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, and the model has embeddings "
            f"for {rows}; use the tokenizer that belongs to the model"
        )
    if job.trains:
        require_trainable(tokenizer)
    return tokenizer


def _check_set(job: SetJob, model: ModelJob, tokenizer: Any, found: Answers) -> None:
    try:
        if job.measure is None:
            _check_training(job, model, tokenizer, found)
        else:
            _check_prompts(job, model, tokenizer, found)
    except EbblineError as error:
        found.faults.append(f"{job.where}: {error}")


def _check_training(job: SetJob, model: ModelJob, tokenizer: Any, found: Answers) -> None:
    rows = read_conversations(Path(job.path))
    _require_supported(rows, model, job, tokenizer)
    used = sorted({i for seed in job.seeds for i in order_of(len(rows), seed)[: job.needed]})
    lengths, unknown, broken = [], 0, list[tuple[int, str]]()
    for index in used[:MOST]:
        try:
            ids, labels = encode(rows[index], tokenizer, sys.maxsize)
        except DataError as error:
            broken.append((index + 1, str(error)))
            continue
        lengths.append(len(ids))
        unknown += _has_unknown(tokenizer, ids)
        if all(label == -100 for label in labels[: job.max_tokens]):
            broken.append(
                (
                    index + 1,
                    f"its prompt fills train.max_tokens={job.max_tokens}, so no token of the "
                    "answer is left to learn; raise train.max_tokens, or remove the row",
                )
            )
    for number, reason in broken[:NAMED]:
        found.faults.append(f"{job.where}: {job.path}: conversation {number}: {reason}")
    if len(broken) > NAMED:
        found.faults.append(f"{job.where}: {len(broken) - NAMED} more conversations like these")
    if len(used) > MOST:
        found.notes.append(f"{job.where}: the first {MOST} of {len(used)} rows were tokenised")
    _note_unknown(job, model, unknown, len(lengths), found)
    _add(job, lengths, found)


def _require_supported(
    rows: list[Conversation], model: ModelJob, job: SetJob, tokenizer: Any
) -> None:
    facts = probe(tokenizer)
    lacking = [names for turns in rows if (names := unsupported(facts, turns))]
    if lacking:
        raise DataError(
            f"the chat template of {model.where} in {model.path} does not support "
            f"{' and '.join(sorted({name for names in lacking for name in names}))}, and "
            f"{len(lacking)} of the {len(rows)} conversations in {job.path} have them. Leave them "
            "out of the data, or use a template that has them"
        )


def _check_prompts(job: SetJob, model: ModelJob, tokenizer: Any, found: Answers) -> None:
    suite: Any = TypeAdapter[Any](Suite).validate_json(json.dumps(job.measure))
    prompts = prompts_of(suite, Path(job.path)).prompts
    rows = encode_prompts(tokenizer, [each.text for each in prompts])
    lengths = [len(ids) for ids in rows]
    longest = max(range(len(rows)), key=lengths.__getitem__)
    if lengths[longest] > job.max_tokens:
        raise DataError(
            f"{prompts[longest].where} has {lengths[longest]} tokens with the tokenizer of "
            f"{model.where}, and max_new_tokens={suite.max_new_tokens} leaves room for "
            f"{job.max_tokens}; shorten or remove it"
        )
    positions = read_header(Path(model.path)).numbers.get("positions")
    if positions is not None and lengths[longest] + suite.max_new_tokens > positions:
        found.notes.append(
            f"{job.where}: {prompts[longest].where} has {lengths[longest]} tokens; with "
            f"max_new_tokens={suite.max_new_tokens} that is beyond the {positions} positions of "
            f"{model.where}"
        )
    _note_unknown(job, model, sum(_has_unknown(tokenizer, ids) for ids in rows), len(rows), found)
    _add(job, lengths, found)


def _add(job: SetJob, lengths: list[int], found: Answers) -> None:
    if lengths:
        cut = sum(length > job.max_tokens for length in lengths)
        found.lengths.append(TokenLengths(job.where, max(lengths), job.max_tokens, cut))


def _has_unknown(tokenizer: Any, ids: list[int]) -> bool:
    unknown = tokenizer.unk_token_id
    # Some tokenizers use one token as unknown and as the end.
    return unknown is not None and unknown != tokenizer.eos_token_id and unknown in ids


def _note_unknown(job: SetJob, model: ModelJob, unknown: int, rows: int, found: Answers) -> None:
    if unknown:
        found.notes.append(
            f"{job.where}: {unknown} of {rows} rows have text that is not in the vocabulary of "
            f"{model.where}"
        )


def _check_task(job: TaskJob) -> None:
    from ebbline.tasks.measuring.lm_tasks.sources import tasks_of  # takes seconds

    tasks_of(job.task, Path(job.path))


def _jobs(text: str) -> Jobs:
    read = json.loads(text)
    models = [
        ModelJob(**{**each, "sets": tuple(SetJob(**own) for own in each["sets"])})
        for each in read["models"]
    ]
    return Jobs(tuple(models), tuple(TaskJob(**each) for each in read["tasks"]))


def _show(what: str) -> None:
    print(json.dumps({"now": what}), flush=True)


if __name__ == "__main__":
    print(json.dumps({"found": asdict(answers_to(_jobs(sys.stdin.read()), _show))}), flush=True)
