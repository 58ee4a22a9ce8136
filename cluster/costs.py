"""What stages take: measured by the store where it has run the like, a stated guess where it has not."""

import statistics
from collections import defaultdict
from collections.abc import Iterable

from cluster.store import Artifact, Store
from tasks.specs import KINDS, Spec

GUESS_S = {
    "language": 2.0,
    "organism": 60.0,
    "convert": 60.0,
    "data": 1.0,
    "train": 60.0,
    "subspace": 600.0,
    "project": 5.0,
    "apply": 1.0,
    "generate": 10.0,
    "judge": 30.0,
    "score": 1.0,
    "evaluate": 10.0,
}


class Estimates:
    """Seconds a stage is expected to run. `learn` takes in what has just been measured."""

    def __init__(self, store: Store) -> None:
        self._seen: dict[str, list[float]] = defaultdict(list)
        for kind in KINDS:
            self.learn(store.all(kind))

    def learn(self, artifacts: Iterable[Artifact]) -> None:
        for artifact in artifacts:
            seconds = float(artifact.provenance.get("seconds", 0.0))
            self._seen[artifact.kind].append(seconds)
            self._seen[_shape(artifact.kind, artifact.hashed["spec"])].append(seconds)

    def seconds(self, spec: Spec) -> float:
        """The median of the nearest like: the same suite or method first, then the same kind, then a guess."""
        for like in (_shape(spec.KIND, spec.model_dump(mode="json")), spec.KIND):
            if self._seen[like]:
                return statistics.median(self._seen[like])
        return GUESS_S[spec.KIND]


def _shape(kind: str, spec: dict[str, object]) -> str:
    detail = spec.get("method") or spec.get("task") or spec.get("template") or spec.get("size") or spec.get("max_new_tokens")
    return f"{kind}/{detail}"
