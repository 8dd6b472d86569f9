"""The DMQ checkpoint: a folder from which every later stage works, without the original weights.

``dmq.json`` says what it is and where it comes from; ``dmq.safetensors`` holds the numbers; ``run.json``
holds what differs from run to run (seconds, memory, machine), so that the first two are the same bytes for
the same seed. No pickles.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.bits import Bits
from dmq_export.common.files import atomic_folder, read_json, require_free, sha256
from dmq_export.coverage import Coverage, FloatLayer
from dmq_export.errors import CheckpointError, DmqError
from dmq_export.layer import LayerSpec, QuantizedLayer

SCHEMA = 1
MANIFEST, TENSORS, RUN = "dmq.json", "dmq.safetensors", "run.json"
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SourceInfo:
    """Where the weights came from.

    Attributes:
        class_name: of the diffusers denoiser.
        config: of the denoiser.
        scheduler: configuration of the scheduler used for calibration.
        weights_sha256: of the source's weight files.
    """

    class_name: str
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    weights_sha256: str


@dataclass(frozen=True)
class Probe:
    """Some inputs of the calibration set, kept to verify what is made from the checkpoint.

    Attributes:
        timesteps: ``[T']``.
        sample: network inputs, ``[T', N, ...]``.
        conditioning: by name, each ``[N, ...]``.
        prediction: what the float model answers, ``[T', N, ...]``.
    """

    timesteps: NDArray[np.float32]
    sample: NDArray[np.float32]
    conditioning: Mapping[str, NDArray[Any]]
    prediction: NDArray[np.float32]

    def resized(self, count: int) -> "Probe":
        """The same with ``count`` samples a step, over again where there are fewer."""
        rows = np.arange(count) % self.sample.shape[1]
        conditioning = {name: value[rows] for name, value in self.conditioning.items()}
        return Probe(self.timesteps, self.sample[:, rows], conditioning, self.prediction[:, rows])


@dataclass(frozen=True)
class Checkpoint:
    """A calibrated model.

    Attributes:
        model: its source.
        recipe: the calibration settings.
        timesteps: the calibrated timesteps ``[T]``, in sampling order; row ``i`` of every per-step table
            belongs to ``timesteps[i]``.
        layers: the quantized layers, in the order in which they run.
        float_layers: the others.
        float_tensors: state of everything that is not a quantized layer's weight or bias.
        probe: inputs to verify with.
        metrics: what calibration measured, as JSON values.
        versions: of the tool and its libraries.
    """

    model: SourceInfo
    recipe: Mapping[str, Any]
    timesteps: NDArray[np.float32]
    layers: tuple[QuantizedLayer, ...]
    float_layers: tuple[FloatLayer, ...]
    float_tensors: Tensors
    probe: Probe
    metrics: Mapping[str, Any]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        for layer in self.layers:
            if len(layer.scale) not in (1, len(self.timesteps)):
                raise CheckpointError(
                    f"layer {layer.spec.name}: activation tables of {len(layer.scale)} rows, "
                    f"1 or {len(self.timesteps)} (one per timestep) was expected"
                )

    @property
    def coverage(self) -> Coverage:
        return Coverage(tuple(layer.spec for layer in self.layers), self.float_layers)

    @property
    def bits(self) -> Bits:
        return Bits.parse(str(self.recipe["bits"]))


def save_checkpoint(
    checkpoint: Checkpoint, folder: Path, *, run: Mapping[str, Any], replace_existing: bool = False
) -> None:
    """Write ``checkpoint`` to ``folder``, whole or not at all.

    Raises:
        DmqError: the folder exists (and ``replace_existing`` is not set) or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    require_place(folder, replace_existing=replace_existing)
    with atomic_folder(folder, replace=replace_existing) as scratch:
        try:
            save_file(_tensors(checkpoint), scratch / TENSORS)
        except SafetensorError as error:
            raise DmqError(f"{folder} cannot be written: {error}") from error
        manifest = _manifest(checkpoint) | {"tensors_sha256": sha256(scratch / TENSORS)}
        for name, content in ((MANIFEST, manifest), (RUN, dict(run))):
            (scratch / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (scratch / TENSORS).chmod((scratch / MANIFEST).stat().st_mode)  # safetensors writes for the owner alone


def require_place(folder: Path, *, replace_existing: bool) -> None:
    """Refuse to write a checkpoint over anything but a checkpoint, before any work is done.

    Raises:
        DmqError: as :func:`save_checkpoint`.
    """
    require_free(folder, replace=replace_existing)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise DmqError(f"{folder} is not empty and no checkpoint, so it is not replaced: choose another path")


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """The checkpoint in ``folder``, verified against its hash.

    Raises:
        CheckpointError: it is not a checkpoint, is of another schema, or is damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is not a DMQ checkpoint: it has no {MANIFEST}")
    try:
        manifest = read_json(folder / MANIFEST)
    except DmqError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from error
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{folder / MANIFEST} has schema {manifest.get('schema')!r}, this version reads {SCHEMA}: "
            "calibrate again, or use the version that wrote it"
        )
    tensors = _read_tensors(folder / TENSORS, str(manifest.get("tensors_sha256")))
    try:
        return _checkpoint(manifest, tensors)
    except CheckpointError:
        raise
    except (AttributeError, DmqError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__} {error}"
        raise CheckpointError(f"damaged checkpoint {folder}: {what}") from error


def _read_tensors(path: Path, digest: str) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise CheckpointError(f"damaged checkpoint: {path} is missing")
    if sha256(path) != digest:
        raise CheckpointError(f"damaged checkpoint: {path} does not have the sha256 that {MANIFEST} records")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise CheckpointError(f"damaged checkpoint: {path}: {error}") from error


def _manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "versions": dict(checkpoint.versions),
        "model": asdict(checkpoint.model),
        "recipe": dict(checkpoint.recipe),
        "timesteps": checkpoint.timesteps.tolist(),
        "layers": [asdict(layer.spec) for layer in checkpoint.layers],
        "float_layers": [asdict(layer) for layer in checkpoint.float_layers],
        "metrics": dict(checkpoint.metrics),
    }


def _tensors(checkpoint: Checkpoint) -> Tensors:
    """Everything numeric, under slash-separated names; activation tables of all layers side by side."""
    tensors: Tensors = {f"float/{name}": value for name, value in checkpoint.float_tensors.items()}
    for layer in checkpoint.layers:
        arrays = dict(layer.tensors())
        for table in ("scale", "zero_point"):
            del arrays[table]
        if layer.spec.bits.weight <= 4:
            arrays["codes"] = pack_nibbles(layer.codes)
        tensors |= {f"layer/{layer.spec.name}/{name}": value for name, value in arrays.items()}
    if checkpoint.layers:
        for table in ("scale", "zero_point"):
            columns = [getattr(layer, table) for layer in checkpoint.layers]
            tensors[f"activation/{table}"] = np.concatenate(columns, axis=1)
    probe = checkpoint.probe
    tensors |= {f"probe/{name}": getattr(probe, name) for name in ("timesteps", "sample", "prediction")}
    tensors |= {f"probe/conditioning/{name}": value for name, value in probe.conditioning.items()}
    return {name: np.asarray(value, order="C") for name, value in tensors.items()}


def _checkpoint(manifest: dict[str, Any], tensors: Tensors) -> Checkpoint:
    return Checkpoint(
        model=SourceInfo(**manifest["model"]),
        recipe=manifest["recipe"],
        timesteps=np.asarray(manifest["timesteps"], np.float32),
        layers=_layers([_spec(entry) for entry in manifest["layers"]], tensors),
        float_layers=tuple(FloatLayer(**entry) for entry in manifest["float_layers"]),
        float_tensors=_below("float/", tensors),
        probe=Probe(
            timesteps=tensors["probe/timesteps"],
            sample=tensors["probe/sample"],
            prediction=tensors["probe/prediction"],
            conditioning=_below("probe/conditioning/", tensors),
        ),
        metrics=manifest["metrics"],
        versions=manifest["versions"],
    )


def _spec(entry: dict[str, Any]) -> LayerSpec:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    fields["bits"] = Bits(**entry["bits"])
    return LayerSpec(**fields)


def _layers(specs: list[LayerSpec], tensors: Tensors) -> tuple[QuantizedLayer, ...]:
    layers, column = [], 0
    width = sum(len(spec.parts) for spec in specs)
    for table in ("scale", "zero_point") if specs else ():
        shape = tensors[f"activation/{table}"].shape
        if len(shape) != 2 or shape[1] != width:
            raise CheckpointError(f"damaged checkpoint: activation/{table} is {list(shape)}, [T, {width}] was expected")
    for spec in specs:
        arrays: dict[str, Any] = {"bias": None} | _below(f"layer/{spec.name}/", tensors)
        if spec.bits.weight <= 4:
            arrays["codes"] = unpack_nibbles(arrays["codes"], spec.weight_shape)
        columns = slice(column, column + len(spec.parts))
        arrays |= {table: tensors[f"activation/{table}"][:, columns] for table in ("scale", "zero_point")}
        layers.append(QuantizedLayer(spec, **arrays))
        column = columns.stop
    return tuple(layers)


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[n]`` codes in 0..15 to ``[ceil(n / 2)]`` bytes, the first in the low nibble, as ONNX and TensorRT have it.

    An odd count is padded with a zero nibble.

    Raises:
        ValueError: a code does not fit four bits.
    """
    flat = codes.ravel()
    if flat.size and flat.max() > 15:
        raise ValueError(f"code {flat.max()} does not fit four bits")
    padded = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return (padded[0::2] | padded[1::2] << 4).astype(np.uint8)


def unpack_nibbles(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The inverse of :func:`pack_nibbles` for codes of ``shape``.

    Raises:
        ValueError: the byte count is not that of ``shape``.
    """
    count = int(np.prod(shape))
    if packed.shape != ((count + 1) // 2,):
        raise ValueError(f"{packed.shape} bytes cannot hold codes of shape {shape}")
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).ravel()
    return nibbles[:count].reshape(shape)
