"""The object stores and the proxy that other tests rely on do what they say."""

import hashlib
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import psutil
import pytest
from botocore.exceptions import EndpointConnectionError, ReadTimeoutError

from lens_pipeline_tests.faulty_proxy import FaultyProxy
from lens_pipeline_tests.object_stores import GCSServer, S3Server, sign_in

Proxied = Callable[[S3Server | GCSServer], FaultyProxy]
CONTENT = bytes(range(250)) * 20_000  # 5 MB


def s3(server: S3Server, proxy: FaultyProxy | None = None, **options: Any) -> Any:
    """s3fs, straight or through a proxy."""
    address = proxy.url if proxy else None
    return fsspec.filesystem("s3", **server.storage_options(address), **options)


def gcs(server: GCSServer, proxy: FaultyProxy | None = None) -> Any:
    """gcsfs, straight or through a proxy."""
    return fsspec.filesystem("gs", **server.storage_options(proxy.url if proxy else None))


@pytest.fixture
def upload(gcs_bucket: str) -> str:
    """The path that puts the object `thing` without a client library."""
    return f"/upload/storage/v1/b/{gcs_bucket.removeprefix('gs://')}/o?uploadType=media&name=thing"


@pytest.fixture
def proxy(gcs_server: GCSServer, faulty_proxy: Proxied) -> FaultyProxy:
    """In front of GCS's server, where a request needs no signature."""
    return faulty_proxy(gcs_server)


def connect(proxy: FaultyProxy) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=20)


def status(proxy: FaultyProxy, *request: Any) -> int:
    """Of the answer to a request on a connection of its own."""
    connection = connect(proxy)
    try:
        connection.request(*request)
        answer = connection.getresponse()
        answer.read()
    finally:
        connection.close()
    return answer.status


def test_s3_gives_back_what_was_put_and_its_md5(s3_server: S3Server, s3_bucket: str) -> None:
    files = s3(s3_server)
    files.pipe_file(f"{s3_bucket}/folder/thing", CONTENT)
    assert files.cat_file(f"{s3_bucket}/folder/thing") == CONTENT
    assert files.info(f"{s3_bucket}/folder/thing")["size"] == len(CONTENT)
    etag = files.info(f"{s3_bucket}/folder/thing")["ETag"]
    assert etag.strip('"') == hashlib.md5(CONTENT).hexdigest()


def test_gcs_gives_back_what_was_put_and_its_md5(gcs_server: GCSServer, gcs_bucket: str) -> None:
    files = gcs(gcs_server)
    files.pipe_file(f"{gcs_bucket}/folder/thing", CONTENT)
    assert files.cat_file(f"{gcs_bucket}/folder/thing") == CONTENT
    found = files.info(f"{gcs_bucket}/folder/thing")
    assert found["size"] == len(CONTENT)
    assert found["md5Hash"] == b64encode(hashlib.md5(CONTENT).digest()).decode()


def test_s3_puts_on_condition(s3_server: S3Server, s3_bucket: str) -> None:
    files, thing = s3(s3_server), f"{s3_bucket}/thing"
    bucket = s3_bucket.removeprefix("s3://")

    def put(content: bytes, **condition: str) -> str:
        done = files.call_s3("put_object", Bucket=bucket, Key="thing", Body=content, **condition)
        return str(done["ETag"])

    first = put(b"first", IfNoneMatch="*")
    with pytest.raises(OSError, match="pre-conditions"):
        put(b"second", IfNoneMatch="*")
    put(b"third", IfMatch=first)
    with pytest.raises(OSError, match="pre-conditions"):
        put(b"fourth", IfMatch=first)
    assert files.cat_file(thing) == b"third"


def test_s3_refuses_a_wrong_secret(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, s3_server.environment(wrong=True))
    with pytest.raises(PermissionError, match="signature"):
        s3(s3_server).pipe_file(f"{s3_bucket}/thing", CONTENT)
    with pytest.raises(PermissionError):
        s3(s3_server).cat_file(f"{s3_bucket}/thing")


def test_who_may_only_read_reads_and_does_not_write(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3(s3_server).pipe_file(f"{s3_bucket}/thing", b"content")
    sign_in(monkeypatch, s3_server.environment(read_only=True))
    files = s3(s3_server)
    assert files.cat_file(f"{s3_bucket}/thing") == b"content"
    assert len(files.ls(s3_bucket)) == 1
    with pytest.raises(PermissionError, match="Access Denied"):
        files.pipe_file(f"{s3_bucket}/other", b"content")
    with pytest.raises(PermissionError, match="Access Denied"):
        files.rm_file(f"{s3_bucket}/thing")


def test_s3_makes_no_bucket_that_was_not_asked_for(s3_server: S3Server, s3_bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        s3(s3_server).pipe_file(f"{s3_bucket}-misspelt/thing", CONTENT)


def test_s3_keeps_its_objects_when_it_is_killed(s3_server: S3Server, s3_bucket: str) -> None:
    files = s3(s3_server)
    files.pipe_file(f"{s3_bucket}/thing", CONTENT)
    s3_server.kill()
    assert not s3_server.running
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(s3_server.url).port or 0)).close()
    s3_server.restart()
    assert files.cat_file(f"{s3_bucket}/thing") == CONTENT


def test_a_bucket_is_made_where_a_test_has_left_the_server_dead(s3_server: S3Server) -> None:
    s3_server.kill()
    s3_server.make_bucket(f"lens-{secrets.token_hex(8)}")
    assert s3_server.running


def test_gcs_keeps_its_objects_when_it_is_killed(gcs_server: GCSServer, gcs_bucket: str) -> None:
    files = gcs(gcs_server)
    files.pipe_file(f"{gcs_bucket}/thing", CONTENT)
    gcs_server.kill()
    gcs_server.restart()
    assert files.cat_file(f"{gcs_bucket}/thing") == CONTENT


def running(group: int) -> list[psutil.Process]:
    """The processes of a group, without those that have ended and wait to be counted out."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("S3Server", signal.SIGKILL), ("GCSServer", signal.SIGTERM), ("GCSServer", signal.SIGINT)],
)
@pytest.mark.usefixtures("s3_server", "gcs_server")  # skipped where they are not installed
def test_no_server_outlives_the_process_that_started_it(
    kind: str, sent: signal.Signals, tmp_path: Path
) -> None:
    code = f"""
import sys, time
from pathlib import Path
from lens_pipeline_tests.object_stores import {kind}
with {kind}(Path(sys.argv[1])) as server:
    print(server._process.pid, *server._leftovers(), flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "server")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        assert owner.stdout is not None
        pid, *leftovers = owner.stdout.readline().split()
        assert len(running(int(pid))) == 2  # the server, and the shell that watches over it
        owner.send_signal(sent)
        owner.wait(30)
    finally:
        owner.kill()
        owner.communicate()
    until = time.monotonic() + 10
    while (left := running(int(pid))) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left
    assert not [path for path in leftovers if Path(path).exists()]


@pytest.mark.usefixtures("gcs_server")
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = GCSServer(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", urlsplit(server.url).port or 0))
        with pytest.raises(RuntimeError, match="address already in use"):
            server.start()
    assert not server.running


def test_a_signature_holds_through_the_proxy(
    s3_server: S3Server, s3_bucket: str, faulty_proxy: Proxied, tmp_path: Path
) -> None:
    proxy = faulty_proxy(s3_server)
    files, thing = s3(s3_server, proxy), f"{s3_bucket}/thing"
    (tmp_path / "file").write_bytes(CONTENT * 3)
    files.put_file(str(tmp_path / "file"), thing, chunksize=6 * 2**20)  # in three parts
    assert files.cat_file(thing) == CONTENT * 3
    assert [line.split()[0] for line in proxy.seen[:5]] == ["POST", "PUT", "PUT", "PUT", "POST"]
    assert proxy.requests == len(proxy.seen) == 7
    assert proxy.faults == 0


def test_gcsfs_stays_on_the_way_through_the_proxy(
    gcs_server: GCSServer, gcs_bucket: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    files, thing = gcs(gcs_server, proxy), f"{gcs_bucket}/thing"
    (tmp_path / "file").write_bytes(CONTENT * 3)
    # The server names the address where an upload in parts goes on.
    files.put_file(str(tmp_path / "file"), thing, chunksize=6 * 2**20)
    assert sum("upload_id" in line for line in proxy.seen) == 3
    assert files.cat_file(thing) == CONTENT * 3


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError")])
def test_every_second_request_is_answered_with_an_error(
    status: int, code: str, s3_server: S3Server, s3_bucket: str, faulty_proxy: Proxied
) -> None:
    proxy = faulty_proxy(s3_server)
    proxy.every(2, status=status, only="^PUT")
    files = s3(s3_server, proxy)
    for name in "abc":
        files.pipe_file(f"{s3_bucket}/{name}", CONTENT)
    assert proxy.requests == 5  # the second and the fourth were made again
    assert proxy.faults == 2
    assert all(files.cat_file(f"{s3_bucket}/{name}") == CONTENT for name in "abc")
    proxy.every(1, status=status)
    # botocore tries again, and around it s3fs, where it is asked to slow down.
    once = s3(s3_server, proxy, config_kwargs={"retries": {"max_attempts": 0}})
    with pytest.raises(OSError) as problem:  # noqa: PT011 - its cause says more
        once.pipe_file(f"{s3_bucket}/d", CONTENT)
    assert problem.value.__cause__.response["Error"]["Code"] == code  # type: ignore[union-attr]
    proxy.pass_through()
    assert not once.exists(f"{s3_bucket}/d")


def test_gcsfs_tries_again_after_an_error(
    gcs_server: GCSServer, gcs_bucket: str, proxy: FaultyProxy
) -> None:
    files = gcs(gcs_server, proxy)
    proxy.every(2, status=503)
    for name in "ab":
        files.pipe_file(f"{gcs_bucket}/{name}", CONTENT)
    assert (proxy.requests, proxy.faults) == (3, 1)


def test_a_connection_goes_on_after_an_error(proxy: FaultyProxy, upload: str) -> None:
    proxy.every(2, status=503)
    connection = connect(proxy)
    statuses = []
    for _ in range(4):
        connection.request("POST", upload, CONTENT)
        answer = connection.getresponse()
        answer.read()
        statuses.append(answer.status)
    connection.close()
    assert statuses == [200, 503, 200, 503]


def test_a_connection_is_reset_in_the_middle_of_a_put(
    s3_server: S3Server, s3_bucket: str, faulty_proxy: Proxied
) -> None:
    proxy = faulty_proxy(s3_server)
    files, thing = s3(s3_server, proxy), f"{s3_bucket}/thing"
    proxy.reset_after(1_000_000, times=2)
    files.pipe_file(thing, CONTENT)
    assert (proxy.requests, proxy.faults) == (3, 2)
    assert files.cat_file(thing) == CONTENT
    proxy.reset_after(1_000_000, times=None)
    once = s3(s3_server, proxy, config_kwargs={"retries": {"max_attempts": 0}})
    with pytest.raises(EndpointConnectionError):
        once.pipe_file(f"{s3_bucket}/half", CONTENT)
    assert not once.exists(f"{s3_bucket}/half")  # which carries less, and passes


def test_a_connection_is_reset_in_the_middle_of_a_get(
    s3_server: S3Server, s3_bucket: str, faulty_proxy: Proxied
) -> None:
    proxy = faulty_proxy(s3_server)
    files, thing = s3(s3_server, proxy), f"{s3_bucket}/thing"
    files.pipe_file(thing, CONTENT)
    proxy.reset_after(1_000_000, times=3)
    assert files.cat_file(thing) == CONTENT
    assert proxy.faults == 3


def test_a_reset_comes_after_so_many_bytes(proxy: FaultyProxy, upload: str) -> None:
    assert status(proxy, "POST", upload, CONTENT) == 200
    proxy.reset_after(1_000_000)
    connection = connect(proxy)
    connection.request("GET", upload.replace("/upload", "").split("?")[0] + "/thing?alt=media")
    answer = connection.getresponse()
    received: list[int] = []
    with pytest.raises(ConnectionResetError):
        received.extend(iter(lambda: len(answer.read1(10_000)), 0))
    assert 0 < sum(received) <= 1_000_000
    proxy.reset_after(0)
    with pytest.raises(ConnectionResetError):
        status(proxy, "GET", "/storage/v1/b")
    assert status(proxy, "GET", "/storage/v1/b") == 200  # one reset was asked for
    assert (proxy.requests, proxy.faults) == (4, 2)


def test_requests_are_delayed(s3_server: S3Server, s3_bucket: str, faulty_proxy: Proxied) -> None:
    proxy = faulty_proxy(s3_server)
    proxy.delay(0.5)
    begun = time.monotonic()
    s3(s3_server, proxy).pipe_file(f"{s3_bucket}/thing", CONTENT)
    assert time.monotonic() - begun > 0.5
    assert (proxy.requests, proxy.faults) == (1, 1)


def test_a_stalled_request_is_never_answered(
    s3_server: S3Server, s3_bucket: str, faulty_proxy: Proxied
) -> None:
    proxy = faulty_proxy(s3_server)
    impatient = {"read_timeout": 0.5, "retries": {"max_attempts": 0}}
    files = s3(s3_server, proxy, config_kwargs=impatient)
    files.retries = 1
    proxy.stall()
    with pytest.raises(ReadTimeoutError):
        files.pipe_file(f"{s3_bucket}/thing", CONTENT)
    assert (proxy.requests, proxy.faults) == (1, 1)
    proxy.pass_through()
    files = s3(s3_server, proxy)
    assert not files.exists(f"{s3_bucket}/thing")
    files.pipe_file(f"{s3_bucket}/thing", CONTENT)
    assert files.cat_file(f"{s3_bucket}/thing") == CONTENT


def test_a_body_may_come_in_chunks(
    gcs_server: GCSServer, gcs_bucket: str, proxy: FaultyProxy, upload: str
) -> None:
    """As in `aws-chunked` uploads, of which nobody knows the length beforehand."""
    proxy.every(2, status=503)
    connection = connect(proxy)
    for expected in (200, 503):
        blocks = iter([CONTENT[:1000], CONTENT[1000:]])
        connection.request(
            *("POST", upload, blocks, {"Transfer-Encoding": "chunked"}), encode_chunked=True
        )
        answer = connection.getresponse()
        answer.read()
        assert answer.status == expected
    connection.close()
    assert gcs(gcs_server).cat_file(f"{gcs_bucket}/thing") == CONTENT


def test_a_server_that_is_down_looks_down_through_the_proxy(tmp_path: Path) -> None:
    with FaultyProxy(GCSServer(tmp_path).url) as proxy:
        with pytest.raises(ConnectionResetError):
            status(proxy, "GET", "/storage/v1/b")
        assert (proxy.requests, proxy.faults) == (1, 0)
