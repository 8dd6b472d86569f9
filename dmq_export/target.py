"""Where an exported graph is to run."""

from typing import Literal

Target = Literal["portable", "tensorrt", "openvino"]
FloatType = Literal["float32", "float16"]
