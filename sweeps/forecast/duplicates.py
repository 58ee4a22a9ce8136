"""Adapters that will come out the same: two thresholds with the same modules below them give one
adapter, which is measured once.

Where an adapter's cosines are known, so are its twins. Elsewhere the store's applied adapters say
how many are to be expected.
"""

import math

from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.state.todo import Todo
from ebbline.tasks.defences.gate import chosen, read_rows
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.specs import ApplySpec, ProjectSpec
from ebbline.tasks.stage import stage_of


def twins(found: Todo, store: Store, distinct: float) -> frozenset[str]:
    """The ids of stages that read from an adapter that is expected to equal an earlier one, and so
    are expected not to run.

    `distinct` is the share of applied adapters that equal no earlier one, for those whose cosines
    are not known.
    """
    resolver = Resolver(store)
    masks: set[tuple[str, frozenset[str]]] = set()
    unknown, same, behind = 0, set[str](), set[str]()
    for missing in found.missing.values():
        spec = missing.stage.spec
        if not isinstance(spec, ApplySpec):
            if any(above in same or above in behind for above in missing.above):
                behind.add(missing.id)
            continue
        projection = stage_of(missing.stage.inputs["projection"])
        artifact = None if projection is None else resolver.artifact(projection)
        if artifact is None:
            unknown += 1
            twin = math.floor(unknown * (1 - distinct)) > math.floor((unknown - 1) * (1 - distinct))
        else:
            try:
                rows = read_rows(artifact.file(ProjectSpec.COSINES))
                mask = artifact.key, chosen(rows, spec.threshold, spec.modules)
            except ProjectionError:  # more modules than it has: this stage will fail and say so
                continue
            twin = mask in masks
            masks.add(mask)
        if twin:
            same.add(missing.id)
    return frozenset(behind)
