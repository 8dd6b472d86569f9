"""Make the graphs of other tools in tests/graphs: one small network, quantized and exported by each.

    python bench/foreign_graphs.py [TOOL...]        # ort modelopt nncf brevitas torch; all by default

Needs the tools themselves, which nothing else here does: onnxruntime, nvidia-modelopt (with onnx-graphsurgeon,
onnxslim, lief, pulp, omegaconf), nncf, brevitas (with onnxoptimizer), torchao. What an exporter writes for people to
read (stack traces, documentation) is taken out, nothing else is changed. tests/graphs/README.md says which version made
what.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

GRAPHS = Path(__file__).resolve().parents[1] / "tests/graphs"
WIDTH, CHANNELS, SIZE, HEADS = 32, 4, 8, 2
OPSET = 20
Graph = Callable[[Path], Any]


class Attention(nn.Module):
    """Self-attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Any) -> Any:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Denoiser(nn.Module):
    """A residual convolution and an attention, with a convolution on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, WIDTH)
        self.act = nn.SiLU()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.conv_out = nn.Conv2d(WIDTH, CHANNELS, 1)

    def forward(self, x: Any) -> Any:
        h = self.conv_in(x)
        h = h + self.conv(self.act(self.norm1(h)))
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(self.norm2(tokens))
        return self.conv_out(tokens.transpose(1, 2).unflatten(2, (SIZE, SIZE)))


def network() -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return Denoiser().eval()


def sample() -> torch.Tensor:
    return torch.randn(2, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def exported(model: Any, path: Path, *, dynamo: bool = False) -> Path:
    """``model`` as torch's exporter writes it."""
    more: dict[str, Any] = {"input_names": ["sample"], "output_names": ["prediction"], "opset_version": OPSET}
    if dynamo:
        more["external_data"] = False
    torch.onnx.export(model, (sample(),), path, dynamo=dynamo, **more)
    return path


def layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Parent, name and layer of every convolution and matrix product."""
    kinds = (nn.Linear, nn.Conv2d)
    return [
        (parent, name, layer)
        for parent in list(model.modules())
        for name, layer in list(parent.named_children())
        if isinstance(layer, kinds)
    ]


# ONNX Runtime


def ort_static(folder: Path, *, symmetric: bool = False, bias: bool = True, **more: Any) -> Any:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.left = [{"sample": sample().numpy()}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    options = {"ActivationSymmetric": symmetric, "QuantizeBias": bias} | more.pop("options", {})
    more.setdefault("activation_type", QuantType.QInt8 if symmetric else QuantType.QUInt8)
    quantize_static(ort_source(folder), folder / "made.onnx", Reader(), extra_options=options, **more)
    return onnx.load(folder / "made.onnx")


def ort_source(folder: Path) -> Path:
    from onnxruntime.quantization import quant_pre_process

    source = exported(network(), folder / "float.onnx", dynamo=True)
    quant_pre_process(source, folder / "source.onnx", skip_symbolic_shape=True)
    return folder / "source.onnx"


def ort_products(folder: Path) -> Any:
    """As ONNX Runtime's documentation asks for TensorRT: pairs at weights too, and only in front of products."""
    products = ["Conv", "MatMul", "Gemm"]
    options = {"AddQDQPairToWeight": True, "OpTypesToExcludeOutputQuantization": products}
    return ort_static(
        folder, symmetric=True, bias=False, per_channel=True, op_types_to_quantize=products, options=options
    )


def ort_dynamic(folder: Path) -> Any:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(ort_source(folder), folder / "made.onnx")
    return onnx.load(folder / "made.onnx")


def ort_four_bit(folder: Path, form: str) -> Any:
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(exported(network(), folder / "float.onnx"))
    quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True, quant_format=QuantFormat[form])
    quantizer.process()
    return quantizer.model.model


# Model Optimizer


def modelopt_onnx(folder: Path, **more: Any) -> Any:
    from modelopt.onnx.quantization import quantize

    source = exported(network(), folder / "float.onnx")
    data = {"sample": sample().numpy()}
    quantize(str(source), calibration_data=data, output_path=str(folder / "made.onnx"), calibration_eps=["cpu"], **more)
    return onnx.load(folder / "made.onnx")


def modelopt_torch(folder: Path, config: str, dtype: str = "fp32") -> Any:
    """By Model Optimizer's own exporter, which takes 4-bit weights of matrix products only."""
    from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

    del folder
    model = calibrated(config, without="*conv*" if "INT4" in config else None)
    content, _ = get_onnx_bytes_and_metadata(model, sample(), "made", weights_dtype=dtype, onnx_opset=OPSET)
    return onnx.load_from_string(OnnxBytes.from_bytes(content).get_onnx_model_file_bytes())


def modelopt_torch_raw(folder: Path, config: str) -> Any:
    """By torch's exporter alone, so that nodes of the domain ``trt`` stay."""
    with torch.no_grad():
        return onnx.load(exported(calibrated(config), folder / "made.onnx"))


def calibrated(config: str, without: str | None = None) -> nn.Module:
    import modelopt.torch.quantization as mtq

    model = network()
    mtq.quantize(model, getattr(mtq, config), lambda each: each(sample()))
    if without is not None:
        mtq.disable_quantizer(model, without)
    return model


# NNCF


def nncf_onnx(folder: Path, preset: str = "PERFORMANCE") -> Any:
    import nncf

    model = onnx.load(exported(network(), folder / "float.onnx"))
    data = nncf.Dataset([{"sample": sample().numpy()}])
    return nncf.quantize(model, data, preset=nncf.QuantizationPreset[preset])


def nncf_weights(folder: Path, mode: str, **more: Any) -> Any:
    import nncf

    model = onnx.load(exported(network(), folder / "float.onnx"))
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **more)


# Brevitas


def brevitas(folder: Path, weight: str, data: str) -> Any:
    import brevitas.nn as qnn
    import brevitas.quant as quant
    from brevitas.export import export_onnx_qcdq

    model = network()
    kinds = {"weight_quant": getattr(quant, weight), "input_quant": getattr(quant, data)}
    for parent, name, layer in layers(model):
        if isinstance(layer, nn.Linear):
            new = qnn.QuantLinear(layer.in_features, layer.out_features, bias=True, **kinds)
        else:
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
            new = qnn.QuantConv2d(*sizes, padding=layer.padding, bias=True, **kinds)
        new.load_state_dict(layer.state_dict(), strict=False)
        setattr(parent, name, new)
    with torch.no_grad():
        model.train()(sample())
    export_onnx_qcdq(model.eval(), args=sample(), export_path=str(folder / "made.onnx"), opset_version=OPSET)
    return onnx.load(folder / "made.onnx")


# torch and torchao


class FakeQuantized(nn.Module):
    """A layer whose input and weight are fake-quantized."""

    def __init__(self, layer: Any, data: Any, weight: Any) -> None:
        super().__init__()
        self.layer, self.data, self.weight = layer, data(), weight()

    def forward(self, x: Any) -> Any:
        x, weight = self.data(x), self.weight(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight, self.layer.bias)
        return nn.functional.conv2d(x, weight, self.layer.bias, padding=self.layer.padding)


def torch_fake(folder: Path, *, symmetric: bool) -> Any:
    ao: Any = import_module("torch.ao.quantization")

    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    low, kind = (-128, torch.qint8) if symmetric else (0, torch.quint8)
    data = ao.FakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver, quant_min=low, quant_max=low + 255, dtype=kind, qscheme=scheme
    )
    weight = ao.FakeQuantize.with_args(
        observer=ao.MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    model = network()
    for parent, name, layer in layers(model):
        setattr(parent, name, FakeQuantized(layer, data, weight))
    model.train()(sample())
    return onnx.load(exported(model.eval().apply(ao.disable_observer), folder / "made.onnx"))


def torchao_pt2e(folder: Path) -> Any:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    model = prepare_pt2e(torch.export.export(network(), (sample(),)).module(), quantizer)
    model(sample())
    return onnx.load(exported(convert_pt2e(model), folder / "made.onnx", dynamo=True))


PACKAGES = {"ort": "onnxruntime-gpu", "modelopt": "nvidia-modelopt"}  # those that are called otherwise
TOOLS: dict[str, dict[str, Graph]] = {
    "ort": {
        "uint8": ort_static,
        "int8": partial(ort_static, symmetric=True),
        "int8-float-bias": partial(ort_static, symmetric=True, bias=False),
        "int8-products": ort_products,
        "dynamic": ort_dynamic,
        "w4-qdq": partial(ort_four_bit, form="QDQ"),
        "w4-matmulnbits": partial(ort_four_bit, form="QOperator"),
    },
    "modelopt": {
        "onnx-int8": partial(modelopt_onnx, quantize_mode="int8", high_precision_dtype="fp32"),
        "onnx-int8-fp16": partial(modelopt_onnx, quantize_mode="int8"),
        "onnx-fp8": partial(modelopt_onnx, quantize_mode="fp8"),
        "onnx-int4": partial(modelopt_onnx, quantize_mode="int4"),
        "torch-int8": partial(modelopt_torch, config="INT8_DEFAULT_CFG"),
        "torch-int8-fp16": partial(modelopt_torch, config="INT8_SMOOTHQUANT_CFG", dtype="fp16"),
        "torch-fp8": partial(modelopt_torch, config="FP8_DEFAULT_CFG"),
        "torch-fp8-raw": partial(modelopt_torch_raw, config="FP8_DEFAULT_CFG"),
        "torch-int4": partial(modelopt_torch, config="INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    },
    "nncf": {
        "default": nncf_onnx,
        "mixed": partial(nncf_onnx, preset="MIXED"),
        "w8-symmetric": partial(nncf_weights, mode="INT8_SYM"),
        "w4": partial(nncf_weights, mode="INT4_SYM", group_size=32, all_layers=True),
    },
    "brevitas": {
        "int8": partial(brevitas, weight="Int8WeightPerChannelFloat", data="Int8ActPerTensorFloat"),
        "uint8": partial(brevitas, weight="ShiftedUint8WeightPerTensorFloat", data="ShiftedUint8ActPerTensorFloat"),
    },
    "torch": {
        "fake-int8": partial(torch_fake, symmetric=True),
        "fake-uint8": partial(torch_fake, symmetric=False),
        "pt2e-x86": torchao_pt2e,
    },
}


def without_prose(model: Any) -> Any:
    """The same graph without stack traces and documentation."""
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    model.graph.ClearField("metadata_props")
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    return model


def main() -> None:
    GRAPHS.mkdir(exist_ok=True)
    for tool in sys.argv[1:] or TOOLS:
        for name, make in TOOLS[tool].items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    model = without_prose(make(Path(folder)))
                except Exception as error:  # of any tool, of any kind: say so and go on
                    traceback.print_exc(limit=-3)
                    print(f"{tool}-{name}: {type(error).__name__}: {error}", file=sys.stderr)
                    continue
            path = GRAPHS / f"{tool}-{name}.onnx"
            onnx.save(model, path)
            package = "torchao" if name.startswith("pt2e") else PACKAGES.get(tool, tool)
            print(f"| `{path.name}` | {package} {version(package)} | {path.stat().st_size / 1000:.0f} KB |")


if __name__ == "__main__":
    main()
