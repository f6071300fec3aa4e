"""The SSD tier's directory across crashes: only whole checkpoints are ever there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.store.importer import Importer
from services.store.remote import Hub
from services.store.tier import SsdTier
from shared.contracts.residency import Source
from shared.errors import HearthError
from tests.unit.store.sources import make_source


def fill(root: Path, source: Path) -> str:
    """Import a source into a tier of its own life; the checkpoint's id."""
    tier = SsdTier(root)
    importer = Importer(tier, Hub("http://127.0.0.1:9"), chunk_bytes=8192)
    outcome = importer.run(Source(url=str(source)), progressed=lambda done, total: None)
    tier.close()
    return outcome.stored.id


def test_whole_checkpoints_are_adopted_oldest_use_first(tmp_path: Path) -> None:
    ids = []
    for number in range(3):
        make_source(tmp_path / f"m{number}", seed=number)
        ids.append(fill(tmp_path / "store", tmp_path / f"m{number}"))
    for age, id in enumerate((ids[2], ids[0], ids[1])):
        os.utime(tmp_path / "store" / "checkpoints" / id / "hearth.json", (age, age))
    tier = SsdTier(tmp_path / "store")
    tier.touch(tier.checkpoints / ids[0])
    stored, refused = tier.scan()
    assert [one.id for one in stored] == [ids[2], ids[1], ids[0]]
    assert refused == []
    assert stored[0].source == Source(url=str(tmp_path / "m2"))


@pytest.mark.parametrize("damage", ["no manifest", "broken manifest", "short weights", "no tokenizer", "other name"])
def test_what_is_not_whole_is_removed_with_a_reason(tmp_path: Path, damage: str) -> None:
    make_source(tmp_path / "m")
    place = tmp_path / "store" / "checkpoints" / fill(tmp_path / "store", tmp_path / "m")
    match damage:
        case "no manifest":
            (place / "hearth.json").unlink()
        case "broken manifest":
            (place / "hearth.json").write_text("{")
        case "short weights":
            os.truncate(place / "model.safetensors", 5000)
        case "no tokenizer":
            (place / "tokenizer.json").unlink()
        case _:
            place = place.rename(place.with_name("0" * 32))
    tier = SsdTier(tmp_path / "store")
    stored, refused = tier.scan()
    assert stored == []
    assert [name for name, _ in refused] == [place.name]
    assert os.listdir(tier.checkpoints) == []


def test_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    place = tmp_path / "store" / "checkpoints" / fill(tmp_path / "store", tmp_path / "m")
    text = (place / "hearth.json").read_text()
    (place / "hearth.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    stored, refused = SsdTier(tmp_path / "store").scan()
    assert stored == []
    assert "version 2" in refused[0][1]
    assert place.exists()


def test_killed_in_the_middle_of_an_import_nothing_is_claimed(tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    script = (
        "import os, signal; from pathlib import Path;"
        "from services.store.importer import Importer; from services.store.tier import SsdTier;"
        "from shared.contracts.residency import Source;"
        f"one = Importer(SsdTier(Path({str(tmp_path / 'store')!r})), None, chunk_bytes=8192);"
        f"one.run(Source(url={str(tmp_path / 'm')!r}), progressed=lambda a, b: os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == -9
    assert len(os.listdir(tmp_path / "store" / "incoming")) == 1
    tier = SsdTier(tmp_path / "store")
    assert tier.scan() == ([], [])
    assert os.listdir(tmp_path / "store" / "incoming") == []


def test_one_store_at_a_time(tmp_path: Path) -> None:
    first = SsdTier(tmp_path)
    with pytest.raises(HearthError, match="Another store uses"):
        SsdTier(tmp_path)
    first.close()
    SsdTier(tmp_path).close()


def test_removing_what_is_gone_is_fine(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path)
    tier.remove(tier.checkpoints / "gone")


def test_what_cannot_be_read_just_now_is_no_reason_to_delete_it(tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    manifest = tmp_path / "store" / "checkpoints" / fill(tmp_path / "store", tmp_path / "m") / "hearth.json"
    kept = manifest.rename(tmp_path / "kept")
    manifest.symlink_to(manifest)  # reading fails (ELOOP), for root too
    tier = SsdTier(tmp_path / "store")
    stored, refused = tier.scan()
    assert (stored, len(refused)) == ([], 1)
    tier.close()
    manifest.unlink()
    kept.rename(manifest)
    assert len(SsdTier(tmp_path / "store").scan()[0]) == 1
