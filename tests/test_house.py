"""The plan of the house, as rules: who may import whom, how long a file may be, what nobody does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = ("http_frontend", "tokenizer_proc", "scheduler_proc", "detokenizer_proc")
CODE = ("engine", *PROCESSES, "scripts")
# Bottom to top: what stands further up may import what stands further down.
FLOORS = (
    "config", "wire", "checkpoints", "parallel", "kernels", "layers", "models", "launcher", "bench", "doctor", "cli",
    "__main__",
)  # fmt: skip
MAY_IMPORT = {
    "http_frontend": {"config", "wire"},
    "tokenizer_proc": {"config", "wire", "checkpoints"},
    "detokenizer_proc": {"config", "wire", "checkpoints"},
    "scheduler_proc": {"config", "wire", "checkpoints", "parallel", "kernels", "layers", "models"},
}
LONGEST = 420
EMPTY_NAMES = {"utils", "helpers", "common", "misc", "util", "helper"}


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def imports(self) -> set[str]:
        """Every dotted name that an import statement anywhere in the module names."""
        return set(_imported(self.tree, self.package))


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def modules() -> dict[str, Module]:
    found = {}
    for top in CODE:
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text()
            found[name] = Module(name, path.relative_to(ROOT), ast.parse(text), text.count("\n"))
    return found


def below(names: set[str], top: str) -> set[str]:
    return {name for name in names if name == top or name.startswith(top + ".")}


def test_all_rooms_are_there() -> None:
    assert {name.partition(".")[0] for name in modules()} == set(CODE)
    floors = {name.split(".")[1] for name in modules() if name.count(".") and name.startswith("engine.")}
    assert floors <= set(FLOORS), "a floor of engine that the plan does not know"


def test_processes_never_import_one_another_and_the_engine_knows_none() -> None:
    for module in modules().values():
        top = module.name.partition(".")[0]
        if top == "scripts":
            continue
        for process in PROCESSES:
            assert process == top or not below(module.imports(), process), f"{module.path} imports {process}"


def test_each_process_imports_only_the_floors_it_may() -> None:
    for module in modules().values():
        allowed = MAY_IMPORT.get(module.name.partition(".")[0])
        for name in below(module.imports(), "engine") - {"engine"} if allowed is not None else ():
            floor = name.split(".")[1]
            assert floor in allowed or floor == "__version__", f"{module.path} imports {name}"


def test_engine_floors_import_only_downward() -> None:
    for module in modules().values():
        mine = module.name.split(".")[1:2]
        if not module.name.startswith("engine.") or not mine:
            continue
        for name in below(module.imports(), "engine") - {"engine"}:
            floor = name.split(".")[1]
            if floor in FLOORS:
                assert FLOORS.index(floor) <= FLOORS.index(mine[0]), f"{module.path} imports {name}, a floor above it"


def test_no_import_circles() -> None:
    graph = {name: sorted((module.imports() & modules().keys()) - {name}) for name, module in modules().items()}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, "import circle: " + " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for imported in graph[name]:
                walk(imported, (*way, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_torch_stays_out_where_starting_must_be_quick() -> None:
    """The frontend, the command line and the launcher, with all that they import at their top level."""
    heavy = {"torch", "transformers", "gguf"}
    for start in ("http_frontend.__main__", "engine.cli", "engine.launcher.serve"):
        waiting, seen = [start], set()
        while waiting:
            module = modules()[waiting.pop()]
            seen.add(module.name)
            top_level = ast.Module([node for node in module.tree.body if not _is_type_checking(node)], [])
            top_level.body = [node for node in top_level.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
            names = set(_imported(top_level, module.package))
            for package in heavy:
                assert not below(names, package), f"{module.path}, which {start} imports, imports {package}"
            waiting += [name for name in names if name in modules() and name not in seen]
    for module in modules().values():
        if module.name.startswith("http_frontend"):
            assert not any(below(module.imports(), package) for package in heavy), f"{module.path}"


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_files_are_short_and_have_telling_names() -> None:
    for path in [*ROOT.glob("*.py"), *(file for top in (*CODE, "tests", "csrc") for file in (ROOT / top).rglob("*.*"))]:
        if path.suffix in {".py", ".pyi", ".cpp", ".h"}:
            lines = path.read_text().count("\n")
            assert lines <= LONGEST, f"{path.relative_to(ROOT)}: {lines} lines"
            assert path.stem not in EMPTY_NAMES, f"{path.relative_to(ROOT)}: a name that says nothing"


def test_triton_is_for_the_kernels_of_gpus_alone() -> None:
    """Where there is no GPU it need not be installed."""
    for module in modules().values():
        if not module.name.startswith("engine.kernels.gpu"):
            assert not below(module.imports(), "triton"), f"{module.path} imports triton"
            heavy = below(module.imports(), "engine.kernels.gpu")
            assert not heavy or module.name in ("engine.kernels.choice", "scripts.gpu_table"), f"{module.path}: {heavy}"


def test_nobody_unpickles_or_calls_a_shell() -> None:
    for module in modules().values():
        for unsafe in ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"):
            assert not below(module.imports(), unsafe), f"{module.path} imports {unsafe}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("os", "system"), ("yaml", "load")}, (
                    f"{module.path}:{node.lineno}: {node.value.id}.{node.attr}"
                )
            if isinstance(node, ast.Attribute):
                assert not node.attr.endswith("_pyobj"), f"{module.path}:{node.lineno}: {node.attr} pickles"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, f"{module.path}:{node.lineno}: {node.func.id}"
            if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"}:
                assert isinstance(node.value, ast.Constant) and node.value.value is False, (
                    f"{module.path}:{node.value.lineno}: {node.arg}"
                )
            if isinstance(node, ast.keyword) and node.arg == "shell":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, (
                    f"{module.path}:{node.value.lineno}: runs a shell"
                )


def test_packages_are_typed() -> None:
    for package in ("engine", *PROCESSES):
        assert (ROOT / package / "py.typed").is_file(), package
