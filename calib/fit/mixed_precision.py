"""Which layers get more bits: those whose rounding costs the prediction most, per weight.

The model evaluates a few recorded inputs with one layer rounded at a time. What the layers cost adds up nearly
independently, so a layer's own cost is about what more bits there would save.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from calib.model.fake_quantized import quantized
from calib.model.load import SourceModel
from calib.record.trajectories import Trajectories
from dmq_export.bits import Bits
from dmq_export.layer import LayerSpec, QuantizedLayer

MORE = Bits(7, 8)  # the most that int8 kernels take: 2^7 - 1 = 127 is their largest weight
SAMPLES, STEPS = 2, 10  # that a layer is judged by


def few_evaluations(trajectories: Trajectories) -> Trajectories:
    """The first :data:`SAMPLES` rows at :data:`STEPS` steps from the first to the last, or what there is."""
    count = len(trajectories.timesteps)
    steps = torch.linspace(0, count - 1, min(STEPS, count)).round().long()
    few = trajectories.first(SAMPLES)
    return replace(few, timesteps=few.timesteps[steps], inputs=few.inputs[steps], predictions=few.predictions[steps])


def prediction_error(source: SourceModel, layer: QuantizedLayer, trajectories: Trajectories) -> float:
    """``mean_t |e^ - e|^2 / |e|^2`` of the prediction ``e`` when only this layer is quantized.

    Its input stays float if it has 8 bits already: more weight bits would not change what that costs.
    """
    activations = layer.spec.bits.activation < MORE.activation
    device = next(source.network.parameters()).device
    conditioning = {key: value.to(device) for key, value in trajectories.conditioning.items()}
    evaluations = zip(trajectories.timesteps, trajectories.inputs, trajectories.predictions, strict=True)
    errors: list[float] = []
    with quantized(source.network, [layer], trajectories.timesteps, activations=activations) as reference:
        for timestep, x, expected in evaluations:
            predicted = reference(x.to(device), timestep, **conditioning).cpu()
            errors.append(((predicted - expected).square().sum() / expected.square().sum()).item())
    return sum(errors) / len(errors)


def most_sensitive(
    groups: Sequence[tuple[LayerSpec, ...]], errors: Mapping[str, float], share: float
) -> tuple[tuple[LayerSpec, ...], ...]:
    """The groups that cost most per weight and together hold at most ``share`` of the weights.

    Args:
        groups: layers that share an equivalent scaling, and so are fitted together.
        errors: :func:`prediction_error` by layer.
    """
    sizes = {group: sum(spec.weight_count for spec in group) for group in groups}
    costs = {group: sum(errors[spec.name] for spec in group) / sizes[group] for group in groups}
    room = share * sum(sizes.values())
    chosen = []
    for group in sorted(groups, key=costs.__getitem__, reverse=True):
        if sizes[group] <= room:
            chosen.append(group)
            room -= sizes[group]
    return tuple(group for group in groups if group in chosen)


def sensitivity_evaluations(layers: int, steps: int) -> float:
    """How many samples the float network could evaluate while :func:`prediction_error` judges as many layers."""
    return layers * SAMPLES * min(STEPS, steps) * 1.3
