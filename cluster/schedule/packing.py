"""Which trainings may be one pack, and how many of them a GPU of each type holds: what the
scheduler is told of them.

Nothing of it can change a key: members of a pack are committed as the stages they are.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ebbline.cluster.profile import Profile
from ebbline.cluster.store.artifacts import Artifact
from ebbline.cluster.store.resolver import contents_of
from ebbline.cluster.store.sources import HUB
from ebbline.tasks.errors import EbblineError
from ebbline.tasks.models.memory import most_packed, predictable
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Input, Part, Source, Stage, stage_of
from ebbline.tasks.training.packs import pack_name

MOST = 64  # members of a pack, however small they are: past it the matrix products are large enough
Shares = Mapping[str | None, float]  # GPU type -> the share of what the base leaves of such a GPU
_log = logging.getLogger(__name__)


class Packing:
    """Packs by the profile's `pack` and its GPUs' `memory_gb`. `artifact` says what an input's
    stage has made.
    """

    def __init__(self, profile: Profile, artifact: Callable[[Stage], Artifact | None]) -> None:
        self._profile, self._artifact = profile, artifact
        self._known: dict[str, tuple[str, dict[str | None, float]]] = {}
        self._shares: dict[tuple[str, int, str | None], float] = {}
        self._configs: dict[str, dict[str, Any] | None] = {}

    def of(self, stage: Stage, key: str, types: frozenset[str | None]) -> tuple[str, Shares]:
        """(the name that all have which may be packed with it, its share by GPU type); nothing for
        what is trained alone.

        `stage` is one whose inputs are done, so that its key is known.
        """
        if not isinstance(stage.spec, TrainSpec) or self._profile.pack == 1:
            return "", {}
        if key not in self._known:
            self._known[key] = pack_name(stage.spec, contents_of(stage, self._artifact) or {}), {}
        name, shares = self._known[key]
        if name:
            for gpu in (
                types - shares.keys()
            ):  # what else a pack's members differ in takes no memory
                like = (name, stage.spec.rank, gpu)
                if like not in self._shares:
                    self._shares[like] = self._share(stage, stage.spec, gpu)
                shares[gpu] = self._shares[like]
        return name, shares

    def _share(self, stage: Stage, spec: TrainSpec, gpu: str | None) -> float:
        most = self._profile.pack
        found = self._profile.gpus.get(gpu) if gpu is not None else None
        if found is None or found.memory_gb is None:
            return (
                1.0 if most is None else 1 / most
            )  # nobody knows what it holds: as many as the profile says
        config = self._config(stage.inputs["model"])
        if config is None or not predictable(config, spec):
            return 1.0
        return 1 / max(1, most_packed(config, spec, found.memory_gb, most or MOST))

    def _config(self, model: Input) -> dict[str, Any] | None:
        """A model's config.json; None, with a word of why, when it cannot be read here: its
        trainings run alone.
        """
        if model.lineage not in self._configs:
            try:
                self._configs[model.lineage] = json.loads(self._config_file(model).read_text())
            except (
                EbblineError,
                OSError,
                ValueError,
            ) as error:  # whoever loads the model says more, and a training alone is no fault
                _log.warning(
                    "no memory is predicted for packs on a model whose config.json cannot "
                    "be read: %s",
                    error,
                )
                self._configs[model.lineage] = None
        return self._configs[model.lineage]

    def _config_file(self, model: Input) -> Path:
        if isinstance(model, Source):
            if not model.location.startswith(HUB):
                return Path(model.location) / "config.json"
            from huggingface_hub import hf_hub_download  # only a study with hub models needs it

            repo_id, _, commit = model.location.split(":", 2)[2].partition("@")
            return Path(hf_hub_download(repo_id, "config.json", revision=commit))
        stage = stage_of(model)
        artifact = None if stage is None else self._artifact(stage)
        if artifact is None:
            raise RuntimeError("a training is to start before its model is there")
        return artifact.file(
            f"{model.path}/config.json" if isinstance(model, Part) else "config.json"
        )
