"""Who imports whom: the rooms of docs/design.md."""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
SOURCES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("llamatrain", "data_tools", "launch")
    for path in (REPOSITORY / package).rglob("*.py")
}
FLOORS = """
config arithmetic memory process distributed flat device run_directory tokenizer files garbage errors version words
model
parallel data optim checkpoint observe evaluation resilience planning
session preflight trainer initial_weights snapshots rollback integrity dry_run scorer evaluator verification reporting
cli train plan generate evaluate convert report goodput check verify
"""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS.strip().splitlines()) for room in rooms.split()}
NEIGHBOURS = {("evaluation", "data"), ("evaluation", "observe")}
WITHOUT_TORCH = """
config arithmetic memory process run_directory tokenizer files garbage errors words planning reporting
cli train plan generate evaluate convert report goodput check verify
data.shards data.order data.permutation data.sources checkpoint.commit evaluation.tasks observe.goodput
resilience.control resilience.guard resilience.hang resilience.pulse resilience.watchman
preflight.findings verification.cases
"""


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def imports(module: str, *, when_loaded: bool = False) -> frozenset[str]:
    """The modules of this repository, and torch, that a module imports; `when_loaded`: outside of functions."""
    found: set[str] = set()
    todo: list[ast.AST] = [parsed(module)]
    while todo:
        node = todo.pop()
        if when_loaded and (isinstance(node, ast.FunctionDef) or is_for_types(node)):
            continue
        todo += ast.iter_child_nodes(node)
        names: Iterable[str] = ()
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        found.update("torch" if name.partition(".")[0] == "torch" else name for name in names)
    return frozenset(found & {*SOURCES, "torch"})


def loaded(module: str) -> set[str]:
    """All that is loaded with a module, packages it lies in among it."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [name.rpartition(".")[0]] if "." in name else []
            todo += imports(name, when_loaded=True) if name in SOURCES else ()
    return seen


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_a_room_imports_only_from_rooms_below_it() -> None:
    wings, wrong = FLOOR["data"], set()
    for module in (name for name in SOURCES if name.startswith("llamatrain.")):
        own = room_of(module)
        for other in map(room_of, (name for name in imports(module) if name.startswith("llamatrain."))):
            beside = FLOOR[other] == FLOOR[own] != wings or (own, other) in NEIGHBOURS
            if own != other and not beside and FLOOR[other] >= FLOOR[own]:
                wrong.add(f"{module} imports {other}")
    assert wrong == set()


def test_data_tools_and_launch_stand_beside_and_need_no_torch() -> None:
    for module in SOURCES:
        beside = module.partition(".")[0]
        if beside == "llamatrain":
            assert not any(name.startswith(("data_tools", "launch")) for name in imports(module)), module
        else:
            assert "torch" not in loaded(module), module


def test_rooms_without_torch_load_none() -> None:
    named = tuple(f"llamatrain.{name}." for name in WITHOUT_TORCH.split())
    modules = [name for name in SOURCES if f"{name}.".startswith(named)]
    assert len(modules) > len(named)
    assert [module for module in modules if "torch" in loaded(module)] == []
