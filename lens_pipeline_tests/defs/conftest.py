"""A Dagster instance in files, and a webhook that people are told by."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import dagster as dg
import pytest


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """For what looks at its files, or at it from several threads."""
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as found:
        yield found


@dataclass
class Webhook:
    """`posted`, where it answers with 200; `answers` to the next posts, and then 200; `asked`: the
    paths that were requested without a text."""

    posted: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    answers: list[int] = field(default_factory=lambda: [503])

    @property
    def texts(self) -> list[str]:
        return [told["text"] for told in self.posted]


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    """A real server, at LENS_WEBHOOK_URL and LENS_HEARTBEAT_URL."""
    found = Webhook()

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            answer = found.answers.pop(0) if found.answers else 200
            if answer == 200:
                found.posted.append(json.loads(content))
            self.send_response(answer)
            if answer == 302:
                self.send_header("Location", "/login")
            self.end_headers()

        def do_GET(self) -> None:
            found.asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    address = f"http://127.0.0.1:{server.server_port}/hooks/t0ps3cret"
    monkeypatch.setenv("LENS_WEBHOOK_URL", address)
    monkeypatch.setenv("LENS_HEARTBEAT_URL", address.replace("hooks", "beats"))
    yield found
    server.shutdown()
    thread.join()
    server.server_close()
