"""PCA in the space weighted by the queries: the basis of least logit error q . (k_hat - k)."""

from __future__ import annotations

import numpy as np

from kvtc_gguf.transforms.types import Basis, HeadStatistics


def query_pca(statistics: HeadStatistics) -> Basis:
    """Eigenvectors of W C W, by falling variance, with the weighting W undone in the decode matrix; mean removed.

    The decoded key is invariant to the scale of single channels: a channel that is large but that queries read softly
    does not draw bits.
    """
    weight = statistics.weight
    _, vectors = np.linalg.eigh(weight[:, None] * statistics.covariance * weight)
    return Basis(statistics.mean, vectors[:, ::-1] / weight[:, None])
