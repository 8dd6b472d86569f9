"""What a traced graph has in place of each quantized layer: one node ``dmq::Layer``, which a lowering replaces."""

DOMAIN = "dmq"
OPSET = 21
OUTPUT = "out_sample"
BATCH = "batch"
