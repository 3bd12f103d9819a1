"""The volume in-process against a dictionary: whatever is done to both, in any order, they tell the same.

Hypothesis chooses the acts and shrinks what fails; failures that were found stand below as tests of their own.
METADISKFS_EXAMPLES makes a run longer, METADISKFS_SHRINK=1 lets it take its time to shrink. Chunks have 64 KiB here.
"""

import errno
import itertools
import os
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.fs.drivers import VolumeDriver

CHUNK = 64 << 10
PATHS = st.sampled_from(["/a", "/b", "/c", "/d", "/e", "/d/a", "/d/b", "/e/a", "/e/d", "/e/d/a"])
OFFSETS = st.sampled_from([0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 7])
LENGTHS = st.sampled_from([0, 1, 99, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])


class File:
    def __init__(self) -> None:
        self.data = bytearray()
        self.mode = 0o644
        self.mtime: int | None = None


class Symlink:
    """Not a file, not a folder; as an object, because it may have several names too."""


class Model:
    """What a file system is: paths to files, folders (None) and symlinks."""

    def __init__(self) -> None:
        self.tree: dict[str, File | Symlink | None] = {"/": None}

    def kind(self, path: str) -> str:
        if path not in self.tree:
            return "nothing"
        return {File: "file", Symlink: "symlink"}.get(type(self.tree[path]), "folder")

    def below(self, path: str) -> list[str]:
        return [other for other in self.tree if other.startswith(path.rstrip("/") + "/") and other != path]

    def is_reachable(self, *paths: str) -> bool:
        """Whether all that stands above is folders: what is not never gets past the kernel."""
        return all(self.kind(str(folder)) == "folder" for path in paths for folder in Path(path).parents)


class Machine(RuleBasedStateMachine):
    folder: Path
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.driver = VolumeDriver(self.folder / str(next(self.numbers)))
        self.model = Model()
        self.handles: list[tuple[int, File]] = []
        self.content = itertools.count(1)

    # -- acts on names --------------------------------------------------------------------------------------------

    def expect(self, error: int, act: Any, *arguments: Any) -> None:
        """Do it, and see it fail as the model says (0: not at all)."""
        try:
            act(*arguments)
        except OSError as found:
            assert found.errno == error, f"{found} instead of {errno.errorcode.get(error, 'success')}"
        else:
            assert not error, f"success instead of {errno.errorcode[error]}"

    def create(self, path: str, act: Any, *arguments: Any) -> bool:
        if not self.model.is_reachable(path):
            return False
        error = errno.EEXIST if path in self.model.tree else 0
        self.expect(error, act, *arguments)
        return not error

    @rule(path=PATHS)
    def mkdir(self, path: str) -> None:
        if self.create(path, self.driver.mkdir, path):
            self.model.tree[path] = None

    @rule(path=PATHS)
    def symlink(self, path: str) -> None:
        if self.create(path, self.driver.symlink, "target", path):
            self.model.tree[path] = Symlink()

    @rule(old=PATHS, new=PATHS)
    def link(self, old: str, new: str) -> None:
        if not self.model.is_reachable(old, new):
            return
        error = 0 if old in self.model.tree else errno.ENOENT
        if not error and self.model.kind(old) == "folder":
            error = errno.EPERM
        error = error or (errno.EEXIST if new in self.model.tree else 0)
        self.expect(error, self.driver.link, old, new)
        if not error:
            self.model.tree[new] = self.model.tree[old]

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        if not self.model.is_reachable(path):
            return
        error = 0 if path in self.model.tree else errno.ENOENT
        if not error and self.model.kind(path) == "folder":
            error = errno.EISDIR
        self.expect(error, self.driver.unlink, path)
        if not error:
            del self.model.tree[path]

    @rule(path=PATHS)
    def rmdir(self, path: str) -> None:
        if not self.model.is_reachable(path):
            return
        error = 0 if path in self.model.tree else errno.ENOENT
        if not error and self.model.kind(path) != "folder":
            error = errno.ENOTDIR
        error = error or (errno.ENOTEMPTY if self.model.below(path) else 0)
        self.expect(error, self.driver.rmdir, path)
        if not error:
            del self.model.tree[path]

    @rule(old=PATHS, new=PATHS)
    def rename(self, old: str, new: str) -> None:
        tree, kind = self.model.tree, self.model.kind
        if not self.model.is_reachable(old, new) or new.startswith(old + "/") or old.startswith(new + "/"):
            return  # the kernel answers that itself
        error = 0 if old in tree else errno.ENOENT
        if not error and new in tree and tree[new] is not tree[old]:
            if kind(old) == "folder":
                error = errno.ENOTDIR if kind(new) != "folder" else errno.ENOTEMPTY if self.model.below(new) else 0
            elif kind(new) == "folder":
                error = errno.EISDIR
        elif not error and new in tree and kind(old) == "folder" and old != new:
            error = errno.ENOTEMPTY if self.model.below(new) else 0
        self.expect(error, self.driver.rename, old, new)
        if error or old == new or (kind(old) != "folder" and tree[old] is tree.get(new)):
            return
        moved = {path: tree.pop(path) for path in [old, *self.model.below(old)]}
        tree.update({new + path[len(old) :]: entry for path, entry in moved.items()})

    # -- acts on content ------------------------------------------------------------------------------------------

    def bytes_of(self, length: int) -> bytes:
        """Some content twice, most of it once."""
        number = next(self.content)
        return bytes([number % 251 + 1]) * length

    def file(self, path: str) -> File | None:
        entry = self.model.tree.get(path)
        return entry if isinstance(entry, File) else None

    @rule(path=PATHS, offset=OFFSETS, length=LENGTHS)
    def write(self, path: str, offset: int, length: int) -> None:
        if not self.model.is_reachable(path) or self.model.kind(path) not in ("file", "nothing"):
            return
        data = self.bytes_of(length)
        self.driver.write(path, data, offset)
        file = self.file(path) or File()
        self.model.tree[path] = file
        self.put(file, offset, data)

    def put(self, file: File, offset: int, data: bytes) -> None:
        if data:
            file.data.extend(bytes(max(0, offset - len(file.data))))
            file.data[offset : offset + len(data)] = data
            file.mtime = None

    @rule(path=PATHS, length=LENGTHS)
    def append(self, path: str, length: int) -> None:
        if (file := self.file(path)) is not None and len(file.data) < 8 * CHUNK:
            data = self.bytes_of(length)
            self.driver.write(path, data, flags=os.O_WRONLY | os.O_APPEND)
            self.put(file, len(file.data), data)

    @rule(path=PATHS, size=st.one_of(OFFSETS, LENGTHS))
    def truncate(self, path: str, size: int) -> None:
        if (file := self.file(path)) is not None:
            self.driver.truncate(path, size)
            file.data = file.data[:size] + bytes(max(0, size - len(file.data)))
            file.mtime = None

    @rule(path=PATHS)
    def replace(self, path: str) -> None:
        if (file := self.file(path)) is not None:
            data = self.bytes_of(10)
            self.driver.write(path, data, flags=os.O_WRONLY | os.O_TRUNC)
            file.data, file.mtime = bytearray(data), None

    @rule(path=PATHS, offset=OFFSETS, length=LENGTHS)
    def punch(self, path: str, offset: int, length: int) -> None:
        if (file := self.file(path)) is not None and length:
            handle = self.open(path)
            self.driver.volume.fallocate(handle, 1 | 2, offset, length)
            self.close(handle)
            end = min(len(file.data), offset + length)
            if offset < end:
                file.data[offset:end] = bytes(end - offset)
            file.mtime = None

    @rule(source=PATHS, goal=PATHS, blocks=st.integers(0, 3), to=st.integers(0, 3))
    def copy_range(self, source: str, goal: str, blocks: int, to: int) -> None:
        one, two = self.file(source), self.file(goal)
        if one is None or two is None:
            return
        reader, writer = self.open(source), self.open(goal)
        start, at = blocks * CHUNK, to * CHUNK
        try:
            done = self.driver.volume.copy_range(reader, start, writer, at, 2 * CHUNK)
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP
            return
        finally:
            self.close(reader)
            self.close(writer)
        assert done == min(2 * CHUNK, len(one.data) - start) or done % CHUNK == 0
        self.put(two, at, bytes(one.data[start : start + done]))

    @rule(path=PATHS, mode=st.sampled_from([0o600, 0o755, 0o4711]))
    def chmod(self, path: str, mode: int) -> None:
        if (file := self.file(path)) is not None:
            self.driver.chmod(path, mode)
            file.mode = mode

    @rule(path=PATHS, when=st.sampled_from([1, 10**18 + 7]))
    def utime(self, path: str, when: int) -> None:
        if (file := self.file(path)) is not None:
            self.driver.utime(path, when, when)
            file.mtime = when

    # -- files held open ------------------------------------------------------------------------------------------

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        return self.driver.volume.open(self.driver.volume.tree.resolve(os.fsencode(path)), flags)

    def close(self, handle: int) -> None:
        self.driver.volume.flush(handle)
        self.driver.volume.release(handle)

    @precondition(lambda self: len(self.handles) < 3)
    @rule(path=PATHS)
    def hold(self, path: str) -> None:
        if (file := self.file(path)) is not None:
            self.handles.append((self.open(path), file))

    @precondition(lambda self: self.handles)
    @rule(offset=OFFSETS, length=LENGTHS)
    def write_held(self, offset: int, length: int) -> None:
        handle, file = self.handles[0]
        data = self.bytes_of(length)
        self.driver.volume.write(handle, memoryview(data), offset)
        self.driver.volume.flush(handle)
        self.put(file, offset, data)

    @precondition(lambda self: self.handles)
    @rule()
    def fsync_held(self) -> None:
        self.driver.volume.fsync(self.handles[0][0])

    @precondition(lambda self: self.handles)
    @rule()
    def let_go(self) -> None:
        self.close(self.handles.pop(0)[0])

    # -- the world ------------------------------------------------------------------------------------------------

    @rule()
    def sync(self) -> None:
        if not self.driver.node.away:
            self.driver.sync()

    @rule()
    def evict(self) -> None:
        if not self.driver.node.away:
            self.driver.evict()

    @rule()
    def node_goes(self) -> None:
        """What was read lately stays readable, what is written waits."""
        self.compare()
        self.driver.node.away = True

    @rule()
    def node_returns(self) -> None:
        self.driver.node.away = False
        self.driver.volume.uploader.retry_now()

    @rule()
    def crash(self) -> None:
        """The process dies: threads end, nothing is sealed, nothing is told."""
        self.handles.clear()
        volume = self.driver.volume
        volume._stopping.set()
        volume._urgent.set()
        volume._thread.join()
        volume.uploader.stop()
        volume.hasher.stop()
        self.driver.index.close()
        volume.cache.descriptors.close()
        self.driver.start()

    @rule()
    def remount(self) -> None:
        for handle, _ in self.handles:
            self.close(handle)
        self.handles.clear()
        self.driver.remount()

    # -- comparison -----------------------------------------------------------------------------------------------

    @rule()
    def compare(self) -> None:
        """All names, and all content."""
        for path in sorted(self.model.tree):
            if self.model.kind(path) == "folder":
                prefix = path.rstrip("/") + "/"
                names = sorted(
                    other[len(prefix) :] for other in self.model.below(path) if "/" not in other[len(prefix) :]
                )
                assert sorted(self.driver.listdir(path)) == names
            elif (file := self.file(path)) is not None:
                assert self.driver.read(path) == bytes(file.data), path
        for handle, file in self.handles:
            assert self.driver.volume.read(handle, 1 << 30, 0) == bytes(file.data)

    @invariant()
    def attributes_agree(self) -> None:
        entries = list(self.model.tree.values())
        for path, entry in self.model.tree.items():
            status = self.driver.stat(path)
            if isinstance(entry, File):
                assert status.st_size == len(entry.data), path
                assert status.st_mode & 0o7777 == entry.mode, path
                assert status.st_nlink == sum(other is entry for other in entries), path
                assert entry.mtime is None or status.st_mtime_ns == entry.mtime, path
                assert 0 <= status.st_blocks * 512 <= -(-len(entry.data) // 512) * 512, path
            elif entry is None:
                folders = [other for other in self.model.below(path) if self.model.kind(other) == "folder"]
                direct = sum(str(Path(other).parent) == path for other in folders)
                assert status.st_nlink == 2 + direct, path

    def teardown(self) -> None:
        self.driver.node.away = False
        self.compare()
        for handle, _ in self.handles:
            self.close(handle)
        self.driver.close()
        cache = self.driver.volume.cache
        assert cache.work_files() == []


def run(folder: Path, examples: int) -> None:
    Machine.folder = folder
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            database=None,
            phases=[phase for phase in Phase if phase != Phase.shrink or "METADISKFS_SHRINK" in os.environ],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_volume_agrees_with_a_dictionary(tmp_path: Path) -> None:
    run(tmp_path, int(os.environ.get("METADISKFS_EXAMPLES") or 30))


def test_a_punched_chunk_stays_away_after_a_remount(tmp_path: Path) -> None:
    """Its row must go with the commit, not only its place in memory."""
    driver = VolumeDriver(tmp_path)
    try:
        driver.write("/f", b"x" * (3 * CHUNK))
        driver.remount()
        handle = driver.volume.open(driver.volume.tree.resolve(b"/f"), os.O_RDWR)
        driver.volume.fallocate(handle, 1 | 2, CHUNK, CHUNK)
        driver.volume.flush(handle)
        driver.volume.release(handle)
        driver.remount()
        assert driver.read("/f") == b"x" * CHUNK + bytes(CHUNK) + b"x" * CHUNK
        assert driver.stat("/f").st_blocks == 2 * CHUNK // 512
    finally:
        driver.close()
