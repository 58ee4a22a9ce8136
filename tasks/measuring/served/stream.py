"""One stream of requests to a server: as many in flight as keep it busy."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from ebbline.tasks.errors import Leaving

T = TypeVar("T")
A = TypeVar("A")
WAIT_S = 1.0  # between looks at whether the machine is about to go


def streamed(
    items: Iterable[T],
    request: Callable[[T], Callable[[], A] | None],
    at_once: int,
    leaving: Callable[[], bool],
    may_meet: Callable[[T, T], bool] = lambda one, other: True,
) -> Generator[tuple[T, A]]:
    """Each item with its answer, as the answers arrive. `request` makes an item's request; None
    leaves the item out. Items in flight together all `may_meet`, which is an equivalence.

    Raises what a request raises, when no other is in flight any more. Raises Leaving at once when
    the machine is about to go.
    """
    waiting = deque(items)
    in_flight: dict[Future[A], T] = {}
    pool = ThreadPoolExecutor(at_once)
    left = False
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < at_once:
                if not may_meet(waiting[0], next(iter(in_flight.values()), waiting[0])):
                    break
                item = waiting.popleft()
                if (asked := request(item)) is not None:
                    in_flight[pool.submit(asked)] = item
            done, _ = wait(in_flight, WAIT_S, FIRST_COMPLETED)
            if leaving():
                left = True
                raise Leaving("the machine is about to go; this stage had not ended")
            for answered in done:
                yield in_flight.pop(answered), answered.result()
    finally:
        pool.shutdown(wait=not left, cancel_futures=True)
