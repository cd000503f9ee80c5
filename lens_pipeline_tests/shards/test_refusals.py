"""Stores that refuse: what is told of them, and what works with fewer rights."""

import os
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lens_pipeline import LensDataModule, LensWebDatasetDataModule
from lens_pipeline.errors import InputError
from lens_pipeline.shards import open_shards, patience, publish_shards
from lens_pipeline.shards.patience import RefusedError
from lens_pipeline.shards.store import Store
from lens_pipeline.shards.versions import (
    is_published,
    newest_version,
    published_at,
    version_at,
)
from lens_pipeline_tests.object_stores import S3Server, sign_in
from lens_pipeline_tests.shards.published import Proxies, publish_versions


def test_cloud_places_that_cannot_be_written_are_told_apart_at_once(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = s3_server.storage_options()

    def refused(url: str) -> str:
        begun = time.monotonic()
        with pytest.raises(InputError) as caught:
            publish_shards(shards_folder, url, storage_options=options)
        assert time.monotonic() - begun < 45  # a store that is tried again takes longer
        assert url in str(caught.value)
        return str(caught.value)

    assert "there is no bucket nowhere" in refused("s3://nowhere/lenses")
    sign_in(monkeypatch, s3_server.environment(wrong=True))
    wrong = refused(s3_bucket)
    assert "credentials are refused" in wrong
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in wrong
    sign_in(monkeypatch, {"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"})
    assert "there are no credentials for it" in refused(s3_bucket)
    sign_in(monkeypatch, s3_server.environment(read_only=True))
    assert "no writing (Access Denied.)" in refused(s3_bucket)


@pytest.mark.parametrize(
    ("kind", "status", "code", "only", "said"),
    [
        ("s3", 400, "InvalidToken", "", "lenses: no writing, for credentials are refused"),
        ("s3", 400, "InvalidBucketName", "", r"lenses: no writing \("),
        ("gcs", 401, "", "", "lenses: no writing, for credentials are refused"),
        ("gcs", 403, "", "POST", r"lenses: no writing \(Forbidden: "),
        ("s3", 403, "", r"HEAD .*\.writable-\w+ ", r"lenses: no reading \("),
        ("s3", 403, "", r"HEAD .*\.none", r"lenses: no listing \("),
        (
            *("s3", 400, "ExpiredToken", r"PUT .*train-000001\.tar"),
            r"lenses/\w{64}/train-000001\.tar: may not be put, for credentials are refused",
        ),
        (
            *("s3", 403, "AccessDenied", r"PUT .*latest\.json"),
            r"lenses/latest\.json: may not be put \(Forbidden\)",
        ),
    ],
)
def test_cloud_that_refuses_is_not_asked_again(
    kind: str,
    status: int,
    code: str,
    only: str,
    said: str,
    shards_folder: Path,
    request: pytest.FixtureRequest,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And it is told what it has refused."""
    server, bucket = (request.getfixturevalue(f"{kind}_{what}") for what in ("server", "bucket"))
    monkeypatch.setattr(patience, "PATIENCE", 5.0)
    proxy = faulty_proxy(server)
    proxy.every(1, status=status, code=code, only=only)
    with pytest.raises(RefusedError, match=said):
        publish_shards(
            shards_folder, f"{bucket}/lenses", storage_options=server.storage_options(proxy.url)
        )


def test_cloud_is_read_by_who_may_not_list(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    """S3 tells them of what is absent that they may not read it."""
    url = f"{s3_bucket}/lenses"
    version = publish_shards(
        shards_folder, url, storage_options=s3_server.storage_options()
    ).dataset_version
    proxy = faulty_proxy(s3_server)
    proxy.every(1, status=403, code="AccessDenied", only="list-type|lenses/(manifest|val-)")
    options = s3_server.storage_options(proxy.url)
    data = LensDataModule(url, 16, cache_dir=tmp_path, storage_options=options)
    assert data.content == version
    tars = LensWebDatasetDataModule(val_urls=f"{url}/val-000000.tar", storage_options=options)
    assert len(tars.split("val")) == len(open_shards(shards_folder).split("val"))
    proxy.every(1, status=403, code="AccessDenied", only="list-type|latest")
    of_version = f"{url}/{version}"
    assert published_at(of_version, options) == version_at(of_version, options) == of_version
    assert is_published(of_version, options)
    proxy.every(1, status=403, code="AccessDenied", only="lenses/(manifest|latest)")
    with pytest.raises(RefusedError, match=r"lenses/manifest\.json: may not be read"):
        LensDataModule(url, storage_options=options).format  # noqa: B018


def test_a_web_server_that_is_unwell_for_a_moment_is_asked_again(
    shards_folder: Path, tmp_path: Path
) -> None:
    """fsspec says of any answer but a good one that there is no such file."""
    asked: Counter[str] = Counter()

    class Unwell(SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            asked[f"{self.command} {self.path}"] += 1
            if self.path.endswith(".tar") and asked[f"{self.command} {self.path}"] == 1:
                self.send_error(503)
                return None
            return super().send_head()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    (tar,) = shards_folder.glob("val-*.tar")
    (tmp_path / "a.tar").write_bytes(tar.read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Unwell, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = Store(f"http://127.0.0.1:{server.server_port}")
        about = store.about("a.tar")
        assert about is not None
        assert about["size"] == tar.stat().st_size
        assert store.about("b.tar") is None
        server.shutdown()
    assert asked["HEAD /a.tar"] > 1


def test_cloud_without_conditional_puts_is_published_to(
    own_shards: Path,
    s3_bucket: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"{s3_bucket}/lenses"
    monkeypatch.setattr(patience, "PATIENCE", 5.0)
    proxy = faulty_proxy(s3_server)
    proxy.every(1, status=501, code="NotImplemented", only="(?i)\nif-(none-)?match:")
    options = s3_server.storage_options(proxy.url)
    versions = publish_versions(own_shards, url, options, 2)
    assert newest_version(url, options) == f"{url}/{versions[-1]}"
    assert proxy.faults == 2
    assert "no conditional put" in caplog.text


@pytest.mark.parametrize("options", [{"endpoint_url": "localhost:9000"}, {"nosuch": 1}])
def test_cloud_options_that_no_client_takes_are_named(
    options: dict[str, Any], own_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"})
    with pytest.raises(InputError, match=r"s3://bucket/lenses: .*LENS_STORAGE_OPTIONS"):
        publish_shards(own_shards, "s3://bucket/lenses", storage_options=options)
