"""The house rules: imports run downwards, bookkeeping has no tensor in it, lines have at most 110 columns."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in (ROOT / "duoserve").rglob("*.py")}


def imports(name: str, anywhere: bool = False) -> set[str]:
    """What a module imports when it is imported itself (or `anywhere` in it), by full names."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found.update(f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module
                         for alias in node.names)
    return found


GRAPH = {name: imports(name) & set(MODULES) for name in MODULES}


def below(name: str, seen: tuple[str, ...] = ()) -> set[str]:
    """All that a module imports, directly or not; fails on a circle."""
    assert name not in seen, " -> ".join((*seen, name))
    return GRAPH[name].union(*(below(other, (*seen, name)) for other in GRAPH[name]))


@pytest.mark.parametrize("name", MODULES)
def test_no_import_goes_round_in_a_circle(name):
    below(name)


def test_nothing_below_the_engine_imports_it():
    above = {name for name in MODULES if "duoserve.engine" in below(name)}
    assert above == {f"duoserve.bench.{name}" for name in ("__main__", "live", "gpu", "madeup", "parts",
                                                           "quality")}
    assert not GRAPH["duoserve"]            # lazily: `python -m duoserve.checkpoint` needs none of it


@pytest.mark.parametrize("name", ("scheduler", "cache", "policies", "history"))
def test_bookkeeping_has_no_tensor_in_it(name):
    assert not {"torch", "torch.nn"} & imports(f"duoserve.{name}", anywhere=True)


def test_no_module_imports_the_command_line_of_the_bench():
    assert not any("duoserve.bench.__main__" in GRAPH[name] for name in MODULES)


def test_the_model_knows_nothing_of_caches_streams_or_policies():
    assert below("duoserve.model") == {
        f"duoserve.{name}" for name in ("config", "errors", "files", "history", "quant")}


def test_no_line_has_more_than_110_columns():
    listed = subprocess.run(["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name] or list(ROOT.rglob("*.py"))
    assert paths
    long = [f"{path.relative_to(ROOT)}:{i}" for path in paths if path.exists()
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 110]
    assert not long, f"{len(long)} lines are too long: {' '.join(long[:20])}"
