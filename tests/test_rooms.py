"""The rooms of the package: each imports only from those on floors below, and no modules in a circle."""

import ast
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import factorized_gpt2

ROOT = Path(factorized_gpt2.__file__).parent
FLOORS = (  # from the ground up; rooms on one floor do not know each other
    {"network", "common"},
    {"text"},
    {"models", "settings"},
    {"trainer"},
    {"compress", "nanogpt"},
    {"runs"},
    {"hub", "report"},
    {"cli"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


def imported_by(path: Path) -> set[str]:
    """Name the modules of the package that one imports, as in `text.blocks`."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join((*above, name)) for name in names}
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_down(path):
    room = path.parent.name
    others = {name.partition(".")[0] for name in imported_by(path)} - {room}
    lazily = {"common"} if path.name == "__init__.py" else set()
    assert {other for other in others - lazily if FLOOR_OF[other] >= FLOOR_OF[room]} == set()


def test_no_circles():
    graph = {name_of(path): imported_by(path) for path in MODULES if path.name != "__init__.py"}
    list(TopologicalSorter(graph).static_order())


def test_what_is_published_stands_alone():
    allowed = {name_of(path) for path in (ROOT / "network").glob("*.py")}
    for path in (ROOT / "network").glob("*.py"):
        assert imported_by(path) <= allowed


@pytest.mark.parametrize("room", sorted(FLOOR_OF))
def test_every_room_says_what_it_is_for(room):
    module = import_module(f"factorized_gpt2.{room}")
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018
