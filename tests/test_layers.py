"""Floors: a module imports from lower floors, or from its own without cycles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxlm"

# Rooms from the ground up; a package is one room with all its modules.
FLOORS = [
    {
        "errors",
        "huge_pages",
        "axes",
        "values",
        "model_parts",
        "model_config",
        "data_config",
        "config",
        "presets",
        "yaml_file",
        "mistakes",
        "cli",
    },
    {
        "mesh",
        "collectives",
        "xla",
        "tokenizer",
        "tokenizer_base",
        "tokenizer_dropout",
        "tokenizer_foreign",
        "tokenizer_training",
        "chat",
        "flops",
        "monitor",
        "manifest",
        "placement",
        "liveness",
        "processes",
        "profiling",
    },
    {"sharding", "misfit"},
    {"data", "optim", "parallel", "picture"},
    {"nn", "losses"},
    {"models"},
    {"tasks", "checkpoint", "orbax_noise"},
    {"step", "decode", "decode_params", "decode_ngram", "beam", "padding", "sampling"},
    {"export"},
    {
        "api",
        "base",
        "texts",
        "continuing",
        "fitting",
        "evaluation",
        "lm_eval",
        "loading",
        "run_folder",
        "inputs",
        "validation",
        "parity",
    },
    {"train", "prepare", "evaluate", "check", "sample", "bench", "export.__main__", "__main__"},
    {"__init__"},
]
COMMANDS = 10
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    return module if module in FLOOR else module.split(".")[0]


def imports(module: str) -> set[str]:
    """The modules of the package that `module` imports anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == PACKAGE.name:
                found.add(resolve(name))
    return found


def resolve(name: str) -> str:
    """The module that an imported name is or lives in."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_floor_and_imports_from_below(module):
    assert room(module) in FLOOR, f"{module} has no floor: give its room one in FLOORS"
    floor = FLOOR[room(module)]
    for other in imports(module):
        above = FLOOR[room(other)]
        assert above <= floor, f"{module} (floor {floor}) imports {other} (floor {above})"
        assert floor != COMMANDS or above != COMMANDS or room(module) == room(other), (
            f"the command {module} imports the command {other}"
        )


def test_there_are_no_cycles():
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a cycle of imports: {' -> '.join([*path, module])}"
        if module in done:
            return
        path.append(module)
        for other in imports(module):
            visit(other)
        path.pop()
        done.add(module)

    for module in MODULES:
        visit(module)


def test_imports_are_seen():
    assert {"config", "sharding", "tasks.batch", "nn.layers"} <= imports("step")


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{module}: split it by concept"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{module}.{node.name} has {lines} lines"
