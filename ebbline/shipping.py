"""`pick --export`: write one adapter of the store and its model card, atomically. `--with-base`
adds the aligned model that it was trained on.

Invariant: the weights equal the store's record byte for byte, and the export holds no path of this
machine.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

from ebbline.analysis.paper.card import ALIGNED, base_name, card, hub_base
from ebbline.analysis.results.collect import baselines, prompt_sets
from ebbline.analysis.results.picks.floors import Pick
from ebbline.analysis.results.picks.picked import picked_json
from ebbline.base_model import aligned_model
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.state.outcome import changed_share
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import OF_TRAINING, Point, Result, adapter_stage, defence_of
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.defences.defence import SHARE_COLUMN
from ebbline.tasks.errors import Damaged, StoreError, StudyError
from ebbline.tasks.identity import file_digest

CONFIG, WEIGHTS, CARD, RECORD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "pick.json",
)


def ship(
    view: StudyView,
    found: Pick,
    seed: int,
    alone: Result,
    done: int,
    to: Path,
    seed_requested: bool,
    with_base: bool = False,
) -> dict[str, Any]:
    """Write the defended adapter of a pick into `to`, a new or empty folder; return the content of
    its pick.json. `with_base` writes the aligned model into `to`/aligned.

    `alone` is the point with the metrics of `seed` only. `seed_requested`: the user gave the seed.
    `done` is the number of finished points. Raises StudyError when `to` cannot be written, and
    StoreError when retention dropped the adapter or its files differ from the record.
    """
    study, name, home = view.study, view.name, view.home
    destination = _destination(to)
    result = found.result
    defence = defence_of(result.point)
    measures, makes = defence.measures.KIND, defence.makes.KIND
    adapter = _whole(home, makes, result.keys[f"{makes}[seed={seed}]"], name)
    files = adapter_files(adapter, defence.adapter_folder)
    stages = {
        part: home.store.open(part, result.keys[f"{part}[seed={seed}]"])
        for part in (*OF_TRAINING, measures)
        if f"{part}[seed={seed}]" in result.keys
    } | {makes: adapter}
    base = aligned_model(view, result, seed) if with_base else None
    share = changed_share(
        result.point, {f"{part}[seed={seed}]": stages[part] for part in (measures, makes)}
    )
    alone = replace(alone, changed_share=share)
    record = {
        "study": study.study,
        "seed": seed,
        "seed_asked_for": seed_requested,
        f"{SHARE_COLUMN}_of_seed": share,
        "weights_sha256": adapter.files[files[WEIGHTS]],
        "base": {
            **_base(study, result.point, with_base),
            "content_sha256": stages[adapter_stage(result.point)].hashed["inputs"]["model"],
        },
        **picked_json(study, found),
        "settings_of_stages": {part: artifact.hashed["spec"] for part, artifact in stages.items()},
    }
    aligned, prompts = baselines(view).get(result.point.model, {}), prompt_sets(view)
    text = card(
        study, found, seed, alone, done, stages, aligned, prompts, seed_requested, with_base
    )
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as scratch:
            fresh = Path(scratch) / "out"
            fresh.mkdir()
            for name, file in files.items():
                shutil.copyfile(adapter.file(file), fresh / name)
                _require_recorded(adapter, file, fresh / name)
            config = json.loads((fresh / CONFIG).read_text())
            named = {**config, **_base(study, result.point, with_base)}
            (fresh / CONFIG).write_text(json.dumps(named, indent=2, sort_keys=True))
            if base is not None:
                base.write(fresh / ALIGNED)
            (fresh / CARD).write_text(text, "utf-8")
            (fresh / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False))
            fresh.replace(destination)
    except OSError as error:
        raise StudyError(
            f"{to} cannot be written: {error}. Free disk space or give another folder; nothing "
            "was written there"
        ) from error
    return record


def _base(study: Study, point: Point, with_base: bool) -> dict[str, str | None]:
    """The base model in PEFT's configuration: the hub's model at its commit, the exported folder,
    or a name that no hub and no folder has.
    """
    hub = hub_base(study, point)
    return {
        # "./" keeps libraries from looking for a model of that name on the hub
        "base_model_name_or_path": f"./{ALIGNED}" if with_base else base_name(study, point),
        "revision": None if hub is None else hub.commit,
    }


def _whole(home: Home, kind: str, key: str, name: str) -> Artifact:
    """The defended adapter, with every file that its record names."""
    adapter = home.store.open(kind, key)
    dropped = home.store.dropped(adapter)
    if dropped:
        raise StoreError(
            f"the adapter {kind}/{key} has a record, but its tensors were dropped to save "
            f"space ({', '.join(sorted(dropped))}). To make"
            f" them anew:\n  ebbline store forget {kind} {key} --home "
            f"{quote(str(home.root))}\n  "
            f"ebbline run {quote(name)} --home {quote(str(home.root))}"
            "\nThis also reruns its training if that was dropped; both results must equal "
            "the measured ones. Nothing was exported"
        )
    for file in adapter.files:
        _require_recorded(adapter, file)
    return adapter


def adapter_files(adapter: Artifact, folder: str) -> dict[str, str]:
    """Name -> path in the artifact, of the files in the folder of an adapter."""
    prefix = f"{folder}/" if folder else ""
    return {path.removeprefix(prefix): path for path in adapter.files if path.startswith(prefix)}


def _require_recorded(adapter: Artifact, file: str, copy: Path | None = None) -> None:
    """Check a file of the adapter, or its `copy`."""
    try:
        whole = file_digest(copy or adapter.file(file)) == adapter.files[file]
    except Damaged:
        whole = False
    if not whole:
        raise StoreError(
            f"{file} of {adapter.kind}/{adapter.key} is not what its record says; `ebbline store "
            "verify --mend` moves it away and the next run makes it again. Nothing was exported"
        )


def _destination(to: Path) -> Path:
    destination = to.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise StudyError(f"{to} exists and is not an empty folder; give a new or empty folder")
    above = next(folder for folder in destination.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StudyError(f"cannot create {to}: {above} is not a folder that you may write to")
    return destination
