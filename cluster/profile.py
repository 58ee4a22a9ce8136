"""The cluster's profile: what its GPUs cost, where its store lies, how patient to be.
HOME/cluster.yaml, or all defaults.

Nothing in it can change a result, so no key hashes it. It holds no secret: those come from the
environment.
"""

from typing import Annotated

from pydantic import Field

from ebbline.tasks.specs import Count, Frozen, Number, Positive


class GpuType(Frozen):
    """One type of GPU: what an hour of it costs, and what it holds."""

    usd_per_hour: Annotated[Number, Field(ge=0.0)]
    memory_gb: Positive | None = None


class Profile(Frozen):
    """`gpus` go by Ray's accelerator type (A100, H100, ...); the type `other` stands for all that
    are not named.

    `store` is a folder or an object store's URL, `storage` Optuna's database URL, `address` Ray's.
    A stage that is lost is tried `tries` times, waiting `backoff_s` and twice as long each time;
    one without a sign of life for `hang_after_s` is cancelled. Workers keep at most `cache_gb` of
    what they fetched from an object store. At most `pack` trainings share a GPU (1: none do); when
    it is not given, as many as fit where `memory_gb` is known, and where it is not, each trains
    alone. At most `wandb_points` points of a study are runs of their own on W&B; the others are
    rows of a table in their training's run.
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
        """Dollars for an hour of a GPU of this type; None when neither it nor `other` has a
        price.
        """
        found = self.gpus.get(gpu_type or "other", self.gpus.get("other"))
        return None if found is None else found.usd_per_hour
