"""From a traced graph to an ONNX file: folding, the two lowerings, reading and writing, and the comparison of both."""
