"""Selects the layers to quantize: the model runs once, and of every layer it is seen what it is and when it runs."""

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calib.model.families import example_conditioning
from calib.model.hooks import hooked
from calib.model.load import SourceModel
from calib.model.network import predict
from dmq_export.bits import Bits
from dmq_export.coverage import Coverage, FloatLayer
from dmq_export.errors import ModelError
from dmq_export.layer import LayerSpec, Scheme

KINDS: dict[type[nn.Module], str] = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Linear: "linear"}
# every module with a weight that a product uses; a subclass of a supported kind is not supported, for its forward
# may do anything
WEIGHTED: tuple[type[nn.Module], ...] = (
    *KINDS,
    nn.Bilinear,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)


@dataclass(frozen=True)
class Call:
    """One run of a layer.

    Attributes:
        parts: the channels of each tensor if the input is a concat.
        source: number of its input; layers that are given the same tensor have the same.
    """

    name: str
    parts: tuple[int, ...]
    source: int


@dataclass(frozen=True)
class Block:
    """Layers whose weights are rounded together: all quantized layers below the module ``name``."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class LayerSelection:
    """Which layers are quantized, which stay float, and how they belong together.

    Attributes:
        input_groups: the quantized layers in order, those that share one input (queries, keys, values) together.
    """

    coverage: Coverage
    blocks: tuple[Block, ...]
    input_groups: tuple[tuple[LayerSpec, ...], ...]

    def with_specs(self, changed: Mapping[str, LayerSpec]) -> "LayerSelection":
        """The same with other specifications for some layers, by name."""

        def new(specs: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
            return tuple(changed.get(spec.name, spec) for spec in specs)

        coverage = replace(self.coverage, quantized=new(self.coverage.quantized))
        return replace(self, coverage=coverage, input_groups=tuple(new(group) for group in self.input_groups))


class _Concats(TorchFunctionMode):
    """Remembers which tensors came out of ``torch.cat``, and of what sizes they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, int, tuple[int, ...]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate):
            named = dict(kwargs or {})
            axis = args[1] if len(args) > 1 else named.get("dim", named.get("axis", 0))
            sizes = tuple(tensor.shape[axis] for tensor in (args[0] if args else named["tensors"]))
            self.made.append((result, axis % result.dim(), sizes))
        return result

    def parts(self, tensor: Tensor, axis: int) -> tuple[int, ...]:
        """The sizes along ``axis`` of the tensors that ``tensor`` was concatenated from."""
        for made, made_axis, sizes in self.made:
            if made is tensor and made_axis == axis % tensor.dim():
                return sizes
        return (tensor.shape[axis],)


def observe(source: SourceModel) -> list[Call]:
    """Every run of a Conv or Linear during one evaluation, in order.

    Raises:
        ModelError: the model does not run on inputs of the shapes its configuration states.
        torch.OutOfMemoryError: the GPU's memory runs out.
    """
    calls: list[Call] = []
    concats = _Concats()
    inputs: list[weakref.ref[Tensor]] = []  # weak, or every activation would stay

    def note(module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        x = args[0]
        axis = -1 if isinstance(module, nn.Linear) else 1
        number = next((i for i, known in enumerate(inputs) if known() is x), len(inputs))
        if number == len(inputs):
            inputs.append(weakref.ref(x))
        calls.append(Call(name, concats.parts(x, axis), number))

    hooks = (
        module.register_forward_pre_hook(lambda module, args, name=name: note(module, args, name))
        for name, module in source.network.named_modules()
        if type(module) in KINDS
    )
    device = next(source.network.parameters()).device
    conditioning = example_conditioning(source.class_name, source.config, batch=1)
    try:
        with hooked(hooks), torch.no_grad(), concats:
            sample = torch.zeros(1, *source.sample_shape, device=device)
            on_device = {name: value.to(device) for name, value in conditioning.items()}
            predict(source.network, sample, torch.tensor(1.0, device=device), on_device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{source.class_name} does not run on inputs of the shapes in its config.json: {reason}"
        ) from error
    return calls


def select_layers(source: SourceModel, bits: Bits, scheme: Scheme, float_patterns: Sequence[str]) -> LayerSelection:
    """Decide layer by layer what is quantized.

    Args:
        float_patterns: the user's name patterns of layers to leave float.

    Raises:
        ModelError: a pattern matches no layer, or nothing is left to quantize.
    """
    runs = observe(source)
    calls = {call.name: call for call in runs}
    floats = _float_layers(source, runs, float_patterns)
    left_float = {layer.name for layer in floats}
    specs = tuple(
        _spec(source.network.get_submodule(name), call, bits, scheme)
        for name, call in calls.items()
        if name not in left_float
    )
    if not specs:
        raise ModelError("no layer is left to quantize: see --float-layer and the model's layers")
    return LayerSelection(Coverage(specs, floats), _blocks(source, specs), _input_groups(specs, calls))


def _float_layers(source: SourceModel, calls: list[Call], float_patterns: Sequence[str]) -> tuple[FloatLayer, ...]:
    """The layers that are not quantized, each with the reason."""
    counts = Counter(call.name for call in calls)
    modules = {name: module for name, module in source.network.named_modules() if isinstance(module, WEIGHTED)}
    obstacles = {name: why for name, module in modules.items() if (why := _obstacle(module, counts[name]))}
    wanted = {name: why for name in modules if (why := source.family.float_reason(name))}
    candidates = [name for name in dict.fromkeys(call.name for call in calls) if name not in wanted | obstacles]
    if candidates:
        wanted |= {candidates[-1]: "last layer", candidates[0]: "first layer"}
    wanted = _excluded(list(modules), float_patterns) | wanted
    reasons = obstacles | wanted
    order = [*dict.fromkeys(call.name for call in calls), *modules]
    products = [name for name, module in source.network.named_modules() if type(module).__name__.endswith("Attention")]
    return (
        *(
            FloatLayer(name, _kind(modules[name]), _size(modules[name]), reason, by_design=name in wanted)
            for name, reason in sorted(reasons.items(), key=lambda item: order.index(item[0]))
        ),
        *(FloatLayer(name, "q·k, softmax·v", 0, "attention products", by_design=True) for name in products),
    )


def _excluded(names: Sequence[str], patterns: Sequence[str]) -> dict[str, str]:
    """The layers the user leaves float."""
    excluded: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ModelError(
                f"--float-layer {pattern!r} matches no layer: patterns match whole names, such as {names[0]}"
            )
        excluded |= dict.fromkeys(matched, f"--float-layer {pattern}")
    return excluded


def _obstacle(module: nn.Module, runs: int) -> str | None:
    """Why a layer of this kind, run so often, cannot be quantized; None where it can."""
    if type(module) not in KINDS:
        return f"{type(module).__name__} is not supported"
    if runs != 1:
        return "never runs" if runs == 0 else f"runs {runs} times per step"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding mode {module.padding_mode}"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.padding == "same" and any(r % 2 for r in _reaches(module)):
        return "padding 'same' of an even kernel"
    return None


def _spec(module: nn.Module, call: Call, bits: Bits, scheme: Scheme) -> LayerSpec:
    if isinstance(module, nn.Linear):
        return LayerSpec(call.name, "linear", module.out_features, call.parts, bits, scheme=scheme)
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        raise TypeError(f"{call.name} is a {type(module).__name__}")
    return LayerSpec(
        name=call.name,
        kind="conv1d" if isinstance(module, nn.Conv1d) else "conv2d",
        out_channels=module.out_channels,
        # a grouped convolution mixes no channels across groups, so a split would buy nothing
        parts=call.parts if module.groups == 1 else (module.in_channels,),
        bits=bits,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=_padding(module),
        dilation=tuple(module.dilation),
        groups=module.groups,
        scheme=scheme,
    )


def _padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    """Zeros on either side per axis; :func:`_obstacle` has refused what is not the same on both."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if isinstance(module.padding, str):
        return tuple(reach // 2 for reach in _reaches(module))
    return tuple(module.padding)


def _reaches(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """How much smaller an unpadded convolution's output is, per axis."""
    return [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]


def _blocks(source: SourceModel, specs: Sequence[LayerSpec]) -> tuple[Block, ...]:
    """The outermost modules of the family's block classes, and each layer outside any as its own block."""
    blocks: dict[str, list[str]] = {}
    for spec in specs:
        path = spec.name.split(".")
        above = [".".join(path[:depth]) for depth in range(1, len(path))]
        inside = (
            name for name in above if type(source.network.get_submodule(name)).__name__ in source.family.block_classes
        )
        blocks.setdefault(next(inside, spec.name), []).append(spec.name)
    return tuple(Block(name, tuple(layers)) for name, layers in blocks.items())


def _input_groups(specs: Sequence[LayerSpec], calls: Mapping[str, Call]) -> tuple[tuple[LayerSpec, ...], ...]:
    """Layers that read the same patches of the same input, so that they can share one equivalent scaling."""
    groups: dict[object, list[LayerSpec]] = {}
    for spec in specs:
        window = (spec.kind, spec.parts, spec.kernel, spec.stride, spec.padding, spec.dilation)
        alone = spec.name if spec.groups > 1 else None
        groups.setdefault((calls[spec.name].source, window, alone), []).append(spec)
    return tuple(tuple(group) for group in groups.values())


def _kind(module: nn.Module) -> str:
    return KINDS.get(type(module), type(module).__name__)


def _size(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else 0
