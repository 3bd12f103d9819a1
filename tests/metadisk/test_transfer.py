"""The transfer process as the mount uses it: a real process, real sockets, a node that fails."""

import hashlib
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadiskfs.metadisk import wire
from metadiskfs.metadisk.jobs import (
    MAX_MESSAGE,
    FetchJob,
    FetchResult,
    TransferSettings,
    UploadJob,
    UploadResult,
    encode,
)
from metadiskfs.metadisk.transfer import Transfer
from metadiskfs.metadisk.worker import NICENESS, UPLOAD_THREADS, Urgency
from tests.metadisk.bad_node import BadNode
from tests.metadisk.conftest import until

Write = Callable[[bytes], Path]
Noise = Callable[[int], bytes]
BLOCK = wire.BLOCK_SIZE
CHUNK = 4 << 20


class Mount:
    """Stands for the mount: hands out jobs, keeps results."""

    def __init__(self, url: str, **settings: object) -> None:
        self.uploads: queue.Queue[UploadResult] = queue.Queue()
        self.fetches: queue.Queue[FetchResult] = queue.Queue()
        self.restarts = 0
        defaults = {"connect_timeout": 1.0, "read_timeout": 0.4, "read_deadline": 1.0}
        self.transfer = Transfer(
            TransferSettings(url, **(defaults | settings)),  # type: ignore[arg-type]
            on_upload=self.uploads.put,
            on_fetch=self.fetches.put,
            on_restart=self._restarted,
        )
        self.transfer.start()

    def _restarted(self) -> None:
        self.restarts += 1

    def upload(self, path: Path, content: bytes, number: int = 1) -> UploadResult:
        job = UploadJob(number, str(path), hashlib.sha256(content).hexdigest(), len(content))
        assert self.transfer.upload(job)
        return self.uploads.get(timeout=20)

    def fetch(self, job: FetchJob) -> list[FetchResult]:
        assert self.transfer.fetch(job)
        results = [self.fetches.get(timeout=20)]
        while not (results[-1].done or results[-1].error):
            results.append(self.fetches.get(timeout=20))
        return results


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[BadNode, Mount]]:
    """Starting a process takes a third of a second; most tests can share one."""
    with BadNode() as node:
        mount = Mount(node.url)
        yield node, mount
        mount.transfer.close()


@pytest.fixture
def node(shared: tuple[BadNode, Mount]) -> BadNode:
    shared[0].reset()
    return shared[0]


@pytest.fixture
def mount(shared: tuple[BadNode, Mount]) -> Mount:
    mount = shared[1]
    assert mount.uploads.empty()
    assert mount.fetches.empty()
    return mount


@pytest.fixture
def own(node: BadNode) -> Iterator[Mount]:
    """A process for this test alone."""
    mount = Mount(node.url)
    yield mount
    mount.transfer.close()


def fetch_job(
    node: BadNode, content: bytes, path: Path, *, first: int = 0, blocks: bool = True, number: int = 1
) -> FetchJob:
    link = node.put(content)
    pieces = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    digests = b"".join(map(wire.block_digest, pieces)).hex() if blocks and len(pieces) > 1 else ""
    sha256 = hashlib.sha256(content).hexdigest()
    counter_start = node.counter_start
    return FetchJob(number, str(path), link.filehash, link.key, counter_start, sha256, len(content), digests, first)


def announced(results: list[FetchResult]) -> set[int]:
    return {block for result in results if not result.error for block in range(result.start, result.stop)}


# -- uploads ---------------------------------------------------------------------------------------------------------


def test_an_upload_and_its_proof(mount: Mount, node: BadNode, chunk: Write, noise: Noise) -> None:
    content = noise(3 * BLOCK + 5)
    result = mount.upload(chunk(content), content)
    assert not result.error
    assert wire.Link(result.filehash, result.key) == wire.link_of(content)
    pieces = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    assert result.blocks == b"".join(map(wire.block_digest, pieces)).hex()
    assert node.count("upload") == 1


def test_one_bad_chunk_does_not_stop_the_others(mount: Mount, chunk: Write) -> None:
    assert mount.transfer.upload(UploadJob(1, "/nowhere/at/all", "0" * 64, 3))
    assert mount.transfer.upload(UploadJob(2, str(chunk(b"bad")), hashlib.sha256(b"good").hexdigest(), 3))
    longer = chunk(b"good and more")
    assert mount.transfer.upload(UploadJob(5, str(longer), hashlib.sha256(b"good").hexdigest(), 4))
    assert mount.transfer.upload(UploadJob(3, str(chunk(b"good")), "not hex", 4))
    assert mount.transfer.upload(UploadJob(4, str(chunk(b"good")), hashlib.sha256(b"good").hexdigest(), 4))
    results = {result.id: result for result in (mount.uploads.get(timeout=20) for _ in range(5))}
    assert results[5].error == "ChunkDamaged"
    assert [results[number].error for number in (1, 2, 3, 4)] == [
        "ChunkDamaged",
        "ChunkDamaged",
        "MetadiskfsError",
        "",
    ]


@pytest.mark.parametrize(
    ("fault", "error", "retry_after"),
    [
        ("status:429:77", "NodeBusy", 77.0),
        ("status:503", "NodeBusy", None),
        ("status:402", "BalanceInsufficient", None),
        ("early:413", "ObjectTooLarge", None),
        ("hang", "NodeUnreachable", None),
        ("receipt:filehash", "ContentMismatch", None),
        ("html:200", "NodeRefused", None),
    ],
)
def test_failures_are_told_by_name(
    mount: Mount, node: BadNode, chunk: Write, fault: str, error: str, retry_after: float | None
) -> None:
    node.fail("upload", fault, times=-1)
    result = mount.upload(chunk(b"x"), b"x")
    assert (result.error, result.retry_after) == (error, retry_after)
    assert result.message
    node.heal()
    assert not mount.upload(chunk(b"x"), b"x").error


# -- fetches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK, BLOCK + 1, 9 * BLOCK, 9 * BLOCK + 17])
@pytest.mark.parametrize("first", [0, 1, 6])
@pytest.mark.parametrize("kind", ["ranges", "no-ranges", "chunked", "no-length", "closes", "counter-one"])
def test_a_fetch_of_any_kind(
    mount: Mount, node: BadNode, tmp_path: Path, noise: Noise, size: int, first: int, kind: str
) -> None:
    node.ranges = kind != "no-ranges"
    node.lengths = {"chunked": "chunked", "no-length": "none"}.get(kind, "length")
    node.keep_alive = kind != "closes"
    node.counter_start = int(kind == "counter-one")
    content, path = noise(size), tmp_path / "part"
    count = -(-size // BLOCK)
    first = min(first, max(0, count - 1))
    results = mount.fetch(fetch_job(node, content, path, first=first))
    assert results[-1].done, results[-1].message
    assert announced(results) == set(range(count))
    assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o600
    if kind == "ranges" and count > 1:
        assert (results[0].start, results[0].stop) == (first, first + 1)
    assert node.count("download") == (0 if not size else 2 if first and kind != "no-ranges" else 1)


def test_without_digests_nothing_is_told_before_the_whole_is_proven(
    mount: Mount, node: BadNode, tmp_path: Path, noise: Noise
) -> None:
    content, path = noise(9 * BLOCK), tmp_path / "part"
    assert mount.fetch(fetch_job(node, content, path, blocks=False)) == [FetchResult(1, 0, 9, done=True)]
    assert path.read_bytes() == content
    node.fail("download", f"alter:{8 * BLOCK}")
    results = mount.fetch(fetch_job(node, content, path, blocks=False))
    assert [result.error for result in results] == ["ContentMismatch"]
    assert not path.exists()


@pytest.mark.parametrize("place", [0, 3 * BLOCK, 9 * BLOCK + 16])
def test_altered_bytes_are_never_announced(
    mount: Mount, node: BadNode, tmp_path: Path, noise: Noise, place: int
) -> None:
    content, path = noise(9 * BLOCK + 17), tmp_path / "part"
    node.fail("download", f"alter:{place}")
    results = mount.fetch(fetch_job(node, content, path))
    assert results[-1].error == "ContentMismatch"
    assert announced(results) <= set(range(place // BLOCK))
    assert not path.exists()


@pytest.mark.parametrize("lengths", ["length", "chunked"])
@pytest.mark.parametrize("fault", ["short:0", "short:1000", "short:400000", "html:200", "wrong-range"])
def test_a_wrong_answer_is_an_error_at_once(
    mount: Mount, node: BadNode, tmp_path: Path, noise: Noise, fault: str, lengths: str
) -> None:
    node.lengths = lengths
    content, path = noise(5 * BLOCK), tmp_path / "part"
    node.fail("download", fault)
    begun = time.monotonic()
    results = mount.fetch(fetch_job(node, content, path, first=2 if fault == "wrong-range" else 0))
    assert results[-1].error == ("NodeRefused" if fault == "wrong-range" else "ContentMismatch")
    assert time.monotonic() - begun < 0.8
    assert not path.exists()


@pytest.mark.parametrize("lengths", ["length", "chunked", "none"])
@pytest.mark.parametrize("fault", ["reset:300000", "truncate:300000", "status:500"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(
    mount: Mount, node: BadNode, tmp_path: Path, noise: Noise, fault: str, lengths: str, ranges: bool
) -> None:
    node.lengths, node.ranges = lengths, ranges
    content, path = noise(5 * BLOCK), tmp_path / "part"
    node.fail("download", fault, times=2 if ranges and lengths == "length" else 1)
    results = mount.fetch(fetch_job(node, content, path))
    assert results[-1].done, results[-1].message
    assert path.read_bytes() == content


def test_a_download_that_falls_silent_goes_on(mount: Mount, node: BadNode, tmp_path: Path, noise: Noise) -> None:
    content, path = noise(5 * BLOCK), tmp_path / "part"
    node.fail("download", "hang:200000")
    assert mount.fetch(fetch_job(node, content, path))[-1].done
    assert path.read_bytes() == content


def test_a_slow_line_is_given_time_as_long_as_it_moves(
    mount: Mount, node: BadNode, tmp_path: Path, noise: Noise
) -> None:
    content, path = noise(12 * BLOCK), tmp_path / "part"
    node.fail("download", "pace:0.12")
    begun = time.monotonic()
    results = mount.fetch(fetch_job(node, content, path))
    assert results[-1].done, results[-1].message
    assert time.monotonic() - begun > 1.0, "not as slow as it should have been"


def test_what_was_received_is_not_asked_for_again(mount: Mount, node: BadNode, tmp_path: Path, noise: Noise) -> None:
    content = noise(20 * BLOCK)
    node.fail("download", "truncate:1000000")
    assert mount.fetch(fetch_job(node, content, tmp_path / "part"))[-1].done
    assert node.requests[-1].headers["range"].startswith("bytes=1000000-")


@pytest.mark.parametrize("fault", ["hang", "drip", "drip-body", "status:503", "reset", "status:429:1"])
def test_a_fetch_never_waits_for_ever(mount: Mount, node: BadNode, tmp_path: Path, noise: Noise, fault: str) -> None:
    node.fail("download", fault, times=-1)
    begun = time.monotonic()
    results = mount.fetch(fetch_job(node, noise(3 * BLOCK), tmp_path / "part"))
    assert results[-1].error in ("NodeUnreachable", "NodeBusy")
    assert time.monotonic() - begun < 2
    assert not (tmp_path / "part").exists()


def test_an_endless_answer_fills_nothing(own: Mount, node: BadNode, tmp_path: Path, noise: Noise) -> None:
    content, path = noise(3 * BLOCK), tmp_path / "part"
    node.fail("download", "endless", times=-1)
    results = own.fetch(fetch_job(node, content, path))
    assert results[-1].error == "ContentMismatch"
    assert peak_mib(own.transfer.pid) < 45


def test_a_missing_object(mount: Mount, node: BadNode, tmp_path: Path) -> None:
    job = fetch_job(node, b"gone", tmp_path / "part")
    node.objects.clear()
    assert mount.fetch(job)[-1].error == "ObjectMissing"
    assert not (tmp_path / "part").exists()


def test_a_node_that_is_away(tmp_path: Path, chunk: Write) -> None:
    with BadNode() as gone:
        mount = Mount(gone.url)
        job = fetch_job(gone, b"x", tmp_path / "part")
    try:
        assert mount.fetch(job)[-1].error == "NodeUnreachable"
        assert mount.upload(chunk(b"x"), b"x").error == "NodeUnreachable"
    finally:
        mount.transfer.close()


@pytest.mark.parametrize("change", [{"filehash": "../../status"}, {"key": "zz"}, {"blocks": "00"}, {"size": -1}])
def test_a_job_that_makes_no_sense(
    mount: Mount, node: BadNode, tmp_path: Path, change: dict[str, object], noise: Noise
) -> None:
    """An index that was restored from somewhere is untrusted input."""
    job = fetch_job(node, noise(2 * BLOCK), tmp_path / "part")
    broken = job._replace(**change)
    assert mount.fetch(broken)[-1].error
    assert not node.requests
    assert mount.fetch(job)[-1].done


def test_a_fetch_does_not_follow_a_link(mount: Mount, node: BadNode, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / "part").symlink_to(precious)
    assert mount.fetch(fetch_job(node, b"x", tmp_path / "part"))[-1].error
    assert precious.read_bytes() == b"precious"


def test_an_earlier_attempt_is_written_over_in_place(
    mount: Mount, node: BadNode, tmp_path: Path, noise: Noise
) -> None:
    """After a restart the job comes again; whoever opened the file before must see what is announced now."""
    content, path = noise(4 * BLOCK), tmp_path / "part"
    path.write_bytes(b"old" * BLOCK * 4)
    with path.open("rb") as opened:
        assert mount.fetch(fetch_job(node, content, path))[-1].done
        assert opened.read() == content
        node.fail("download", "html:404")
        assert mount.fetch(fetch_job(node, content, path))[-1].error
        opened.seek(0)
        assert opened.read() == content


def test_reads_do_not_wait_behind_uploads(own: Mount, node: BadNode, tmp_path: Path, chunk: Write) -> None:
    own.upload(chunk(b"warm"), b"warm")
    node.fail("upload", "hang", times=-1)
    for number in range(20):
        assert own.transfer.upload(UploadJob(number, str(chunk(b"x")), hashlib.sha256(b"x").hexdigest(), 1))
    time.sleep(0.1)
    begun = time.monotonic()
    assert own.fetch(fetch_job(node, b"quick", tmp_path / "part"))[-1].done
    assert time.monotonic() - begun < 0.4


# -- the process -----------------------------------------------------------------------------------------------------


def test_it_is_started_again_when_it_dies(own: Mount, node: BadNode, tmp_path: Path, chunk: Write) -> None:
    node.fail("upload", "hang", times=1)
    job = UploadJob(1, str(chunk(b"x")), hashlib.sha256(b"x").hexdigest(), 1)
    assert own.transfer.upload(job)
    until(lambda: node.count("upload"))
    for round_ in range(3):
        os.kill(own.transfer.pid, signal.SIGKILL)
        until(lambda wanted=round_ + 1: own.restarts == wanted)  # type: ignore[misc]
    assert own.uploads.empty()
    assert own.transfer.upload(job)
    assert not own.uploads.get(timeout=20).error
    assert own.fetch(fetch_job(node, b"y", tmp_path / "part"))[-1].done


def test_random_kills_lose_no_job(node: BadNode, chunk: Write) -> None:
    """The mount's duty played through: after each restart everything unfinished is handed out anew."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    contents = {number: chance.randbytes(chance.choice([10, 5000, 600_000])) for number in range(60)}
    paths = {number: chunk(content) for number, content in contents.items()}
    mount = Mount(node.url)
    unfinished = set(contents)
    killed = 0
    try:
        handed: set[int] = set()
        restarts = 0
        while unfinished:
            if mount.restarts != restarts:
                restarts, handed = mount.restarts, set()
            for number in sorted(unfinished - handed):
                content = contents[number]
                job = UploadJob(number, str(paths[number]), hashlib.sha256(content).hexdigest(), len(content))
                if not mount.transfer.upload(job):
                    break
                handed.add(number)
            if killed < 4 and chance.random() < 0.2:
                killed += 1
                os.kill(mount.transfer.pid, signal.SIGKILL)
            try:
                result = mount.uploads.get(timeout=0.5)
            except queue.Empty:
                continue
            assert not result.error, result.message
            unfinished.discard(result.id)
    finally:
        mount.transfer.close()
    assert killed
    assert set(node.objects) >= {wire.link_of(content).filehash for content in contents.values()}


def test_close_ends_it_at_once_whatever_it_does(node: BadNode, tmp_path: Path, chunk: Write) -> None:
    mount = Mount(node.url, read_timeout=60.0, read_deadline=60.0)
    node.fail("any", "hang", times=-1)
    for number in range(12):
        mount.transfer.upload(UploadJob(number, str(chunk(b"x")), hashlib.sha256(b"x").hexdigest(), 1))
        mount.transfer.fetch(fetch_job(node, b"x", tmp_path / str(number)))
    until(lambda: len(node.requests) >= 7)
    begun = time.monotonic()
    mount.transfer.close()
    assert time.monotonic() - begun < 2
    assert not alive(mount.transfer.pid)
    assert not mount.transfer.upload(UploadJob(1, "", "", 0))
    assert mount.restarts == 0
    mount.transfer.close()


def test_it_does_not_outlive_a_killed_mount(node: BadNode, chunk: Write) -> None:
    """Even with all its threads stuck on a node that says nothing."""
    program = """
import sys, time
from metadiskfs.metadisk.jobs import TransferSettings, UploadJob
from metadiskfs.metadisk.transfer import Transfer
quiet = lambda *_: None
transfer = Transfer(TransferSettings(sys.argv[1]), on_upload=quiet, on_fetch=quiet, on_restart=quiet)
transfer.start()
for number in range(10):
    transfer.upload(UploadJob(number, sys.argv[2], sys.argv[3], 1))
print(transfer.pid, flush=True)
time.sleep(60)
"""
    node.fail("any", "hang", times=-1)
    command = [sys.executable, "-c", program, node.url, str(chunk(b"x")), hashlib.sha256(b"x").hexdigest()]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        until(lambda: node.requests)
        parent.kill()
    until(lambda: not alive(pid), 5)


def test_ctrl_c_is_not_for_it(own: Mount, node: BadNode, chunk: Write) -> None:
    own.upload(chunk(b"x"), b"x")
    assert os.getsid(own.transfer.pid) != os.getsid(0)
    os.kill(own.transfer.pid, signal.SIGINT)
    assert not own.upload(chunk(b"y"), b"y").error
    assert own.restarts == 0


def test_its_uploads_are_nice_and_it_shows_no_secret(node: BadNode, chunk: Write) -> None:
    mount = Mount(node.url, token="topsecret1")
    try:
        assert not mount.upload(chunk(b"x"), b"x").error
        pid = mount.transfer.pid
        threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
        niceness = [
            os.getpriority(os.PRIO_PROCESS, thread) - os.getpriority(os.PRIO_PROCESS, 0) for thread in threads
        ]
        assert sorted(niceness, reverse=True)[: UPLOAD_THREADS + 1] == [NICENESS] * UPLOAD_THREADS + [0]
        for part in ("cmdline", "environ"):
            assert b"topsecret1" not in Path(f"/proc/{pid}/{part}").read_bytes()
        assert node.requests[-1].form["token"] == "topsecret1"
    finally:
        mount.transfer.close()


def test_what_lies_in_the_working_directory_is_not_imported(
    node: BadNode, chunk: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requests.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    mount = Mount(node.url)
    try:
        assert not mount.upload(chunk(b"x"), b"x").error
        assert Path(f"/proc/{mount.transfer.pid}/cwd").readlink() == Path("/")
    finally:
        mount.transfer.close()


def test_a_full_queue_is_told_and_never_waited_for(own: Mount, node: BadNode, chunk: Write) -> None:
    own.upload(chunk(b"warm"), b"warm")
    os.kill(own.transfer.pid, signal.SIGSTOP)
    job = UploadJob(1, str(chunk(b"x")), hashlib.sha256(b"x").hexdigest(), 1)
    begun, taken = time.monotonic(), 0
    while own.transfer.upload(job):
        taken += 1
    assert time.monotonic() - begun < 2
    assert taken >= 32
    os.kill(own.transfer.pid, signal.SIGCONT)
    for _ in range(taken):
        assert not own.uploads.get(timeout=20).error
    assert own.transfer.upload(job)


def test_the_longest_message_passes(mount: Mount, node: BadNode, tmp_path: Path, noise: Noise) -> None:
    """64 MiB is the largest chunk: its digests must fit."""
    job = fetch_job(node, noise(2 * BLOCK), tmp_path / "part")
    digests = "00" * wire.BLOCK_DIGEST_SIZE * ((64 << 20) // BLOCK)
    longest = job._replace(blocks=digests)
    assert len(encode([longest])) < MAX_MESSAGE
    assert mount.fetch(longest)[-1].error == "ContentMismatch"


def test_jobs_handed_out_together_have_a_result_each(mount: Mount, chunk: Write) -> None:
    contents = [b"one", b"two", b"three"]
    jobs = [
        UploadJob(n, str(chunk(content)), hashlib.sha256(content).hexdigest(), len(content))
        for n, content in enumerate(contents)
    ]
    assert mount.transfer.upload(jobs[0], jobs[1]._replace(path="/nowhere"), jobs[2])
    results = {result.id: result for result in (mount.uploads.get(timeout=20) for _ in jobs)}
    assert [results[n].error for n in range(3)] == ["", "ChunkDamaged", ""]
    assert [results[n].filehash for n in (0, 2)] == [wire.link_of(contents[n]).filehash for n in (0, 2)]


def test_what_nobody_waits_for_gives_way_for_a_while() -> None:
    urgency, passed = Urgency(), threading.Event()

    def go() -> None:
        urgency.give_way()
        passed.set()

    with urgency.urgent():
        threading.Thread(target=go).start()
        assert not passed.wait(0.01)
        assert passed.wait(5)  # but it is never kept for long
    passed.clear()
    with urgency.urgent():
        threading.Thread(target=go).start()
        begun = time.monotonic()
    assert passed.wait(5)
    assert time.monotonic() - begun < 0.2


def test_a_callback_that_fails_ends_nothing(node: BadNode, chunk: Write, caplog: pytest.LogCaptureFixture) -> None:
    results: queue.Queue[UploadResult] = queue.Queue()

    def take(result: UploadResult) -> None:
        results.put(result)
        if result.id == 1:
            raise ValueError("on purpose")

    transfer = Transfer(
        TransferSettings(node.url), on_upload=take, on_fetch=lambda _result: None, on_restart=lambda: None
    )
    transfer.start()
    try:
        for number in (1, 2):
            transfer.upload(UploadJob(number, str(chunk(b"x")), hashlib.sha256(b"x").hexdigest(), 1))
            assert results.get(timeout=20).id == number
    finally:
        transfer.close()
    assert "on purpose" in caplog.text


def test_it_stays_small(own: Mount, node: BadNode, tmp_path: Path, chunk: Write, noise: Noise) -> None:
    """All threads busy with 4 MiB chunks, several times over."""
    contents = [noise(CHUNK) for _ in range(4)]
    paths = [chunk(content) for content in contents]
    jobs = [fetch_job(node, content, tmp_path / f"part{at}", number=at) for at, content in enumerate(contents)]
    for number in range(16):
        content = contents[number % 4]
        assert own.transfer.upload(
            UploadJob(number, str(paths[number % 4]), hashlib.sha256(content).hexdigest(), CHUNK)
        )
        assert own.transfer.fetch(jobs[number % 4])
    for _ in range(16):
        assert not own.uploads.get(timeout=30).error
    done = 0
    while done < 16:
        result = own.fetches.get(timeout=30)
        assert not result.error, result.message
        done += result.done
    assert peak_mib(own.transfer.pid) < 45


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1016
    raise AssertionError("no peak in the process's status")
