"""Who may import whom (docs/architecture.md), read from the source: imports inside functions count as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAVES = {"cgroup", "config", "errors", "messages", "outputs", "request", "sampling_params", "step", "structs"}

# room -> the rooms it may import, itself and the leaves aside
MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"server", "engine", "models", "program", "runtime", "text", "observe", "worker", "simulate"},
    "server": {"engine", "text", "observe", "models"},
    "engine": {"scheduler", "kvcache", "executor", "worker", "observe", "text", "models"},
    "simulate": {"engine", "scheduler", "kvcache", "observe"},
    "scheduler": {"kvcache"},
    "kvcache": set(),
    "executor": {"worker", "models", "runtime"},
    "worker": {"models", "program", "runtime"},
    "models": {"program", "runtime"},
    "runtime": {"program"},
    "program": set(),
    "text": {"models"},
    "observe": set(),
}
NARROW = {
    ("text", "models"): {"gguf_file", "hf_config", "spec"},
    ("models", "runtime"): {"base"},
    ("server", "models"): {"spec"},
}
BANNED = {"pickle", "dill", "cloudpickle", "joblib", "jsonpickle", "marshal", "shelve"}
WEB = ["fastapi", "uvicorn", "starlette", "pydantic", "gguf", "typer", "rich", "prometheus_client"]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def modules() -> Iterator[tuple[Path, str]]:
    """(file, room) of the package; the room of octavo/config.py is "config"."""
    for path in sorted((ROOT / "octavo").rglob("*.py")):
        yield path, path.relative_to(ROOT / "octavo").parts[0].removesuffix(".py")


def test_rooms_import_only_what_the_map_allows() -> None:
    wrong = []
    for path, room in modules():
        if room in {"__init__", "__main__"}:
            continue
        for line, name in imports_of(path):
            if not name.startswith("octavo."):
                continue
            target, *rest = name.split(".")[1:]
            if target in LEAVES | {room}:
                continue
            if target == "__version__" and room in {"cli", "server"}:  # what is shown to people
                continue
            narrow = NARROW.get((room, target))
            allowed = target in MAY_IMPORT.get(room, set()) and (narrow is None or (rest and rest[0] in narrow))
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} may not import {name}")
    assert not wrong, "\n".join(wrong)


def test_what_only_a_type_checker_imports_is_never_looked_up() -> None:
    """Annotations of a function are read when it is defined; of one in another function, when that is called."""
    for path, room in modules():
        text = path.read_text(encoding="utf-8")
        if "if TYPE_CHECKING:" in text and room != "__init__":
            assert "from __future__ import annotations" in text, path


def test_every_file_of_tests_has_a_name_of_its_own() -> None:
    """pytest imports them by their names: two of one name end the whole run."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert [name for name in names if names.count(name) > 1] == []


def test_every_room_is_on_the_map() -> None:
    rooms = {room for path, room in modules() if (ROOT / "octavo" / room).is_dir()}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("rooms", "banned"), [({"scheduler", "kvcache"}, {"numpy", "torch"}), (set(MAY_IMPORT), {"torch", "triton"})]
)
def test_counting_needs_no_numpy_and_only_the_cuda_runtime_needs_torch(rooms: set[str], banned: set[str]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, room in modules()
        if room in rooms
        if path.relative_to(ROOT).parts[:3] != ("octavo", "runtime", "cuda")
        for line, name in imports_of(path)
        if name.split(".")[0] in banned
    ]
    assert not wrong, "\n".join(wrong)


def test_what_only_compiles_kernels_waits_for_no_torch() -> None:
    """Processes that compile Triton kernels import these; torch would take each of them seconds of a first start."""
    for path in [*(ROOT / "octavo/runtime/cuda/kernels").glob("*.py"), ROOT / "octavo/runtime/cuda/compiling.py"]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not what stands under TYPE_CHECKING
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert "torch" not in [*names, getattr(node, "module", "")], f"{path}:{node.lineno}"


def test_nothing_unpickles_or_evaluates() -> None:
    wrong = []
    for path, _ in modules():
        wrong += [f"{path}:{line}: {name}" for line, name in imports_of(path) if name.split(".")[0] in BANNED]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            pickles = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
            if called in {"eval", "exec", "torch.load", "np.load", "numpy.load"} or pickles:
                wrong.append(f"{path}:{node.lineno}: {called}()")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("imported", "refused"),
    [
        ("octavo; octavo.LLM, octavo.SamplingParams", WEB),  # offline
        ("octavo.cli.serve, octavo.engine.async_engine, octavo.server.app, octavo.server.loop", ["numpy"]),  # a front
    ],
)
def test_what_is_imported_without_whom(imported: str, refused: list[str]) -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import {imported}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
