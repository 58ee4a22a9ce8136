"""Computes which trainings may form a pack, and how many fit on a GPU of each type.

Invariant: packing changes no key, because each member of a pack is committed as its own stage.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ebbline.cluster.profile import Profile
from ebbline.cluster.store.artifacts import Artifact
from ebbline.cluster.store.resolver import contents_of
from ebbline.tasks.errors import EbblineError
from ebbline.tasks.headers.hub import HUB
from ebbline.tasks.models.memory import most_packed, predictable
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Input, Part, Source, Stage, stage_of
from ebbline.tasks.training.packs import pack_name

MOST = 64  # the most members of a pack; more do not make a GPU's matrix products more efficient
Shares = Mapping[str | None, float]  # GPU type -> share of the memory beside the base model
_log = logging.getLogger(__name__)


class Packing:
    """Packs by the profile's `pack` and its GPUs' `memory_gb`. `artifact` returns the artifact of
    an input's stage.
    """

    def __init__(self, profile: Profile, artifact: Callable[[Stage], Artifact | None]) -> None:
        self._profile, self._artifact = profile, artifact
        self._by_key: dict[str, tuple[str, dict[str | None, float]]] = {}
        self._shares: dict[tuple[str, int, bool, str | None], float] = {}
        self._configs: dict[str, dict[str, Any] | None] = {}

    def of(self, stage: Stage, key: str, types: frozenset[str | None]) -> tuple[str, Shares]:
        """(name of its pack, its share of a GPU by type); an empty name if it runs alone. Trainings
        with the same name may be packed.

        The inputs of `stage` must be done.
        """
        if not isinstance(stage.spec, TrainSpec) or self._profile.pack == 1:
            return "", {}
        if key not in self._by_key:
            self._by_key[key] = pack_name(stage.spec, contents_of(stage, self._artifact) or {}), {}
        name, shares = self._by_key[key]
        if name:
            # Members of a pack differ in memory only by their rank and by their moving average.
            for gpu in types - shares.keys():
                same_memory = (name, stage.spec.rank, stage.spec.ema_decay > 0, gpu)
                if same_memory not in self._shares:
                    self._shares[same_memory] = self._share(stage, stage.spec, gpu)
                shares[gpu] = self._shares[same_memory]
        return name, shares

    def forget(self, keys: Iterable[str]) -> None:
        """Forget trainings that are done."""
        for key in keys:
            self._by_key.pop(key, None)

    def _share(self, stage: Stage, spec: TrainSpec, gpu: str | None) -> float:
        most = self._profile.pack
        found = self._profile.gpus.get(gpu) if gpu is not None else None
        if found is None or found.memory_gb is None:
            return 1.0 if most is None else 1 / most  # the memory is unknown
        config = self._config(stage.inputs["model"])
        if config is None or not predictable(config, spec):
            return 1.0
        return 1 / max(1, most_packed(config, spec, found.memory_gb, most or MOST))

    def _config(self, model: Input) -> dict[str, Any] | None:
        """A model's config.json. None, with a warning, if it cannot be read here; then its
        trainings run alone.
        """
        if model.lineage not in self._configs:
            try:
                self._configs[model.lineage] = json.loads(self._config_file(model).read_text())
            # Only a warning: if the model is really damaged, the stage that loads it fails.
            except (EbblineError, OSError, ValueError) as error:
                _log.warning(
                    "trainings on a model run unpacked, because its config.json cannot be read: %s",
                    error,
                )
                self._configs[model.lineage] = None
        return self._configs[model.lineage]

    def _config_file(self, model: Input) -> Path:
        if isinstance(model, Source):
            if not model.location.startswith(HUB):
                return Path(model.location) / "config.json"
            from huggingface_hub import hf_hub_download  # a slow import, only for hub models

            repo_id, _, commit = model.location.split(":", 2)[2].partition("@")
            return Path(hf_hub_download(repo_id, "config.json", revision=commit))
        stage = stage_of(model)
        artifact = None if stage is None else self._artifact(stage)
        if artifact is None:
            raise RuntimeError("a training was scheduled before its model was done")
        return artifact.file(
            f"{model.path}/config.json" if isinstance(model, Part) else "config.json"
        )
