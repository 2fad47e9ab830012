"""PCA in the space of the full metric: the basis of least e . metric e, with errors that do not interact.

Keys: the joint eigenbasis of keys and queries. `query_pca` knows how large the queries of a channel are, this one also
how they point: attention looks along few directions of a head, and only errors along these cost anything. Values: the
directions that W_o reads, by the variance that they carry to the output.
"""

from __future__ import annotations

import numpy as np

from kvtc_gguf.transforms.types import Basis, HeadStatistics


def metric_pca(statistics: HeadStatistics) -> Basis:
    """Eigenvectors of M^1/2 C M^1/2, by falling variance, with M^1/2 undone in the decode matrix; mean removed."""
    power, axes = np.linalg.eigh(statistics.metric)
    root = np.sqrt(np.maximum(power, 1e-30))
    half, back = (axes * root) @ axes.T, (axes / root) @ axes.T
    _, vectors = np.linalg.eigh(half @ statistics.covariance @ half)
    return Basis(statistics.mean, back @ vectors[:, ::-1])
