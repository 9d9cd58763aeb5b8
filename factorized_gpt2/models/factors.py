"""Low-rank factors of vocabulary matrices."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of one vocabulary matrix, or of an input and an output matrix.

    Input side: `wte @ scale_up + mean` stands for the token embedding (V, d). Output side: hidden states h (..., d)
    meet `h @ scale_down @ lm_head`, where `lm_head` is `wte.T` when the head is tied.

    Attributes:
        wte: (V, k) float32.
        scale_up: (k, d) float32.
        scale_down: (d, k) float32.
        mean: (d,) float32.
        explained_share: Share, in [0, 1], that rank k keeps of what the method maximises: for PCA, of the embedding's
            variance about its mean; 1 when there is nothing to lose.
        lm_head: (k, V) float32 when the head has a matrix of its own, `None` when it is tied.
    """

    wte: np.ndarray
    scale_up: np.ndarray
    scale_down: np.ndarray
    mean: np.ndarray
    explained_share: float
    lm_head: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The rank k."""
        return self.wte.shape[1]
