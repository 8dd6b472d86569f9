"""What the wheel holds."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["dmq_export", "calib", "engines"]
LARGEST_MODEL = 4 * 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", ".venv", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder / "source", ignore=junk)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(folder / "source")], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_wheel_ships_exactly_our_packages(wheel: zipfile.ZipFile) -> None:
    shipped = {Path(name).parts[0] for name in wheel.namelist()}
    assert {name for name in shipped if not name.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.slow
def test_the_wheel_ships_every_module(wheel: zipfile.ZipFile) -> None:
    ours = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert ours <= set(wheel.namelist())


@pytest.mark.slow
def test_the_wheel_ships_the_bundled_model_in_four_megabytes(wheel: zipfile.ZipFile) -> None:
    model = [info for info in wheel.infolist() if info.filename.startswith("dmq_export/models/digits/")]
    names = {Path(info.filename).relative_to("dmq_export/models/digits").as_posix() for info in model}
    assert {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "classifier.onnx",
    } <= names
    assert sum(info.file_size for info in model) < LARGEST_MODEL


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_claims_our_package(package: str) -> None:
    assert set(packages_distributions().get(package, [])) <= {"dmq-export"}
