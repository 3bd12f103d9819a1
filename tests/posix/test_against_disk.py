"""The same thousands of calls on the local disk and in the mount: same answers, same effects.

The disk's file system is the specification. Each case stands in a folder of its own, which is made, looked at, acted
in by one user and looked at again. Compared are the call's answer, and for the folder and everything in it: type,
mode, owner, links, size, device, which inode it is, and which of the three times the call changed.

Every third case runs with the suite, all of them with scripts/test-posix.
"""

import itertools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.posix.conftest import fresh_folder
from tests.posix.users import ANNA, BEN, CARL, GUESTS, STAFF, User

_TICK = 0.02
"""Seconds after which a time that the kernel takes from its coarse clock has changed."""


class Case(NamedTuple):
    user: str
    setup: str
    act: str


KINDS = {
    "missing": "0",
    "file": "opened('file', os.O_CREAT); os.truncate('file', 7)",
    "empty": "opened('empty', os.O_CREAT)",
    "folder": "os.mkdir('folder', 0o755); opened('folder/x', os.O_CREAT)",
    "emptyfolder": "os.mkdir('emptyfolder', 0o755)",
    "link": "os.symlink('target', 'link'); opened('target', os.O_CREAT)",
    "folderlink": "os.symlink('pointed', 'folderlink'); os.mkdir('pointed', 0o755)",
    "dangling": "os.symlink('nowhere', 'dangling')",
    "loop": "os.symlink('loop', 'loop')",
    "fifo": "os.mkfifo('fifo', 0o644)",
    "sock": "os.mknod('sock', stat.S_IFSOCK | 0o644)",
    "hard": "opened('hard', os.O_CREAT); os.link('hard', 'other')",
}
"""What can stand under a name, and how it is made."""

ON_ONE = """
os.chmod({0!r}, 0o4751)
os.lchown({0!r}, 1, 2)
os.chown({0!r}, 1, 2)
os.unlink({0!r})
os.rmdir({0!r})
os.mkdir({0!r}, 0o1777)
os.mkfifo({0!r}, 0o640)
os.mknod({0!r}, stat.S_IFSOCK | 0o600)
os.symlink('file', {0!r})
os.truncate({0!r}, 3)
os.truncate({0!r}, 300000)
os.utime({0!r}, ns=(5, 999999999))
os.utime({0!r}, ns=(5, 7), follow_symlinks=False)
os.utime({0!r})
os.access({0!r}, os.X_OK)
os.readlink({0!r})
sorted(os.listdir({0!r}))
os.stat({0!r}).st_mode
os.lstat({0!r}).st_mode
opened({0!r}, os.O_RDONLY)
opened({0!r}, os.O_WRONLY)
opened({0!r}, os.O_RDWR)
opened({0!r}, os.O_RDONLY | os.O_CREAT)
opened({0!r}, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
opened({0!r}, os.O_WRONLY | os.O_TRUNC)
opened({0!r}, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
opened({0!r}, os.O_RDONLY | os.O_DIRECTORY)
opened({0!r}, os.O_RDONLY | os.O_NOFOLLOW)
opened({0!r}, os.O_PATH)
os.setxattr({0!r}, 'user.a', b'1')
os.getxattr({0!r}, 'user.a')
os.chdir({0!r})
""".strip().splitlines()

ON_TWO = """
os.rename({0!r}, {1!r})
rename2({0!r}, {1!r}, NOREPLACE)
rename2({0!r}, {1!r}, EXCHANGE)
os.link({0!r}, {1!r})
os.link({0!r}, {1!r}, follow_symlinks=False)
""".strip().splitlines()


def on_one() -> Iterable[Case]:
    for kind, form, act in itertools.product(KINDS, ("{}", "{}/", "{}/below"), ON_ONE):
        yield Case("root", KINDS[kind], act.format(form.format(kind)))


def on_two() -> Iterable[Case]:
    for one, two, act in itertools.product(KINDS, KINDS, ON_TWO):
        setup = KINDS[one] if one == two else f"{KINDS[one]}; {KINDS[two]}"
        yield Case("root", setup, act.format(one, two))
    for one, act in itertools.product(KINDS, ON_TWO):
        setup = f"os.mkdir('in', 0o755); {KINDS[one]}"
        yield Case("root", setup, act.format(one, "in/new"))
        yield Case("root", setup, act.format(f"{one}/", "new"))
        yield Case("root", setup, act.format(one, "new/"))
        yield Case("root", setup, act.format(one, "in"))
        yield Case("root", setup, act.format("in", f"{one}/new"))


def moves() -> Iterable[Case]:
    """Trees moved about, and what must not be."""
    tree = "os.makedirs('a/b/c', 0o755); os.makedirs('z/y', 0o755); opened('a/f', os.O_CREAT); os.link('a/f', 'z/f')"
    paths = ("a", "a/b", "a/b/c", "z", "z/y", "a/f", "z/f", "new", "a/b/c/new", ".", "a/.")
    for one, two, act in itertools.product(paths, paths, ON_TWO[:4]):
        yield Case("root", tree, act.format(one, two))


MODES = (0o000, 0o100, 0o200, 0o300, 0o500, 0o700, 0o070, 0o007, 0o755)
USERS = ("root", "anna", "ben", "carl")


def folder_rights() -> Iterable[Case]:
    """What one may do in a folder of Anna's and STAFF's, by its mode."""
    setup = (
        "os.mkdir('d'); opened('d/f', os.O_CREAT); os.mkdir('d/sub', 0o777); opened('free', os.O_CREAT, 0o666); "
        "os.chmod('.', 0o777); os.chmod('d/f', 0o666); os.chown('d', {anna}, {staff}); os.chmod('d', {mode})"
    )
    acts = """
        opened('d/f', os.O_RDONLY)
        opened('d/new', os.O_CREAT | os.O_WRONLY, 0o600)
        os.stat('d/f').st_size
        os.stat('d').st_size >= 0
        sorted(os.listdir('d'))
        os.unlink('d/f')
        os.rmdir('d/sub')
        os.mkdir('d/made', 0o700)
        os.symlink('x', 'd/made')
        os.mkfifo('d/made', 0o600)
        os.rename('d/f', 'd/g')
        os.rename('free', 'd/g')
        os.rename('d/f', 'g')
        os.rename('d/sub', 'sub')
        rename2('d/f', 'free', EXCHANGE)
        os.link('free', 'd/g')
        os.link('d/f', 'g')
        os.chmod('d', 0o711)
        os.truncate('d/f', 1)
        os.utime('d')
    """.strip().splitlines()
    for mode, user, act in itertools.product(MODES, USERS, acts):
        yield Case(user, setup.format(anna=ANNA, staff=STAFF, mode=mode), act.strip())


def file_rights() -> Iterable[Case]:
    """What one may do with a file of Anna's and STAFF's, by its mode."""
    setup = "opened('f', os.O_CREAT); os.truncate('f', 9); os.chown('f', {anna}, {staff}); os.chmod('f', {mode})"
    acts = """
        opened('f', os.O_RDONLY)
        opened('f', os.O_WRONLY)
        opened('f', os.O_RDWR)
        opened('f', os.O_RDONLY | os.O_TRUNC)
        opened('f', os.O_WRONLY | os.O_APPEND)
        os.truncate('f', 1)
        os.utime('f')
        os.utime('f', ns=(1, 2))
        os.chmod('f', 0o640)
        os.chmod('f', 0o2640)
        os.chown('f', -1, {staff})
        os.chown('f', -1, {guests})
        os.chown('f', {anna}, -1)
        os.chown('f', {ben}, -1)
        os.access('f', os.R_OK), os.access('f', os.W_OK), os.access('f', os.X_OK)
        os.setxattr('f', 'user.a', b'1')
        os.getxattr('f', 'user.a')
        os.listxattr('f')
        os.setxattr('f', 'trusted.a', b'1')
        os.setxattr('f', 'security.a', b'1')
        os.link('f', 'g')
    """.strip().splitlines()
    names = {"anna": ANNA, "ben": BEN, "staff": STAFF, "guests": GUESTS}
    for mode, user, act in itertools.product((0o000, 0o400, 0o200, 0o600, 0o070, 0o006, 0o644), USERS, acts):
        yield Case(user, setup.format(**names, mode=mode), act.strip().format(**names))


def sticky() -> Iterable[Case]:
    """A sticky folder of one, a thing of another, an act of a third."""
    setup = (
        "os.mkdir('d'); os.mkdir('free'); opened('free/x', os.O_CREAT); os.chown('free/x', {by}, {by}); "
        "os.chmod('.', 0o777); os.chmod('free', 0o777); {make}; os.chown('d/x', {owner}, {owner}); "
        "os.chown('d', {folder}, {folder}); os.chmod('d', 0o1777)"
    )
    makes = {"file": "opened('d/x', os.O_CREAT)", "folder": "os.mkdir('d/x', 0o777)"}
    acts = (
        "os.unlink('d/x')", "os.rmdir('d/x')", "os.rename('d/x', 'd/y')", "os.rename('d/x', 'free/y')",
        "os.rename('free/x', 'd/x')", "rename2('free/x', 'd/x', EXCHANGE)", "os.link('d/x', 'free/y')",
        "opened('d/x', os.O_CREAT | os.O_RDWR)",
    )  # fmt: skip
    ids = {"root": 0, "anna": ANNA, "ben": BEN}
    for folder, owner, user, kind, act in itertools.product(ids.values(), ids.values(), USERS, makes, acts):
        by = {**ids, "carl": CARL}[user]
        yield Case(user, setup.format(by=by, folder=folder, owner=owner, make=makes[kind]), act)


SPECIAL = (0o4755, 0o2755, 0o6777, 0o2745, 0o4644, 0o2644, 0o6644, 0o1777, 0o7777)


def special_bits() -> Iterable[Case]:
    """When suid and sgid are lost: by writes, changes of owner and mode, of files and folders.

    Without chown(path, -1, -1): that changes the ctime on a disk, but no request says so (docs/SEMANTICS.md).
    """
    file = "opened('f', os.O_CREAT); os.truncate('f', 9); os.chown('f', {anna}, {staff}); os.chmod('f', {mode})"
    folder = "os.mkdir('f'); os.chown('f', {anna}, {staff}); os.chmod('f', {mode})"
    on_files = """
        with_fd('f', os.O_WRONLY, os.write, X)
        with_fd('f', os.O_WRONLY, os.write, b'')
        with_fd('f', os.O_WRONLY, os.pwrite, X, 100000)
        with_fd('f', os.O_WRONLY, os.ftruncate, 1)
        with_fd('f', os.O_WRONLY, os.ftruncate, 9)
        os.truncate('f', 3)
        os.truncate('f', 9)
        opened('f', os.O_WRONLY | os.O_TRUNC)
        opened('f', os.O_WRONLY)
        store_mapped('f')
        os.link('f', 'g')
        fallocate('f', 0, 0, 100)
        fallocate('f', KEEP_SIZE, 0, 100)
        fallocate('f', KEEP_SIZE | PUNCH_HOLE, 0, 5)
        opened('g', os.O_CREAT); with_fd('g', os.O_WRONLY, os.write, X); copied('g', 'f')
    """.strip().splitlines()
    on_both = """
        os.chown('f', {anna}, -1)
        os.chown('f', -1, {staff})
        os.chown('f', {ben}, {guests})
        os.chown('f', -1, {guests})
        os.chmod('f', 0o6777)
        os.chmod('f', 0o2755)
        os.utime('f')
        os.rename('f', 'g')
        os.setxattr('f', 'user.a', X)
    """.strip().splitlines()
    names = {"anna": ANNA, "ben": BEN, "staff": STAFF, "guests": GUESTS}
    opener = "os.chmod('.', 0o777); "
    for mode, user in itertools.product(SPECIAL, USERS):
        for act in (*on_files, *on_both):
            yield Case(user, opener + file.format(**names, mode=mode), act.strip().format(**names))
        for act in on_both:
            yield Case(user, opener + folder.format(**names, mode=mode), act.strip().format(**names))


def inherited() -> Iterable[Case]:
    """What is made in a folder with sgid, and with other umasks than ours."""
    setup = "os.mkdir('d'); os.chown('d', {folder}, {group}); os.chmod('d', {mode})"
    acts = """
        opened('d/new', os.O_CREAT | os.O_WRONLY, 0o666)
        opened('d/new', os.O_CREAT | os.O_WRONLY, 0o2775)
        opened('d/new', os.O_CREAT | os.O_WRONLY, 0o6777)
        opened('d/new', os.O_CREAT | os.O_WRONLY, 0o444)
        os.mkdir('d/new', 0o777)
        os.mkdir('d/new', 0o3777)
        os.mkfifo('d/new', 0o2770)
        os.mknod('d/new', stat.S_IFREG | 0o2770)
        os.symlink('x', 'd/new')
        os.umask(0o027); os.mkdir('d/new', 0o777), os.umask(0)
        os.umask(0o777); opened('d/new', os.O_CREAT | os.O_RDWR, 0o777), os.umask(0)
    """.strip().splitlines()
    for mode, group, user, act in itertools.product((0o2777, 0o777, 0o3777), (STAFF, GUESTS), USERS, acts):
        yield Case(user, setup.format(folder=ANNA, group=group, mode=mode), act.strip())


def devices() -> Iterable[Case]:
    """Device files: for root alone. They cannot be opened in the mount (nodev), so they are only made and seen."""
    for user, kind in itertools.product(("root", "anna"), ("stat.S_IFCHR", "stat.S_IFBLK")):
        yield Case(user, "os.chmod('.', 0o777)", f"os.mknod('dev', {kind} | 0o640, os.makedev(1, 3))")
        yield Case(user, "os.chmod('.', 0o777)", f"os.mknod('dev', {kind} | 0o640, os.makedev(4000, 70000))")


def _run(parent: Path, cases: list[Case], users: dict[str, User]) -> list[Any]:
    """The answers and effects of all cases; every folder is made before the first act, so that times differ."""
    root = users["root"]
    folders = [parent / str(number) for number in range(len(cases))]
    root.batch([(parent, f"os.mkdir('{folder.name}', 0o755)") for folder in folders])
    made = root.batch([(folder, case.setup) for folder, case in zip(folders, cases, strict=True)])
    assert not [answer for answer in made if isinstance(answer, str) and answer.startswith("E")], made
    for act in ("look_around()", "snapshot()"):
        time.sleep(_TICK)
        before = root.batch([(folder, act) for folder in folders])
    time.sleep(_TICK)
    answers: dict[Path, Any] = {}
    for name, user in users.items():
        todo = [(folder, case.act) for folder, case in zip(folders, cases, strict=True) if case.user == name]
        answers |= zip((folder for folder, _ in todo), user.batch(todo), strict=True)
    after = root.batch([(folder, "snapshot()") for folder in folders])
    return [(answers[folder], _effects(one, two)) for folder, one, two in zip(folders, before, after, strict=True)]


def _effects(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is there now; of each inode, what it was called, which times changed, and times set to long ago."""
    known = {row[0]: (path, row[-3:]) for path, row in before.items()}
    found = {}
    for path, (number, *attributes, atime, mtime, ctime) in after.items():
        old_path, old_times = known.get(number, ("", ()))
        changed = "".join(
            letter for letter, one, two in zip("amc", old_times, (atime, mtime, ctime), strict=False) if one != two
        )
        long_ago = [when for when in (atime, mtime) if when < 10**18]
        found[path] = (*attributes, f"was {old_path}" if old_path else "new", changed, long_ago)
    return found


GROUPS = (on_one, on_two, moves, folder_rights, file_rights, sticky, special_bits, inherited, devices)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_answers_and_effects_are_those_of_the_disk(
    group: Any, disk: Path, shared: Any, users: dict[str, User]
) -> None:
    cases = list(group())[:: 1 if os.environ.get("METADISKFS_POSIX_ALL") else 3]
    expected = _run(fresh_folder(disk), cases, users)
    found = _run(fresh_folder(shared.path), cases, users)
    wrong = [
        f"{case.user}: {case.setup}\n    {case.act}\n    disk:  {one}\n    mount: {two}"
        for case, one, two in zip(cases, expected, found, strict=True)
        if one != two
    ]
    answers = {str(answer) for answer, _ in expected}
    assert len(answers) > 1, "a group of cases with one answer tests nothing"
    assert not wrong, f"{len(wrong)} of {len(cases)} cases differ:\n" + "\n".join(wrong[:20])
