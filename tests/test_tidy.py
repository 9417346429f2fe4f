"""The house rules, one test each. A failure lists `file:line: what is wrong`, one line for each place."""

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import cordee
import rooms

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "cordee"
FILE_LINES = 600  # longer files hold more than one noun
FUNCTION_LINES = 60  # what fits a screen
ROOM_LINES = 4500  # a larger room has more than one subject

PURE_ROOMS = ("generation", "speculation", "grammar", "chat", "cluster")
IMPURE_MODULES = {
    "asyncio",
    "concurrent",
    "datetime",
    "multiprocessing",
    "os",
    "random",
    "secrets",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "uuid",
}
# Values without a clock behind them: times handed in, random numbers with a seed.
PURE_NAMES = {("datetime", "datetime"), ("datetime", "timedelta"), ("random", "Random")}
IMPURE_CALLS = {"now", "utcnow", "today", "urandom", "default_rng"}

# A room may import the rooms before it (ARCHITECTURE.md); modules of no room stand first.
ROOMS = (
    *(
        "errors",
        "system",
        "files",
        "findings",
        "children",
        "privacy",
        "cluster",
        "models",
        "convert",
        "engine",
        "speculation",
        "generation",
        "grammar",
        "chat",
    ),
    *(
        "machine",
        "net",
        "access",
        "worker",
        "distribution",
        "serving",
        "agent",
        "doctor",
        "api",
        "web",
        "console",
        "endpoints",
        "demo",
        "terminal",
        "compress",
        "distill",
        "install",
        "cli",
    ),
)
LANGUAGE_DECORATORS = {
    "asynccontextmanager",
    "cache",
    "cached_property",
    "classmethod",
    "contextmanager",
    "dataclass",
    "lru_cache",
    "overload",
    "property",
    "staticmethod",
}
ENTRY_POINTS = {"cordee", "cordee.cli.main"}
# Only this file starts Python, so that nothing is imported from the folder that a user is in.
STARTS_PYTHON = PACKAGE / "children.py"


@cache
def sources(*folders: str) -> tuple[Path, ...]:
    return tuple(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, line: int, fault: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {fault}"


def hold(faults: list[str]) -> None:
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name or None) of each import, wherever it stands; relative ones made absolute."""
    package = module_name(path).split(".") if path.is_relative_to(ROOT / "src") else []
    if package and path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def test_files_are_short() -> None:
    lengths = [
        (path, path.read_text(encoding="utf-8").count("\n")) for path in sources("src", "tests", "bench")
    ]
    hold([place(path, n, f"{n} lines, at most {FILE_LINES}") for path, n in lengths if n > FILE_LINES])


def test_functions_are_short() -> None:
    hold(
        [
            place(path, node.lineno, f"{node.name} has {lines} lines, at most {FUNCTION_LINES}")
            for path in sources("src", "tests", "bench")
            for node in ast.walk(tree(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES
        ]
    )


def test_pure_rooms_have_no_socket_clock_or_thread() -> None:
    faults = []
    for path in (path for room in PURE_ROOMS for path in sources(f"src/cordee/{room}")):
        for line, module, name in imports(path):
            if module.split(".")[0] in IMPURE_MODULES and (module, name) not in PURE_NAMES:
                faults.append(
                    place(path, line, f"imports {module}{f'.{name}' if name else ''} in a pure room")
                )
        for node in ast.walk(tree(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            seeded = node.func.attr == "default_rng" and (node.args or node.keywords)
            shared_state = ast.unparse(node.func.value) in {"np.random", "numpy.random"}
            if (node.func.attr in IMPURE_CALLS or shared_state) and not seeded:
                faults.append(place(path, node.lineno, f"calls {node.func.attr}() in a pure room"))
    hold(faults)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "cordee" else None


def test_rooms_import_only_the_rooms_above_them() -> None:
    faults = []
    for path in sources("src"):
        own = room_of(module_name(path))
        if own is None:
            continue
        if own not in ROOMS:
            faults.append(place(path, 1, f"{own} is no room of ARCHITECTURE.md"))
            continue
        for line, module, name in imports(path):
            other = room_of(module) or (name if module == "cordee" and name in ROOMS else None)
            if other is not None and (other not in ROOMS or ROOMS.index(other) > ROOMS.index(own)):
                faults.append(place(path, line, f"{own} must not know {other}"))
    hold(faults)


def test_the_rooms_are_those_of_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("## Rooms")[2].partition("\n## ")[0]
    first_column = " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
    named = re.findall(r"`src/cordee/(\w+)(?:/|\.py)`", first_column)
    assert tuple(named) == ROOMS


def test_the_picture_of_the_rooms_is_that_of_the_imports() -> None:
    text = rooms.TARGET.read_text(encoding="utf-8")
    assert rooms.drawn(text) == text, "`make docs` draws it anew"


@pytest.mark.parametrize("folder", ["src/cordee", "sim", "training", "bench"])
def test_no_files_import_each_other_in_a_circle(folder: str) -> None:
    assert rooms.circles(rooms.imports(folder)) == []


def test_rooms_have_one_subject() -> None:
    lines: dict[str, int] = {}
    for path in sources("src"):
        room = room_of(module_name(path))
        if room is not None:
            lines[room] = lines.get(room, 0) + path.read_text(encoding="utf-8").count("\n")
    assert {room: count for room, count in lines.items() if count > ROOM_LINES} == {}


def test_a_public_class_name_stands_once() -> None:
    places: dict[str, list[str]] = {}
    for path in sources("src"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and node.name[0] != "_":
                places.setdefault(node.name, []).append(place(path, node.lineno, f"class {node.name}"))
    hold([where for found in places.values() if len(found) > 1 for where in found])


def modules_started(path: Path) -> set[str]:
    """Modules that a source names in a string: processes started as `python -m NAME`."""
    strings = (node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant))
    return {text for text in strings if isinstance(text, str) and re.fullmatch(r"cordee(\.\w+)+", text)}


def test_no_dead_module() -> None:
    used = set(ENTRY_POINTS)
    for path in sources("src"):
        own = module_name(path)
        for _, module, name in imports(path):
            used |= {module, f"{module}.{name}"} - {own}
        used |= modules_started(path)
    packages = {module.rpartition(".")[0] for module in used}
    hold(
        [
            place(path, 1, f"{module} is imported by no other module")
            for path in sources("src")
            if (module := module_name(path)) not in used | packages
        ]
    )


def test_python_is_started_in_one_place() -> None:
    hold(
        [
            place(path, node.lineno, "starts Python: use children.command")
            for path in sources("src")
            if path != STARTS_PYTHON
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute | ast.alias)
            and ast.unparse(node) in ("sys.executable", "multiprocessing", "ProcessPoolExecutor")
        ]
    )


def public_definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and the public methods of its classes.

    A library calls the methods of classes that are derived from one of its own (`click.Group`).
    """
    pending: list[ast.stmt] = list(tree(path).body)
    for node in pending:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            yield node
        if isinstance(node, ast.ClassDef) and not any(isinstance(base, ast.Attribute) for base in node.bases):
            pending.extend(node.body)


@cache
def names_used(path: Path) -> dict[str, int]:
    """How often a module names each identifier other than by defining or importing it."""
    counts: dict[str, int] = {}
    for node in ast.walk(tree(path)):
        name = (
            node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        )
        if name is not None:
            counts[name] = counts.get(name, 0) + 1
    return counts


def registers(decorator: ast.expr) -> bool:
    """Whether a decorator hands the function to a library: `@main.command()` does, `@property` does not."""
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
    return name not in LANGUAGE_DECORATORS


def test_nothing_public_is_unused() -> None:
    used = set().union(*(names_used(path) for path in sources("src", "tests", "bench", "scripts", "sim")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    used |= {target.partition(":")[2] for target in project["scripts"].values()}
    hold(
        [
            place(path, node.lineno, f"{node.name} is used nowhere")
            for path in sources("src")
            for node in public_definitions(path)
            if node.name not in used and not any(map(registers, node.decorator_list))
        ]
    )


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def cited_paths(text: str) -> Iterator[tuple[int, str]]:
    """(line, path) of everything in backticks that looks like a path inside this tree."""
    entries = {path.name for path in ROOT.iterdir() if path.name not in {".venv", ".git"}}
    rooms = {path.name for path in PACKAGE.iterdir()}
    for number, line in enumerate(text.splitlines(), 1):
        for quoted in re.findall(r"`([\w.][\w./-]*)`", line):
            first = quoted.partition("/")[0]
            is_path = "/" in quoted and first in entries | rooms
            if is_path or re.fullmatch(r"[\w-]+\.(md|py|sh|toml|yml)", quoted):
                yield number, quoted


def exists(cited: str, folder: Path) -> bool:
    """Whether a path is there, from the root, a room's or the document's folder; a bare name anywhere."""
    if "/" not in cited and any(path.name == cited for path in sources("src", "tests", "bench", "scripts")):
        return True
    return any((base / cited).exists() for base in (ROOT, PACKAGE, folder))


def test_cited_paths_exist() -> None:
    hold(
        [
            place(document, line, f"`{cited}` does not exist")
            for document in documents()
            for line, cited in cited_paths(document.read_text(encoding="utf-8"))
            if not exists(cited, document.parent)
        ]
    )


def test_dependencies_are_explained_once_each() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    wanted = sorted(re.match(r"[\w-]+", line).group() for line in wanted)
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == wanted


def test_test_files_have_names_of_their_own() -> None:
    """Pytest imports them by name: of two with the same one the second cannot be collected."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_pages_fetch_nothing_from_outside() -> None:
    served = [path for suffix in ("html", "js", "css", "svg") for path in PACKAGE.rglob(f"*.{suffix}")]
    # Of the libraries, whose comments and messages name sites, a browser's log shows it (tests/web).
    served = [path for path in served if "vendor" not in path.parts]
    namespaces = ("http://www.w3.org/",)  # names in SVG and XHTML, never fetched
    hold(
        [
            place(path, number, f"names {url}")
            for path in served
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            for url in re.findall(r"(?:https?:)?//[\w.-]+\.\w+/?", line)
            if not url.startswith(namespaces)
        ]
    )


def test_the_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n" in text
    assert "Version 2.0, January 2004" in text


def test_the_changelog_names_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", text, re.MULTILINE)
    assert versions[:1] == [cordee.__version__]


def test_every_source_says_what_it_is_for() -> None:
    hold(
        [
            place(path, 1, "has no docstring")
            for path in sources("src", "tests", "bench", "scripts")
            if not ast.get_docstring(tree(path))
        ]
    )


def test_the_readme_is_short() -> None:
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.fr.md")}
    counts = {name: len(text.split()) for name, text in texts.items()}  # as `wc -w` counts
    hold([f"{name}:1: {count} words, at most 900" for name, count in counts.items() if count > 900])
