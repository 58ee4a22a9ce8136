"""Before a study runs: do its models' chat templates do what its stages need?

Models and data on the hub are checked by the first stage that reads them.
"""

import json
import subprocess
import sys
from collections.abc import Iterator

from ebbline.sweeps.study.study import ModelRef, Study
from ebbline.tasks.errors import ModelError
from ebbline.tasks.models.template_check import Asked


def require_templates(study: Study) -> None:
    """Raises ModelError, with a line for each local model whose template cannot be used."""
    asked = list(_asked(study))
    if not asked:
        return
    check = subprocess.run(
        [sys.executable, "-P", "-m", "ebbline.tasks.models.template_check"],
        input=json.dumps([each.as_json() for each in asked]),
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
    pool = study.data.pool.path
    for name, model in study.models.items():
        tuned = model.aligned.tuned
        start = model.aligned if tuned is None or model.base is None else model.base
        role = "aligned" if start is model.aligned else "base"
        yield from _local(
            f"models.{name}.{role}",
            start,
            chat=model.chat.model_dump(),
            trains=True,
            pool="" if pool is None else str(pool.located()),
        )
    for name, judge in study.judges.items():
        if judge.model is not None and judge.settings.template in ("yes-no", "llama-guard"):
            yield from _local(
                f"judges.{name}.model",
                judge.model,
                chat=judge.settings.chat.model_dump(),
                checked=judge.settings.template == "yes-no",
            )


def _local(where: str, reference: ModelRef, **settings: object) -> Iterator[Asked]:
    if reference.path is not None:
        yield Asked(where, str(reference.path.located()), **settings)  # type: ignore[arg-type]
