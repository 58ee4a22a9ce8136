"""Where the server of a backend lies, as the profile says it (`servers` in HOME/cluster.yaml).

The backend itself, NAME==VERSION, is in the Spec. Its place is never hashed: a measurement does not
depend on where it was computed. Secrets come from the environment.
"""

from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.specs import SERVED, Count, Frozen, Number

VLLM = "vllm=="
KEY = "EBBLINE_SERVER_KEY"
# Prints it. The package of another build of vLLM may have another name.
VERSION_OF_VLLM = """
import sys
from importlib.metadata import packages_distributions, version
found = packages_distributions().get("vllm")
print(version(found[0])) if found else sys.exit("no vLLM is installed there")
"""


class ServerPlace(Frozen):
    """Where a server lies: give `python` or `address`.

    python       the interpreter of an environment with vLLM. ebbline starts a server with it for
                 each batch of stages, on the GPUs that the batch holds, and ends it with the batch
    gpu_share    of each GPU's memory that the started server reserves
    cache_gb     memory for keys and values of a server that is started on a CPU
    address      the URL of a server that runs already, up to /v1
    models       for an address: a model's content digest (its first 12 digits or more) -> its name
                 at that server
    at_once      requests in flight; by default twice the batch size
    """

    python: Annotated[str, Field(min_length=1)] | None = None
    gpu_share: Annotated[Number, Field(gt=0.0, le=1.0)] = 0.9
    cache_gb: Count = 1
    address: str | None = None
    models: Mapping[Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")], str] = {}
    at_once: Count | None = None

    @field_validator("address")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            url = urlsplit(value)
            port = url.port
        except ValueError:
            raise ValueError("this address is no URL; write it as http://HOST:PORT/v1") from None
        if url.username or url.password or url.query:
            raise ValueError(
                f"the address of the server at {url.hostname} holds a user name, a key or a query; "
                f"put the key into the environment variable {KEY}"
            )
        if url.scheme not in ("http", "https") or not url.hostname or port == 0:
            raise ValueError(f"{value!r} is no http(s) URL; write it as http://HOST:PORT/v1")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _one_place(self) -> "ServerPlace":
        if (self.python is None) == (self.address is None):
            raise ValueError(
                "give `python`, the interpreter of an environment with vLLM, or `address`, the URL "
                "of a server that runs"
            )
        if self.models and self.address is None:
            raise ValueError(
                "`models` names the models at an `address`; a started server loads the model itself"
            )
        return self

    def name_of(self, content: str) -> str | None:
        """The name at the address of the model with this content digest."""
        return next(
            (name for digest, name in self.models.items() if content.startswith(digest)), None
        )


def require_backends(servers: Mapping[str, ServerPlace]) -> None:
    """Raise ValueError for a server of a profile whose name is no backend."""
    for backend, place in servers.items():
        if not SERVED.fullmatch(backend):
            raise ValueError(
                f"{backend!r} names no server with its version; write it as vllm==0.32.0"
            )
        if place.python is not None and not backend.startswith(VLLM):
            raise ValueError(
                f"ebbline starts vLLM only; start {backend} yourself and give its `address`"
            )


def is_version(backend: str, stated: str) -> bool:
    """Whether a server that states this version is the backend; a build's label may be left out."""
    return backend.partition("==")[2] in (stated, stated.partition("+")[0])


def given_at(place: str) -> ServerPlace:
    """A server as a command line names it: a URL, or the path of an interpreter."""
    return ServerPlace(address=place) if "://" in place else ServerPlace(python=place)


def place_of(backend: str, server: Mapping[str, object] | None) -> ServerPlace:
    """Where the backend lies. Raises EvaluationError if nothing says so."""
    if server is None:
        raise EvaluationError(missing(backend))
    return ServerPlace.model_validate(server)


def missing(backend: str) -> str:
    return (
        f"nothing says where the server {backend} lies; name it in HOME/cluster.yaml under "
        f"`servers`, with `python: PATH` or `address: URL`"
    )
