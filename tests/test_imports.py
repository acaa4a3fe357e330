"""Imports point one way, heavy libraries stay where they belong, and the command line answers at once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ffsplit

PACKAGE = Path(ffsplit.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
WORKERS = [module for module in MODULES if module.startswith("ffsplit.run.stages.")]


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module is not None, "imports are absolute"
        for alias in node.names:
            dotted = f"{node.module}.{alias.name}"
            yield dotted if dotted in MODULES else node.module
    elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "import_module":
        yield from (each.value for each in node.args if isinstance(each, ast.Constant))


@cache
def every_import(module: str) -> frozenset[str]:
    """Whatever a module imports, at its top or inside its functions."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    return frozenset(name for node in ast.walk(tree) for name in _names(node))


@cache
def top_imports(module: str) -> frozenset[str]:
    """What importing a module imports: not what its functions or `if TYPE_CHECKING` do."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(ast.parse(MODULES[module].read_text("utf-8")).body)
    while waiting:
        node = waiting.pop()
        found |= set(_names(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
    return frozenset(found)


def loaded_by(module: str, *, packages: bool = True) -> set[str]:
    """Everything that importing a module imports, through our own modules and the packages they are in."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            waiting += top_imports(name)
            waiting += [name.rsplit(".", 1)[0]] if packages and "." in name else []
    return seen


def libraries(names: set[str] | frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def in_room(*rooms: str) -> list[str]:
    return [module for module in MODULES if room(module) in rooms]


def test_the_scan_sees_every_module() -> None:
    assert {
        "ffsplit",
        "ffsplit.cli.entry",
        "ffsplit.distributed.ray_runner",
        "ffsplit.runtime.plugin",
    } <= set(MODULES)
    assert "ray" in libraries(every_import("ffsplit.distributed.ray_runner"))
    assert "ffsplit.run.driver" in every_import("ffsplit.cli.commands")


def test_only_distributed_imports_ray() -> None:
    users = {module for module in MODULES if "ray" in libraries(every_import(module))}
    assert {room(module) for module in users - {"ffsplit.compat.ray"}} == {"distributed"}


PRIVATE = re.compile(
    r"\b(?:ray|torch|transformers|huggingface_hub|boto3|botocore|pydantic)(?:\.\w+)*\._(?!_)"
    r"|\bimport _raylet|transformers\.(?:core_model_loading|conversion_mapping)|onednn"
)


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) != "compat"])
def test_private_interfaces_of_libraries_are_used_in_compat_alone(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Import | ast.ImportFrom):
            assert not PRIVATE.search(ast.unparse(node)), ast.unparse(node)


@pytest.mark.parametrize("module", in_room("splitting", "compressors"))
def test_the_maths_never_imports_transformers_or_ray(module: str) -> None:
    assert not {"transformers", "ray"} & libraries(loaded_by(module))
    assert not {"transformers", "ray"} & libraries(every_import(module))


LIGHT = ["ffsplit", "ffsplit.cli", "ffsplit.config", "ffsplit.errors", "ffsplit.ffn.shapes"]


@pytest.mark.parametrize("module", LIGHT + in_room("store"))
def test_light_modules_load_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "ray", "numpy", "pyarrow", "datasets", "safetensors"}
    assert not heavy & libraries(loaded_by(module))


def test_a_run_that_is_committed_loads_neither_stages_nor_reports() -> None:
    """What its driver loads anyway; a test of the pipeline sees that it asks for no tokenizer."""
    loaded = loaded_by("ffsplit.run.driver") | loaded_by("ffsplit.cli.tables")
    assert not {"ray", "boto3", "botocore", "pyarrow", "jinja2"} & libraries(loaded)
    assert WORKERS and not set(WORKERS) & loaded


@pytest.mark.parametrize("module", WORKERS)
def test_workers_import_no_runner(module: str) -> None:
    """A stage's file has what its workers run: they load no cluster, no command and no report with it."""
    loaded = {room(name) for name in loaded_by(module)}
    assert not {"distributed", "cli", "zoo", "report"} & loaded


@pytest.mark.parametrize("module", in_room("config", "errors", "ffn", "keys", "redaction"))
def test_the_ground_floor_imports_nothing_above_it(module: str) -> None:
    own = {name for name in every_import(module) if name.startswith("ffsplit")}
    ground = {"ffsplit.config", "ffsplit.errors", "ffsplit.keys", "ffsplit.redaction"}
    assert {name for name in own if room(name) != "ffn"} <= ground


def test_no_import_goes_round_in_a_circle() -> None:
    for module in MODULES:
        for name in top_imports(module) & MODULES.keys():
            assert module not in loaded_by(name, packages=False), f"{module} and {name} import each other"


def test_no_two_rooms_import_each_other() -> None:
    """Not by a detour either, and not inside functions."""
    rooms: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module in MODULES:
        imported = {room(name) for name in every_import(module) & MODULES.keys()}
        rooms[room(module)] |= imported - {room(module), ""}
    for name in rooms.keys() - {""}:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            for other in rooms[waiting.pop()] - seen:
                assert other != name, f"room {name} imports itself by way of others"
                seen.add(other)
                waiting.append(other)


def test_no_drawers() -> None:
    assert not {"utils", "helpers", "common", "misc"} & {module.split(".")[-1] for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_about_400_lines_at_most(module: str) -> None:
    assert len(MODULES[module].read_text("utf-8").splitlines()) <= 420


@pytest.mark.subprocess
def test_importing_ffsplit_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, ffsplit; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "ffsplit" in loaded
    assert not {"torch", "transformers", "ray", "numpy", "pydantic", "boto3"} & loaded


@pytest.mark.subprocess
@pytest.mark.parametrize("order", ["import ffsplit", "import transformers.quantizers.auto, ffsplit"])
def test_the_split_format_is_registered_in_either_order(order: str) -> None:
    code = (
        f"{order}; from transformers.quantizers import auto; print('ffsplit' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_public_names() -> None:
    for name in ffsplit.__all__:
        assert getattr(ffsplit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ffsplit.nothing


@pytest.mark.subprocess
def test_help_loads_no_heavy_library() -> None:
    """Importing takes most of the time that a command line needs to answer."""
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); "
    code += "from ffsplit.cli.entry import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shown, modules = done.stdout.splitlines()
    assert "compress" in "\n".join(shown)
    heavy = {"torch", "transformers", "ray", "numpy", "pyarrow", "datasets", "matplotlib", "boto3", "scipy"}
    assert not heavy & set(modules.split())
