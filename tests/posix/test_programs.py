"""Programs that people run in a folder, in the mount without a special case."""

import mailbox
import os
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from tests.posix.test_files import CHUNK, pattern


def run(*command: str, cwd: Path, check: bool = True, **environment: str) -> str:
    """What a program printed, on both channels. Fails with it when the program does."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_tree(root: Path, folders: int = 10, files: int = 10) -> None:
    """Files of several sizes, links of both kinds, odd names, modes, attributes and times."""
    for folder in range(folders):
        (root / f"d{folder}").mkdir(parents=True)
        for number in range(files):
            path = root / f"d{folder}/f{number}"
            path.write_bytes(pattern(folder * number * 37, number))
            os.utime(path, ns=(10**18 + number, 10**18 + folder * 1_000_000_007 + number))
    (root / "large").write_bytes(pattern(3 * CHUNK + 5))
    (root / "script").write_text("#!/bin/sh\necho run\n")
    (root / "script").chmod(0o755)
    os.symlink("d0/f1", root / "link")
    os.symlink("nowhere", root / "dangling")
    os.link(root / "large", root / "again")
    os.mkfifo(root / "fifo")
    (root / "ä \udcff").write_text("odd name")
    os.setxattr(root / "script", "user.comment", b"kept")
    os.chown(root / "d1", 1234, 4321)
    with open(root / "sparse", "wb") as file:
        file.truncate(30 * CHUNK)
        os.pwrite(file.fileno(), b"middle", 15 * CHUNK)
    for path in (root / "link", root / "dangling", root / "fifo", *root.glob("d?"), root):
        os.utime(path, ns=(10**18, 10**18 + 5), follow_symlinks=False)  # rsync keeps those of files to the nanosecond


def listing(root: Path) -> list[str]:
    """Everything that a copy should keep; folders' times are set last by the tools, so they are in."""
    format_ = "%P|%y|%m|%U|%G|%T@|%l|%n|%s\\n"
    text = subprocess.run(["find", ".", "-printf", format_], cwd=root, capture_output=True, check=True).stdout
    lines = sorted(os.fsdecode(text).splitlines())
    return [line for line in lines if not line.startswith("|")] if "|d|" in lines[0] else lines


def files_only(lines: list[str]) -> list[str]:
    """Without the sizes of folders, which every file system has its own way with."""
    return [line.rpartition("|")[0] if "|d|" in line else line for line in lines]


GIT = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null",
}  # fmt: skip


def git_life(folder: Path, files: int) -> None:
    """init, add, commit, clone, branch, merge, gc, fsck of a tree of that many files."""

    def git(*arguments: str, cwd: Path) -> str:
        return run("git", *arguments, cwd=cwd, **GIT)

    work, clone = folder / "work", folder / "clone"
    work.mkdir()
    git("init", "-q", "-b", "main", cwd=work)
    for number in range(files):
        path = work / f"{number % 20}/{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"file {number}\n" * (number % 50))
    git("add", ".", cwd=work)
    git("commit", "-q", "-m", "first", cwd=work)
    assert git("status", "--porcelain", cwd=work) == ""
    git("clone", "-q", str(work), str(clone), cwd=folder)
    (clone / "0/0.txt").write_text("changed\n")
    git("commit", "-q", "-a", "-m", "second", cwd=clone)
    git("pull", "-q", str(clone), "main", cwd=work)
    assert (work / "0/0.txt").read_text() == "changed\n"
    git("gc", "-q", "--aggressive", cwd=work)
    assert "error" not in git("fsck", "--full", "--strict", cwd=work)
    assert git("status", "--porcelain", cwd=work) == ""
    assert git("log", "--oneline", cwd=work).count("\n") == 2


def test_git(inside: Path) -> None:
    git_life(inside, 60)


def rsync_twice(folder: Path, files: int) -> None:
    make_tree(folder / "from", 10, files // 10)
    run("rsync", "-aHAX", "--numeric-ids", "from/", "to/", cwd=folder)
    assert listing(folder / "to") == listing(folder / "from")
    again = run("rsync", "-aHAX", "--numeric-ids", "--itemize-changes", "from/", "to/", cwd=folder)
    assert again == ""
    assert run("rsync", "-aHAX", "--checksum", "--itemize-changes", "from/", "to/", cwd=folder) == ""


def test_rsync_twice_has_nothing_to_do_the_second_time(inside: Path) -> None:
    rsync_twice(inside, 50)


def test_rsync_from_the_disk_and_back(inside: Path, disk: Path) -> None:
    source, back = disk / f"from{inside.name}", disk / f"back{inside.name}"
    make_tree(source, 3, 3)
    run("rsync", "-aHX", f"{source}/", "mirror/", cwd=inside)
    run("rsync", "-aHX", "mirror/", f"{back}/", cwd=inside)
    assert files_only(listing(back)) == files_only(listing(inside / "mirror")) == files_only(listing(source))
    assert run("rsync", "-aHX", "--itemize-changes", f"{source}/", f"{back}/", cwd=inside) == ""


def test_tar_there_and_back(inside: Path, disk: Path) -> None:
    make_tree(inside / "from", 4, 5)
    tar = ("tar", "--xattrs", "--sort=name", "--format=posix", "--pax-option=delete=atime,delete=ctime")
    run(*tar, "--sparse", "-cf", f"{disk}/{inside.name}-s.tar", ".", cwd=inside / "from")
    run(*tar, "-cf", f"{disk}/{inside.name}.tar", ".", cwd=inside / "from")
    (inside / "to").mkdir()
    run(*tar, "-xpf", f"{disk}/{inside.name}-s.tar", cwd=inside / "to")
    assert listing(inside / "to") == listing(inside / "from")
    run("diff", "-r", "--no-dereference", "--exclude=fifo", "from", "to", cwd=inside)
    assert os.getxattr(inside / "to/script", "user.comment") == b"kept"
    assert (inside / "to/sparse").stat().st_blocks < 5 * CHUNK // 512
    run(*tar, "-cf", f"{disk}/{inside.name}-2.tar", ".", cwd=inside / "to")
    assert Path(f"{disk}/{inside.name}.tar").read_bytes() == Path(f"{disk}/{inside.name}-2.tar").read_bytes()


def test_an_archive_inside(inside: Path) -> None:
    (inside / "f").write_bytes(pattern(2 * CHUNK))
    with tarfile.open(inside / "a.tgz", "w:gz") as archive:
        archive.add(inside / "f", "f")
    with tarfile.open(inside / "a.tgz") as archive:
        member = archive.extractfile("f")
        assert member is not None
        with member:
            assert member.read() == pattern(2 * CHUNK)


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_sqlite_with_readers_beside(inside: Path, journal: str) -> None:
    """A writer and three readers: every reader sees whole transactions, and the file is sound at the end."""
    path = inside / "db"
    turns = 60
    with_writer = sqlite3.connect(path, timeout=20, isolation_level=None)
    assert with_writer.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
    with_writer.execute("CREATE TABLE t (n INTEGER, text TEXT)")
    failures: list[str] = []
    ended = threading.Event()

    def read() -> None:
        reader = sqlite3.connect(path, timeout=20)
        try:
            while not ended.is_set():
                count, total = reader.execute("SELECT count(*), total(n) FROM t").fetchone()
                if count % 10 or total != sum(range(count)):
                    failures.append(f"{count} {total}")
        finally:
            reader.close()

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(turns):
            with_writer.execute("BEGIN IMMEDIATE")
            rows = [(number, "x" * 100) for number in range(turn * 10, turn * 10 + 10)]
            with_writer.executemany("INSERT INTO t VALUES (?, ?)", rows)
            with_writer.execute("COMMIT")
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    assert not failures
    assert with_writer.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert with_writer.execute("SELECT count(*) FROM t").fetchone() == (turns * 10,)
    with_writer.close()
    assert os.listdir(inside) == ["db"]


def test_sqlite_by_several_processes(inside: Path) -> None:
    code = (
        "import sqlite3, sys\n"
        "db = sqlite3.connect('db', timeout=60, isolation_level=None)\n"
        "db.execute('PRAGMA journal_mode = WAL')\n"
        "for n in range(40):\n"
        "    db.execute('BEGIN IMMEDIATE')\n"
        "    value = db.execute('SELECT n FROM t').fetchone()[0]\n"
        "    db.execute('UPDATE t SET n = ?', (value + 1,))\n"
        "    db.execute('COMMIT')\n"
    )
    with sqlite3.connect(inside / "db") as first:
        first.execute("CREATE TABLE t (n INTEGER)")
        first.execute("INSERT INTO t VALUES (0)")
    first.close()
    workers = [subprocess.Popen([sys.executable, "-c", code], cwd=inside) for _ in range(3)]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0]
    last = sqlite3.connect(inside / "db")
    assert last.execute("SELECT n FROM t").fetchone() == (120,)
    last.close()


def test_sed_in_place(inside: Path) -> None:
    (inside / "f").write_text("one\ntwo\n")
    (inside / "f").chmod(0o640)
    run("sed", "-i", "s/two/three/", "f", cwd=inside)
    assert (inside / "f").read_text() == "one\nthree\n"
    assert (inside / "f").stat().st_mode & 0o777 == 0o640
    run("sed", "-i.bak", "s/one/1/", "f", cwd=inside)
    assert sorted(os.listdir(inside)) == ["f", "f.bak"]


def test_an_editor_saves(inside: Path) -> None:
    """Write the new file, put it over the old one, drop the backup, as vim does with backupcopy=no."""
    path = inside / "text"
    path.write_text("old\n")
    for turn in range(5):
        os.rename(path, inside / "text~")
        with open(path, "w") as file:
            file.write(f"new {turn}\n")
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), (inside / "text~").stat().st_mode & 0o777)
        os.unlink(inside / "text~")
    assert path.read_text() == "new 4\n"
    assert os.listdir(inside) == ["text"]


def test_vim(inside: Path) -> None:
    (inside / "f").write_text("hello\n")
    run("vim", "-u", "NONE", "-es", "-c", "%s/hello/goodbye/", "-c", "wq", "f", cwd=inside)
    assert (inside / "f").read_text() == "goodbye\n"
    assert os.listdir(inside) == ["f"]


def test_cp_keeps_everything(inside: Path) -> None:
    make_tree(inside / "from", 3, 3)
    run("cp", "-a", "--sparse=always", "from", "to", cwd=inside)
    assert listing(inside / "to") == listing(inside / "from")
    assert (inside / "to/sparse").stat().st_blocks <= 2 * CHUNK // 512
    assert os.getxattr(inside / "to/script", "user.comment") == b"kept"
    run("cp", "--reflink=auto", "from/large", "copy", cwd=inside)
    assert (inside / "copy").read_bytes() == pattern(3 * CHUNK + 5)


def test_mv_across_file_systems(inside: Path, disk: Path) -> None:
    outside = disk / f"moved{inside.name}"
    make_tree(inside / "from", 3, 3)
    before = files_only(listing(inside / "from"))
    run("mv", "from", str(outside), cwd=inside)
    assert os.listdir(inside) == []
    run("mv", str(outside), "back", cwd=inside)
    assert files_only(listing(inside / "back")) == before
    assert not outside.exists()


def test_find_newer_du_df_ls(inside: Path) -> None:
    (inside / "old").write_bytes(pattern(CHUNK))
    time.sleep(0.01)
    (inside / "mark").touch()
    time.sleep(0.01)
    (inside / "new").write_bytes(pattern(2 * CHUNK))
    assert run("find", ".", "-newer", "mark", "-type", "f", cwd=inside) == "./new\n"
    assert run("du", "-s", "--block-size=1", "new", cwd=inside) == f"{2 * CHUNK}\tnew\n"
    assert run("du", "-s", "--block-size=1", ".", cwd=inside) == f"{3 * CHUNK}\t.\n"
    with open(inside / "hole", "wb") as file:
        file.truncate(1 << 40)
    assert run("du", "hole", cwd=inside) == "0\thole\n"
    assert run("ls", "-s", "hole", cwd=inside) == "0 hole\n"
    lines = run("df", "--output=source,fstype,size,used,avail,itotal", ".", cwd=inside).splitlines()
    source, kind, size, used, available, inodes = lines[1].split()
    assert (source, kind) == ("metadiskfs", "fuse.metadiskfs")
    assert int(size) >= int(used) >= 0 < int(available)
    assert int(inodes) > 1000


def test_a_maildir_and_an_mbox(inside: Path) -> None:
    for box in (mailbox.Maildir(inside / "dir"), mailbox.mbox(inside / "box")):
        keys = [box.add(f"Subject: {number}\n\nbody {number}\n") for number in range(5)]
        box.flush()
        box.remove(keys[2])
        box.flush()
        assert sorted(message["Subject"] for message in box) == ["0", "1", "3", "4"]
        box.close()


def test_make_builds_what_is_older(inside: Path) -> None:
    (inside / "in").write_text("1")
    (inside / "Makefile").write_text("out: in\n\tcp in out\n\techo built >> log\n")
    for _ in range(2):
        run("make", "out", cwd=inside)
    time.sleep(0.01)
    (inside / "in").write_text("2")
    run("make", "out", cwd=inside)
    assert (inside / "log").read_text() == "built\n" * 2
    assert (inside / "out").read_text() == "2"
