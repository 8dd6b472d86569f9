"""Embeddings of prompts: files, what fits a model and what does not, and the hash that stands for them."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmq_export.denoiser.arguments import Argument
from dmq_export.denoiser.embeddings import Embeddings, fitted, load_embeddings
from dmq_export.errors import DmqError, ModelError

TEXT = Argument("encoder_hidden_states", (None, 4))
POOLED = Argument("added_cond_kwargs.text_embeds", (3,))
MASK = Argument("encoder_attention_mask", (None,), integer=True, optional=True)
GUIDANCE = Argument("guidance", ())


def text(rows: int = 2, length: int = 5, width: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, length, width)).astype(np.float32)


def test_a_file_holds_both_branches(tmp_path: Path) -> None:
    given_text, without = text(), text(1)
    np.savez(tmp_path / "e.npz", **{"encoder_hidden_states": given_text, "uncond/encoder_hidden_states": without})
    loaded = load_embeddings(tmp_path / "e.npz")
    assert loaded == Embeddings({TEXT.name: given_text}, {TEXT.name: without})
    np.testing.assert_array_equal(loaded.given[TEXT.name], given_text)
    np.testing.assert_array_equal(loaded.unconditional[TEXT.name], without)
    assert loaded.count == 2


def test_any_change_changes_the_hash() -> None:
    base = Embeddings({"a": np.zeros((2, 3), np.float32)})
    others = [
        Embeddings({"b": np.zeros((2, 3), np.float32)}),
        Embeddings({"a": np.zeros((2, 3), np.float64)}),
        Embeddings({"a": np.zeros((2, 3, 1), np.float32)}),
        Embeddings({"a": np.full((2, 3), 1e-30, np.float32)}),
        Embeddings({"a": np.zeros((2, 3), np.float32)}, {"a": np.zeros((1, 3), np.float32)}),
    ]
    assert len({one.sha256 for one in [base, *others]}) == len(others) + 1
    assert base == Embeddings({"a": np.zeros((2, 3), np.float32)})


def test_the_rest_of_the_prompts_keeps_its_other_branch() -> None:
    words = text(3)
    assert Embeddings({"a": words}, {"a": words[:1]}).after(2) == Embeddings({"a": words[2:]}, {"a": words[:1]})
    assert Embeddings({"a": words}, {"a": -words}).after(1) == Embeddings({"a": words[1:]}, {"a": -words[1:]})
    with pytest.raises(DmqError, match="there are no embeddings"):
        Embeddings({"a": words}).after(3)


def refuse_file(path: Path, message: str) -> None:
    with pytest.raises(DmqError, match=message) as caught:
        load_embeddings(path)
    assert str(path) in str(caught.value)


def test_files_of_another_kind_are_refused_in_words(tmp_path: Path) -> None:
    refuse_file(tmp_path / "none.npz", "cannot read .*: No such file")
    (tmp_path / "text.npz").write_text("a cat\n")
    refuse_file(tmp_path / "text.npz", "no .npz file of plain arrays")
    np.savez(tmp_path / "pickle.npz", a=np.array([{}], dtype=object))
    refuse_file(tmp_path / "pickle.npz", "no .npz file of plain arrays")
    np.save(tmp_path / "one.npy", np.zeros((2, 2)))
    refuse_file(tmp_path / "one.npy", "holds a single array")
    np.savez(tmp_path / "rows.npz", a=np.zeros((2, 3)), b=np.zeros((3, 3)))
    refuse_file(tmp_path / "rows.npz", r"embeddings b: \[3, 3\], but the first array has 2 rows")
    np.savez(tmp_path / "empty.npz", **{"uncond/a": np.zeros((2, 3))})
    refuse_file(tmp_path / "empty.npz", "there are no embeddings")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "rows.npz").read_bytes()[:-30])
    refuse_file(tmp_path / "cut.npz", "no .npz file|cannot read")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(1, 9))
def test_samples_take_turns_with_the_prompts(rows: int, without: int, start: int, count: int) -> None:
    without = rows if without > 1 else 1
    embeddings = Embeddings({"a": np.arange(rows)}, {"a": 100 + np.arange(without)})
    one, other = embeddings.cycled(range(start, start + count))
    assert one["a"].tolist() == [i % rows for i in range(start, start + count)]
    assert other["a"].tolist() == [100 + i % without for i in range(start, start + count)]


def test_what_fits_comes_in_the_types_a_model_takes() -> None:
    arrays = {TEXT.name: text().astype(np.float16), POOLED.name: np.ones((2, 3)), MASK.name: np.ones((2, 5), bool)}
    result = fitted(Embeddings(arrays), [TEXT, POOLED, MASK], None)
    assert {name: value.dtype.name for name, value in result.given.items()} == {
        TEXT.name: "float32",
        POOLED.name: "float32",
        MASK.name: "int64",
    }
    assert result.unconditional == {}


def test_without_guidance_the_other_branch_is_left_out() -> None:
    both = Embeddings({TEXT.name: text()}, {TEXT.name: text(1)})
    assert fitted(both, [TEXT], None) == fitted(Embeddings({TEXT.name: text()}), [TEXT], None)
    assert fitted(both, [TEXT], 3.0).unconditional.keys() == {TEXT.name}


def test_a_distilled_model_is_told_the_scale_and_needs_no_other_branch() -> None:
    result = fitted(Embeddings({TEXT.name: text()}), [TEXT, GUIDANCE], 3.5)
    assert result.given["guidance"].tolist() == [3.5, 3.5]
    assert result.unconditional == {}
    said = Embeddings({TEXT.name: text(), "guidance": np.array([1.0, 2.0])})
    assert fitted(said, [TEXT, GUIDANCE], 3.5).given["guidance"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arrays", "uncond", "scale", "message"),
    [
        ({"prompt_embeds": text()}, {}, None, "told nothing called 'prompt_embeds': it takes encoder_hidden_states"),
        ({TEXT.name: text()}, {}, None, "the embeddings lack added_cond_kwargs.text_embeds: the model takes enc"),
        (
            {TEXT.name: text(width=3), POOLED.name: np.ones((2, 3))},
            {},
            None,
            "encoder_hidden_states: [2, 5, 3] was given, the model takes encoder_hidden_states [S, L, 4]",
        ),
        ({TEXT.name: text(), POOLED.name: np.ones((2, 3, 1))}, {}, None, "[2, 3, 1] was given"),
        ({TEXT.name: text() * np.nan, POOLED.name: np.ones((2, 3))}, {}, None, "are not finite"),
        ({TEXT.name: text(), POOLED.name: np.ones((2, 3))}, {}, 2.0, "the empty prompt too: give them as uncond/"),
        ({TEXT.name: text(), POOLED.name: np.ones((2, 3))}, {TEXT.name: text()}, 2.0, "lack added_cond_kwargs"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    arrays: dict[str, np.ndarray], uncond: dict[str, np.ndarray], scale: float | None, message: str
) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        fitted(Embeddings(arrays, uncond), [TEXT, POOLED, MASK], scale)


def test_a_distilled_model_without_a_scale_is_refused() -> None:
    with pytest.raises(ModelError, match="lack guidance, or --guidance-scale"):
        fitted(Embeddings({TEXT.name: text()}), [TEXT, GUIDANCE], None)
