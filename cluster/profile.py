"""The cluster's profile: GPU prices, the place of the store, timeouts. It is read from
HOME/cluster.yaml; without that file every setting has its default.

Invariant: no setting here changes a result, so no key hashes it. Secrets come from the environment.
"""

from typing import Annotated

from pydantic import Field

from ebbline.tasks.specs import Count, Frozen, Number, Positive


class GpuType(Frozen):
    """Price and memory of one GPU type."""

    usd_per_hour: Annotated[Number, Field(ge=0.0)]
    memory_gb: Positive | None = None


class Profile(Frozen):
    """Settings of a cluster.

    gpus          GPU types by Ray's accelerator type (A100, H100, ...); `other`: all other types
    store         a folder, or the URL of an object store
    storage       the URL of Optuna's database
    address       the address of the Ray cluster
    tries         how often a lost stage is tried; the pause is `backoff_s` and doubles each time
    hang_after_s  a stage without progress for this long is cancelled
    cache_gb      the bound of a worker's copies of files from an object store
    pack          the most trainings on one GPU (1: no packing). Default: as many as fit in
                  `memory_gb`; without `memory_gb` each trains alone
    wandb_points  the most points with a W&B run of their own; the other points are rows of a table
                  in their training's run
    """

    store: str | None = None
    storage: str | None = None
    address: str = "local"
    gpus: dict[str, GpuType] = {}
    tries: Count = 3
    backoff_s: Positive = 5.0
    hang_after_s: Positive = 1800.0
    checkpoint_every_s: Positive = 60.0
    cache_gb: Positive = 100.0
    pack: Count | None = None
    wandb_points: Count = 500

    def price(self, gpu_type: str | None) -> float | None:
        """US dollars for one hour of this GPU type. None if neither it nor `other` has a price."""
        found = self.gpus.get(gpu_type or "other", self.gpus.get("other"))
        return None if found is None else found.usd_per_hour
