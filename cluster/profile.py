"""The cluster's profile: GPU prices, the place of the store, timeouts, Slurm. It is read from
HOME/cluster.yaml; without that file every setting has its default.

Invariant: no setting here changes a result, so no key hashes it. Secrets come from the environment.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ebbline.tasks.measuring.served.place import ServerPlace, require_backends
from ebbline.tasks.specs import Count, Frozen, Number, Positive, Spec


class GpuType(Frozen):
    """Price and memory of one GPU type."""

    usd_per_hour: Annotated[Number, Field(ge=0.0)]
    memory_gb: Positive | None = None


AlertEvent = Literal["point_failed", "budget", "ended"]

DEFAULT_LEAD_S = 300
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
# A name that ends so, and a value that is neither a variable nor a path
_SECRET = re.compile(
    r"\b(\w*(?:TOKEN|KEY|PASSWORD|PASSWD|SECRET))=[\"']?[^\"'$/~\s]", re.IGNORECASE
)


def slurm_seconds(time: str) -> int:
    """The seconds of a time limit as Slurm reads it: MINUTES, MINUTES:SECONDS, HH:MM:SS, DAYS-HH,
    DAYS-HH:MM or DAYS-HH:MM:SS. Raises ValueError.
    """
    found = _TIME.fullmatch(time)
    if found is None:
        raise ValueError(f"{time!r} is not a time limit; write MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found["days"] is not None:
        return days * 86400 + first * 3600 + second * 60 + third
    if found["third"] is not None:
        return first * 3600 + second * 60 + third
    return first * 60 + second


def _number_as_text(value: object) -> object:
    # `memory: 64000` and `gpus_per_node: 4` are numbers in YAML, and text for Slurm.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_number_as_text), Field(pattern=r"^\S+$")]


class SlurmSettings(Frozen):
    """What `ebbline slurm` asks of Slurm. Fields that are None are left to the cluster's defaults.

    gpus_per_node  a number, or TYPE:NUMBER; default: what the study's largest model takes
    logical_gpus   GPUs of a node for a study on CPUs; then Slurm is asked for none
    cpus_per_node  default: two for each GPU of the node, and two more
    memory         of each node, such as 64G
    lead_s         how long before the time limit the run is interrupted; default 300, and at most
                   a quarter of the time
    requeues       the most times that the job requeues itself
    python         the interpreter on the nodes; default: the one that runs `ebbline slurm`
    sbatch         further options of sbatch, such as --constraint=a100
    setup          shell lines that each node needs first, such as `module load cuda`
    """

    partition: Text | None = None
    account: Text | None = None
    nodes: Count = 1
    gpus_per_node: Text | None = None
    logical_gpus: Count | None = None
    cpus_per_node: Count | None = None
    memory: Text | None = None
    time: str | None = None
    lead_s: Annotated[int, Field(ge=1, le=65535)] | None = None  # Slurm's own limit
    requeues: Count = 100
    python: str | None = None
    sbatch: tuple[str, ...] = ()
    setup: Annotated[str, Field(max_length=1_000_000)] = ""

    @field_validator("time", mode="before")
    @classmethod
    def _time(cls, value: object) -> object:
        if isinstance(value, int):
            raise ValueError('YAML reads this time as a number; write it in quotes, as "24:00:00"')
        if isinstance(value, str):
            slurm_seconds(value)
        return value

    @field_validator("gpus_per_node")
    @classmethod
    def _gpus(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"(?:[^:\s]+:)?[1-9]\d*", value):
            raise ValueError(f"{value!r} must be a number or TYPE:NUMBER, such as 4 or a100:4")
        return value

    @field_validator("sbatch")
    @classmethod
    def _options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not option.startswith("-") or len(option.splitlines()) != 1:
                raise ValueError(f"{option!r} must be one option of sbatch, such as --exclusive")
        return value

    @model_validator(mode="after")
    def _whole(self) -> "SlurmSettings":
        if self.gpus_per_node is not None and self.logical_gpus is not None:
            raise ValueError("give gpus_per_node, or logical_gpus for a study on CPUs; not both")
        if self.time is not None and self.lead_s is not None:
            limit_s = slurm_seconds(self.time)
            if self.lead_s >= limit_s:
                raise ValueError(
                    f"lead_s is {self.lead_s}, which must be less than the time ({limit_s} s)"
                )
        for text in (*self.sbatch, self.setup):
            if found := _SECRET.search(text):
                raise ValueError(
                    f"{found[1]} has a value here, and others can read this script. Put it into a "
                    "file of mode 600, and write `source FILE` into setup"
                )
        return self

    @property
    def gpus(self) -> int:
        """GPUs of a node; 0 when they are not given."""
        if self.logical_gpus is not None:
            return self.logical_gpus
        return int((self.gpus_per_node or "0").rpartition(":")[2])

    @property
    def lead(self) -> int:
        """Seconds before the time limit at which the run is interrupted."""
        if self.lead_s is not None:
            return self.lead_s
        if self.time is None:
            return DEFAULT_LEAD_S
        return max(1, min(DEFAULT_LEAD_S, slurm_seconds(self.time) // 4))


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
    wandb_alerts  of which events W&B sends an alert: `point_failed`, `budget` (it stopped the
                  study), `ended`; default: of none
    slurm         what `ebbline slurm` asks of Slurm
    servers       where the server of a backend (NAME==VERSION) lies; see
                  ebbline.tasks.measuring.served.place
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
    wandb_alerts: tuple[AlertEvent, ...] = ()
    slurm: SlurmSettings = SlurmSettings()
    servers: dict[str, ServerPlace] = {}

    @field_validator("servers")
    @classmethod
    def _servers(cls, value: dict[str, ServerPlace]) -> dict[str, ServerPlace]:
        require_backends(value)
        return value

    def server_of(self, spec: Spec) -> dict[str, Any] | None:
        """Where the server of a stage's backend lies; None if it needs none or none is named."""
        found = self.servers.get(getattr(spec, "backend", ""))
        return None if found is None else found.model_dump(mode="json")

    def price(self, gpu_type: str | None) -> float | None:
        """US dollars for one hour of this GPU type. None if neither it nor `other` has a price."""
        found = self.gpus.get(gpu_type or "other", self.gpus.get("other"))
        return None if found is None else found.usd_per_hour
