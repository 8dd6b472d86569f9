"""Train the bundled model: a class-conditional UNet2DModel on scikit-learn's handwritten digits.

    python examples/digits/train.py --out OUT      # about 40 minutes on two cores

Writes an ordinary diffusers folder (``unet/``, ``scheduler/``) and, beside it, ``classifier.onnx``: a plain
convolutional classifier fitted to the *real* digits, which judges whether a sample shows the digit it was asked
for. Label 10 means "no label" (10 % of the training labels are dropped), so the model can be
sampled with classifier-free guidance too.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from diffusers import DDIMScheduler, UNet2DModel
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

SIZE = 16
CLASSES = 10
NO_LABEL = CLASSES  # one more embedding row, trained by label dropout
TEST_SHARE = 5  # every fifth digit is kept from the classifier's training


def digits() -> tuple[Tensor, Tensor]:
    """All 1797 digits as images ``[N, 1, 16, 16]`` in -1..1, and their labels ``[N]``."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # 0..16 -> -1..1
    images = functional.interpolate(images, size=SIZE, mode="bicubic").clamp(-1, 1)
    return images, torch.from_numpy(data.target).long()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions: 1797 digits are few."""
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    rows, columns = torch.randint(0, 3, (2, len(images)), generator=generator)
    span = torch.arange(SIZE)
    rows = (rows[:, None] + span)[:, None, :, None]
    columns = (columns[:, None] + span)[:, None, None, :]
    return padded[torch.arange(len(images))[:, None, None, None], 0, rows, columns]


def build_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(48, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        dropout=0.1,
        num_class_embeds=CLASSES + 1,
    )


def build_classifier() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, CLASSES),
    )


def train_classifier(images: Tensor, labels: Tensor, steps: int = 1500) -> tuple[nn.Module, float]:
    """The classifier and its accuracy on the fifth of the real digits that it never saw."""
    generator = torch.Generator().manual_seed(1)
    test = torch.arange(len(images)) % TEST_SHARE == 0
    model, (train_x, train_y) = build_classifier(), (images[~test], labels[~test])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(steps):
        pick = torch.randint(0, len(train_x), (128,), generator=generator)
        loss = functional.cross_entropy(model(shifted(train_x[pick], generator)), train_y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    return model.eval(), accuracy


def train_unet(images: Tensor, labels: Tensor, scheduler: DDIMScheduler, steps: int) -> UNet2DModel:
    """Noise-prediction training with a moving average of the weights (decay 0.999)."""
    generator = torch.Generator().manual_seed(0)
    model = build_unet().train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
    warmup = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    start = time.perf_counter()
    for step in range(steps):
        pick = torch.randint(0, len(images), (128,), generator=generator)
        clean = shifted(images[pick], generator)
        dropped = torch.rand(128, generator=generator) < 0.1
        label = torch.where(dropped, NO_LABEL, labels[pick])
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (128,), generator=generator)
        output = model(scheduler.add_noise(clean, noise, t), t, class_labels=label).sample
        loss = functional.mse_loss(output, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for mean, new in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(new.data, 0.001 if step > 1000 else 0.05)
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)
    return average


@torch.no_grad()
def sample(model: UNet2DModel, scheduler: DDIMScheduler, labels: Tensor, steps: int = 20) -> Tensor:
    scheduler.set_timesteps(steps)
    x = torch.randn(len(labels), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t, class_labels=labels).sample, t, x).prev_sample
    return x


def save_classifier(classifier: nn.Module, path: Path) -> None:
    """ONNX: ``image [N, 1, 16, 16]`` to ``scores [N, 10]``."""
    program = torch.onnx.export(
        classifier,
        (torch.zeros(2, 1, SIZE, SIZE),),
        dynamo=True,
        input_names=["image"],
        output_names=["scores"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    model = ClearMetadataAndDocStringPass()(program.model).model  # no paths of this machine
    onnx_ir.save(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = digits()
    classifier, accuracy = train_classifier(images, labels)
    print(f"classifier: {100 * accuracy:.1f} % on unseen real digits", flush=True)
    scheduler = DDIMScheduler(num_train_timesteps=1000, steps_offset=1)
    model = train_unet(images, labels, scheduler, options.steps)
    # float16 on disk halves the download; what ships is judged, so round first
    model = model.half().float()
    wanted = torch.arange(1000) % CLASSES
    shown = classifier(sample(model, scheduler, wanted)).argmax(1)
    agreement = (shown == wanted).float().mean().item()
    print(f"label agreement: {100 * agreement:.1f} % of 1000 samples, 20 DDIM steps", flush=True)
    model.half().save_pretrained(options.out / "unet")
    scheduler.save_pretrained(options.out / "scheduler")
    save_classifier(classifier, options.out / "classifier.onnx")
    facts = {"classifier_accuracy": accuracy, "label_agreement": agreement, "steps": options.steps}
    (options.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    np.random.seed(0)
    main()
