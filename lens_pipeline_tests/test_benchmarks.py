"""What benchmarks print, write and end with."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks._harness import Target, report


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("rate", [0.95, 0.85])
def test_a_target_that_is_missed_is_said_and_fails_where_that_is_asked_for(
    check: bool, rate: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = [Target("rate", rate, at_least=0.9), Target("seconds", 3.0, at_most=3.5)]
    out = tmp_path / "found.json"
    with pytest.raises(SystemExit) as ended:
        report(Namespace(json=out, check=check), lambda: ([{"way": "ours"}], targets))
    met = rate >= 0.9
    assert ended.value.code == int(check and not met)
    said = capsys.readouterr().out
    assert f"rate: {rate} (target >= 0.9): {'met' if met else 'MISSED'}" in said
    assert "seconds: 3 (target <= 3.5): met" in said
    assert json.loads(out.read_text()) == {
        "rows": [{"way": "ours"}],
        "targets": [
            {"name": "rate", "value": rate, "at_least": 0.9, "met": met},
            {"name": "seconds", "value": 3.0, "at_most": 3.5, "met": True},
        ],
    }
