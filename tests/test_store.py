"""What is computed is computed once, and a run that is interrupted goes on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from oag_transform.evaluation.store import Array, Store, fingerprint


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


def test_fingerprints_tell_weights_values_shapes_and_dtypes_apart() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    contents: list[nn.Module | torch.Tensor] = [one, other, nn.Sequential(one), torch.zeros(2, 3), torch.zeros(3, 2)]
    contents += [torch.zeros(2, 3).double(), torch.ones(2, 3), torch.zeros(())]
    found = [fingerprint(content) for content in contents]
    assert len(set(found)) == len(found)
    assert fingerprint(torch.zeros(3, 2).T) == fingerprint(torch.zeros(2, 3))
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(other)
