"""Fits one layer on its own: equivalent scaling, activation range, weight grid, rounding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.device import FLOAT_BYTES
from calib.fit.activation_range import activation_range, clip_range, quantized_patches
from calib.fit.les import LesResult, LesSettings, fit_les, les_bytes
from calib.fit.rounding import learned_gain, round_weight, rounding_bytes, rounding_nanoseconds
from calib.fit.weight_range import grid_nanoseconds, grid_qparams, minmax_qparams
from calib.metrics import decibels
from calib.quant.fake_quant import QParams, choose_qparams
from calib.quant.patches import dequantized_weight, product, scaled_weight, weight_matrix
from calib.record.layer_inputs import LayerInputs, capture_bytes, columns_of, patch_rows
from calib.record.work_folder import WorkFolder
from dmq_export.common.seeds import stream_seed
from dmq_export.layer import LayerSpec, QuantizedLayer
from dmq_export.recipe import Recipe

EVALUATED_NUMBERS = 2**22  # of the patches, which clipping and the report evaluate the layer on
EVALUATED_OUTPUTS = 128  # channels, likewise


@dataclass(frozen=True)
class LayerFit:
    """A fitted layer and what the fit measured, as JSON values."""

    layer: QuantizedLayer
    report: dict[str, Any]

    def save(self, work: WorkFolder) -> None:
        """Keep the fit; :func:`load_fit` gives it back."""
        tensors = {name: torch.from_numpy(array) for name, array in self.layer.tensors().items()}
        work.save(fit_key(self.layer.spec), tensors, self.report)


def fit_key(spec: LayerSpec) -> str:
    """Under which key a layer's fit is kept; a layer may be fitted again with more bits."""
    return f"fits/{spec.bits}/{spec.name}"


def load_fit(spec: LayerSpec, work: WorkFolder) -> LayerFit:
    """A fit that was kept."""
    entry = work.load(fit_key(spec))
    arrays: dict[str, Any] = {"bias": None} | {name: tensor.numpy() for name, tensor in entry.tensors.items()}
    return LayerFit(QuantizedLayer(spec, **arrays), dict(entry.facts))


@dataclass(frozen=True)
class LayerWeights:
    """A layer to fit: its shape, its weight and its bias, if it has one."""

    spec: LayerSpec
    weight: Tensor
    bias: Tensor | None


def equivalent_scaling(layers: Sequence[LayerWeights], inputs: LayerInputs, recipe: Recipe) -> LesResult:
    """One equivalent scaling for layers that read the same patches of one input: for all their outputs together.

    Args:
        inputs: of the first of the layers.
    """
    first = layers[0].spec
    weight = torch.cat([layer.weight for layer in layers])
    spec = replace(first, out_channels=len(weight))
    wanted = recipe.rounding != "nearest" and recipe.les_rounding_gain and recipe.les_iterations
    settings = LesSettings(
        iterations=recipe.les_iterations,
        learning_rate=recipe.les_learning_rate,
        batch=recipe.les_batch,
        alpha=recipe.timestep_alpha,
    )
    return fit_les(
        spec,
        weight,
        inputs,
        settings,
        static=recipe.scales == "static",
        rounding_gain=learned_gain(spec, weight, inputs.moments) if wanted else 1.0,
        seed=stream_seed(recipe.seed, "les", first.name),
    )


def fit_layer(weights: LayerWeights, inputs: LayerInputs, recipe: Recipe, les: LesResult) -> LayerFit:
    """Quantize a layer by ``recipe``; PTS and AdaRound, which need more than one layer's inputs, come later.

    Args:
        les: from :func:`equivalent_scaling`.
    """
    spec, weight, bias = weights.spec, weights.weight, weights.bias
    learned = recipe.rounding != "nearest"
    scaled = scaled_weight(spec, weight, les.tau)
    weight_qparams = _weight_qparams(spec, scaled, recipe)
    codes = round_weight(spec, scaled, weight_qparams, inputs.moments, learned=learned, tau=les.tau)
    few, some = inputs.thinned(EVALUATED_NUMBERS), _some_outputs(spec)
    fewer = replace(spec, out_channels=len(scaled[some]))
    activation = _activation_qparams(fewer, scaled[some], few, les.tau, recipe)
    rounded = dequantized_weight(spec, codes, weight_qparams)
    layer = QuantizedLayer(
        spec=spec,
        codes=_integers(codes),
        weight_scale=_floats(weight_qparams.scale),
        weight_zero_point=_integers(weight_qparams.zero_point),
        tau=_floats(les.tau),
        shift=np.zeros(spec.in_channels, np.uint8),
        scale=_floats(activation.scale),
        zero_point=_integers(activation.zero_point),
        bias=None if bias is None else _floats(bias),
    )
    x = few.patches / les.tau[:, None]
    report = {
        "tau": [float(les.tau.min()), float(les.tau.max())],
        "step_loss": les.step_loss.tolist(),
        "step_weight": les.step_weight.tolist(),
        **_sqnr(fewer, scaled[some], rounded[some], x, quantized_patches(spec, x, few.step, activation)),
    }
    return LayerFit(layer, report)


def _some_outputs(spec: LayerSpec) -> slice:
    """Evenly spaced, about :data:`EVALUATED_OUTPUTS`; all of a grouped layer."""
    return slice(None, None, 1 if spec.groups > 1 else max(1, spec.out_channels // EVALUATED_OUTPUTS))


def _weight_qparams(spec: LayerSpec, scaled: Tensor, recipe: Recipe) -> QParams:
    return grid_qparams(spec, scaled) if recipe.weight_grid else minmax_qparams(spec, scaled)


def _activation_qparams(spec: LayerSpec, scaled: Tensor, inputs: LayerInputs, tau: Tensor, recipe: Recipe) -> QParams:
    span = activation_range(spec, inputs.extrema, tau, static=recipe.scales == "static")
    if recipe.clip:
        span = clip_range(spec, scaled, inputs, tau, span)
    return choose_qparams(span, spec.bits.activation, spec.scheme)


def _sqnr(spec: LayerSpec, scaled: Tensor, rounded: Tensor, x: Tensor, quantized_x: Tensor) -> dict[str, float]:
    """The layer's output SQNR in dB with only its weights, only its input, and both quantized."""
    target = product(spec, x, weight_matrix(spec, scaled))
    outputs = {
        "weights_db": product(spec, x, weight_matrix(spec, rounded)),
        "activations_db": product(spec, quantized_x, weight_matrix(spec, scaled)),
        "output_db": product(spec, quantized_x, weight_matrix(spec, rounded)),
    }
    return {name: round(decibels(target, output), 2) for name, output in outputs.items()}


def _floats(values: Tensor) -> NDArray[np.float32]:
    return values.detach().cpu().numpy().astype(np.float32)


def _integers(values: Tensor) -> NDArray[np.uint8]:
    return values.detach().cpu().numpy().astype(np.uint8)


def fit_nanoseconds(spec: LayerSpec, *, clip: bool) -> float:
    """Time of a fit besides equivalent scaling, on the core that this was measured on; only the proportions count."""
    evaluated = min(EVALUATED_NUMBERS, columns_of(spec) * spec.groups * patch_rows(spec))
    return (10 + 55 * clip) * evaluated + grid_nanoseconds(spec) + rounding_nanoseconds(spec)


def fit_bytes(spec: LayerSpec, recipe: Recipe, evaluations: int) -> int:
    """Memory of a fit: the patches of ``evaluations`` (samples times steps), and the most demanding of its steps."""
    steps = (rounding_bytes(spec), les_bytes(spec, recipe.les_batch), 5 * FLOAT_BYTES * EVALUATED_NUMBERS)
    return capture_bytes(spec, evaluations) + max(steps)
