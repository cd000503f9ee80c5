"""Several files at a time: threads that transfer them, or bring what is needed next."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from lens_pipeline.progress import progress_bar
from lens_pipeline.shards.manifest import Listed

T = TypeVar("T")
R = TypeVar("R")
AT_A_TIME = 8  # transfers
IN_MEMORY = 10**9  # bytes of objects that are fetched


def at_a_time(n_bytes: int) -> int:
    """How many transfers, of which each keeps so many bytes in memory."""
    return max(1, min(AT_A_TIME, IN_MEMORY // max(1, n_bytes)))


def transfer(
    files: Sequence[Listed],
    one: Callable[[Listed], T],
    what: str,
    at_a_time: int = AT_A_TIME,
) -> list[T]:
    """What `one` gives for each file, several at a time; where one fails, no more are begun.

    what: they are doing, for the progress bar.
    """
    total = sum(listed.bytes for listed in files)
    with (
        progress_bar(total=total, desc=what, unit="B", unit_scale=True) as progress,
        ThreadPoolExecutor(at_a_time) as pool,
    ):

        def told(listed: Listed) -> T:
            done = one(listed)
            progress.update(listed.bytes)
            return done

        return list(pool.map(told, files))  # which cancels the others where one fails


def ahead_of(items: Iterable[T], get: Callable[[T], R], at_a_time: int) -> Generator[R, None, None]:
    """What `get` gives of each item, in their order, begun before it is asked for: so many at a
    time, by threads that no end of the process waits for. Errors come in their item's place."""
    tasks: queue.SimpleQueue[tuple[T, Future[R]] | None] = queue.SimpleQueue()

    def work() -> None:
        while (task := tasks.get()) is not None:
            item, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(get(item))
            except BaseException as problem:  # noqa: BLE001 - whoever waits for it is told
                future.set_exception(problem)

    for _ in range(at_a_time):
        threading.Thread(target=work, daemon=True).start()
    begun: deque[Future[R]] = deque()
    try:
        for item in items:
            begun.append(Future())
            tasks.put((item, begun[-1]))
            if len(begun) > at_a_time:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
        for _ in range(at_a_time):
            tasks.put(None)
