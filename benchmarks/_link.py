"""A network between a client and a server on this machine, slower than its memory."""

import asyncio
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

BLOCK = 2**17


class Link:
    """A context with a TCP relay at `url` in front of the server at `target`, through which at most
    so many MB (10^6 bytes) a second pass in each direction, over all connections together."""

    def __init__(self, target: str, mb_per_s: float) -> None:
        address = urlsplit(target)
        self._target, self._rate = (address.hostname, address.port), mb_per_s * 1e6
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._free = {"up": 0.0, "down": 0.0}  # when the next block may pass
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=BLOCK)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        await self._ended.wait()
        server.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(*self._target, limit=BLOCK)
        ways = self._pass(client, to_server, "up"), self._pass(server, to_client, "down")
        with suppress(asyncio.CancelledError):  # the link ends
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, way: str) -> None:
        try:
            while block := await source.read(BLOCK):
                now = self._loop.time()
                begins = max(now, self._free[way])
                self._free[way] = begins + len(block) / self._rate
                await asyncio.sleep(begins - now)
                to.write(block)
                await to.drain()
        finally:
            to.close()
