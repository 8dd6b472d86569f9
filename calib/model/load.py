"""Reads a diffusers folder: the float denoiser and everything that must be remembered of it."""

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.model.families import ModelFamily, family_of
from dmq_export.common.files import read_json, sha256
from dmq_export.denoiser.config import FLUX, sample_shape
from dmq_export.errors import DmqError, ModelError

DENOISER_FOLDERS = ("unet", "transformer")
FLUX_SAMPLE_SIZE = 128  # latents of 1024x1024 pixels
LONGEST_REASON = 300  # characters of a message that is not ours
WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class SourceModel:
    """A float denoiser in evaluation mode, with the facts of its folder.

    Attributes:
        network: the diffusers module, float32.
        class_name: of ``network``.
        config: of ``network``, JSON values only; with a ``sample_size`` where the model's own states none.
        scheduler: configuration found beside it; empty if there is none.
        weights_sha256: over all weight files, names included.
    """

    network: nn.Module
    class_name: str
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    weights_sha256: str

    @property
    def family(self) -> ModelFamily:
        return family_of(self.class_name)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return sample_shape(self.config)


def load_model(
    folder: Path,
    device: torch.device,
    *,
    sample_size: int | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> SourceModel:
    """Load the denoiser of a diffusers folder (a pipeline's, or the denoiser's own) onto ``device``.

    Args:
        sample_size: height and width of the latents, for Flux alone; None is that of its pipeline, 128.
        notice: receives what the user should know of a model that can be used.

    Raises:
        ModelError: there is no such folder, it holds no diffusers denoiser, or its weights do not load.
    """
    denoiser = denoiser_folder(folder)
    config = read_config(denoiser, sample_size)
    class_name = str(config["_class_name"])
    network = _network(denoiser, class_name, notice).to(device).eval().requires_grad_(False)
    scheduler = denoiser.parent / "scheduler" / "scheduler_config.json"
    return SourceModel(
        network=network,
        class_name=class_name,
        config={key: value for key, value in config.items() if key != "_name_or_path"},
        scheduler=read_json(scheduler) if scheduler.is_file() else {},
        weights_sha256=_weights_sha256(denoiser),
    )


def denoiser_folder(folder: Path) -> Path:
    """Where the denoiser of a diffusers folder lies: in ``unet`` or ``transformer``, or in the folder itself.

    Raises:
        ModelError: it is nowhere there.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder: give a local diffusers folder "
            "(download one with: hf download NAME --local-dir FOLDER), or digits for the bundled model"
        )
    if (folder / "config.json").is_file():
        return folder
    found = [folder / name for name in DENOISER_FOLDERS if (folder / name / "config.json").is_file()]
    if not found:
        raise ModelError(
            f"{folder} is not a diffusers model: it has no config.json, unet/config.json or transformer/config.json"
        )
    return found[0]


def read_config(denoiser: Path, sample_size: int | None = None) -> dict[str, Any]:
    """The configuration of the model in ``denoiser``, its class as ``_class_name``.

    Raises:
        ModelError: it cannot be read, or does not go with ``sample_size``.
    """
    try:
        config = read_json(denoiser / "config.json")
    except DmqError as error:
        raise ModelError(str(error)) from error
    if "_class_name" not in config:
        raise ModelError(f"{denoiser}/config.json names no diffusers class (_class_name is missing)")
    return _sized(config, sample_size)


def _sized(config: dict[str, Any], sample_size: int | None) -> dict[str, Any]:
    """The configuration with the sample size that Flux's does not state."""
    if config["_class_name"] == FLUX:
        size = FLUX_SAMPLE_SIZE if sample_size is None else sample_size
        if size < 2 or size % 2:
            raise ModelError(f"sample size {size}: Flux packs 2x2 latents into a token, so an even number is needed")
        return config | {"sample_size": size}
    if sample_size is not None:
        raise ModelError(
            f"{config['_class_name']}'s config.json states its sample size, {config.get('sample_size')}: "
            "leave out --sample-size"
        )
    return config


def _network(denoiser: Path, class_name: str, notice: Callable[[str], None]) -> nn.Module:
    import diffusers

    model_class = getattr(diffusers, class_name, None)
    if not (inspect.isclass(model_class) and issubclass(model_class, diffusers.ModelMixin)):
        raise ModelError(
            f"{denoiser}/config.json names {class_name!r}, which is no model of diffusers {diffusers.__version__}"
        )
    if not any(path.suffix in WEIGHT_SUFFIXES for path in denoiser.iterdir()):
        raise ModelError(f"{denoiser} holds no weights (*.safetensors or *.bin): download all of its files")
    try:
        with _silence():
            network, loaded = model_class.from_pretrained(  # type: ignore[no-untyped-call]
                str(denoiser),
                local_files_only=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # diffusers raises OSError, ValueError, RuntimeError and safetensors' own
        raise ModelError(f"the model in {denoiser} does not load: {reason(error)}") from error
    _require_weights(network, loaded["missing_keys"], denoiser)
    if loaded["unexpected_keys"]:
        unused = sorted(loaded["unexpected_keys"])
        notice(f"{denoiser} has weights that the {class_name} of its config.json has no place for: {_named(unused)}")
    float_network: nn.Module = network
    return float_network


def _require_weights(network: nn.Module, missing: Sequence[str], denoiser: Path) -> None:
    """Refuse what diffusers would go on with: random numbers where there are none, and what is no number."""
    if missing:
        raise ModelError(f"the model in {denoiser} does not load: its weights lack {_named(sorted(missing))}")
    damaged = [name for name, value in network.state_dict().items() if not _is_finite(value)]
    if damaged:
        raise ModelError(f"the weights in {denoiser} hold NaN or infinity, in {_named(damaged)}: train it again")


def _is_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite; one of those makes the sum so, which is found ten times as fast."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def reason(error: Exception) -> str:
    """Another library's message on one line of ours."""
    return (" ".join(str(error).split()) or type(error).__name__)[:LONGEST_REASON]


def _named(tensors: Sequence[str]) -> str:
    return tensors[0] if len(tensors) == 1 else f"{tensors[0]} and {len(tensors) - 1} more"


@contextmanager
def _silence() -> Iterator[None]:
    """While the block runs, diffusers does not log: it gives advice that would do harm here."""
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _weights_sha256(denoiser: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(denoiser.iterdir()):
        if path.suffix in WEIGHT_SUFFIXES:
            digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()
