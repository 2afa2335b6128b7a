"""Vectorised draws without replacement, all from one NumPy generator."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CELLS = 1 << 25
"""Most random numbers held at once; keeps a block within about 130 MB."""


def distinct(rng: np.random.Generator, rows: int, size: int, population: int) -> NDArray[np.int32]:
    """Draw ``size`` distinct integers of ``0..population-1`` per row, uniformly over ordered draws.

    A partial Fisher-Yates shuffle runs over all rows at once, so that the cost is ``rows * size`` whatever
    the population. A block starts from the permutations that the block before it left behind: a draw is
    uniform from any starting permutation. Returns ``[rows, size]``.
    """
    drawn = np.empty((rows, size), dtype=np.int32)
    block = max(1, min(rows, _CELLS // max(population, 1)))
    table = np.repeat(np.arange(population, dtype=np.int32)[:, None], block, axis=1)
    for start in range(0, rows, block):
        count = min(block, rows - start)
        lanes = np.arange(count)
        for i in range(size):
            other = rng.integers(i, population, size=count)
            picked = table[other, lanes]
            table[other, lanes] = table[i, :count]
            table[i, :count] = picked
            drawn[start : start + count, i] = picked
    return drawn


def weighted_distinct(
    rng: np.random.Generator, rows: int, size: int, weights: NDArray[np.float64]
) -> NDArray[np.int32]:
    """Draw ``size`` distinct indices per row one after the other, each with probability proportional to its weight.

    Exponential clocks of rate ``weights[j]`` ring in exactly the order of successive draws without
    replacement, so the first ``size`` bells of a row are its draw, in order. Returns ``[rows, size]``.
    """
    population = len(weights)
    drawn = np.empty((rows, size), dtype=np.int32)
    block = max(1, _CELLS // population)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        clocks = rng.standard_exponential((stop - start, population), dtype=np.float32)
        clocks /= weights.astype(np.float32)
        if size < population:
            first = np.argpartition(clocks, size - 1, axis=1)[:, :size]
            order = np.argsort(np.take_along_axis(clocks, first, axis=1), axis=1)
            drawn[start:stop] = np.take_along_axis(first, order, axis=1)
        else:
            drawn[start:stop] = np.argsort(clocks, axis=1)
    return drawn


def power_law(slots: int, power: float) -> NDArray[np.float64]:
    """``p_j`` proportional to ``power * j**(power - 1)`` for ``j = 1..slots``, summing to one."""
    p = power * np.arange(1, slots + 1, dtype=np.float64) ** (power - 1.0)
    return p / p.sum()
