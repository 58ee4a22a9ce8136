"""Computes the keys of stages from their inputs' contents, and finds stages in the store."""

from collections.abc import Callable

from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.tasks.identity import digest
from ebbline.tasks.stage import Input, Part, Source, Stage, key_payload


def contents_of(
    stage: Stage, artifact: Callable[[Stage], Artifact | None]
) -> dict[str, str] | None:
    """Input -> content digest; None while an input is not done."""
    contents: dict[str, str] = {}
    for name, item in stage.inputs.items():
        content = content_of(item, artifact)
        if content is None:
            return None
        contents[name] = content
    return contents


def content_of(item: Input, artifact: Callable[[Stage], Artifact | None]) -> str | None:
    """The content digest of an input; None while it is not done."""
    if isinstance(item, Source):
        return item.content
    found = artifact(item.stage if isinstance(item, Part) else item)
    if found is None:
        return None
    return found.content_of(item.path) if isinstance(item, Part) else found.content


class Resolver:
    """Finds the stages of a graph that are in the store, without running any."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._found: dict[str, Artifact | None] = {}

    def hashed(self, stage: Stage) -> dict[str, object] | None:
        """The object whose digest is the stage's key; None while an input is not done."""
        contents = contents_of(stage, self.artifact)
        return None if contents is None else key_payload(stage.spec, contents)

    def key(self, stage: Stage) -> str | None:
        payload = self.hashed(stage)
        return None if payload is None else digest(payload)

    def artifact(self, stage: Stage) -> Artifact | None:
        if stage.lineage not in self._found:
            key = self.key(stage)
            self._found[stage.lineage] = None if key is None else self.store.find(stage.kind, key)
        return self._found[stage.lineage]
