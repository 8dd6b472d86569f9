"""The checkpoint on disk: what is saved comes back, and damage is reported as such."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import conv2d, linear, random_layer, specs
from safetensors.numpy import load_file, save_file

from dmq_export.bits import Bits
from dmq_export.checkpoint import Checkpoint, Probe, SourceInfo, load_checkpoint, save_checkpoint
from dmq_export.common.files import sha256
from dmq_export.coverage import FloatLayer
from dmq_export.errors import CheckpointError, DmqError
from dmq_export.layer import LayerSpec, QuantizedLayer

FILES = ["dmq.json", "dmq.safetensors", "run.json"]
TIMESTEPS = np.array([67, 33.5, 1 / 3], np.float32)
SPECS = (
    conv2d(name="down.conv", out_channels=3, parts=(3,)),  # 81 codes
    conv2d(name="up.shortcut", parts=(4, 3), kernel=(1, 1), padding=(0, 0), bits=Bits(4, 6)),
    linear(name="to_q", bits=Bits(8, 8), scheme="symmetric"),
)


def random_checkpoint(layers: tuple[QuantizedLayer, ...], **changes: Any) -> Checkpoint:
    rng = np.random.default_rng(0)
    settings: dict[str, Any] = {
        "model": SourceInfo("UNet2DModel", {"sample_size": 8, "act_fn": "silu"}, {"_class_name": "DDIM"}, "ab" * 32),
        "recipe": {"bits": "w4a6", "steps": 3, "labels": [0, 1]},
        "timesteps": TIMESTEPS,
        "layers": layers,
        "float_layers": (FloatLayer("conv_in", "conv2d", 72, "first layer", by_design=True),),
        "float_tensors": {"conv_in.weight": rng.standard_normal((2, 3)).astype(np.float32)},
        "probe": Probe(
            timesteps=TIMESTEPS[:2],
            sample=rng.standard_normal((2, 1, 3, 4)).astype(np.float32),
            conditioning={"class_labels": np.array([7])},
            prediction=rng.standard_normal((2, 1, 3, 4)).astype(np.float32),
        ),
        "metrics": {"prediction_sqnr_db": {"both": [20.125, 19.0]}},
        "versions": {"dmq-export": "0.1.0"},
    }
    return Checkpoint(**(settings | changes))


def three_layers(steps: int = 3) -> tuple[QuantizedLayer, ...]:
    return tuple(random_layer(spec, steps=steps, seed=i) for i, spec in enumerate(SPECS))


def round_trip(checkpoint: Checkpoint) -> Checkpoint:
    with TemporaryDirectory() as parent:
        save_checkpoint(checkpoint, Path(parent) / "checkpoint", run={})
        return load_checkpoint(Path(parent) / "checkpoint")


def assert_arrays_equal(left: Any, right: Any) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], strict=True, err_msg=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint, to be damaged."""
    save_checkpoint(random_checkpoint(three_layers()), tmp_path / "checkpoint", run={"seconds": {"fit": 1.5}})
    return tmp_path / "checkpoint"


def edit_manifest(folder: Path, edit: Callable[[Any], object]) -> None:
    path = folder / "dmq.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def record_digest(folder: Path) -> None:
    """What a writer with a bug would do, so that the checks behind the hash are reached."""
    edit_manifest(folder, lambda manifest: manifest.update(tensors_sha256=sha256(folder / "dmq.safetensors")))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "dmq.safetensors")
    edit(tensors)
    save_file(tensors, folder / "dmq.safetensors")
    record_digest(folder)


# what is saved comes back


@settings(deadline=None, max_examples=50)
@given(st.lists(specs(), max_size=3), st.integers(1, 3), st.integers(0, 2**16), st.lists(st.booleans(), min_size=3))
def test_any_layers_come_back_as_they_were(kinds: list[LayerSpec], steps: int, seed: int, bias: list[bool]) -> None:
    layers = tuple(
        random_layer(replace(spec, name=f"blocks.{i}"), steps=steps, seed=seed + i, bias=bias[i])
        for i, spec in enumerate(kinds)
    )
    timesteps = TIMESTEPS if steps == 1 else TIMESTEPS[:steps]  # one row for each, or one for all
    loaded = round_trip(random_checkpoint(layers, timesteps=timesteps)).layers
    assert [layer.spec for layer in loaded] == [layer.spec for layer in layers]
    for left, right in zip(loaded, layers, strict=True):
        assert_arrays_equal(left.tensors(), right.tensors())


def test_all_else_comes_back_as_it_was() -> None:
    checkpoint = random_checkpoint(three_layers())
    loaded = round_trip(checkpoint)
    for name in ("model", "recipe", "float_layers", "metrics", "versions", "coverage"):
        assert getattr(loaded, name) == getattr(checkpoint, name), name
    np.testing.assert_array_equal(loaded.timesteps, TIMESTEPS, strict=True)
    assert_arrays_equal(loaded.float_tensors, checkpoint.float_tensors)
    assert_arrays_equal(loaded.probe.conditioning, checkpoint.probe.conditioning)
    for name in ("timesteps", "sample", "prediction"):
        np.testing.assert_array_equal(getattr(loaded.probe, name), getattr(checkpoint.probe, name), strict=True)
    assert loaded.bits == Bits(4, 6)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(6, dtype=np.float32)[::2],
        np.array([1.5, -2], np.float16),
        np.array([2**40, -1], np.int64),
        np.array([True, False]),
        np.zeros((0, 3), np.float32),
        np.array(7.5, np.float32),
    ],
    ids=["transposed", "strided", "float16", "int64", "bool", "empty", "scalar"],
)
def test_float_tensors_keep_their_values_shape_and_type(value: np.ndarray) -> None:
    loaded = round_trip(random_checkpoint((), float_tensors={"buffer": value}))
    np.testing.assert_array_equal(loaded.float_tensors["buffer"], value, strict=True)


@pytest.mark.parametrize(("bits", "size"), [(3, 41), (4, 41), (5, 81), (8, 81)])
def test_codes_of_up_to_four_bits_take_half_a_byte(tmp_path: Path, bits: int, size: int) -> None:
    layer = random_layer(replace(SPECS[0], bits=Bits(bits, 8)))
    save_checkpoint(random_checkpoint((layer,)), tmp_path / "checkpoint", run={})
    assert load_file(tmp_path / "checkpoint" / "dmq.safetensors")["layer/down.conv/codes"].nbytes == size


def test_the_same_checkpoint_is_the_same_bytes_whatever_the_run(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(three_layers(), float_tensors={"a": np.zeros(2), "b": np.ones(3)})
    reordered = replace(checkpoint, float_tensors=dict(reversed(checkpoint.float_tensors.items())))
    save_checkpoint(checkpoint, tmp_path / "one", run={"seconds": {"fit": 1.0}})
    save_checkpoint(reordered, tmp_path / "two", run={"seconds": {"fit": 2.0}})
    for name in ("dmq.json", "dmq.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert json.loads((tmp_path / "two" / "run.json").read_text()) == {"seconds": {"fit": 2.0}}


# writing


def test_a_checkpoint_is_three_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_another_checkpoint_is_written_over_only_when_asked(folder: Path) -> None:
    before = (folder / "dmq.json").read_bytes()
    with pytest.raises(DmqError, match="exists and is not empty: choose another path, or pass --fresh"):
        save_checkpoint(random_checkpoint(()), folder, run={})
    assert (folder / "dmq.json").read_bytes() == before
    save_checkpoint(random_checkpoint(()), folder, run={}, replace_existing=True)
    assert load_checkpoint(folder).layers == ()
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(DmqError, match=re.escape(str(home))):
        save_checkpoint(random_checkpoint(()), home, run={}, replace_existing=True)
    assert [path.name for path in home.iterdir()] == ["thesis.tex"]


def test_all_of_a_checkpoint_can_be_read_by_whom_the_umask_says(folder: Path) -> None:
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    broken = random_checkpoint(three_layers(), metrics={"not json": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(broken, tmp_path / "checkpoint", run={})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(random_checkpoint(()), folder, run={"not json": object()}, replace_existing=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "checkpoint"
    with pytest.raises(DmqError, match=f"^cannot write {re.escape(str(path))}: No such file"):
        save_checkpoint(random_checkpoint(()), path, run={})


# damage


def test_a_sound_checkpoint_loads(folder: Path) -> None:
    """The damage below starts from this."""
    edit_tensors(folder, lambda tensors: None)
    assert [layer.spec for layer in load_checkpoint(folder).layers] == list(SPECS)


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is not a DMQ checkpoint: it has no dmq.json"):
        load_checkpoint(tmp_path / name)


def test_missing_tensors_are_named(folder: Path) -> None:
    (folder / "dmq.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"damaged checkpoint: .*dmq\.safetensors is missing"):
        load_checkpoint(folder)


def test_what_a_run_took_is_not_needed(folder: Path) -> None:
    (folder / "run.json").unlink()
    assert len(load_checkpoint(folder).layers) == 3


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_changed_byte_of_the_tensors_is_found(position: float, change: int) -> None:
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "checkpoint"
        save_checkpoint(random_checkpoint(three_layers()), folder, run={})
        content = bytearray((folder / "dmq.safetensors").read_bytes())
        content[int(position * len(content))] ^= change
        (folder / "dmq.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"dmq\.safetensors does not have the sha256 that dmq\.json records"):
            load_checkpoint(folder)


def test_tensors_of_another_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(random_checkpoint(three_layers(steps=1)), tmp_path / "other", run={})
    shutil.copy(tmp_path / "other" / "dmq.safetensors", folder)
    with pytest.raises(CheckpointError, match="does not have the sha256"):
        load_checkpoint(folder)


def test_a_file_that_holds_no_tensors_is_refused(folder: Path) -> None:
    path = folder / "dmq.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    record_digest(folder)
    with pytest.raises(CheckpointError, match=rf"^damaged checkpoint: {re.escape(str(path))}: "):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xff", b"null"])
def test_manifest_that_are_no_json_object_are_refused(folder: Path, content: bytes) -> None:
    (folder / "dmq.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^damaged checkpoint: .*dmq\.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_is_refused_with_a_way_on(folder: Path, schema: object) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(schema=schema))
    expected = (
        f"dmq.json has schema {schema!r}, this version reads 1: calibrate again, or use the version that wrote it"
    )
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        load_checkpoint(folder)


FACTS_DAMAGE = {
    "no layers": lambda manifest: manifest.pop("layers"),
    "no model": lambda manifest: manifest.pop("model"),
    "no recipe": lambda manifest: manifest.pop("recipe"),
    "no timesteps": lambda manifest: manifest.pop("timesteps"),
    "no float layers": lambda manifest: manifest.pop("float_layers"),
    "no metrics": lambda manifest: manifest.pop("metrics"),
    "no versions": lambda manifest: manifest.pop("versions"),
    "no digest": lambda manifest: manifest.pop("tensors_sha256"),
    "model without class": lambda manifest: manifest["model"].pop("class_name"),
    "model with more": lambda manifest: manifest["model"].update(more=1),
    "model a list": lambda manifest: manifest.update(model=[1]),
    "timesteps text": lambda manifest: manifest.update(timesteps="soon"),
    "layers null": lambda manifest: manifest.update(layers=None),
    "layer text": lambda manifest: manifest["layers"].append("conv"),
    "layer without name": lambda manifest: manifest["layers"][0].pop("name"),
    "layer without kind": lambda manifest: manifest["layers"][0].pop("kind"),
    "layer without parts": lambda manifest: manifest["layers"][0].pop("parts"),
    "layer without kernel": lambda manifest: manifest["layers"][0].pop("kernel"),
    "layer without bits": lambda manifest: manifest["layers"][0].pop("bits"),
    "layer of another name": lambda manifest: manifest["layers"][0].update(name="down.conv2"),
    "layer of other channels": lambda manifest: manifest["layers"][0].update(out_channels=4),
    "layer of other parts": lambda manifest: manifest["layers"][1].update(parts=[7]),
    "layer of no groups": lambda manifest: manifest["layers"][0].update(groups=0),
    "layer of nine bits": lambda manifest: manifest["layers"][0]["bits"].update(weight=9),
    "layer of text bits": lambda manifest: manifest["layers"][0].update(bits="w4a8"),
    "layer of fewer bits": lambda manifest: manifest["layers"][2]["bits"].update(weight=5),
    "layer of fewer activation bits": lambda manifest: manifest["layers"][0]["bits"].update(activation=3),
    "layer lost from the front": lambda manifest: manifest["layers"].pop(0),
    "layer lost from the end": lambda manifest: manifest["layers"].pop(),
    "layer twice": lambda manifest: manifest["layers"].append(manifest["layers"][0]),
    "float layer without reason": lambda manifest: manifest["float_layers"][0].pop("reason"),
    "timestep lost": lambda manifest: manifest["timesteps"].pop(),
}


@pytest.mark.parametrize("damage", FACTS_DAMAGE.values(), ids=FACTS_DAMAGE)
def test_damaged_manifest_are_reported(folder: Path, damage: Callable[[Any], object]) -> None:
    edit_manifest(folder, damage)
    with pytest.raises(CheckpointError, match=r"damaged checkpoint:? .+|layer \S+: \S"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "layer/down.conv/codes",
        "layer/down.conv/weight_scale",
        "layer/down.conv/weight_zero_point",
        "layer/down.conv/tau",
        "layer/down.conv/shift",
        "activation/scale",
        "activation/zero_point",
        "probe/timesteps",
        "probe/sample",
        "probe/prediction",
    ],
)
def test_a_missing_tensor_is_reported(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"^damaged checkpoint .*{name.rpartition('/')[2]}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        *(f"layer/{layer}/{name}" for layer in ("down.conv", "to_q") for name in ("codes", "tau", "shift", "bias")),
        *(f"layer/up.shortcut/{name}" for name in ("weight_scale", "weight_zero_point")),
        *(f"activation/{name}" for name in ("scale", "zero_point")),
    ],
)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: value[:-1],
        lambda value: np.concatenate([value, value], axis=-1),
        lambda value: value[None],
        lambda value: value.ravel()[0],
        lambda value: value.astype(np.float64),
    ],
    ids=["shorter", "longer", "one axis more", "a number", "float64"],
)
def test_a_tensor_of_another_shape_or_type_is_reported(
    folder: Path, name: str, spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: np.array(spoil(tensors[name]))}))
    with pytest.raises(CheckpointError, match=r"damaged checkpoint:? .+|layer \S+: \S+ is \S+ \["):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("layer/down.conv/tau", 0, "layer down.conv: tau must be finite and positive"),
        ("layer/down.conv/weight_scale", np.nan, "layer down.conv: weight_scale must be finite and positive"),
        ("activation/scale", -1, "layer to_q: scale must be finite and positive"),
        ("layer/down.conv/weight_zero_point", 16, "layer down.conv: weight_zero_point is 16, at most 15"),
        ("layer/to_q/shift", 4, "layer to_q: shift is 4, at most 3"),
    ],
)
def test_a_value_out_of_range_is_reported_with_its_layer(folder: Path, name: str, value: float, expected: str) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name].flat[-1] = value

    edit_tensors(folder, spoil)
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(folder)


def test_a_zero_point_beyond_six_bits_is_reported_with_its_layer(folder: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["activation/zero_point"][0, 1] = 64

    edit_tensors(folder, spoil)
    with pytest.raises(CheckpointError, match=r"layer up\.shortcut: zero_point is 64, at most 63"):
        load_checkpoint(folder)


def test_a_tensor_that_no_layer_has_is_reported(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"layer/to_q/codebook": np.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"damaged checkpoint .*codebook"):
        load_checkpoint(folder)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1, exclude_max=True), st.sampled_from('09-."[]{},: ex\n'))
def test_a_changed_character_of_the_manifest_never_ends_in_a_traceback(position: float, character: str) -> None:
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "checkpoint"
        save_checkpoint(random_checkpoint(three_layers()), folder, run={})
        text = (folder / "dmq.json").read_text()
        index = int(position * len(text))
        (folder / "dmq.json").write_text(text[:index] + character + text[index + 1 :])
        with suppress(CheckpointError):
            load_checkpoint(folder)
