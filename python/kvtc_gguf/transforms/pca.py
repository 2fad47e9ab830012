"""Principal components (KVTC, arXiv 2511.01815, section 3): the basis of least reconstruction error."""

from __future__ import annotations

import numpy as np

from kvtc_gguf.transforms.types import Basis, HeadStatistics


def pca(statistics: HeadStatistics) -> Basis:
    """Eigenvectors of the covariance by falling variance, mean removed."""
    _, vectors = np.linalg.eigh(statistics.covariance)
    return Basis(statistics.mean, vectors[:, ::-1])
