"""Which layers are quantized, in which parts, and why the others are not."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calib.model.families import family_of
from calib.model.layers import LayerSelection, observe, select_layers
from calib.model.load import SourceModel, load_model
from dmq_export.bits import Bits
from dmq_export.coverage import FloatLayer
from dmq_export.errors import ModelError

W4A8 = Bits(4, 8)


class Denoiser(nn.Module):
    """``first`` and ``last`` around whatever ``middle`` does to 4 channels; called as diffusers' models are."""

    def __init__(self, layers: dict[str, nn.Module], middle: Callable[[nn.ModuleDict, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 1)
        self.layers = nn.ModuleDict(layers)
        self.last = nn.Conv2d(4, 2, 1)
        self.middle = middle

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.last(self.middle(self.layers, self.first(sample))),)


def source(network: nn.Module) -> SourceModel:
    return SourceModel(network, "Custom", {"sample_size": 4, "in_channels": 2}, {}, "")


def selection(
    layers: dict[str, nn.Module], middle: Callable[[nn.ModuleDict, Tensor], Tensor], *float_patterns: str
) -> LayerSelection:
    return select_layers(source(Denoiser(layers, middle)), W4A8, "asymmetric", float_patterns)


def floats(result: LayerSelection) -> dict[str, FloatLayer]:
    return {layer.name: layer for layer in result.coverage.float_layers}


def parts_of(layer: nn.Module, middle: Callable[[nn.ModuleDict, Tensor], Tensor]) -> tuple[int, ...]:
    return selection({"x": layer}, middle).coverage.quantized[0].parts


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> SourceModel:
    return load_model(tiny_model, torch.device("cpu"))


def test_every_conv_and_linear_is_listed_exactly_once(tiny: SourceModel) -> None:
    coverage = select_layers(tiny, W4A8, "asymmetric", ["*.to_q"]).coverage
    listed = Counter([spec.name for spec in coverage.quantized] + [layer.name for layer in coverage.float_layers])
    layers = [name for name, m in tiny.network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    products = [name for name, m in tiny.network.named_modules() if type(m).__name__ == "Attention"]
    assert listed == Counter(layers + products)
    parameters = sum(tiny.network.get_submodule(name).get_parameter("weight").numel() for name in layers)
    assert coverage.parameters == parameters


def test_blocks_partition_the_quantized_layers(tiny: SourceModel) -> None:
    result = select_layers(tiny, W4A8, "asymmetric", ["mid_block.*.conv1"])
    in_blocks = [name for block in result.blocks for name in block.layers]
    assert sorted(in_blocks) == sorted(spec.name for spec in result.coverage.quantized)
    assert len(set(in_blocks)) == len(in_blocks)
    for block in result.blocks:
        assert all(name == block.name or name.startswith(f"{block.name}.") for name in block.layers)
    blocks = {block.name: block.layers for block in result.blocks}
    attention = "mid_block.attentions.0"
    assert blocks[attention] == tuple(f"{attention}.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0"))
    assert blocks["mid_block.resnets.0"] == ("mid_block.resnets.0.conv2",)
    assert blocks["down_blocks.0.downsamplers.0.conv"] == ("down_blocks.0.downsamplers.0.conv",)


def test_skip_shortcuts_are_split_where_the_skip_was_joined(tiny: SourceModel) -> None:
    specs = select_layers(tiny, W4A8, "asymmetric", []).coverage.quantized
    shortcuts = {spec.name: spec.parts for spec in specs if len(spec.parts) > 1}
    # channels that come up, then the skip's: the down path leaves 8 8 8 | 16 16 behind, last one first
    assert shortcuts == {
        "up_blocks.0.resnets.0.conv_shortcut": (16, 16),
        "up_blocks.0.resnets.1.conv_shortcut": (16, 8),
        "up_blocks.1.resnets.0.conv_shortcut": (16, 8),
        "up_blocks.1.resnets.1.conv_shortcut": (8, 8),
    }


def test_the_layers_that_stay_float_say_why(tiny: SourceModel) -> None:
    layers = floats(select_layers(tiny, W4A8, "asymmetric", ["*.to_q", "*.to_*"]))
    assert layers["conv_in"].reason == "first layer"
    assert layers["conv_out"].reason == "last layer"
    assert layers["time_embedding.linear_1"].reason == "time or label embedding"
    assert layers["class_embedding"].reason == "time or label embedding"
    assert layers["mid_block.resnets.0.time_emb_proj"].reason == "time or label embedding"
    assert layers["mid_block.attentions.0"].reason == "attention products"
    assert layers["mid_block.attentions.0.to_v"].reason == "--float-layer *.to_*"
    assert all(layer.by_design for layer in layers.values())
    assert layers["conv_in"].parameters == 8 * 1 * 3 * 3


def test_a_float_layer_pattern_takes_the_layers_it_matches_and_no_others(tiny: SourceModel) -> None:
    everything = {spec.name for spec in select_layers(tiny, W4A8, "asymmetric", []).coverage.quantized}
    fewer = select_layers(tiny, W4A8, "asymmetric", ["*.conv1", "mid_block.*"])
    kept = {spec.name for spec in fewer.coverage.quantized}
    assert kept == {name for name in everything if not name.endswith(".conv1") and not name.startswith("mid_block.")}


def test_the_first_and_last_layer_may_be_named_too(tiny: SourceModel) -> None:
    result = select_layers(tiny, W4A8, "asymmetric", ["conv_in"])
    assert result.coverage.quantized == select_layers(tiny, W4A8, "asymmetric", []).coverage.quantized
    assert floats(result)["conv_in"].reason == "first layer"


@pytest.mark.parametrize("pattern", ["conv1", "to_q", "", "*.CONV1"])
def test_a_float_layer_pattern_without_a_match_is_an_error_with_an_example(tiny: SourceModel, pattern: str) -> None:
    with pytest.raises(ModelError, match=r"matches no layer.* whole names, such as conv_in") as caught:
        select_layers(tiny, W4A8, "asymmetric", ["*.conv2", pattern])
    assert f"--float-layer {pattern!r}" in str(caught.value)


def test_nothing_left_to_quantize_is_an_error(tiny: SourceModel) -> None:
    with pytest.raises(ModelError, match="no layer is left to quantize: see --float-layer"):
        select_layers(tiny, W4A8, "asymmetric", ["*"])


CONCATS = {
    "two tensors": lambda x: torch.cat([x, x[:, :3]], dim=1),
    "a positional axis": lambda x: torch.cat((x, x[:, :3]), 1),
    "an axis from the end": lambda x: torch.cat([x, x[:, :3]], dim=-3),
    "numpy's argument name": lambda x: torch.cat([x, x[:, :3]], axis=1),
    "concat": lambda x: torch.concat([x, x[:, :3]], dim=1),
    "concatenate by keywords": lambda x: torch.concatenate(tensors=[x, x[:, :3]], dim=1),
}


@pytest.mark.parametrize("how", CONCATS)
def test_a_convolution_on_a_concat_is_split_at_its_boundary(how: str) -> None:
    assert parts_of(nn.Conv2d(7, 4, 1), lambda m, x: m["x"](CONCATS[how](x))) == (4, 3)


def test_a_linear_layer_on_a_concat_of_features_is_split() -> None:
    def middle(m: nn.ModuleDict, x: Tensor) -> Tensor:
        tokens = x.movedim(1, -1)
        return m["x"](torch.cat([tokens[..., :1], tokens], dim=-1)).movedim(-1, 1)

    assert parts_of(nn.Linear(5, 4), middle) == (1, 4)


def test_a_linear_layer_on_a_concat_of_tokens_is_not_split() -> None:
    def middle(m: nn.ModuleDict, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT  # [N, 16, 4]
        return m["x"](torch.cat([tokens, tokens], dim=1))[:, :16].mT.unflatten(2, (4, 4))

    assert parts_of(nn.Linear(4, 4), middle) == (4,)


def test_a_convolution_on_a_concat_of_rows_is_not_split() -> None:
    assert parts_of(nn.Conv2d(4, 4, 1), lambda m, x: m["x"](torch.cat([x, x], dim=2))[:, :, :4]) == (4,)


def test_a_grouped_convolution_on_a_concat_is_not_split() -> None:
    assert parts_of(nn.Conv2d(8, 4, 1, groups=2), lambda m, x: m["x"](torch.cat([x, x], 1))) == (8,)


def test_what_lies_between_the_concat_and_the_layer_undoes_the_split() -> None:
    assert parts_of(nn.Conv2d(8, 4, 1), lambda m, x: m["x"](torch.cat([x, x], 1).relu())) == (8,)


def test_a_concat_of_the_same_sizes_elsewhere_does_not_split() -> None:
    def middle(m: nn.ModuleDict, x: Tensor) -> Tensor:
        torch.cat([x, x], 1)
        return m["x"](x.repeat(1, 2, 1, 1))

    assert parts_of(nn.Conv2d(8, 4, 1), middle) == (8,)


def test_a_layer_that_runs_twice_or_never_stays_float() -> None:
    layers = {"twice": nn.Conv2d(4, 4, 1), "never": nn.Conv2d(4, 4, 1), "once": nn.Conv2d(4, 4, 1)}
    result = selection(layers, lambda m, x: m["twice"](m["once"](m["twice"](x))))
    assert [spec.name for spec in result.coverage.quantized] == ["layers.once"]
    odd = {name: (layer.reason, layer.by_design) for name, layer in floats(result).items() if "layers" in name}
    assert odd == {"layers.twice": ("runs 2 times per step", False), "layers.never": ("never runs", False)}


def test_one_module_under_two_names_counts_its_runs_together() -> None:
    shared = nn.Conv2d(4, 4, 1)
    layers = {"a": shared, "b": shared, "c": nn.Conv2d(4, 4, 1)}
    result = selection(layers, lambda m, x: m["b"](m["c"](m["a"](x))))
    assert floats(result)["layers.a"].reason == "runs 2 times per step"


class Projection(nn.Linear):
    """A subclass, whose forward might do anything."""


UNSUPPORTED = {
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 4, 1), lambda layer, x: layer(x)),
    "Conv3d": (nn.Conv3d(4, 4, 1), lambda layer, x: layer(x[..., None])[..., 0]),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 4, 1), lambda layer, x: layer(x.flatten(2)).view_as(x)),
    "Embedding": (nn.Embedding(2, 4), lambda layer, x: x + layer.weight[0].view(4, 1, 1)),
    "Bilinear": (nn.Bilinear(4, 4, 4), lambda layer, x: layer(x.mT, x.mT).mT),
    "ConvTranspose3d": (nn.ConvTranspose3d(4, 4, 1), lambda layer, x: layer(x[..., None])[..., 0]),
    "Projection": (Projection(4, 4), lambda layer, x: layer(x.mT).mT),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_layer_of_another_kind_is_listed_as_not_supported(kind: str) -> None:
    layer, apply = UNSUPPORTED[kind]
    layers = {"odd": layer, "plain": nn.Conv2d(4, 4, 1)}
    result = selection(layers, lambda m, x: m["plain"](apply(m["odd"], x)))
    assert [spec.name for spec in result.coverage.quantized] == ["layers.plain"]
    found = floats(result)["layers.odd"]
    assert (found.kind, found.reason, found.by_design) == (kind, f"{kind} is not supported", False)
    assert found.parameters == layer.weight.numel()


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_with_anything_but_zeros_stays_float(mode: str) -> None:
    layers = {"padded": nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode), "plain": nn.Conv2d(4, 4, 1)}
    result = selection(layers, lambda m, x: m["plain"](m["padded"](x)))
    found = floats(result)["layers.padded"]
    assert (found.reason, found.by_design) == (f"padding mode {mode}", False)


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "expected"),
    [(3, 1, "same", (1, 1)), ((1, 3), 2, "same", (0, 2)), (2, 2, "same", (1, 1)), (3, 1, "valid", (0, 0))],
)
def test_padding_by_name_is_counted_out(
    kernel: int | tuple[int, int], dilation: int, padding: str, expected: tuple[int, int]
) -> None:
    layer = nn.Conv2d(4, 4, kernel, dilation=dilation, padding=padding)
    assert selection({"x": layer}, lambda m, x: m["x"](x)).coverage.quantized[0].padding == expected


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_an_even_kernel_with_padding_same_stays_float() -> None:
    layers = {"even": nn.Conv2d(4, 4, 2, padding="same"), "plain": nn.Conv2d(4, 4, 1)}
    result = selection(layers, lambda m, x: m["plain"](m["even"](x)))
    assert [spec.name for spec in result.coverage.quantized] == ["layers.plain"]
    found = floats(result)["layers.even"]
    assert (found.reason, found.by_design) == ("padding 'same' of an even kernel", False)


def test_the_spec_says_everything_about_the_layer() -> None:
    layers = {
        "conv1d": nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=3, groups=2),
        "conv2d": nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=4),
        "linear": nn.Linear(4, 7),
    }

    def middle(m: nn.ModuleDict, x: Tensor) -> Tensor:
        m["conv2d"](x), m["conv1d"](x.flatten(2)), m["linear"](x.movedim(1, -1))
        return x

    result = select_layers(source(Denoiser(layers, middle)), Bits(3, 6), "symmetric", [])
    conv, flat, linear = result.coverage.quantized
    assert (conv.name, conv.kind, conv.out_channels, conv.parts) == ("layers.conv2d", "conv2d", 8, (4,))
    assert (conv.kernel, conv.stride, conv.padding, conv.dilation) == ((3, 1), (2, 1), (1, 0), (1, 2))
    assert (flat.name, flat.kind, flat.out_channels, flat.parts) == ("layers.conv1d", "conv1d", 6, (4,))
    assert (flat.kernel, flat.stride, flat.padding, flat.dilation) == ((3,), (2,), (2,), (3,))
    assert (conv.groups, flat.groups, linear.groups) == (4, 2, 1)
    assert (linear.name, linear.kind, linear.out_channels, linear.parts) == ("layers.linear", "linear", 7, (4,))
    assert {(spec.bits, spec.scheme) for spec in (conv, flat, linear)} == {(Bits(3, 6), "symmetric")}


def test_quantized_layers_are_listed_in_the_order_they_run() -> None:
    layers = {name: nn.Conv2d(4, 4, 1) for name in "abc"}
    result = selection(layers, lambda m, x: m["b"](m["a"](m["c"](x))))
    assert [spec.name for spec in result.coverage.quantized] == ["layers.c", "layers.a", "layers.b"]
    assert [block.name for block in result.blocks] == ["layers.c", "layers.a", "layers.b"]


def test_float_layers_are_listed_in_the_order_they_run_those_that_never_do_last() -> None:
    layers = {name: nn.Conv2d(4, 4, 1) for name in ("never", "twice", "asked", "plain")}
    result = selection(layers, lambda m, x: m["plain"](m["twice"](m["twice"](m["asked"](x)))), "layers.asked")
    assert list(floats(result)) == ["first", "layers.asked", "layers.twice", "last", "layers.never"]


class Attention(nn.Module):
    """Two linear layers in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.mT)).mT


class ResnetBlock2D(nn.Module):
    """A block around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention = nn.Conv2d(4, 4, 1), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.conv(x))


def test_layers_belong_to_the_outermost_block_above_them() -> None:
    layers = {"resnet": ResnetBlock2D(), "alone": nn.Conv2d(4, 4, 1), "attention": Attention()}
    blocks = selection(layers, lambda m, x: m["attention"](m["alone"](m["resnet"](x)))).blocks
    assert [(block.name, len(block.layers)) for block in blocks] == [
        ("layers.resnet", 3),
        ("layers.alone", 1),
        ("layers.attention", 2),
    ]


def test_a_model_that_does_not_run_on_its_own_shapes_is_an_error() -> None:
    network = Denoiser({"x": nn.Conv2d(4, 4, 1)}, lambda m, x: m["x"](x))
    wrong = SourceModel(network, "Custom", {"sample_size": 4, "in_channels": 3}, {}, "")
    with pytest.raises(ModelError, match=r"Custom does not run on inputs of the shapes in its config\.json"):
        select_layers(wrong, W4A8, "asymmetric", [])
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_gpu_that_is_full_is_not_the_configurations_fault() -> None:
    def fill(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        selection({"x": nn.Conv2d(4, 4, 1)}, fill)


def test_observing_leaves_no_hooks_behind(tiny: SourceModel) -> None:
    calls = observe(tiny)
    assert calls[0].name == "time_embedding.linear_1"
    assert calls[-1].name == "conv_out"
    assert calls[-1].parts == (8,)
    assert not any(module._forward_pre_hooks for module in tiny.network.modules())


def test_queries_keys_and_values_share_an_input_and_nothing_else_does(tiny_model: Path) -> None:
    selection = select_layers(load_model(tiny_model, torch.device("cpu")), Bits(4, 8), "asymmetric", ())
    families = [[spec.name for spec in family] for family in selection.input_groups]
    assert sorted(name for family in families for name in family) == sorted(
        spec.name for spec in selection.coverage.quantized
    )
    together = [family for family in families if len(family) > 1]
    attentions = {name.rpartition(".")[0] for family in together for name in family}
    assert together
    assert together == [
        [f"{a}.{part}" for part in ("to_q", "to_k", "to_v")]
        for a in dict.fromkeys(family[0].rpartition(".")[0] for family in together)
    ]
    assert len(attentions) == len(together)


class Shared(nn.Module):
    """Layers of one input that look at it differently, and one whose input only has the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.narrow, self.strided = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, stride=2)
        self.grouped, self.copied = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = self.first(sample)
        for layer in (self.a, self.b, self.narrow, self.strided, self.grouped):
            layer(x)
        self.copied(x.clone())
        return (self.last(x),)


def test_input_groups_read_the_same_patches_of_the_same_tensor() -> None:
    source = SourceModel(Shared(), "Shared", {"sample_size": 8, "in_channels": 1}, {}, "")
    families = select_layers(source, Bits(4, 8), "asymmetric", ()).input_groups
    assert [[spec.name for spec in family] for family in families] == [
        ["a", "b"],
        ["narrow"],
        ["strided"],
        ["grouped"],
        ["copied"],
    ]


FLOAT_REASONS = {
    "time_embedding.linear_1": "time or label embedding",
    "transformer_blocks.3.norm1.linear": "time or label embedding",
    "transformer_blocks.3.norm1_context.linear": "time or label embedding",
    "single_transformer_blocks.3.norm.linear": "time or label embedding",
    "norm_out.linear": "time or label embedding",
    "proj_out_1": "time or label embedding",
    "context_embedder": "text embedding",
    "caption_projection.linear_1": "text embedding",
    "proj_out": None,
    "transformer_blocks.3.attn.to_q": None,
    "single_transformer_blocks.3.proj_mlp": None,
}


@pytest.mark.parametrize("name", FLOAT_REASONS)
def test_what_carries_time_or_text_into_the_blocks_stays_float(name: str) -> None:
    assert family_of("SD3Transformer2DModel").float_reason(name) == FLOAT_REASONS[name]
