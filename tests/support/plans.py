"""A plan of a machine that is not this one, as far as files can tell."""

import hashlib

from engines.tensorrt.plan_file import Machine, PlanMetadata
from engines.tensorrt.profile import ShapeRange

CONTENT = b"a plan, as far as this module is concerned"
MACHINE = Machine("tensorrt", "10.16.1.11", "Linux x86_64", "NVIDIA H200", "9.0")
PLAN_METADATA = PlanMetadata(
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    machine=MACHINE,
    capabilities=(),
    version_compatible=False,
    hardware_compatible="none",
    stripped=False,
    onnx_sha256={"model.onnx": "ab" * 32},
    shapes={"sample": ShapeRange((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8)), "timestep": ShapeRange((), (), ())},
    settings={"optimization_level": 3, "workspace": None},
    layers={"int8": 3, "reformat": 1},
    metadata={"bits": "w4a8", "model": "UNet2DModel"},
    versions={"dmq-export": "0.1.0"},
)
