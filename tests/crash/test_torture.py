"""A short run of the random test; scripts/torture runs the long one. And the model it rests on must not be blind."""

import json
import os
from pathlib import Path

from metadiskfs.torture.model import Directory, File, Model
from tests.conftest import metadiskfs


def test_a_short_run_ends_without_differences(home: Path) -> None:
    done = metadiskfs("torture", "--minutes", "0.5", "--json", check=False, timeout=110)
    print(done.stderr)
    report = json.loads(done.stdout)
    assert report["differences"] == []
    assert done.returncode == 0
    assert report["rounds"] >= 5
    assert report["operations"] >= 500


def test_a_closed_file_has_one_content() -> None:
    file = File(b"old")
    file.changed(b"new!")
    file.promised()
    assert file.accepts(b"new!")
    assert not file.accepts(b"old")
    assert not file.accepts(b"new?")


def test_an_open_file_may_be_as_promised_or_as_written_since_or_a_mixture() -> None:
    file = File(b"a" * 10_000)
    file.changed(b"b" * 10_000)
    assert file.accepts(b"a" * 10_000)
    assert file.accepts(b"b" * 10_000)
    assert file.accepts(b"a" * 5_000 + b"b" * 5_000)
    assert not file.accepts(b"a" * 9_999)
    assert not file.accepts(b"a" * 9_999 + b"c")


def test_a_write_cut_off_may_have_been_taken_in_part() -> None:
    file = File(b"old content")
    file.write_begins(4, b"CONTENT, longer")
    assert file.accepts(b"old content")
    assert file.accepts(b"old CONTent")
    assert file.accepts(b"old CONTENT, lo")
    assert not file.accepts(b"old CONT")
    assert not file.accepts(b"old CONTENT, lx")


def test_every_kind_of_difference_is_seen(tmp_path: Path) -> None:
    shared = File(b"shared")
    model = Model(
        {"d": Directory(), "gone": File(), "changed": File(b"1"), "one": shared, "two": shared, "kind": File()}
    )
    (tmp_path / "d").mkdir()
    (tmp_path / "changed").write_bytes(b"2")
    (tmp_path / "one").write_bytes(b"shared")
    (tmp_path / "two").write_bytes(b"shared")
    (tmp_path / "kind").mkdir()
    (tmp_path / "new").write_bytes(b"")
    differences = model.settle(tmp_path)
    for words in ("gone is missing", "new should not", "changed has a wrong", "no longer the same", "another kind"):
        assert [one for one in differences if words in one], (words, differences)
    assert model.settle(tmp_path) == []


def test_an_act_cut_off_is_done_or_not(tmp_path: Path) -> None:
    for done in (False, True):
        folder = tmp_path / str(done)
        folder.mkdir()
        file = File(b"x")
        (folder / ("new" if done else "old")).write_bytes(b"x")
        model = Model({"old": file}, {"new": file})
        assert model.settle(folder) == []
        assert list(model.names) == [os.listdir(folder)[0]]
