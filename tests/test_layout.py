"""The house of rooms: imports point one way, read from the code itself; lazy exports of an `__init__` do not count."""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

import segcompass_hf

PACKAGE = Path(segcompass_hf.__file__).parent
NAME = "segcompass_hf"
ROOMS = ("core", "data", "metrics", "evaluation", "bulk", "training", "explain", "hub", "commands", "cli")
CORE_PARTIES = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
LAZY_PARTIES = {"scipy"}  # inside functions only
SCENES = "data/scenes"
# Public modules whose types mypy does not check yet.
UNTYPED = {
    "evaluation.predictors.sampling",
    "explain.dictionary.entries",
    "hub.conversion.from_original",
    "hub.conversion.to_original",
    "hub.publishing.push",
    "training.grpo.trainer",
    "training.loop.resume",
    "training.recipe.check",
    "training.recipe.running",
    "training.sae.trainer",
    "training.segmentation.trainer",
    "training.warmup.trainer",
}

Graph = dict[str, set[str]]


@cache
def files(package: Path = PACKAGE) -> dict[str, ast.Module]:
    """Path of every file, from the package's folder -> what it says."""
    paths = sorted(path for path in package.rglob("*.py") if "checkpoints" not in path.parts)
    return {path.relative_to(package).as_posix(): ast.parse(path.read_text("utf-8")) for path in paths}


def imports(file: str, tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """Parts of what a file imports of the package, each name with the module it is taken from; also in functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            folder = Path(file).parent.parts
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            parts = (*start, *(node.module.split(".") if node.module else ()))
            if not node.level:
                if parts[0] != NAME:
                    continue
                parts = parts[1:]
            yield from ((*parts, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split("."))[1:] for a in node.names if a.name.split(".")[0] == NAME)


@cache
def exports(package: str) -> dict[str, str]:
    """Name -> module, `.x` or `..x`, of what a package loads lazily: the stub beside its `__init__` lists it."""
    stub = PACKAGE / f"{package}i"
    lines = ast.parse(stub.read_text("utf-8")).body if stub.is_file() else []
    froms = [line for line in lines if isinstance(line, ast.ImportFrom) and line.level and line.module]
    return {alias.name: "." * line.level + line.module for line in froms for alias in line.names}


def file_of(parts: tuple[str, ...], trees: dict[str, ast.Module]) -> str:
    """The file that defines what `parts` name: a module, a package, or a name that a package loads lazily."""
    for length in (len(parts), len(parts) - 1):
        base = "/".join(parts[:length])
        if f"{base}.py" in trees:
            return f"{base}.py"
        package = f"{base}/__init__.py".removeprefix("/")
        if package in trees:
            lazy = exports(package).get(parts[-1]) if length < len(parts) else None
            if lazy is None:
                return package
            up = len(lazy) - len(lazy.lstrip("."))  # as `from` counts: one dot is the package itself
            start = parts[: length - up + 1]
            return file_of((*start, *lazy.lstrip(".").split("."), parts[-1]), trees)
    raise AssertionError(f"{'.'.join(parts)} is imported but not there")


@cache
def graph() -> Graph:
    trees = files()
    return {file: {file_of(parts, trees) for parts in imports(file, trees[file])} - {file} for file in trees}


def circles(edges: Graph) -> list[list[str]]:
    """Sets of nodes that reach one another, each with two nodes or more (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            circle = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def folder_graph(depth: int) -> Graph:
    """Imports between folders, down to `depth`; the files beside a folder's subfolders are one node of their own."""
    edges: Graph = {}
    for file, others in graph().items():
        for other in others:
            one, two = (folder(name, depth) for name in (file, other))
            if one != two:
                edges.setdefault(one, set()).add(two)
    return edges


def folder(file: str, depth: int) -> str:
    if file == "cli.py":  # it stands at the root but uses every room
        return "cli"
    parts = Path(file).parent.parts
    return "/".join(parts[:depth]) + ("/*" if len(parts) < depth else "") if parts else "core"


def room(file: str) -> str:
    return "cli" if file == "cli.py" else file.split("/")[0] if "/" in file else "core"


def why(nodes: Iterable[str], name_of: Callable[[str], str]) -> str:
    """The imports between the nodes of a circle."""
    nodes = set(nodes)
    lines = [
        f"{file} -> {other}"
        for file, others in graph().items()
        for other in sorted(others)
        if name_of(file) != name_of(other) and {name_of(file), name_of(other)} <= nodes
    ]
    return "\n".join(lines)


def test_circles_are_found():
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set(), "f": {"g"}, "g": {"f"}}
    assert circles(edges) == [["a", "b", "c"], ["f", "g"]]


def test_imports_are_read_wherever_they_stand():
    tree = ast.parse(
        "from . import b\nif TYPE_CHECKING:\n    from ..c.d import E\ndef f():\n    from segcompass_hf import g\n"
        "    import segcompass_hf.h.i, torch\n    from os import path\n"
    )
    assert set(imports("x/a.py", tree)) == {("x", "b"), ("c", "d", "E"), ("g",), ("h", "i")}


def test_lazy_names_are_followed_to_their_files():
    trees = files()
    assert file_of(("explain", "explain"), trees) == "explain/explaining.py"
    assert file_of(("explain", "plot_segmentations"), trees) == "figure.py"
    assert (
        file_of(("evaluation", "predictors", "baselines", "BASELINES"), trees) == "evaluation/predictors/baselines.py"
    )
    assert file_of(("metrics", "score_sample"), trees) == "metrics/__init__.py"
    assert file_of(("__version__",), trees) == "__init__.py"


def defined(tree: ast.Module) -> set[str]:
    """Names that a file defines at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_stubs_name_what_their_modules_define():
    stubs = sorted(PACKAGE.rglob("*.pyi"))
    assert {stub.parent.name for stub in stubs} >= {NAME, "data", "evaluation", "explain", "hub", "training"}
    for stub in stubs:
        package = stub.relative_to(PACKAGE).with_suffix(".py").as_posix()
        for name in exports(package):
            file = file_of((*Path(package).parent.parts, name), files())
            assert name in defined(files()[file]), f"{package}i: {file} does not define {name}"


def test_types_of_public_modules_are_checked():
    """`make lint` runs mypy on what `pyproject.toml` lists; who mends one of `UNTYPED` lists it there."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    checked = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]["modules"])
    stubs = [stub.relative_to(PACKAGE).with_suffix(".py").as_posix() for stub in PACKAGE.rglob("*.pyi")]
    public = {file_of((*Path(stub).parent.parts, name), files()) for stub in stubs for name in exports(stub)} | {
        *stubs
    }
    names = {".".join((NAME, *Path(file).with_suffix("").parts)).removesuffix(".__init__") for file in public}
    assert names - checked == {f"{NAME}.{module}" for module in UNTYPED}


def test_no_circle_between_files():
    found = circles(graph())
    assert not found, "\n\n".join(why(circle, lambda file: file) for circle in found)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_circle_between_folders(depth):
    found = circles(folder_graph(depth))
    assert not found, "\n\n".join(why(circle, lambda file: folder(file, depth)) for circle in found)


def test_imports_point_to_earlier_rooms():
    wrong = [
        f"{file} -> {other}"
        for file, others in graph().items()
        for other in others
        if ROOMS.index(room(other)) > ROOMS.index(room(file))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_says_what_lives_there():
    folders = {Path(file).parent for file in files()} - {Path("."), Path("hub/space")}
    silent = [
        str(one)
        for one in folders
        if "evaluate_modules" not in one.parts
        and not ast.get_docstring(files().get(f"{one}/__init__.py", ast.parse("")))
    ]
    assert not silent


# Core files are shipped as remote code


def core_files() -> list[str]:
    kinds = ("*_segcompass.py", "configuration_*.py", "modeling_*.py")
    return [file for file in files() if "/" not in file and any(fnmatch(file, kind) for kind in kinds)]


@pytest.mark.parametrize("file", core_files())
def test_core_imports_what_remote_code_may(file):
    tree = files()[file]
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}: from .x import y"
            assert f"{node.module}.py" in core_files(), f"line {node.lineno}: {node.module} is not shipped"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            allowed = CORE_PARTIES | set(sys.stdlib_module_names) | (LAZY_PARTIES if id(node) in inside else set())
            assert not {name.split(".")[0] for name in names} - allowed, f"line {node.lineno}: {names}"


# Scenes' attributes are named by data/scenes alone


def attribute_words() -> dict[str, str]:
    """Every word of Scenes' attributes -> which attribute it is of."""
    tree = files()[f"{SCENES}/drawing.py"]
    words = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id in ("COLORS", "SHAPES", "SIZES"):
            listed = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
            words |= {word.value: target.id for word in listed}
    return words


def named_attributes(tree: ast.Module, words: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Lines that name Scenes' attributes.

    Its words are ordinary ones, so one of them says nothing: `"image is too large"`, `x.square()`;
    nor does one inside another (`cross-entropy`). What counts is a
    text that holds words of two attributes (`"small ring"`), two words of one attribute listed in one collection
    (`("red", "green")`), and the tables themselves imported. Docstrings do not count: their examples are prose.
    """
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            said = {words[word] for word in re.findall(r"[a-z]+(?:-[a-z]+)*", node.value.lower()) if word in words}
            if len(said) > 1:
                yield node.lineno, node.value
        elif isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict):
            items = node.keys if isinstance(node, ast.Dict) else node.elts
            listed = [item.value for item in items if isinstance(item, ast.Constant) and item.value in words]
            if len({word for word in listed}) > 1:
                yield node.lineno, ", ".join(listed)
        elif isinstance(node, ast.ImportFrom):
            tables = {"COLORS", "SHAPES", "SIZES", "HELD_OUT_PAIRS", "HELD_OUT_TRIPLES"}
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in tables)


def test_naming_of_attributes_is_found():
    words = attribute_words()
    assert words["red"] == "COLORS" and words["ring"] == "SHAPES" and words["small"] == "SIZES" and len(words) == 13
    code = '''"""The small red ring."""
a = "too large"
b = "the large ring"
c = ("red", "green")
d = {"circle": 1, "ring": 2}
e = ["small", "x"]
f = x.square()
g = "a small table, white-space: normal"
from .drawing import COLORS
'''
    assert sorted(line for line, _ in named_attributes(ast.parse(code), words)) == [3, 4, 5, 9]


def test_only_scenes_names_its_attributes():
    words = attribute_words()
    named = [
        f"{file}:{line}: {text[:80]}"
        for file, tree in files().items()
        if not file.startswith(f"{SCENES}/")
        for line, text in named_attributes(tree, words)
    ]
    assert not named, "\n".join(named)
