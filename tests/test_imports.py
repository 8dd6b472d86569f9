"""Who may import whom, and what the command line must not load."""

import ast
import subprocess
import sys
from functools import cache
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
# each package from the ground up: a floor stands on those below it, and its rooms do not know each other
FLOORS = {
    "calib": [{"device", "metrics"}, {"quant"}, {"model"}, {"pipeline", "record"}, {"fit"}, {"run"}, {"calibrate"}],
    "dmq_export": [
        {"__init__", "errors"},  # of the package itself only the version is used from inside
        {"batch", "bits", "common", "target"},
        {"denoiser", "layer", "lint"},
        {"coverage", "recipe"},
        {"checkpoint"},
        {"metadata"},
        {"graph", "sampling"},
        {"summary"},
        {"commands"},
        {"cli_options"},
        {"cli"},
        {"__main__"},
    ],
}
ROOF = {"commands", "cli", "__main__"}  # of dmq_export; sees all three packages
LENT = {"__init__", "batch", "common", "errors"}  # what engines uses of dmq_export


@cache
def imported_modules(path: Path) -> set[str]:
    """Dotted names of what ``path`` imports at run time, anywhere; of ``from a import b`` both ``a`` and ``a.b``."""
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
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imports_of(path: Path) -> set[str]:
    """Their top-level packages."""
    return {name.partition(".")[0] for name in imported_modules(path)}


def rooms_of(path: Path, package: str) -> set[str]:
    """What ``path`` imports of ``package``: its modules and sub-packages, ``__init__`` for the names of its own."""
    parts = {name.split(".")[1] for name in imported_modules(path) if name.startswith(f"{package}.")}
    return {part if part in set().union(*FLOORS[package]) else "__init__" for part in parts}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def room(path: Path) -> str:
    """The module or sub-package directly below a package that ``path`` belongs to."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def is_roof(path: Path) -> bool:
    """The command line sees all three packages."""
    return path.relative_to(ROOT).parts[0] == "dmq_export" and room(path) in ROOF


@pytest.mark.parametrize("package", ["calib", "engines"])
def test_a_package_imports_only_what_the_arrows_allow(package: str) -> None:
    for path in modules(package):
        assert imports_of(path) & OURS <= {"dmq_export", package}, path


def test_dmq_export_imports_neither_calib_nor_engines_below_the_roof() -> None:
    for path in modules("dmq_export"):
        if not is_roof(path):
            assert not imports_of(path) & {"calib", "engines"}, path


def test_engines_use_little_of_dmq_export() -> None:
    for path in modules("engines"):
        assert rooms_of(path, "dmq_export") <= LENT, path


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_stays_at_home(library: str) -> None:
    for package in OURS - HOMES[library]:
        for path in modules(package):
            assert is_roof(path) or library not in imports_of(path), path


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_is_on_a_floor(package: str) -> None:
    assert {room(path) for path in modules(package)} - {"__init__"} == set().union(*FLOORS[package]) - {"__init__"}


@pytest.mark.parametrize("package", FLOORS)
def test_a_room_imports_only_from_the_floors_below_and_from_itself(package: str) -> None:
    level = {name: floor for floor, names in enumerate(FLOORS[package]) for name in names}
    for path in modules(package):
        here = room(path)
        if here == "__init__":
            continue
        for other in rooms_of(path, package) - {here}:
            assert level[other] < level[here], f"{path} imports {package}.{other}"


def imported_files() -> dict[Path, set[Path]]:
    """Each of our files, and those of our files that it imports; of a package with a module of it only the module."""
    files = [path for package in OURS for path in modules(package)]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    found: dict[Path, set[Path]] = {}
    for path in files:
        names = imported_modules(path) & named.keys()
        found[path] = {named[name] for name in names if not any(other.startswith(f"{name}.") for other in names)}
    return found


def test_no_file_imports_itself_by_way_of_others() -> None:
    rest = imported_files()
    while free := [path for path, others in rest.items() if not others & rest.keys()]:
        rest = {path: others for path, others in rest.items() if path not in free}
    assert not rest, sorted(map(str, rest))


NO_HEAVY_LIBRARY = f"import sys; sys.modules.update(dict.fromkeys({list(HOMES)}))"


@pytest.mark.parametrize("command", ["", "calibrate", "onnx", "sample", "lint", "inspect", "trt-build"])
def test_help_loads_no_heavy_library(command: str) -> None:
    arguments = [command, "-h"] if command else ["-h"]
    code = f"{NO_HEAVY_LIBRARY}; from dmq_export.cli import main; main({arguments!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_tensorrt_engine_is_imported_without_any_other_heavy_library() -> None:
    code = f"{NO_HEAVY_LIBRARY}; import engines.tensorrt.engine, engines.tensorrt.build"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
