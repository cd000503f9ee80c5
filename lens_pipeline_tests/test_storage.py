"""Places: what LENS_STORAGE_OPTIONS says reaches the store; what names a table."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.locations import names_table, without_query
from lens_pipeline.storage import (
    FEW,
    READ_LIMIT,
    WORTH_LISTING,
    asking,
    filling,
    known_states,
    locate,
    states_of,
)
from lens_pipeline_tests.faulty_proxy import FaultyProxy
from lens_pipeline_tests.object_stores import S3Server, sign_in


@pytest.fixture
def requests_seen() -> Iterator[tuple[str, list[Any]]]:
    """(the address of a server that has nothing, the requests that have come to it)"""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


def ask(url: str, options: dict[str, Any]) -> Any:
    filesystem, path = locate(url, options)
    with suppress(FileNotFoundError):
        filesystem.cat_file(path)
    return filesystem


def test_the_state_of_a_file_is_known_where_its_store_tells_it(
    tmp_path: Path, s3_bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, s3_server.environment())
    options = {"endpoint_url": s3_server.url}
    bucket = locate(s3_bucket, options)[0]
    local = [f"{tmp_path}/{name}" for name in "ab"]
    (tmp_path / "a").write_bytes(b"pixels")
    os.utime(tmp_path / "a", (0, 0))
    first = known_states(local)
    assert first == known_states(local)
    assert first[local[1]] == "missing"
    # A file that is moved into place has the time of its content, and not that of its name.
    (tmp_path / "new").write_bytes(b"PIXELS")
    os.utime(tmp_path / "new", (0, 0))
    (tmp_path / "new").rename(tmp_path / "a")
    assert known_states(local)[local[0]] != first[local[0]]
    for place in ("{}", "{}/image"):  # in one folder, and each in a folder of its own
        remote = [f"{s3_bucket}/{place.format(f'{number:03d}')}" for number in range(FEW + 1)]
        for name in remote:
            bucket.pipe_file(name, b"pixels")
        found = known_states(remote, options)
        assert {*found} == {*remote}
        bucket.pipe_file(remote[7], b"PIXELS")
        # Of a store a file that is missing may be one that it keeps for others.
        again = known_states([*remote, f"{s3_bucket}/{place.format('missing')}"], options)
        assert again.keys() == found.keys()
        assert [name for name in remote if again[name] != found[name]] == [remote[7]]


def test_a_folder_is_filled_by_one_writer(tmp_path: Path) -> None:
    """What fails leaves what another has begun, and nothing of its own, and is told."""
    folder = tmp_path / "new"
    with filling(folder):
        (folder / "mine").touch()
        with pytest.raises(InputError, match=f"{folder}: exists and is not empty"), filling(folder):
            pass
    assert [path.name for path in folder.iterdir()] == ["mine"]

    other = tmp_path / "other"

    def fails() -> None:
        with filling(other):
            (other / "file").touch()
            (other / "folder" / "deep").mkdir(parents=True)
            raise KeyError("the problem")

    with pytest.raises(KeyError, match="the problem"):
        fails()
    assert [*other.iterdir()] == []


def test_a_file_of_a_web_server_is_told_from_a_later_one(tmp_path: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.npy"
        found = []
        for when in (1_000_000_000, 1_100_000_000):
            (tmp_path / "a.npy").write_bytes(b"pixels")
            os.utime(tmp_path / "a.npy", (when, when))
            found += states_of([url])
        few = [f"{url}?{number}" for number in range(FEW)]
        local = f"{tmp_path}/a.npy"
        assert {*known_states([*few, local])} == {*few, local}
        # More would have to be asked for one by one before anything is read.
        assert {*known_states([*few, url, local])} == {local}
        server.shutdown()
    assert found[0] != found[1]


def test_endpoint_region_and_who_pays_on_s3(
    requests_seen: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = requests_seen
    sign_in(monkeypatch, {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"})
    options = {
        "endpoint_url": url,
        "client_kwargs": {"region_name": "eu-west-3"},
        "requester_pays": True,
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }
    filesystem = ask("s3://bucket/lenses/manifest.json", options)
    assert seen
    assert seen[0].path.startswith("/bucket/lenses/manifest.json")
    assert seen[0].headers["x-amz-request-payer"] == "requester"
    assert "/eu-west-3/s3/" in seen[0].headers["Authorization"]
    # A setting of the client leaves the others as they are.
    assert filesystem.config_kwargs["read_timeout"] == READ_LIMIT


class Answered(Exception):  # noqa: N818 - as HTTP clients name theirs
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    "problem",
    [ConnectionError("reset"), TimeoutError(), OSError("SlowDown"), Answered(503), Answered(429)],
)
def test_what_may_be_over_in_a_while_is_the_stores_failure(problem: Exception) -> None:
    signed = "s3://b/c.csv?X-Amz-Signature=abc"
    named = pytest.raises(NoAnswerError, match=r"^s3://b/c\.csv\?\*\*\*: its store fails \(\w+")
    with named, asking(signed):
        raise problem
    with pytest.raises(type(problem)), asking("/data/c.csv"):
        raise problem


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_what_may_be_over_in_a_while_of_a_folder_is_no_fault_of_a_file(number: int) -> None:
    named = pytest.raises(NoAnswerError, match=r"^/data/c\.fits: cannot be read now")
    with named, asking("/data/c.fits"):
        raise OSError(number, os.strerror(number))


def test_a_file_that_may_be_read_at_last_is_another(tmp_path: Path) -> None:
    """Its time of change stays; to the administrator, who may read all, nothing changes."""
    file = tmp_path / "a.fits"
    file.write_bytes(b"pixels")
    nobody = 65534
    shared = [folder for folder in tmp_path.parents if folder.stat().st_uid == os.getuid()]
    modes = {folder: folder.stat().st_mode for folder in (tmp_path, *shared)}
    me = os.getresuid()
    try:
        for folder, mode in modes.items():
            folder.chmod(mode | 0o755)
        file.chmod(0)
        if me[0] == 0:
            os.setresuid(nobody, nobody, 0)
        forbidden = dict(states_of([str(file)]))
        os.setresuid(*me)
        file.chmod(0o644)
        if me[0] == 0:
            os.setresuid(nobody, nobody, 0)
        allowed = dict(states_of([str(file)]))
    finally:
        os.setresuid(*me)
        for folder, mode in modes.items():
            folder.chmod(mode)
    assert forbidden == {str(file): None}
    assert allowed == dict(states_of([str(file)])) != forbidden


@pytest.mark.parametrize(
    "problem", [FileNotFoundError(), PermissionError(), ValueError("no number"), Answered(403)]
)
def test_what_stays_as_it_is_comes_out_of_a_store_unchanged(problem: Exception) -> None:
    with pytest.raises(type(problem)), asking("s3://b/c.csv"):
        raise problem


def test_endpoint_and_who_pays_on_gcs(requests_seen: tuple[str, list[Any]]) -> None:
    url, seen = requests_seen
    options = {"endpoint_url": url, "token": "anon", "requester_pays": "my-project"}
    ask("gs://bucket/lenses/manifest.json", options)
    assert seen
    assert "/b/bucket/o/lenses" in seen[0].path
    assert "userProject=my-project" in seen[0].path


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://bucket/field.parquet", True),
        ("/data/Field.FITS", True),
        ("https://h/c.csv?X-Amz-Signature=a/b", True),  # signed
        ("s3://bucket/shards", False),
        ("https://h/shards?name=c.csv", False),
        ("/data/what.csv?", False),  # a file may be called so
    ],
)
def test_what_names_a_table(location: str, expected: bool) -> None:
    assert names_table(location) is expected


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_bucket_is_listed_instead_of_asked_for_each_object(
    kind: str, request: pytest.FixtureRequest, faulty_proxy: Callable[[Any], FaultyProxy]
) -> None:
    bucket: str = request.getfixturevalue(f"{kind}_bucket")
    server = request.getfixturevalue(f"{kind}_server")
    proxy = faulty_proxy(server)
    options = server.storage_options(proxy.url)
    filesystem, root = locate(bucket, server.storage_options())
    names = [f"{bucket}/cutouts/{k:03d}.npy" for k in range(WORTH_LISTING)]
    filesystem.pipe({f"{root}{name.removeprefix(bucket)}": name.encode() for name in names})

    def states(paths: list[str]) -> dict[str, str | None]:
        return dict(states_of(paths, options))

    before = states(names)
    assert proxy.requests < 10
    assert list(before) == names
    assert states(names[:3]) == {name: before[name] for name in names[:3]}
    filesystem.pipe_file(f"{root}/cutouts/007.npy", b"another")
    filesystem.rm_file(f"{root}/cutouts/011.npy")
    after = states(names)
    assert [name[-6:-4] for name in names if after[name] != before[name]] == ["07", "11"]
    assert after[names[11]] is None


def test_a_path_is_no_chain_of_filesystems(tmp_path: Path) -> None:
    for name in ("x", "x::g"):
        (tmp_path / name).write_text(name)
    filesystem, inside = locate(str(tmp_path / "x::g"))
    assert filesystem.cat_file(inside) == b"x::g"
    assert Path(inside) == tmp_path / "x::g"


def test_of_many_files_each_has_its_own_state(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number:03d}") for number in range(100)]
    for size, path in enumerate(paths):
        Path(path).write_bytes(bytes(size))
    Path(paths[40]).unlink()
    found = dict(states_of(reversed(paths)))
    assert list(found) == paths
    assert found.pop(paths[40]) is None
    assert [(state or "").split()[0] for state in found.values()] == [
        str(size) for size in range(100) if size != 40
    ]


def test_what_connecting_fails_at_is_told_without_the_options_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import requests

    def get(url: str, params: dict[str, str], timeout: float) -> None:
        raise requests.ConnectionError(f"refused, with url: /tokeninfo?access_token={params}")

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(
        NoAnswerError, match=r"gs://b/x: .* \(ConnectionError\); correct token"
    ) as raw:
        locate("gs://b/x", {"token": "ya29.s3cret"})
    with pytest.raises(InputError, match=r"gs://b/x: .* \(KeyError\); correct token") as account:
        locate("gs://b/x", {"token": {"client_email": "s3cret", "private_key": "s3cret"}})
    assert not any("s3cret" in str(caught.value) for caught in (raw, account))


def test_a_bucket_that_does_not_answer_says_nothing_of_what_has_changed(
    s3_bucket: str, s3_server: S3Server, faulty_proxy: Callable[[Any], FaultyProxy]
) -> None:
    proxy = faulty_proxy(s3_server)
    proxy.every(1)
    names = [f"{s3_bucket}/{k}.npy" for k in range(WORTH_LISTING)]
    with pytest.raises(NoAnswerError):
        dict(states_of(names, s3_server.storage_options(proxy.url)))


@pytest.mark.parametrize(
    ("url", "without"),
    [
        ("hdfs:///user/x/c.csv", "hdfs:///user/x/c.csv"),
        ("https://h/c.csv?signed=a/b", "https://h/c.csv"),
        ("/a/what?.csv", "/a/what?.csv"),
    ],
)
def test_only_the_query_of_a_url_is_left_out(url: str, without: str) -> None:
    assert without_query(url) == without
