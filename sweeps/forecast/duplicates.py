"""Adapters that will come out the same: two settings of a defence's knobs with one outcome give one
adapter, which is measured once.

Where an adapter is measured, so are its twins known. Elsewhere the store's defended adapters say
how many are to be expected.
"""

import math

from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.state.todo import Todo
from ebbline.tasks.defences.defence import Outcome
from ebbline.tasks.defences.in_use import DEFENCE
from ebbline.tasks.stage import stage_of


def twins(found: Todo, store: Store, distinct: float) -> frozenset[str]:
    """The ids of stages that read from an adapter that is expected to equal an earlier one, and so
    are expected not to run.

    `distinct` is the share of defended adapters that equal no earlier one, for those that are not
    measured.
    """
    resolver = Resolver(store)
    masks: set[tuple[str, Outcome]] = set()
    unknown, same, behind = 0, set[str](), set[str]()
    for missing in found.missing.values():
        spec = missing.stage.spec
        if spec.KIND != DEFENCE.makes.KIND:
            if any(above in same or above in behind for above in missing.above):
                behind.add(missing.id)
            continue
        projection = stage_of(missing.stage.inputs["projection"])
        artifact = None if projection is None else resolver.artifact(projection)
        if artifact is None:
            unknown += 1
            twin = math.floor(unknown * (1 - distinct)) > math.floor((unknown - 1) * (1 - distinct))
        else:
            outcome = DEFENCE.outcome(DEFENCE.knobs(spec, {}), [DEFENCE.measured(artifact.file)])
            if outcome is None:  # more modules than it has: this stage will fail and say so
                continue
            mask = artifact.key, outcome
            twin = mask in masks
            masks.add(mask)
        if twin:
            same.add(missing.id)
    return frozenset(behind)
