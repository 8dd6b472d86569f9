"""TensorRT: from an ONNX file to an engine, what the compiler made of it, and running it."""
