"""Check chat templates before the first stage of a study:

    python -m ebbline.tasks.models.template_check < templates.json

A process of its own, because reading a tokenizer imports torch, which a driver does not. The input
is a list of Asked as JSON. The output is a list of error messages, empty if all is well.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ebbline.tasks.data.chat_rows import unsupported
from ebbline.tasks.data.conversations import read_conversations
from ebbline.tasks.data.template_probes import probe, require_trainable
from ebbline.tasks.errors import EbblineError
from ebbline.tasks.specs import Chat


@dataclass(frozen=True)
class Asked:
    """One template to check. `where` is the model's place in the study file. `pool` is the training
    data of a model that is fine-tuned, empty for a judge.
    """

    where: str
    folder: str
    chat: dict[str, Any]
    checked: bool = True
    trains: bool = False
    pool: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def fault(asked: Asked) -> str:
    """What is wrong with a template for its use; empty if nothing is."""
    from ebbline.tasks.models.loading import load_tokenizer  # imports torch

    try:
        tokenizer = load_tokenizer(
            Path(asked.folder), Chat.model_validate(asked.chat), asked.checked
        )
        if asked.trains:
            require_trainable(tokenizer)
        if asked.pool:
            return _fault_of_data(asked, tokenizer)
    except EbblineError as error:
        return f"{asked.where}: {error}"
    return ""


def _fault_of_data(asked: Asked, tokenizer: Any) -> str:
    facts = probe(tokenizer)
    rows = read_conversations(Path(asked.pool))
    found = [names for turns in rows if (names := unsupported(facts, turns))]
    if not found:
        return ""
    return (
        f"{asked.where}: the chat template in {asked.folder} does not support "
        f"{' and '.join(sorted({name for names in found for name in names}))}, and {len(found)} "
        f"of the {len(rows)} conversations in {asked.pool} have them; leave them out of the "
        "data, or use a template that has them"
    )


if __name__ == "__main__":
    found = [fault(Asked(**each)) for each in json.load(sys.stdin)]
    sys.stdout.write(json.dumps([message for message in found if message]) + "\n")
