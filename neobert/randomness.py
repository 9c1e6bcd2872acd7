"""Random numbers as a pure function of where they are used, so that a restart needs no state."""

from __future__ import annotations

import numpy as np

# What the numbers are for: the first part of a key, so that no two purposes share any.
ORDER, HELD_OUT, MIXTURE, BINS, MASKS, PAIR_SOURCES, PAIR_ORDER, PAIR_TEXTS = range(8)
POSITIONS = 8


def random_generator(seed: int, *key: int) -> np.random.Generator:
    """The generator of (seed, key); those of two different pairs are independent."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


class Permutation:
    """A random order of n things, computed place by place: no array of n numbers is held.

    Four Feistel rounds on the smallest even number of bits that holds n, walking on from numbers
    that are not below n (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """

    def __init__(self, n: int, generator: np.random.Generator):
        self.n = n
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)
        self.keys = generator.integers(1 << 32, size=4).tolist()

    def __call__(self, place: int) -> int:
        """The number, in [0, n), of the thing at `place`."""
        mask = (1 << self.half) - 1
        number = place
        while True:
            left, right = number >> self.half, number & mask
            for key in self.keys:
                mixed = (right ^ key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
                mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
                left, right = right, left ^ (mixed >> 32 & mask)
            number = left << self.half | right
            if number < self.n:
                return number
