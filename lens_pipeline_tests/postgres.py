"""A real PostgreSQL server, from the system's own programs."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens_pipeline_tests.object_stores import free_ports

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
PASSWORD = "s3cr3t-word"


@pytest.fixture
def postgresql() -> Iterator[str]:
    """A URI, with its password, of an empty database on a server of this test's own."""
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed")
    programs, (port,) = PROGRAMS[-1], free_ports(1)
    # PostgreSQL refuses to run as root.
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    prefix = as_user if os.geteuid() == 0 else []
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    (folder / "password").write_text(f"{PASSWORD}\n")
    if prefix:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres", "postgres")
    data = str(folder / "data")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"

    def control(*arguments: str) -> None:
        command = [*prefix, *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)

    first = ["-D", data, "-U", "lens", "-A", "scram-sha-256", "--pwfile", f"{folder}/password"]
    control(str(programs / "initdb"), *first)
    control(
        str(programs / "pg_ctl"), "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start"
    )
    try:
        yield f"postgresql://lens:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        control(str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)
