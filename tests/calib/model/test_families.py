"""Every family of denoisers through the whole road: layer selection, calibration, portable ONNX, verification."""

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from models import NETWORKS, SAMPLE_SIZE, TINY_RECIPE, save_tiny_network, tiny_network_recipe
from torch import nn

from calib.calibrate import calibrate
from calib.model.layers import select_layers
from calib.model.load import load_model
from calib.run.plan import Resources
from dmq_export.checkpoint import load_checkpoint
from dmq_export.commands.export import export_onnx
from dmq_export.common.progress import Progress
from dmq_export.denoiser.arguments import arguments

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=NETWORKS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_network(kind, tmp_path_factory.mktemp(kind))


def test_every_weight_is_quantized_or_listed_with_its_reason(kind: str, model: Path) -> None:
    source = load_model(model, CPU, sample_size=SAMPLE_SIZE.get(kind))
    coverage = select_layers(source, TINY_RECIPE.bits, "asymmetric", []).coverage
    listed = Counter([spec.name for spec in coverage.quantized] + [layer.name for layer in coverage.float_layers])
    weighted = (nn.Conv2d, nn.Linear, nn.Embedding)
    modules = dict(source.network.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, weighted)]
    products = [name for name, module in modules.items() if "Attention" in type(module).__name__]
    assert listed == Counter(layers + products)
    assert all(layer.by_design for layer in coverage.float_layers)
    inside = [spec.name for spec in coverage.quantized if "block" in spec.name]
    assert len(inside) == len(coverage.quantized)  # what is quantized lies in the blocks


def test_it_is_calibrated_exported_and_proved_equal(kind: str, model: Path, tmp_path: Path) -> None:
    source = load_model(model, CPU, sample_size=SAMPLE_SIZE.get(kind))
    recipe = tiny_network_recipe(kind, source.network)
    calibrate(model, tmp_path / "checkpoint", recipe, Resources(CPU), Progress(show=False))
    export = export_onnx(tmp_path / "checkpoint", tmp_path / "model.onnx", Progress(show=False))
    assert export.verification is not None
    graph = ir.load(tmp_path / "model.onnx").graph
    names = [argument.name for argument in arguments(source.class_name, source.config)]
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert [value.name for value in graph.inputs] == ["sample", "timestep", *sorted(names)]
    assert {name: list(value.shape[1:]) for name, value in checkpoint.probe.conditioning.items()} == {
        value.name: list(value.shape)[1:] for value in graph.inputs if value.name in names
    }
    if recipe.embeddings is not None:
        assert checkpoint.recipe["embeddings"] == {"count": 2, "sha256": recipe.embeddings.sha256}
