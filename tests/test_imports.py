"""Who may import whom, and what the command line must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"dmq_export", "calib", "engines"}
HOMES = {  # heavy library -> packages that may import it
    "torch": {"calib"},
    "diffusers": {"calib"},
    "onnx": {"dmq_export"},
    "onnx_ir": {"dmq_export", "calib"},  # what PyTorch's exporter returns
    "onnxruntime": {"engines"},
    "openvino": {"engines"},
    "tensorrt": {"engines"},
    "tensorrt_rtx": {"engines"},
    "polygraphy": {"engines"},
    "cuda": {"engines"},
}
# calib from the ground up: each floor stands on those below it
FLOORS = [{"device", "metrics"}, {"quant"}, {"model"}, {"pipeline", "record"}, {"fit"}, {"run"}, {"calibrate"}]


def imported_modules(path: Path) -> set[str]:
    """Dotted names of the modules that ``path`` imports at run time, anywhere in the file."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module not in OURS else {f"{node.module}.{a.name}" for a in node.names}
    return names


def imports_of(path: Path) -> set[str]:
    """Their top-level packages."""
    return {name.partition(".")[0] for name in imported_modules(path)}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def is_command(path: Path) -> bool:
    """The command line sees all three packages."""
    return path.name == "cli.py" or path.parent.name == "commands"


@pytest.mark.parametrize(("package", "allowed"), [("calib", {"dmq_export"}), ("engines", {"dmq_export"})])
def test_a_package_imports_only_what_the_arrows_allow(package: str, allowed: set[str]) -> None:
    for path in modules(package):
        assert imports_of(path) & OURS <= allowed | {package}, path


def test_dmq_export_imports_neither_calib_nor_engines_outside_the_commands() -> None:
    for path in modules("dmq_export"):
        if not is_command(path):
            assert not imports_of(path) & {"calib", "engines"}, path


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_stays_at_home(library: str) -> None:
    for package in OURS - HOMES[library]:
        for path in modules(package):
            assert is_command(path) or library not in imports_of(path), path


def test_every_module_of_calib_is_on_a_floor() -> None:
    rooms = {path.relative_to(ROOT / "calib").parts[0].removesuffix(".py") for path in modules("calib")}
    assert rooms - {"__init__"} == set().union(*FLOORS)


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_calib_imports_only_from_the_floors_below_and_its_own_room(floor: int) -> None:
    below = set().union(*FLOORS[:floor])
    for room in FLOORS[floor]:
        for path in [ROOT / f"calib/{room}.py", *modules(f"calib/{room}")]:
            if path.is_file():
                inside = {name.split(".")[1] for name in imported_modules(path) if name.startswith("calib.")}
                assert inside <= below | {room}, path


NO_HEAVY_LIBRARY = f"import sys; sys.modules.update(dict.fromkeys({list(HOMES)}))"


@pytest.mark.parametrize("command", ["", "calibrate", "onnx", "sample", "lint", "inspect", "trt-build"])
def test_help_loads_no_heavy_library(command: str) -> None:
    arguments = [command, "-h"] if command else ["-h"]
    code = f"{NO_HEAVY_LIBRARY}; from dmq_export.cli import main; main({arguments!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_tensorrt_engine_is_imported_without_any_other_heavy_library() -> None:
    code = f"{NO_HEAVY_LIBRARY}; import engines.tensorrt.engine, engines.tensorrt.build"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
