"""What samples cost to train on. Pure arithmetic: no torch, no files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cost:
    """FLOPs of a step by what a sample has: tokens, tokens attended to, positions of the vision tower.

    Attention is causal and within a sample, so that it grows with the square of the sample's tokens. The defaults are
    those of LLaMA-3 8B with adapters of rank 64 and its layers computed again, and of a SigLIP tower that is frozen:
    2 x 6.98 G weights a token forward, backward and again, 2.1 G for the head, 1.3 G for the adapters; 0.67 T for a
    picture of 729 patches, its own attention included.
    """

    per_token: float = 45.3e9
    per_token_squared: float = 1.18e6
    per_patch: float = 0.92e9

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """The FLOPs of samples of `lengths` (S, 2), tokens and patches: (S,).

        >>> Cost(per_token=2, per_token_squared=1, per_patch=10).of(np.array([[3, 0], [1, 5]]))
        array([15., 53.])
        """
        tokens, patches = lengths[:, 0].astype(np.float64), lengths[:, 1]
        return tokens * (self.per_token + self.per_token_squared * tokens) + self.per_patch * patches
