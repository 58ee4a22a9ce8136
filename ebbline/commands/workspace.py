"""`ebbline wandb-workspace`: make a study's W&B workspace and report, and remember where they are,
so that they are made once.
"""

import json
from dataclasses import asdict

from ebbline.analysis.wandb.runs import chosen_mode
from ebbline.analysis.wandb.workspace import Made, make
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.files import write_whole


def make_workspace(view: StudyView, entity: str | None, as_json: bool) -> None:
    """Raises StudyError when nobody is logged in, or W&B refuses."""
    study, home = view.study, view.home
    if chosen_mode() != "online":
        raise StudyError(
            f"a workspace of {study.study!r} is made on W&B's server, and WANDB_MODE says "
            "otherwise or nobody is logged in;"
            f" `wandb login` (or WANDB_API_KEY), then `ebbline sync {study.study}` and this command"
        )
    path = view.folder / "wandb" / "workspace.json"
    before = Made(**json.loads(path.read_text())) if path.exists() else None
    try:
        made = make(study, home.profile, entity, before)
    except StudyError as error:
        raise StudyError(
            f"{error}. If those made before were deleted on W&B, delete {path}"
            if before
            else str(error)
        ) from error
    write_whole(path, lambda fresh: fresh.write_text(json.dumps(asdict(made), indent=1)))
    if as_json:
        print(json.dumps(asdict(made), indent=1))
        return
    print(f"workspace  {made.workspace}\nreport     {made.report}")
