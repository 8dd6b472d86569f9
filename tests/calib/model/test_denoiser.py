"""PyTorch networks under the NumPy contract give what they give under PyTorch's."""

from pathlib import Path

import numpy as np
import torch

from calib.model.denoiser import fake_quantized_denoiser, float_denoiser
from calib.model.fake_quantized import load_fake_quantized
from calib.model.load import load_model
from calib.model.network import predict
from dmq_export.checkpoint import Checkpoint

CPU = torch.device("cpu")
SAMPLE = np.random.default_rng(0).standard_normal((2, 1, 8, 8), np.float32)
LABELS = np.array([0, 2])


def test_the_reference(tiny_checkpoint: Checkpoint) -> None:
    denoise = fake_quantized_denoiser(tiny_checkpoint, CPU)
    reference = load_fake_quantized(tiny_checkpoint, CPU)
    for timestep in (67.0, 1.0):  # another row of the tables
        expected = reference(torch.from_numpy(SAMPLE), timestep, class_labels=torch.from_numpy(LABELS))
        np.testing.assert_array_equal(denoise(SAMPLE, timestep, class_labels=LABELS), expected.numpy())


def test_the_float_model(tiny_model: Path) -> None:
    source = load_model(tiny_model, CPU)
    labels = {"class_labels": torch.from_numpy(LABELS)}
    expected = predict(source.network, torch.from_numpy(SAMPLE), torch.tensor(67), labels)
    prediction = float_denoiser(source)(SAMPLE, 67.0, class_labels=LABELS)
    assert type(prediction) is np.ndarray
    np.testing.assert_array_equal(prediction, expected.numpy())


def test_the_arrays_given_stay_as_they_were(tiny_model: Path) -> None:
    sample = SAMPLE.copy()
    float_denoiser(load_model(tiny_model, CPU))(sample, 67.0, class_labels=LABELS)
    np.testing.assert_array_equal(sample, SAMPLE)
