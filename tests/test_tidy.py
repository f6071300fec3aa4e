"""The habits that a linter does not know, as tests: they read the sources and take seconds."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from services.cli.settings import markdown
from shared.settings import known_variables

ROOT: Final = Path(__file__).resolve().parent.parent
PRODUCTION: Final = ("services", "shared", "simulator")
MOST_LINES: Final = 800
# Long because they answer one question at length: a protocol's whole vocabulary, a state machine with its invariants.
LONGER: Final = {"services/gateway/openai.py": 900, "services/store/residency.py": 1000}
BANNED_MODULES: Final = frozenset({"utils", "util", "helpers", "helper", "common", "misc", "types", "manager"})
# One importer per I/O library. A pattern of paths may import the module; nobody else.
IMPORTERS: Final[dict[str, str]] = {
    "nats": r"shared/bus\.py",
    "redis": r"shared/registry\.py",
    "aiohttp": r"services/((gateway|cli)/\w+|store/peer_server)\.py",
    "aiohttp.web": r"services/(gateway/\w+|store/peer_server)\.py",
    "structlog": r"shared/log\.py",
    "torch": r"services/(worker/(engine|sampling|loader|tensors|penalties|cache|attach)\w*|store/convert)\.py",
    "transformers": r"services/(worker/(engine|sampling|loader|tokenizer|attach)\w*|store/convert)\.py",
    "obstore": r"services/store/object(s|_tree|_writer)\.py",
    # the worker: only the class of the errors that transformers raises for configs
    "huggingface_hub": r"services/(store/\w+|worker/engine)\.py",
}
# Calls that make a task nobody owns.
LOOSE_TASKS: Final = frozenset({"create_task", "gather", "ensure_future"})
# Words that the glossary replaces (ARCHITECTURE, glossary), in our own names and documents.
BANNED_WORDS: Final = {
    "utils": "say what the module does",
    "node": "server",
    "pod": "replica",
    "checkpoint shard": "chunk, or shard for tensor parallelism",
}
TEXT_SUFFIXES: Final = frozenset({".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".json", ""})


@cache
def tracked() -> tuple[Path, ...]:
    """Every file that git knows or would take (not the ignored ones); without git, every file of the sources."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if done.returncode == 0 and done.stdout:
        paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    else:
        folders = (*PRODUCTION, "tests", "benchmarks", "examples", "docs")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return tuple(sorted(path for path in paths if path.is_file()))


def sources(*folders: str) -> list[Path]:
    """The Python files of these top-level folders."""
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    """A path as people write it."""
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, `a.b` for `from a import b` as well."""
    for found in ast.walk(tree(path)):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom) and found.module and not found.level:
            yield found.module
            yield from (f"{found.module}.{alias.name}" for alias in found.names)


def dotted(node: ast.expr) -> str:
    """`a.b.c` for an attribute chain, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := dotted(node.value)):
        return f"{inner}.{node.attr}"
    return ""


def test_there_are_sources_to_look_at() -> None:
    assert len(sources(*PRODUCTION)) > 20


def test_no_module_is_named_after_nothing() -> None:
    assert [name(path) for path in sources(*PRODUCTION, "tests", "benchmarks") if path.stem in BANNED_MODULES] == []


def test_no_file_is_too_long() -> None:
    counts = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PRODUCTION, "tests")}
    assert {path: count for path, count in counts.items() if count > LONGER.get(path, MOST_LINES)} == {}


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name(path) for path in sources(*PRODUCTION) if path.stat().st_size > 0 and ast.get_docstring(tree(path)) is None
    ]
    assert silent == []


def test_public_classes_and_functions_have_docstrings() -> None:
    silent = []
    for path in sources(*PRODUCTION):
        for found in tree(path).body:
            if not isinstance(found, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if not found.name.startswith("_") and ast.get_docstring(found) is None:
                silent.append(f"{name(path)}: {found.name}")
    assert silent == []


@pytest.mark.parametrize("library", IMPORTERS)
def test_one_importer_per_library(library: str) -> None:
    strangers = [
        name(path)
        for path in sources(*PRODUCTION)
        if any(module == library or module.startswith(f"{library}.") for module in imports(path))
        and not re.fullmatch(IMPORTERS[library], name(path))
    ]
    assert strangers == []


def test_services_are_strangers() -> None:
    strangers = []
    for path in sources("services"):
        parts = path.relative_to(ROOT).parts
        if len(parts) < 3:
            continue
        for module in imports(path):
            service = module.split(".")[1:2]
            if module.startswith("services.") and service and service[0] != parts[1]:
                strangers.append(f"{name(path)} imports {module}")
    assert strangers == []


def test_no_task_without_an_owner() -> None:
    loose = []
    for path in sources(*PRODUCTION):
        for found in ast.walk(tree(path)):
            if not isinstance(found, ast.Call):
                continue
            called = dotted(found.func)
            owner, _, method = called.rpartition(".")
            # A TaskGroup's own create_task is the one that is meant; asyncio's and the loop's are not.
            if method in LOOSE_TASKS and (owner in {"", "asyncio"} or owner.endswith("loop")):
                loose.append(f"{name(path)}:{found.lineno} {called}")
    assert loose == []


def test_every_exception_is_caught_in_one_place_only() -> None:
    broad = []
    for path in sources(*PRODUCTION):
        for found in ast.walk(tree(path)):
            if not isinstance(found, ast.ExceptHandler):
                continue
            kinds = found.type.elts if isinstance(found.type, ast.Tuple) else [found.type]
            caught = {"" if kind is None else dotted(kind) for kind in kinds}
            if caught & {"", "Exception", "BaseException"} and name(path) != "shared/bus.py":
                broad.append(f"{name(path)}:{found.lineno}")
    assert broad == []


def test_the_environment_is_read_in_one_place() -> None:
    readers = []
    for path in sources(*PRODUCTION):
        allowed = name(path) == "shared/settings.py" or name(path).startswith("services/cli/")
        for found in ast.walk(tree(path)):
            if isinstance(found, ast.Attribute) and dotted(found) in {"os.environ", "os.getenv"} and not allowed:
                readers.append(f"{name(path)}:{found.lineno}")
    assert readers == []


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"]) + r")\b")
    assert _lines_with(marks, sources(*PRODUCTION, "tests", "benchmarks", "examples")) == []


def test_no_path_of_somebodys_machine() -> None:
    paths = re.compile(r"(?<![\w.<{/])/(work|root|home/[a-z]+|Users/[A-Za-z]+)/")
    texts = [path for path in tracked() if path.suffix in TEXT_SUFFIXES and path.stat().st_size < 2**20]
    assert _lines_with(paths, texts) == []


def test_the_glossary_is_used() -> None:
    words = re.compile(r"(?<!\.)\b(" + "|".join(map(re.escape, BANNED_WORDS)) + r")s?\b", re.IGNORECASE)
    found = _lines_with(words, sources(*PRODUCTION))
    # Other people's modules have other people's names.
    assert [line for line in found if not re.search(r"\bimport\b", line)] == []


def test_every_variable_in_the_documents_exists() -> None:
    # A word that ends in _ or * is a pattern, such as HEARTH_*.
    mentioned = re.compile(r"\bHEARTH_[A-Z0-9_]*[A-Z0-9]\b(?![*_])")
    texts = [path for path in tracked() if path.suffix in TEXT_SUFFIXES - {".json"} and path.stat().st_size < 2**20]
    own = {name(path) for path in tracked() if name(path).startswith(("tests/", ".ci/"))}
    known = known_variables()
    unknown = {
        f"{name(path)}: {word}"
        for path in texts
        if name(path) not in own
        for word in mentioned.findall(path.read_text(encoding="utf-8", errors="replace"))
        if word not in known
    }
    assert unknown == set()


def test_the_table_of_settings_in_the_documents_is_the_real_one() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == markdown(), "write it anew: ./hearth settings --markdown > docs/configuration.md"


def _lines_with(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{name(path)}:{number} {line.strip()[:100]}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
