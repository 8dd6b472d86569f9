"""Libraries that not every installation has, and what installs them."""

from importlib.util import find_spec

from dmq_export.errors import DmqError

EXTRAS = {  # library -> the extra of pyproject.toml that brings it
    "torch": "calibrate",
    "diffusers": "calibrate",
    "onnxscript": "calibrate",
    "transformers": "text",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "polygraphy": "tensorrt-rtx",
    "cuda": "tensorrt",
    "onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-tensorrt-rtx",
}


def install(*libraries: str) -> str:
    """The one command that gets ``libraries``, each by the name it is imported by."""
    extras = {library: f"'dmq-export[{EXTRAS[library]}]'" for library in libraries if library in EXTRAS}
    wanted = dict.fromkeys(extras.get(library, library.replace("_", "-")) for library in libraries)
    return f"pip install {' '.join(wanted)}"


def require(what: str, *libraries: str) -> None:
    """Refuse to begin ``what`` without the libraries that it needs.

    Raises:
        DmqError: naming those that are not installed, and what installs them.
    """
    missing = [library for library in libraries if find_spec(library) is None]
    if missing:
        raise DmqError(f"{what} needs what is not installed, {', '.join(missing)}: {install(*missing)}")
