"""Where an exported graph is to run."""

from typing import Literal

Target = Literal["portable", "tensorrt", "openvino"]
FloatType = Literal["float32", "float16"]


def usual_type(target: Target) -> FloatType:
    """The type of a graph's float part where nobody says otherwise: TensorRT fuses attention in 16 bits only."""
    return "float16" if target == "tensorrt" else "float32"
