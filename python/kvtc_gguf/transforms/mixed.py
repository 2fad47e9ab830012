"""PCA mixed by a Hadamard matrix inside groups of 8: every component of a group gets the same variance and is nearer to
a Gaussian, so that the one width which the format gives a group suits all of it.
"""

from __future__ import annotations

import numpy as np

from kvtc_gguf.layout import GROUP
from kvtc_gguf.transforms.hadamard import rotation
from kvtc_gguf.transforms.metric_pca import metric_pca
from kvtc_gguf.transforms.types import Basis, HeadStatistics


def mixed_metric_pca(statistics: HeadStatistics) -> Basis:
    """`metric_pca` with each group of 8 neighbouring components rotated by a signed Hadamard matrix."""
    basis = metric_pca(statistics)
    blocks = np.kron(np.eye(basis.mean.size // GROUP), rotation(GROUP))
    return Basis(basis.mean, basis.decode @ blocks.T)
