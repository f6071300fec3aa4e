"""The SSD tier's directory across crashes: only whole checkpoints are ever there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from services.store.arriving import Arriving
from services.store.tier import SsdTier
from shared.contracts.manifest import Manifest
from shared.contracts.residency import Source
from shared.errors import Code, HearthError
from tests.builders.checkpoints import WEIGHTS, make_checkpoint
from tests.unit.store.sources import an_importer, make_source


def fill(root: Path, source: Path) -> str:
    """Import a source into a tier of its own life; the checkpoint's id."""
    tier = SsdTier(root)
    with an_importer(tier) as importer:
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
        "from services.store.tier import SsdTier; from tests.unit.store.sources import an_importer;"
        "from shared.contracts.residency import Source\n"
        f"with an_importer(SsdTier(Path({str(tmp_path / 'store')!r}))) as one:"
        f" one.run(Source(url={str(tmp_path / 'm')!r}), progressed=lambda a, b: os.kill(os.getpid(), signal.SIGKILL))"
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


# -- checkpoints that arrive chunk by chunk ----------------------------------------------------------------------------


def begin(tier: SsdTier, source: Path, manifest: Manifest) -> Arriving:
    small = {name: (source / name).read_bytes() for name in manifest.small_files}
    return tier.begin(manifest, (source / "hearth.json").read_bytes(), small)


def bring(arriving: Arriving, source: Path, index: int) -> None:
    """Copy one chunk as a fetch does: its bytes, then the mark."""
    size = arriving.manifest.chunk_bytes
    data = (source / WEIGHTS).read_bytes()[index * size : (index + 1) * size]
    with (arriving.directory / WEIGHTS).open("r+b") as file:
        file.seek(index * size)
        file.write(data)
    arriving.mark(index)


def test_a_checkpoint_in_part_is_never_whole_and_is_gone_on_from(tmp_path: Path) -> None:
    manifest = make_checkpoint(tmp_path / "m", chunks=6)
    id, chunks = manifest.checkpoint.checkpoint_id, len(manifest.chunks)
    tier = SsdTier(tmp_path / "store")
    arriving = begin(tier, tmp_path / "m", manifest)
    assert tier.whole(id) is None
    assert tier.arriving(id) is arriving
    with pytest.raises(HearthError, match="arriving already"):
        begin(tier, tmp_path / "m", manifest)
    bring(arriving, tmp_path / "m", 4)
    bring(arriving, tmp_path / "m", 1)
    assert (arriving.has(1, 1), arriving.has(1, 2), arriving.missing[:3]) == (True, False, [0, 2, 3])
    tier.end(arriving)
    tier.close()
    tier = SsdTier(tmp_path / "store")  # the next life
    [stored], refused = tier.scan()
    assert refused == []
    assert (stored.id, stored.arrived_bytes, stored.chunk_bytes) == (id, 2 * 8192, 8192)
    assert stored.stored_bytes >= stored.image_bytes - 4096  # its room is taken from the beginning
    again = begin(tier, tmp_path / "m", manifest)
    assert (again.claimed, again.arrived_bytes) == (frozenset({1, 4}), 0)  # claimed is not arrived
    for index in range(chunks):
        bring(again, tmp_path / "m", index)
    assert tier.scan()[0][0].arrived_bytes == stored.image_bytes - 4096  # all there, and not committed
    place = tier.commit(again)
    assert tier.whole(id) == place
    [whole], refused = tier.scan()
    assert (whole.arrived_bytes, refused, sorted(os.listdir(place))) == (None, [], sorted(os.listdir(tmp_path / "m")))
    assert (place / WEIGHTS).read_bytes() == (tmp_path / "m" / WEIGHTS).read_bytes()
    with pytest.raises(HearthError, match="here already"):
        begin(tier, tmp_path / "m", manifest)


def test_a_direct_write_of_the_last_page_is_cut_at_the_commit(tmp_path: Path) -> None:
    manifest = make_checkpoint(tmp_path / "m", chunks=3)
    tier = SsdTier(tmp_path / "store")
    arriving = begin(tier, tmp_path / "m", manifest)
    for index in range(len(manifest.chunks)):
        bring(arriving, tmp_path / "m", index)
    os.truncate(arriving.directory / WEIGHTS, manifest.image_bytes())
    [stored], refused = tier.scan()
    assert (stored.id, refused) == (manifest.checkpoint.checkpoint_id, [])
    tier.commit(arriving)
    assert tier.scan()[0][0].arrived_bytes is None


def test_a_part_whose_files_are_broken_begins_anew(tmp_path: Path) -> None:
    manifest = make_checkpoint(tmp_path / "m", chunks=3)
    tier = SsdTier(tmp_path / "store")
    arriving = begin(tier, tmp_path / "m", manifest)
    bring(arriving, tmp_path / "m", 1)
    tier.end(arriving)
    (arriving.directory / "config.json").write_text("{}")
    again = begin(tier, tmp_path / "m", manifest)
    assert again.claimed == frozenset({1})  # a small file is simply written again
    assert (again.directory / "config.json").read_bytes() == (tmp_path / "m" / "config.json").read_bytes()
    tier.end(again)
    (arriving.directory / "hearth.json").write_text("{")
    assert begin(tier, tmp_path / "m", manifest).claimed == frozenset()


def test_an_import_replaces_what_had_come_in_part(tmp_path: Path) -> None:
    manifest = make_checkpoint(tmp_path / "m", chunks=3)
    tier = SsdTier(tmp_path / "store")
    tier.end(begin(tier, tmp_path / "m", manifest))
    with tier.staging() as directory:
        make_checkpoint(directory / "x", chunks=3)
        place, existing = tier.publish(directory / "x", manifest.checkpoint.checkpoint_id)
    assert not existing
    assert tier.whole(manifest.checkpoint.checkpoint_id) == place


@pytest.mark.parametrize("at", ["begin", "mark", "data", "journal", "end"])
def test_killed_at_every_point_of_an_arrival_nothing_is_claimed(tmp_path: Path, at: str) -> None:
    """A process that kills itself at a point of begin, mark or commit; what the next life finds."""
    manifest = make_checkpoint(tmp_path / "m", chunks=3)
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from services.store import arriving as journal, tier as module
        from tests.builders.checkpoints import WEIGHTS
        from tests.unit.store.test_tier import begin, bring

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        source, at = Path({str(tmp_path / "m")!r}), {at!r}
        tier = module.SsdTier(Path({str(tmp_path / "store")!r}))
        manifest = tier.manifest(source)
        if at == "begin":
            Path.rename = die
        coming = begin(tier, source, manifest)
        for index in range(len(manifest.chunks)):
            if at == "mark" and index == 1:
                os.pwrite = die
            bring(coming, source, index)
        if at == "data":
            module._sync_all = die
        if at == "journal":
            Path.unlink = die
        tier.commit(coming)
        die()
    """)
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    tier = SsdTier(tmp_path / "store")
    stored, refused = tier.scan()
    assert refused == []
    assert os.listdir(tmp_path / "store" / "incoming") == []
    whole = [one.id for one in stored if one.arrived_bytes is None]
    assert whole == ([manifest.checkpoint.checkpoint_id] if at == "end" else [])
    assert len(stored) == (0 if at == "begin" else 1)
    if at != "end":
        arriving = begin(tier, tmp_path / "m", manifest)
        for index in range(len(manifest.chunks)):
            bring(arriving, tmp_path / "m", index)
        tier.commit(arriving)
        assert tier.whole(manifest.checkpoint.checkpoint_id) is not None


# -- quarantine and pins -----------------------------------------------------------------------------------------------


def publish(tier: SsdTier, *, seed: int = 0) -> Path:
    with tier.staging() as directory:
        manifest = make_checkpoint(directory / "x", chunks=3, seed=seed)
        return tier.publish(directory / "x", manifest.checkpoint.checkpoint_id)[0]


def test_quarantine_keeps_the_bytes_and_the_reason_across_restarts(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path)
    place = publish(tier)
    aside = tier.quarantine(place, "Chunk 1 does not match.")
    assert aside == tmp_path / "quarantine" / place.name
    assert tier.quarantine(aside, "again") == aside
    assert tier.whole(place.name) is None
    os.truncate(aside / WEIGHTS, 10)  # whatever is wrong with it, it is listed
    tier.close()
    [stored], refused = SsdTier(tmp_path).scan()
    assert (stored.id, stored.quarantined, refused) == (place.name, "Chunk 1 does not match.", [])
    assert stored.directory == str(aside)


def test_quarantine_replaces_an_older_one_and_makes_way_for_a_sound_copy(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path)
    tier.quarantine(publish(tier), "first")
    tier.quarantine(publish(tier), "second")
    publish(tier)
    stored, _ = tier.scan()
    assert sorted(one.quarantined for one in stored) == ["", "second"]
    tier.remove(tmp_path / "quarantine" / stored[0].id)
    assert [one.quarantined for one in tier.scan()[0]] == [""]


def test_a_crash_between_mark_and_move_leaves_it_in_quarantine(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path)
    place = publish(tier)
    (place / ".quarantined").write_text("why")
    assert tier.whole(place.name) is None
    [stored], _ = tier.scan()
    assert (stored.quarantined, stored.directory) == ("why", str(tmp_path / "quarantine" / place.name))


def test_pins_survive_a_restart_and_broken_ones_are_none(tmp_path: Path) -> None:
    tier = SsdTier(tmp_path)
    assert tier.pins() == ({}, "")
    tier.save_pins({"b" * 32: "ssd", "a" * 32: "dram"})
    assert tier.pins() == ({"a" * 32: "dram", "b" * 32: "ssd"}, "")
    for broken in ("{", "[]", '{"a": "tape"}', '{"a": ["ssd"]}', "\udcff", "[" * 100_000):
        (tmp_path / "pins.json").write_text(broken, errors="surrogateescape")
        pins, fault = tier.pins()
        assert pins == {}
        assert fault.startswith("pins.json")


def test_what_the_disk_refuses_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_checkpoint(tmp_path / "m", chunks=3)
    tier = SsdTier(tmp_path / "store")
    place = publish(tier, seed=1)

    def refuse(number: int) -> object:
        def call(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return call

    for number, code in ((errno.ENOSPC, Code.NO_CAPACITY), (errno.EDQUOT, Code.NO_CAPACITY)):
        monkeypatch.setattr(os, "posix_fallocate", refuse(number))
        with pytest.raises(HearthError) as caught:
            begin(tier, tmp_path / "m", manifest)
        assert caught.value.failure.code is code
    monkeypatch.undo()
    for number in (errno.EIO, errno.EROFS):
        monkeypatch.setattr(os, "fsync", refuse(number))
        for call in (
            lambda: begin(tier, tmp_path / "m", manifest),
            lambda: tier.save_pins({}),
            lambda: tier.quarantine(place, "bad"),
        ):
            with pytest.raises(HearthError) as caught:
                call()
            assert caught.value.failure.code is Code.CHECKPOINT_UNAVAILABLE
        monkeypatch.undo()
    assert os.listdir(tmp_path / "store" / "checkpoints") == []
    assert os.listdir(tmp_path / "store" / "quarantine") == [place.name], "what is corrupt is aside, durably or not"
    tier.remove(place)  # and what could not be deleted is, with the next change
    assert os.listdir(tmp_path / "store" / "incoming") == []


@pytest.mark.parametrize("deed", ["quarantine", "remove"])
def test_what_the_disk_does_not_let_go_is_no_checkpoint_and_a_sound_copy_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str
) -> None:
    tier = SsdTier(tmp_path)
    place = publish(tier)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(HearthError, match="Input/output error") as caught:
        tier.quarantine(place, "bad") if deed == "quarantine" else tier.remove(place)
    assert caught.value.failure.code is Code.CHECKPOINT_UNAVAILABLE
    assert place.is_dir()
    assert tier.whole(place.name) is None
    monkeypatch.undo()
    assert publish(tier) == place
    assert tier.whole(place.name) == place
    tier.remove(tier.quarantined / place.name)  # as the core does when a sound copy has come
    tier.remove(tier.checkpoints / "another")
    assert tier.whole(place.name) == place
    assert (place / WEIGHTS).exists()
    assert os.listdir(tmp_path / "quarantine") == os.listdir(tmp_path / "incoming") == []
    assert tier.unwanted == frozenset()
