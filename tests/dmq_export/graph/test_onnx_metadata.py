"""Metadata read field by field, against what the onnx package reads."""

from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmq_export.errors import DmqError
from dmq_export.graph.onnx_metadata import onnx_metadata

FOREIGN = Path(__file__).parents[3] / "dmq_export/models/digits/classifier.onnx"


def test_the_metadata_of_an_export_is_found(tiny_onnx: Path) -> None:
    expected = {entry.key: entry.value for entry in onnx.load(tiny_onnx).metadata_props}
    assert onnx_metadata(tiny_onnx) == expected
    assert "dmq" in expected


def test_a_file_without_metadata_has_none() -> None:
    assert onnx_metadata(FOREIGN) == {entry.key: entry.value for entry in onnx.load(FOREIGN).metadata_props}


@given(entries=st.dictionaries(st.text(min_size=1), st.text(max_size=300)), doc=st.text(max_size=300))
def test_any_entry_comes_back(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, str], doc: str) -> None:
    model = onnx.ModelProto(ir_version=10, doc_string=doc, model_version=-1)
    model.graph.name = "fourteen"
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(model.SerializeToString())
    assert onnx_metadata(path) == entries


def test_a_shortened_file_is_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.onnx"
    content = tiny_onnx.read_bytes()
    for size in (len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DmqError, match=f"{path} is no ONNX file, or a damaged one"):
            onnx_metadata(path)


@pytest.mark.parametrize("content", [b"not a protobuf", b"\xff" * 20, b"\x72\x00"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(DmqError, match="is no ONNX file"):
        onnx_metadata(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DmqError, match=f"cannot read {tmp_path}/none.onnx: No such file"):
        onnx_metadata(tmp_path / "none.onnx")
