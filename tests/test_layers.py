"""Imports go downwards only, and what belongs to one file stays in it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "metadiskfs"

LEAVES = {"errors", "config", "crash", ""}
MAY_IMPORT = {
    # Values and pure functions that cross between rooms.
    "metadisk.wire": {"errors"},
    "metadisk.jobs": set(),
    "metadisk": {"metadisk"} | LEAVES,
    "store": {"store", "metadisk.wire", "metadisk.jobs"} | LEAVES,
    "fs": {"fs", "store", "metadisk.wire"} | LEAVES,
    "node": {"node", "metadisk.wire"} | LEAVES,
    "control": LEAVES,
    "embedded": LEAVES,
    "mountpoint": LEAVES,
    # Composition.
    "mount": {"control", "embedded", "mountpoint", "upkeep", "fs", "store", "metadisk"} | LEAVES,
    "upkeep": {"store"} | LEAVES,
    "sweep": {"control", "embedded", "store", "node"} | LEAVES,
    "torture": {"torture", "control", "embedded", "mountpoint", "store"} | LEAVES,
    "cli": {
        "cli",
        "control",
        "embedded",
        "mountpoint",
        "mount",
        "sweep",
        "torture",
        "fs",
        "store",
        "metadisk",
        "node",
    }
    | LEAVES,
    "__main__": {"cli"},
    "errors": set(),
    "crash": set(),
    "config": {"errors"},
    "": set(),
}
ONLY_IN = {
    "mfusepy": {"fs/operations.py"},
    "requests": {"metadisk/client.py"},
    "sqlite3": {"store/", "node/accounts.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if (PACKAGE.parent / (name.replace(".", "/") + ".py")).exists()}
            found |= modules or {node.module}
    return found


def is_type_checking_only(path: Path, module: str) -> bool:
    """An import under ``if TYPE_CHECKING`` names a type and runs nothing."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for inner in ast.walk(node):
                names = [alias.name for alias in inner.names] if isinstance(inner, ast.Import) else []
                if module in names or (isinstance(inner, ast.ImportFrom) and inner.module == module):
                    return True
    return False


def room_of(module: str) -> str:
    """The longest name in MAY_IMPORT that the module belongs to."""
    inner = module.removeprefix("metadiskfs").removeprefix(".").removesuffix(".__init__")
    parts = inner.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in MAY_IMPORT:
            return name
    return "" if inner in ("", "__init__") else f"unknown room {inner}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    module = "metadiskfs." + str(path.relative_to(PACKAGE)).removesuffix(".py").replace("/", ".")
    allowed = MAY_IMPORT[room_of(module)]
    for imported in imports_of(path):
        if imported == "metadiskfs" or imported.startswith("metadiskfs."):
            room = room_of(imported)
            wide = room.split(".")[0]
            assert room in allowed or wide in allowed, f"{module} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_foreign_libraries_stay_where_they_belong(path: Path) -> None:
    inner = str(path.relative_to(PACKAGE))
    for imported in imports_of(path):
        places = ONLY_IN.get(imported.split(".")[0])
        if places and not is_type_checking_only(path, imported):
            assert any(inner == place or (place.endswith("/") and inner.startswith(place)) for place in places), (
                imported
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints(path: Path) -> None:
    if path.is_relative_to(PACKAGE / "cli"):
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
