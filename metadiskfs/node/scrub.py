"""Reading a whole store and comparing every object with its name."""

from collections.abc import Callable
from dataclasses import dataclass

from metadiskfs.errors import ContentMismatch, ObjectMissing
from metadiskfs.node.engine import Engine, prove


@dataclass(slots=True)
class Scrubbed:
    """``size`` in bytes."""

    objects: int = 0
    size: int = 0
    damaged: int = 0


def scrub(engine: Engine, *, on_damaged: Callable[[str, str], None]) -> Scrubbed:
    """Read every object; tells of each damaged one (filehash, what is wrong) and goes on. Changes nothing.

    A damaged object is replaced by the next upload of its content. May run beside a node.
    """
    result = Scrubbed()
    for entry in engine.list():
        try:
            with engine.open(entry.filehash) as stored:
                prove(stored, entry.filehash)
        except ObjectMissing:
            continue  # deleted since it was listed
        except ContentMismatch:
            result.damaged += 1
            on_damaged(entry.filehash, "damaged")
        except OSError as error:
            result.damaged += 1
            on_damaged(entry.filehash, f"unreadable: {error.strerror}")
        result.objects += 1
        result.size += entry.size
    return result
