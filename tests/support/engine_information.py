"""The JSON of the engine inspector, as TensorRT 10 and TensorRT 11 write it."""

import json
from typing import Any

INT8 = "Thirty-two wide channel vectorized row major Int8 format"
HALF = "Channel major FP16 format where channel % 8 == 0"
FLOAT = "Row major linear FP32"


def layer(name: str, kind: str, given: str, result: str, *, metadata: str = "", **more: Any) -> dict[str, Any]:
    """One layer as TensorRT 10 writes it with detailed verbosity."""
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": "x", "Location": "Device", "Dimensions": [1, 32, 8, 8], "Format/Datatype": given}],
        "Outputs": [{"Name": "y", "Location": "Device", "Dimensions": [1, 32, 8, 8], "Format/Datatype": result}],
        "Metadata": metadata,
        **more,
    }


def as_eleven(layers: list[dict[str, Any]]) -> str:
    """The same as TensorRT 11 writes it: format and type apart, inputs and outputs under another name."""
    types = {INT8: "INT8", HALF: "FP16", FLOAT: "FP32"}
    split = json.loads(json.dumps(layers))
    for each in split:
        for tensor in (*each["Inputs"], *each["Outputs"]):
            stated = tensor.pop("Format/Datatype")
            tensor |= {"Format": "Row major linear", "DataType": types[stated]}
    return json.dumps({"Layers": split, "I/O Tensors": []})


def as_ten(layers: list[dict[str, Any]]) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["sample", "out_sample"]})
