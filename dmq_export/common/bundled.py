"""The models that ship with the package."""

from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "models"


def model_folder(model: str) -> Path:
    """A folder as given, or that of the bundled model called ``model`` when no such folder exists."""
    bundled = BUNDLED / model
    return bundled if not Path(model).exists() and bundled.is_dir() else Path(model)
