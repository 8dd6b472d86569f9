"""``import dmq_export``: which names it gives, what it loads, and the page that describes it."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dmq_export

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/api.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'PIL', 'click']))\n"


def run(code: str, folder: Path) -> str:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def stated_to_type_checkers() -> dict[str, tuple[str, str]]:
    """Name -> module and name there, as the imports for type checkers say."""
    tree = ast.parse((ROOT / "dmq_export/__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "importlib"]
    return {
        alias.asname or alias.name: (str(node.module).removeprefix("dmq_export."), alias.name)
        for node in imports
        for alias in node.names
    }


def test_type_checkers_see_the_names_that_are_there() -> None:
    assert stated_to_type_checkers() == dmq_export._HOMES
    assert set(dmq_export.__all__) == {*dmq_export._HOMES, "__version__"}
    for name in dmq_export.__all__:
        assert getattr(dmq_export, name) is not None
        assert name in dir(dmq_export)


def test_a_name_that_is_not_there_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="module 'dmq_export' has no attribute 'lint_files'"):
        dmq_export.lint_files  # noqa: B018


def test_no_verb_has_the_name_of_a_module() -> None:
    """Importing a module below a package sets its name there, and would hide the verb."""
    modules = {path.stem for path in (ROOT / "dmq_export").iterdir()}
    assert not modules & set(dmq_export.__all__)


def test_the_import_loads_nothing_else_of_ours(tmp_path: Path) -> None:
    loaded = run(
        "import sys, dmq_export; print(*[n for n in sys.modules if n.partition('.')[0] == 'dmq_export'])", tmp_path
    )
    assert loaded.split() == ["dmq_export"]


@pytest.fixture
def folder(tiny_model: Path, tiny_checkpoint_folder: Path, tiny_onnx: Path, tmp_path: Path) -> Path:
    """A folder with a ``model``, and the checkpoint and the file that become of it."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(tiny_checkpoint_folder, tmp_path / "checkpoint")
    shutil.copy(tiny_onnx, tmp_path / "model.onnx")
    return tmp_path


def test_the_page_calibrates_and_exports(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint")
    (folder / "model.onnx").unlink()
    printed = run(BLOCKS[0], folder)
    assert "checkpoint written" in printed
    assert "verified: " in printed
    assert (folder / "model.onnx").is_file()


def test_the_page_samples_without_pytorch_in_three_lines(folder: Path) -> None:
    assert BLOCKS[1].strip().count("\n") == 3  # and an empty one
    assert run(f"{WITHOUT}{BLOCKS[1]}\nprint(samples.shape)", folder) == "(8, 1, 8, 8)\n"


def test_the_page_looks_at_files(folder: Path) -> None:
    printed = run(f"{WITHOUT}{BLOCKS[2]}", folder)
    assert "conv_in" in printed
    assert re.search(r"model\.onnx: \d+ errors, \d+ warnings", printed)


def test_there_are_no_other_examples() -> None:
    assert len(BLOCKS) == 3
