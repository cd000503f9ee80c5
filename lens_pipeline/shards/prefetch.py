"""The next batches while one is used: gathered by a thread, brought to a GPU beside its work."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Batch = dict[str, Tensor]
AHEAD = 2  # batches


def gathered_ahead(
    gather: Callable[[list[int]], Batch],
    places: Iterable[list[int]],
    stream: torch.cuda.Stream | None = None,
) -> Iterator[Batch]:
    """What `gather` makes of each of `places`, up to two before they are asked for.

    stream: of a GPU to have them on, where they are copied to from pinned memory.
    """

    def brought(wanted: list[int]) -> tuple[Batch, torch.cuda.Event | None]:
        batch = gather(wanted)
        if stream is None:
            return batch, None
        with torch.cuda.stream(stream):
            moved = {
                name: part.to(stream.device, non_blocking=True) for name, part in batch.items()
            }
            return moved, stream.record_event()

    def taken(future: Future[tuple[Batch, torch.cuda.Event | None]]) -> Batch:
        batch, arrived = future.result()
        if arrived is not None:
            now = torch.cuda.current_stream(batch["image"].device)
            now.wait_event(arrived)
            for part in batch.values():
                part.record_stream(now)
        return batch

    ahead: deque[Future[tuple[Batch, torch.cuda.Event | None]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for wanted in places:
            ahead.append(pool.submit(brought, wanted))
            if len(ahead) > AHEAD:
                yield taken(ahead.popleft())
        while ahead:
            yield taken(ahead.popleft())
