"""One server that measures a model: started with the interpreter of the profile and ended with the
batch of stages, or found at the profile's address.
"""

import contextlib
import secrets
from pathlib import Path
from typing import Any

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.served.client import Client
from ebbline.tasks.measuring.served.place import ServerPlace, is_version, place_of
from ebbline.tasks.measuring.served.starting import ServerProcess, started
from ebbline.tasks.measuring.served.wanted import Wanted
from ebbline.tasks.stage import Context


class Server:
    """A server that answers, with the model under the name `model`. `version` is the one that it
    states, None if it states none.
    """

    def __init__(
        self,
        wanted: Wanted,
        place: ServerPlace,
        client: Client,
        model: str,
        process: ServerProcess | None = None,
    ) -> None:
        self.wanted, self.client, self.model = wanted, client, model
        self._place, self._process = place, process
        self._adapters: dict[Path, str] = {}
        self.version: str | None = None

    def require_version(self) -> None:
        """Raise EvaluationError if it states another version than the backend's."""
        self.version = self.client.version()
        backend = self.wanted.backend
        if self.version is not None and not is_version(backend, self.version):
            name, short = backend.partition("==")[0], self.version.partition("+")[0]
            raise EvaluationError(
                f"the server of the backend {backend} states the version {self.version}; measure "
                f"with `backend: {name}=={short}`, or give the place of the other version"
            )

    def serves(self, wanted: Wanted) -> bool:
        """Whether it can measure this too, without another start."""
        own = self.wanted
        return own.loaded == wanted.loaded and (
            self._process is None or (self._process.is_running and wanted.fits_in(own))
        )

    def name_of(self, adapter: Path | None) -> str:
        """The name of the model with this adapter, which is loaded if it is not yet."""
        if adapter is None:
            return self.model
        if adapter not in self._adapters:
            name = f"{self.model}-{secrets.token_hex(4)}"
            self.client.load_adapter(name, adapter.resolve())
            self._adapters[adapter] = name
        return self._adapters[adapter]

    @property
    def at_once(self) -> int:
        """Requests to have in flight: enough that the next rows wait at the server."""
        return self._place.at_once or 2 * self.wanted.rows

    def forget(self, adapter: Path | None) -> None:
        """Let the server drop an adapter that is measured."""
        if adapter is not None and adapter in self._adapters:
            self.client.unload_adapter(self._adapters.pop(adapter))

    def record(self) -> dict[str, Any]:
        """What a measurement records of it."""
        return {"backend": self.wanted.backend, "states_version": self.version}

    def close(self) -> None:
        if self._process is None:
            for adapter in list(self._adapters):
                # The server may be gone, and with it the adapter
                with contextlib.suppress(EvaluationError):
                    self.forget(adapter)
        self.client.close()
        if self._process is not None:
            self._process.end()


def server_for(wanted: Wanted, ctx: Context) -> Server:
    """The server that this process keeps, if it serves what is wanted, else a new one. A started
    server has room for the adapters that the context names, and for what the one before it served.
    """
    place = place_of(wanted.backend, ctx.server)
    before: list[Wanted] = []

    def serves(server: Server) -> bool:
        before.append(server.wanted)
        return server.serves(wanted)

    def new() -> Server:
        if place.address is None:
            room = wanted.with_room_for(ctx.adapters)
            for earlier in before:
                room = room.and_also(earlier)
            client, name, process = started(room, place, ctx)
            server = Server(room, place, client, name, process)
        else:
            client, name = _found(wanted, place, ctx.contents.get("model", ""))
            server = Server(wanted, place, client, name)
        try:
            server.require_version()
        except EvaluationError:
            server.close()
            raise
        return server

    found: Server = ctx.residents.server(serves, new)
    return found


def _found(wanted: Wanted, place: ServerPlace, content: str) -> tuple[Client, str]:
    """The server at an address, and the model's name there. Raises EvaluationError if it does not
    have the model.
    """
    assert place.address is not None
    if wanted.quantisation != "none":
        raise EvaluationError(
            f"`quantisation: {wanted.quantisation}` cannot be asked of a server at an address; let "
            "ebbline start one (`python`), or use `quantisation: none`"
        )
    client = Client(place.address)
    models = client.models()
    name = place.name_of(content) or next(
        (name for name, root in models.items() if root and _same_folder(root, wanted.model)), None
    )
    if name is None or name not in models:
        known = f"; it has no {name!r}" if name else ""
        raise EvaluationError(
            f"nothing says which model of {place.address} is {wanted.model} (content "
            f"{content[:12] or 'not known'}){known}. It has {', '.join(models) or 'none'}: write "
            f'`models: {{"{content[:12] or "DIGEST"}": NAME}}` beside its address'
        )
    return client, name


def _same_folder(root: str, model: Path) -> bool:
    return Path(root).is_absolute() and Path(root).resolve() == model.resolve()
