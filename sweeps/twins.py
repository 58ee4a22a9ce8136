"""Adapters that will come out the same: two thresholds with the same modules below them give one adapter, which is measured once.

Where an adapter's cosines are known, so are its twins. Elsewhere the store's applied adapters say how many are to be expected.
"""

import math

from cluster.resolver import Resolver
from cluster.store import Store
from sweeps.todo import Todo
from tasks.errors import ProjectionError
from tasks.gate import chosen, read_rows
from tasks.specs import ApplySpec, ProjectSpec
from tasks.stage import stage_of


def twins(found: Todo, store: Store, distinct: float) -> frozenset[str]:
    """The ids of stages that read from an adapter that is expected to equal an earlier one, and so are expected not to run.

    `distinct` is the share of applied adapters that equal no earlier one, for those whose cosines are not known.
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
                mask = artifact.key, chosen(read_rows(artifact.file(ProjectSpec.COSINES)), spec.threshold, spec.modules)
            except ProjectionError:  # more modules than it has: this stage will fail and say so
                continue
            twin = mask in masks
            masks.add(mask)
        if twin:
            same.add(missing.id)
    return frozenset(behind)
