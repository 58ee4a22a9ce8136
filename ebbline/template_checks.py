"""Before a study runs: do its local models' chat templates do what its stages need?

The checks run in a process of their own (`python -m ebbline.template_checks`), because reading a
tokenizer imports torch, which a driver does not. Standard input is a list of Asked as JSON,
standard output a list of error messages. Models and data on the hub are checked by the first stage
that reads them.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ebbline.sweeps.study.references import ModelRef
from ebbline.sweeps.study.study import Study
from ebbline.tasks.chat.probes import probe, require_trainable
from ebbline.tasks.chat.training_rows import unsupported
from ebbline.tasks.data.conversations import read_conversations
from ebbline.tasks.errors import EbblineError, ModelError
from ebbline.tasks.specs import Chat


@dataclass(frozen=True)
class Asked:
    """One template to check. `where` is the model's place in the study file. `checked` is false for
    a judge whose template takes no prompts; `pool` is the training data, empty for a judge.
    """

    where: str
    folder: str
    chat: dict[str, Any]
    checked: bool = True
    trains: bool = False
    pool: str = ""


def require_templates(study: Study) -> None:
    """Raises ModelError, with a line for each local model whose template cannot be used."""
    asked = list(_asked(study))
    if not asked:
        return
    check = subprocess.run(
        [sys.executable, "-P", "-m", "ebbline.template_checks"],
        input=json.dumps([asdict(each) for each in asked]),
        capture_output=True,
        text=True,
        check=False,
    )
    if check.returncode:
        reason = (check.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"the chat templates could not be checked: {reason}")
    faults = json.loads(check.stdout.splitlines()[-1])
    if faults:
        raise ModelError("\n".join(faults))


def _asked(study: Study) -> Iterator[Asked]:
    pool = None if study.data is None else study.data.pool.path
    for name, model in study.models.items():
        tuned = model.aligned.tuned
        start = model.aligned if tuned is None or model.base is None else model.base
        role = "aligned" if start is model.aligned else "base"
        for folder in _local(start):
            yield Asked(
                f"models.{name}.{role}",
                folder,
                model.chat.model_dump(),
                trains=study.train is not None,
                pool="" if pool is None else str(pool.located()),
            )
    for name, judge in study.judges.items():
        template = judge.settings.template
        if judge.model is not None and template in ("yes-no", "llama-guard"):
            for folder in _local(judge.model):
                yield Asked(
                    f"judges.{name}.model",
                    folder,
                    judge.settings.chat.model_dump(),
                    checked=template == "yes-no",
                )


def _local(reference: ModelRef) -> list[str]:
    return [] if reference.path is None else [str(reference.path.located())]


def fault(asked: Asked) -> str:
    """What is wrong with a template for its use; empty if nothing is."""
    from ebbline.tasks.models.loading import load_tokenizer  # imports torch

    try:
        tokenizer = load_tokenizer(
            Path(asked.folder), Chat.model_validate(asked.chat), asked.checked
        )
        if asked.trains:
            require_trainable(tokenizer)
        return _fault_of_data(asked, tokenizer) if asked.pool else ""
    except EbblineError as error:
        return f"{asked.where}: {error}"


def _fault_of_data(asked: Asked, tokenizer: Any) -> str:
    facts = probe(tokenizer)
    rows = read_conversations(Path(asked.pool))
    found = [names for turns in rows if (names := unsupported(facts, turns))]
    if not found:
        return ""
    return (
        f"{asked.where}: the chat template in {asked.folder} does not support "
        f"{' and '.join(sorted({name for names in found for name in names}))}, and {len(found)} "
        f"of the {len(rows)} conversations in {asked.pool} have them. Leave them out of the "
        "data, or use a template that has them"
    )


if __name__ == "__main__":
    messages = [fault(Asked(**each)) for each in json.load(sys.stdin)]
    sys.stdout.write(json.dumps([message for message in messages if message]) + "\n")
