"""Stopping W&B's own service process, which its client starts beside this one."""

import logging

import psutil
import wandb

NAME = "wandb-core"
_log = logging.getLogger(__name__)


def stop_service() -> None:
    """Ends the service of this process at once. The next run starts another one. What the service
    has not sent yet is lost, so its runs have to be shown again from their last known row.
    """
    for child in psutil.Process().children():
        if child.name().startswith(NAME):
            child.kill()
            child.wait(10)
    try:
        wandb.teardown()
    except Exception as error:  # noqa: BLE001  # it says goodbye to a process that has ended
        _log.info("W&B's service was stopped: %s", error)
