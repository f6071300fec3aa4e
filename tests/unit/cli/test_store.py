"""`hearth store`: which disk is measured when nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.store import bench_words


def test_the_disk_of_hearth_up_is_measured_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench_words(["--json"], {}) == ["--json"]
    for name in ("server-2", "server-1"):
        (tmp_path / ".hearth" / "servers" / name / "store").mkdir(parents=True)
    assert bench_words(["--json"], {}) == ["--dir", ".hearth/servers/server-1/store", "--json"]
    assert bench_words([], {"HEARTH_STORE_DIR": "/x"}) == []
    assert bench_words(["--dir=/y"], {}) == ["--dir=/y"]
    assert bench_words([], {"HEARTH_DATA_DIR": "/nowhere"}) == []
