"""COCO's compressed run lengths as numbers, without making the mask.

A text holds the runs of a mask down its columns, background first. Each number is written in base 32, least digit first, one
character a digit: character 48 + digit, + 32 where another digit follows; the highest bit of the last digit is the sign. From
the fourth on a number is the difference to the run two before it.

Shape letters: N texts, M numbers of all texts one after the other, L characters of all texts; S T columns and rows of a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FIRST_CHARACTER, _NUM_CHARACTERS = 48, 64
_DIGIT, _SIGN, _MORE = 31, 16, 32
_MAX_DIGITS = 7  # of a 32-bit number


@dataclass(frozen=True)
class Runs:
    """runs_M: lengths of the runs; first_N: where those of each text begin; is_shortest: no number has a digit too many."""

    runs_M: np.ndarray
    first_N: np.ndarray
    is_shortest: bool

    def num_pixels(self) -> np.ndarray:
        """Of each mask (N,)."""
        return np.add.reduceat(self.runs_M, self.first_N) if len(self.first_N) else self.first_N

    def is_canonical(self) -> bool:
        """Whether the texts are what encoding their masks gives: the shortest, and only a first run may have length 0."""
        is_empty_M = self.runs_M == 0
        is_empty_M[self.first_N] = False
        return self.is_shortest and not is_empty_M.any()


def read_runs(texts: Sequence[bytes]) -> Runs:
    """The runs of all texts. A text that is no sequence of run lengths is an error."""
    if not all(texts):
        raise ValueError("`counts` is empty")
    if not texts:
        return Runs(np.zeros(0, np.int64), np.zeros(0, np.int64), is_shortest=True)
    characters_L = np.frombuffer(b"".join(texts), np.uint8)
    if characters_L.min() < _FIRST_CHARACTER or characters_L.max() >= _FIRST_CHARACTER + _NUM_CHARACTERS:
        raise ValueError("`counts` has a character that run lengths do not have")
    digits_L = characters_L.astype(np.int64) - _FIRST_CHARACTER
    lengths_N = np.array([len(text) for text in texts])
    ends_N = np.cumsum(lengths_N)
    if (digits_L[ends_N - 1] & _MORE).any():
        raise ValueError("`counts` ends in the middle of a number")
    numbers_M, last_M, is_shortest = _read_numbers(digits_L)
    first_N = np.searchsorted(last_M, ends_N - lengths_N)
    runs_M = _undo_differences(numbers_M, first_N)
    if (runs_M < 0).any():
        raise ValueError("`counts` has a run of negative length")
    return Runs(runs_M, first_N, is_shortest)


def crop_runs(crop_ST: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """Lengths of the runs of a mask of this size (height, width) that is empty outside of a box, background first.

    crop_ST: the inside of the box, bool, column by column; left, top: its first column and row.
    """
    height, width = size
    num_columns, num_rows = crop_ST.shape
    # A row of background ends the runs at the foot of a column; of full columns they go on into the next one.
    step = num_rows + (num_rows < height)
    flat = np.zeros(num_columns * step + 1, dtype=bool)
    flat[:-1].reshape(num_columns, step)[:, :num_rows] = crop_ST
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat[0]:
        changes = np.concatenate([[0], changes])
    column, row = np.divmod(changes, max(step, 1))
    runs = np.diff((column + left) * height + row + top, prepend=0, append=height * width)
    return runs if runs[-1] or len(runs) == 1 else runs[:-1]


def _read_numbers(digits_L: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """-> numbers (M,), the place of the last digit of each (M,), and whether none has a digit too many."""
    last_M = np.flatnonzero((digits_L & _MORE) == 0)
    num_digits_M = np.diff(last_M, prepend=-1)
    if num_digits_M.max() > _MAX_DIGITS:
        raise ValueError(f"`counts` has a number of more than {_MAX_DIGITS} digits")
    first_M = last_M - num_digits_M + 1
    place_L = np.arange(len(digits_L)) - np.repeat(first_M, num_digits_M)
    numbers_M = np.add.reduceat((digits_L & _DIGIT) << (5 * place_L), first_M)
    numbers_M -= np.where(digits_L[last_M] & _SIGN, 1 << (5 * num_digits_M), 0)
    # With a digit less, a number has 5 * (num_digits - 1) bits, one of them the sign.
    limit_M = 1 << np.maximum(5 * num_digits_M - 6, 0)
    needs_all_M = (num_digits_M == 1) | (numbers_M >= limit_M) | (numbers_M < -limit_M)
    return numbers_M, last_M, bool(needs_all_M.all())


def _undo_differences(numbers_M: np.ndarray, first_N: np.ndarray) -> np.ndarray:
    """In each text, numbers 1, 3, 5, ... are the differences of one sequence, 2, 4, 6, ... those of another."""
    num_numbers_N = np.diff(first_N, append=len(numbers_M))
    start_M = np.repeat(first_N, num_numbers_N)
    is_even_M = (np.arange(len(numbers_M)) - start_M) % 2 == 0
    # sums[j + 1] is the sum of number j and of every second one before it, of the earlier texts too: take off what the
    # sequence had before it began.
    sums = np.concatenate([[0], numbers_M])
    for parity in (0, 1):
        np.cumsum(sums[parity::2], out=sums[parity::2])
    runs_M = sums[1:] - sums[start_M + is_even_M]
    runs_M[first_N] = numbers_M[first_N]
    return runs_M
