"""`pick --export --with-base`: the aligned model that an adapter was trained on, as a folder that
any library loads.

Invariants: only safetensors, and the tokenizer and configuration beside them, are copied. Each copy
equals the record of the store, or the pin of the study, before it is written anew without paths.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shlex import quote

from ebbline.analysis.paper.card import hub_base
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.study.points import Result, adapter_stage
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StoreError, StudyError
from ebbline.tasks.identity import digest_files, file_digest, folder_files
from ebbline.tasks.stage import Part, Source, stage_of

SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # weights, settings, tokenizer
PATHS = ("_name_or_path", "name_or_path")  # where libraries note the folder that they loaded


@dataclass(frozen=True)
class AlignedModel:
    """A model folder on this machine, with the recorded digest of each file."""

    folder: Path
    files: Mapping[str, str]

    def write(self, to: Path) -> None:
        """Copy the model. Raises StoreError for a copy that differs from its record."""
        for name, sha in self.files.items():
            if PurePosixPath(name).suffix not in SUFFIXES:
                continue
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, to / name)
            if file_digest(to / name) != sha:
                raise StoreError(
                    f"{self.folder / name} changed while it was copied, or its disk is damaged. "
                    "Nothing was exported"
                )
            if name.endswith(".json"):
                _without_paths(to / name)


def aligned_model(view: StudyView, result: Result, seed: int) -> AlignedModel:
    """The aligned model of a point: what ebbline made, or the user's own folder.

    Raises StudyError for a model on the hub, which the adapter names. Raises StoreError when its
    files are gone, and PinError when a local folder differs from its pin.
    """
    hub = hub_base(view.study, result.point)
    if hub is not None:
        raise StudyError(
            f"--with-base: the adapter's base is {hub.id} on the hub at {hub.commit}, and the "
            "export names it. Leave --with-base out; nothing was exported"
        )
    made = view.graph.stages_for(result.point)[f"{adapter_stage(result.point)}[seed={seed}]"]
    item = made.inputs["model"]
    if isinstance(item, Source):
        folder = Path(item.location)
        files = folder_files(folder)
        if digest_files(files) != item.content:
            raise StoreError(f"{folder} changed while it was read. Nothing was exported")
        return AlignedModel(folder, files)
    stage = stage_of(item)
    artifact = None if stage is None else Resolver(view.home.store).artifact(stage)
    if artifact is None or view.home.store.dropped(artifact):
        raise StoreError(
            "the store no longer has the aligned model. To make it again:\n  ebbline run "
            f"{quote(view.name)} --home {quote(str(view.home.root))}\nNothing was exported"
        )
    part = item.path if isinstance(item, Part) else ""
    for name in artifact.below(part):
        artifact.file(name)  # compares it with its record
    return AlignedModel(artifact.path / part, artifact.digests_below(part))


def _without_paths(file: Path) -> None:
    """Remove the folder that a library noted in a settings file: it is a path of this machine."""
    settings = json.loads(file.read_text("utf-8"))
    if isinstance(settings, dict) and set(PATHS) & settings.keys():
        kept = {name: value for name, value in settings.items() if name not in PATHS}
        file.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
