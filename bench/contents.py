"""What is written, reproducibly: from a seed anybody can make the same bytes again and compare."""

import io
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

BLOCK = 4096


def content(seed: int, size: int) -> bytearray:
    """Bytes that neither compress nor repeat, different for every seed."""
    return bytearray(random.Random(seed).randbytes(size))


def small_content(seed: int, number: int, size: int) -> bytes:
    """The content of the n-th small file: made fast, and different from all others."""
    stamp = f"{seed} {number}\n".encode()
    return (stamp + random.Random(seed).randbytes(size))[:size]


def random_offsets(seed: int, size: int, count: int) -> list[int]:
    """Block-aligned places in a file of ``size`` bytes."""
    rng = random.Random(seed + 1)
    return [rng.randrange(max(1, size // BLOCK)) * BLOCK for _ in range(count)]


def random_writes(seed: int, size: int, count: int) -> list[tuple[int, bytes]]:
    return [
        (offset, small_content(seed + 2, number, min(BLOCK, size)))
        for number, offset in enumerate(random_offsets(seed + 2, size, count))
    ]


def _text(rng: random.Random, size: int) -> bytes:
    """Something like source code: it compresses as that does."""
    words = (
        "def",
        "return",
        "self",
        "value",
        "index",
        "if",
        "not",
        "None",
        "=",
        "(x)",
        "for",
        "in",
        "items",
        "#",
        ":",
    )
    parts: list[str] = []
    length = 0
    while length < size:
        line = " " * rng.choice((0, 4, 4, 8)) + " ".join(rng.choices(words, k=rng.randint(2, 9)))
        parts.append(f"{line} {rng.getrandbits(24):x}\n")
        length += len(parts[-1])
    return "".join(parts).encode()[:size]


def source_tree(files: int) -> Iterator[tuple[str, bytes]]:
    """(path, content) of a source tree: sizes as such trees have them, most of a few KiB, some of a hundred."""
    rng = random.Random(42)
    for number in range(files):
        folder = f"src/part{number // 80:02d}/module{number % 80 // 10}"
        size = min(200_000, int(rng.lognormvariate(8.2, 1.2)))
        yield f"{folder}/file{number:04d}.py", _text(rng, size)


def make_tarball(path: Path, files: int) -> int:
    """Write the tree as a tar file; returns how many files and folders it has."""
    folders: set[str] = set()
    with tarfile.open(path, "w") as tar:
        for name, data in source_tree(files):
            for folder in reversed([str(parent) for parent in Path(name).parents][:-1]):
                if folder not in folders:
                    folders.add(folder)
                    entry = tarfile.TarInfo(folder)
                    entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, 1_700_000_000
                    tar.addfile(entry)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), 0o644, 1_700_000_000
            tar.addfile(entry, io.BytesIO(data))
    return files + len(folders)
