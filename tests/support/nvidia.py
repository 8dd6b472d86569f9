"""NVIDIA's Python bindings on a machine without a GPU: loaded over empty libraries, described as type stubs.

The wheels hold only the bindings; the libraries they link to are stood in for by functions that return 0. That is
enough to read every class, enumeration and signature of TensorRT's own module, which ``stubgen`` writes down and
``mypy`` checks our code against.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYMBOLS = {  # what the bindings import from each library
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvonnxparser": (
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
}
STUBGEN = "from mypy.stubgen import main; main()"  # compiled, so python -m does not run it
CUDA_STUB = """
import inspect
from cuda.bindings import runtime
print("from typing import Any")
for name, value in vars(runtime).items():
    if isinstance(value, type) and issubclass(value, int):
        print(f"class {name}:\\n    ...")
        print("".join(f"    {member}: {name}\\n" for member in dir(value) if member.startswith("cuda")))
    elif inspect.isroutine(value) or type(value).__name__ == "cython_function_or_method":
        print(f"def {name}({', '.join(inspect.signature(value).parameters)}) -> Any: ...")
    elif not name.startswith("_"):
        print(f"{name}: Any")
"""


@dataclass(frozen=True)
class Bindings:
    """One release of the bindings, unpacked.

    Attributes:
        version: of TensorRT.
        modules: folder that holds ``cuda``, and ``tensorrt`` where that is not installed.
        libraries: folder that holds the empty libraries.
        stubs: folder that holds the type stubs.
    """

    version: str
    modules: Path
    libraries: Path
    stubs: Path

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python where ``import tensorrt`` finds the bindings."""
        paths = os.pathsep.join([str(self.modules), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": str(self.libraries)}
        return _run([sys.executable, *arguments], env=environment)

    def mypy(self, source: Path) -> list[str]:
        """What is wrong with the use of TensorRT, Polygraphy and CUDA in ``source/engines``, line by line."""
        files = [path.relative_to(source) for path in uses_of_nvidia(source / "engines")]
        options = ["--config-file=", "--follow-imports=silent", "--ignore-missing-imports", "--check-untyped-defs"]
        options += ["--explicit-package-bases", f"--cache-dir={self.stubs.parent / 'mypy'}", "--no-error-summary"]
        environment = {**os.environ, "MYPYPATH": f"{self.stubs}{os.pathsep}{source}"}
        command = [sys.executable, "-m", "mypy", *options, *map(str, files)]
        result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode in (0, 1), result.stderr
        return [line for line in result.stdout.splitlines() if line.startswith("engines")]


def uses_of_nvidia(folder: Path) -> list[Path]:
    """The modules of ``folder`` that import either TensorRT, Polygraphy or CUDA anywhere."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        imported = {
            name.partition(".")[0] for node in ast.walk(ast.parse(path.read_text())) for name in _imported(node)
        }
        if imported & {"tensorrt", "tensorrt_rtx", "polygraphy", "cuda"}:
            found.append(path)
    return found


def unpack_bindings(requirement: str, cuda: str, folder: Path) -> Bindings:
    """Download, unpack and describe one release of both bindings; skips the test where that is not possible."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler for the empty libraries")
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    version = requirement.rpartition("=")[2]
    bindings = Bindings(version, folder / "modules", folder / "libraries", folder / "stubs")
    for wheel in (requirement, cuda, "cuda-pathfinder"):
        unpack_wheel(wheel, bindings.modules)
    (bindings.modules / "tensorrt").symlink_to("tensorrt_bindings")
    _write_libraries(bindings.libraries, version.partition(".")[0])
    _write_stubs(bindings)
    return bindings


def installed_rtx(cuda: str, folder: Path) -> Bindings:
    """TensorRT-RTX as it is installed, described under both names: our code for both runtimes says ``tensorrt``.

    Skips the test where it is not installed.
    """
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    bindings = Bindings(trt.__version__, folder / "modules", folder / "libraries", folder / "stubs")
    for wheel in (cuda, "cuda-pathfinder"):
        unpack_wheel(wheel, bindings.modules)
    real = "tensorrt_rtx_bindings"
    bindings.python(
        "-c", STUBGEN, "--inspect-mode", "-m", f"{real}.tensorrt_rtx", "-m", real, "-o", str(bindings.stubs)
    )
    _mend(bindings.stubs / real / "tensorrt_rtx.pyi")
    for name in ("tensorrt", "tensorrt_rtx"):
        (bindings.stubs / name).mkdir()
        text = f"from {real} import *\nfrom {real} import __version__ as __version__\n"
        (bindings.stubs / name / "__init__.pyi").write_text(text)
    _describe_others(bindings)
    return bindings


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def unpack_wheel(requirement: str, folder: Path) -> None:
    """Download a wheel and unpack it into ``folder``; skips the test where that is not possible."""
    wheels = folder.parent / "wheels" / requirement.replace("=", "")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"{requirement} cannot be downloaded: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder)


def _write_libraries(folder: Path, major: str) -> None:
    folder.mkdir()
    for library, symbols in SYMBOLS.items():
        source, name = folder / f"{library}.c", f"lib{library}.so.{major}"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        _run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)])


def _write_stubs(bindings: Bindings) -> None:
    modules = ("-m", "tensorrt.tensorrt", "-m", "tensorrt")
    bindings.python("-c", STUBGEN, "--inspect-mode", *modules, "-o", str(bindings.stubs))
    _mend(bindings.stubs / "tensorrt" / "tensorrt.pyi")
    _describe_others(bindings)


def _describe_others(bindings: Bindings) -> None:
    """Stubs of CUDA's bindings, and Polygraphy's own source, which mypy can read."""
    cuda = bindings.stubs / "cuda" / "bindings"
    cuda.mkdir(parents=True)
    for package in (cuda.parent, cuda):
        (package / "__init__.pyi").touch()
    (cuda / "runtime.pyi").write_text(bindings.python("-c", CUDA_STUB).stdout)
    import polygraphy

    (bindings.stubs / "polygraphy").symlink_to(Path(polygraphy.__file__).parent)


def _mend(path: Path) -> None:
    path.write_text("".join(map(_valid, path.read_text().splitlines(keepends=True))))


def _valid(line: str) -> str:
    """The line, or the same method with any arguments where the bindings' own text is no Python."""
    if not line.lstrip().startswith("def "):
        return line
    try:
        ast.parse(line.strip())
    except SyntaxError:
        return re.sub(r"\(.*", "(self, *args, **kwargs): ...", line)
    return line


def _run(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result
