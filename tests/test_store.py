"""The store: each computation is done once for the same code, and an interrupted run continues."""

import io
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oag_transform.evaluation import store as store_module
from oag_transform.evaluation.store import PACKAGE, Array, Store, digest, fingerprint, sources


class Computation:
    """Doubles its rows, remembers which it was asked for, and fails at ``fail_at``."""

    def __init__(self, rows: torch.Tensor, fail_at: int | None = None) -> None:
        self.rows, self.asked, self.fail_at = rows, [], fail_at

    asked: list[range]

    def __call__(self, rows: range) -> Array:
        self.asked.append(rows)
        if self.fail_at in rows:
            raise KeyboardInterrupt
        return 2 * self.rows[rows.start : rows.stop].numpy()


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    store, rows = Store(tmp_path, chunk=3), torch.arange(20).reshape(10, 2)
    first = Computation(rows, fail_at=7)
    with pytest.raises(KeyboardInterrupt):
        store.rows({"a": 1}, [rows], first)
    assert first.asked == [range(0, 3), range(3, 6), range(6, 9)]
    second = Computation(rows)
    assert np.array_equal(store.rows({"a": 1}, [rows], second), 2 * rows.numpy())
    assert second.asked == [range(6, 9), range(9, 10)]
    third = Computation(rows)
    store.rows({"a": 1}, [rows], third)
    assert third.asked == []


def test_more_rows_keep_the_chunks_that_are_whole(tmp_path: Path) -> None:
    store, rows = Store(tmp_path, chunk=3), torch.arange(10)
    store.rows({"a": 1}, [rows[:7]], Computation(rows))
    longer = Computation(rows)
    assert np.array_equal(store.rows({"a": 1}, [rows], longer), 2 * rows.numpy())
    assert longer.asked == [range(6, 9), range(9, 10)]


def test_other_content_or_another_key_is_computed_anew(tmp_path: Path) -> None:
    store, rows = Store(tmp_path, chunk=4), torch.arange(8)
    store.rows({"a": 1}, [rows], Computation(rows))
    for key, inputs in (({"a": 2}, [rows]), ({"a": 1}, [rows + 1]), ({"a": 1}, [rows, rows])):
        again = Computation(inputs[0])
        assert np.array_equal(store.rows(key, inputs, again), 2 * inputs[0].numpy())
        assert len(again.asked) == 2


@pytest.fixture
def package(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.pt")
    return Path(shutil.copytree(PACKAGE, tmp_path / "package", ignore=ignore))


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_the_digest_knows_a_constant_that_makes_a_result(package: Path) -> None:
    before = digest(package)
    assert before == digest(PACKAGE) == sources()
    change(package / "noise_level.py", "FULL = 2.6", "FULL = 2.7")
    after = digest(package)
    assert after != before
    change(package / "noise_level.py", "FULL = 2.7", "FULL = 2.6")
    assert digest(package) == before
    (package / "baselines" / "filters.py").rename(package / "baselines" / "other.py")
    assert digest(package) not in (before, after)


def test_the_digest_passes_over_what_only_shows_results(package: Path) -> None:
    before = digest(package)
    (package / "apps" / "more.py").write_text("x = 1\n")
    (package / "evaluation" / "render" / "figures.py").write_text("x = 1\n")
    (package / "evaluation" / "render" / "report.css").write_text("")
    assert digest(package) == before
    (package / "evaluation" / "more.py").write_text("x = 1\n")
    assert digest(package) != before


def test_other_sources_compute_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows = Store(tmp_path, chunk=4), torch.arange(8)
    store.rows({"a": 1}, [rows], Computation(rows))
    monkeypatch.setattr(store_module, "sources", lambda: "other")
    again = Computation(rows)
    store.rows({"a": 1}, [rows], again)
    assert len(again.asked) == 2


def flip_a_bit(content: bytes) -> bytes:
    at = content.index(np.arange(2, 14, 2, dtype=np.int64).tobytes()) + 8  # in the numbers themselves
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def another_kind(_: bytes) -> bytes:
    np.save(file := io.BytesIO(), np.zeros(6))
    return file.getvalue()


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-30], lambda _: b"", lambda _: b"no array", flip_a_bit, another_kind]
)
def test_a_damaged_chunk_is_computed_again(damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, rows = Store(tmp_path, chunk=6), torch.arange(1, 13)
    store.rows({"a": 1}, [rows], Computation(rows))
    (file,) = tmp_path.rglob("000000-*.npz")
    file.write_bytes(damage(file.read_bytes()))
    again = Computation(rows)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(store.rows({"a": 1}, [rows], again), 2 * rows.numpy())
    assert again.asked == [range(6)]
    assert f"{file} is damaged and computed again" in caplog.text
    whole = Computation(rows)
    store.rows({"a": 1}, [rows], whole)
    assert whole.asked == []


def test_a_chunk_of_another_number_of_rows_is_damaged_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, rows = Store(tmp_path, chunk=6), torch.arange(6)
    store.rows({"a": 1}, [rows], Computation(rows))
    (file,) = tmp_path.rglob("*.npz")
    for content in (np.zeros(5), np.zeros(())):
        np.savez(file, rows=content)
        again = Computation(rows)
        assert np.array_equal(store.rows({"a": 1}, [rows], again), 2 * rows.numpy())
        assert again.asked == [range(6)]
    assert "expected 6 rows, got shape (5,)" in caplog.text


def test_a_computation_must_give_the_rows_it_was_asked_for(tmp_path: Path) -> None:
    rows = torch.arange(6)
    with pytest.raises(ValueError, match="expected a result of 6 rows, got 5: what"):
        Store(tmp_path).rows({"a": 1}, [rows], lambda _: np.zeros(5), "what")
    assert not list(tmp_path.iterdir())


def test_fingerprints_tell_weights_values_shapes_and_dtypes_apart() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    contents: list[nn.Module | torch.Tensor] = [one, other, nn.Sequential(one), torch.zeros(2, 3), torch.zeros(3, 2)]
    contents += [torch.zeros(2, 3).double(), torch.ones(2, 3), torch.zeros(())]
    found = [fingerprint(content) for content in contents]
    assert len(set(found)) == len(found)
    assert fingerprint(torch.zeros(3, 2).T) == fingerprint(torch.zeros(2, 3))
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(other)
