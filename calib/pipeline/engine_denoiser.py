"""diffusers' pipelines around any denoiser: an engine in place of the network, the rest as it is in the folder."""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor

from calib.model.load import DENOISER_FOLDERS, reason
from dmq_export.common.extras import require
from dmq_export.denoiser.arguments import flat, timestep_unit
from dmq_export.denoiser.config import sample_shape
from dmq_export.errors import DmqError, ModelError

INDEX = "model_index.json"
POSITIONS = ("img_ids", "txt_ids")  # an engine knows where its tokens lie
OPTIONS = ("cross_attention_kwargs", "joint_attention_kwargs")  # change how the network works, such as a LoRA's scale
OUTPUTS: dict[str, type] = {"UNet2DModel": UNet2DOutput, "UNet2DConditionModel": UNet2DConditionOutput}
Denoise = Callable[..., NDArray[np.float32]]


class EngineDenoiser(ModelMixin, ConfigMixin):
    """What a pipeline takes for its ``unet`` or ``transformer``; evaluates an engine.

    Args:
        denoise: the contract of the engines, ``(sample [N, ...], timestep, **conditioning) -> prediction``, NumPy
            arrays and one timestep, the scheduler's.
        class_name: of the diffusers model that the engine was made from.
        config: of that model.
    """

    def __init__(self, denoise: Denoise, class_name: str, config: Mapping[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        public = {key: value for key, value in config.items() if not key.startswith("_")}
        self.register_to_config(**public)  # type: ignore[no-untyped-call]
        self._denoise = denoise
        self._class_name = class_name
        self._shape = sample_shape(config)
        self.register_buffer("_place", torch.empty(0), persistent=False)
        if config.get("addition_embed_type") == "text_time":  # SDXL's pipeline asks its UNet for this width
            width = int(config["projection_class_embeddings_input_dim"])
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the pipeline works; the engine itself is given CPU tensors."""
        place: Tensor = self._place
        return place.device

    def cache_context(self, _: str) -> contextlib.AbstractContextManager[None]:
        """Flux's pipeline names its branches for caches, of which an engine has none."""
        return contextlib.nullcontext()

    def forward(
        self,
        sample: Tensor | None = None,
        timestep: Any = None,
        *,
        hidden_states: Tensor | None = None,
        return_dict: bool = True,
        **named: Any,
    ) -> Any:
        x = hidden_states if sample is None else sample
        if x is None or timestep is None:
            raise TypeError("a sample and a timestep are needed")
        if tuple(x.shape[1:]) != self._shape:
            raise DmqError(
                f"the engine takes samples of {list(self._shape)}, the pipeline gave {list(x.shape[1:])}: leave out "
                "height and width, or calibrate a model of that size"
            )
        for name in OPTIONS:
            if named.get(name):
                raise DmqError(f"an engine takes no {name}, the pipeline gave {', '.join(named[name])}: leave it out")
        conditioning = flat({name: value for name, value in named.items() if name not in (*OPTIONS, *POSITIONS)})
        arrays = {name: value.detach().cpu().numpy() for name, value in conditioning.items()}
        answer = self._denoise(x.detach().cpu().numpy(), self._step(timestep), **arrays)
        writable = np.require(answer, requirements="W")  # some runtimes give views of memory of their own
        prediction = torch.from_numpy(writable).to(x.device)
        output = OUTPUTS.get(self._class_name, Transformer2DModelOutput)
        return output(sample=prediction) if return_dict else (prediction,)

    def _step(self, timestep: Any) -> float:
        """The scheduler's timestep; all samples of a batch are at the same."""
        steps = torch.as_tensor(timestep, dtype=torch.float32).flatten()
        if not torch.equal(steps, steps[:1].expand(len(steps))):
            raise DmqError(f"an engine takes one timestep for all samples, the pipeline gave {steps.tolist()}")
        return float(steps[0]) * timestep_unit(self._class_name)


def build_pipeline(folder: Path, denoiser: EngineDenoiser) -> Any:
    """The pipeline in ``folder``, with ``denoiser`` in place of its own, which is not loaded.

    Raises:
        ModelError: the folder holds no pipeline, or diffusers cannot load it.
    """
    name = denoiser_name(folder)
    try:
        with _quiet():
            pipeline = DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
                str(folder), local_files_only=True, **{name: denoiser}
            )
            return pipeline.to(torch.float32)  # whatever the encoders' and the decoder's files hold
    except Exception as error:  # diffusers and transformers raise all kinds
        raise ModelError(f"the pipeline in {folder} does not load: {reason(error)}") from error


def denoiser_name(folder: Path) -> str:
    """Which component of the pipeline in ``folder`` is its denoiser, ``unet`` or ``transformer``.

    Raises:
        ModelError: the folder holds no pipeline.
        DmqError: its text encoder needs a library that is missing.
    """
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"{folder} is no pipeline: it has no {INDEX}; give the folder of a whole diffusers pipeline, with its text "
            "encoder and decoder"
        )
    components = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    _require_transformers(folder, components)
    found = [name for name in DENOISER_FOLDERS if name in components]
    if not found:
        raise ModelError(f"the pipeline in {folder} has neither a unet nor a transformer")
    return found[0]


def _require_transformers(folder: Path, components: Mapping[str, Any]) -> None:
    libraries = {value[0] for value in components.values() if isinstance(value, list) and value}
    if "transformers" in libraries:
        require(f"the text encoder in {folder}", "transformers")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the loaders' advice and progress bars from the user."""
    libraries = [diffusers_logging]
    if importlib.util.find_spec("transformers"):
        libraries.append(importlib.import_module("transformers.utils.logging"))
    verbosities = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, verbosities, strict=True):
            library.set_verbosity(verbosity)
            library.enable_progress_bar()
