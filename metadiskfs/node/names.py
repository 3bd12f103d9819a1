"""File names as strangers give them, made harmless. Pure functions."""

import re
import unicodedata

_SEPARATORS = re.compile(r"[\\/\s]+")
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_.-]")
MAX_NAME = 247
"""With the eight characters a download puts in front, 255: what file systems take."""
NAMELESS = "file"


def clean(name: str) -> str:
    """Leave ASCII letters, digits, ``_``, ``.`` and ``-``; separators and spaces become ``_``.

    "file" if nothing is left. What survives means nothing to a header, a shell, a path or a page. Accents go, their
    letters stay.
    """
    plain = unicodedata.normalize("NFKD", name)
    plain = _FORBIDDEN.sub("", _SEPARATORS.sub("_", plain)).lstrip("._")
    return plain[:MAX_NAME] or NAMELESS
