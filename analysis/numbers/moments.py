"""Running means of vectors over sequences, and the covariance of those means; shards add up.

For vectors x_i of sequences i (or sums x_c of clusters c that hold n_c of them), with mean mu over all n:

    V = u / (u - 1) * sum over units of (x_c - n_c mu)(x_c - n_c mu)^T / n^2,    u units

so a smooth function f(mu) has the standard error sqrt(grad f^T V grad f): the delta method of `means.py`
without keeping the sequences. Without clusters only n, mean and centred products are kept (Chan, Golub &
LeVeque 1983); with clusters one record a cluster, since a cluster may go on in another batch or shard.
"""

from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopmdm.model.errors import UsageError

Record = tuple[NDArray, NDArray]
Plain = tuple[NDArray, NDArray, NDArray, list[tuple[Hashable, NDArray, NDArray]] | None]
"""Moments as numbers, words and arrays alone: n, mean, products, and (label, n, total) of each cluster."""


class Moments:
    """Means of vectors [.., k] over sequences; a vector with a NaN in it does not count.

    `n` [..] counts vectors, `mean` [.., k] and `covariance` [.., k, k] of the mean are NaN where nothing
    (for the covariance: fewer than two units) was seen.
    """

    def __init__(self):
        self._n: NDArray | None = None
        self._mean: NDArray = np.empty(0)
        self._products: NDArray = np.empty(0)
        self._clusters: dict[Hashable, Record] | None = None

    def add(self, values: NDArray, clusters: NDArray | None = None) -> None:
        """Take in vectors [sequence, .., k]; `clusters` [sequence] names what they share."""
        known: NDArray = np.asarray(np.isfinite(values).all(axis=-1))
        filled = np.where(known[..., None], values, 0.0).astype(np.float64)
        if self._n is not None and (clusters is None) != (self._clusters is None):
            raise UsageError("some sequences came with clusters and some without; give clusters for all or none")
        if clusters is not None:
            if len(clusters) != len(values):
                expected = f"{len(values)} expected, got {len(clusters)}"
                raise UsageError(f"clusters must name one per sequence: {expected}")
            self._take(_by_cluster(known, filled, clusters))
        n = known.sum(axis=0)
        mean = filled.sum(axis=0) / np.maximum(n, 1)[..., None]
        centred = (filled - mean) * known[..., None]
        self._combine(n, mean, np.einsum("n...i,n...j->...ij", centred, centred))

    def merge(self, other: "Moments") -> None:
        """Take in what another shard has seen."""
        if other._n is None:
            return
        if self._n is not None and (self._clusters is None) != (other._clusters is None):
            raise UsageError("one shard has clusters and the other has none; give clusters for all or none")
        if other._clusters is not None:
            self._take(other._clusters)
        self._combine(other._n, other._mean, other._products)

    def plain(self) -> Plain:
        """What was seen, for `of`."""
        assert self._n is not None, "nothing was added"
        known = self._clusters
        clusters = None if known is None else [(label, *record) for label, record in known.items()]
        return self._n, self._mean, self._products, clusters

    @classmethod
    def of(cls, n: NDArray, mean: NDArray, products: NDArray, clusters: Any = None) -> "Moments":
        """From `plain`."""
        moments = cls()
        moments._n, moments._mean, moments._products = n, mean, products
        if clusters is not None:
            moments._clusters = {label: (number, total) for label, number, total in clusters}
        return moments

    def _combine(self, n: NDArray, mean: NDArray, products: NDArray) -> None:
        if self._n is None:
            self._n, self._mean, self._products = n, mean, products
            return
        total = np.maximum(self._n + n, 1)
        apart = mean - self._mean
        outer = apart[..., :, None] * apart[..., None, :]
        self._mean = self._mean + apart * (n / total)[..., None]
        self._products = self._products + products + outer * (self._n * n / total)[..., None, None]
        self._n = self._n + n

    def _take(self, records: dict[Hashable, Record]) -> None:
        mine = self._clusters = {} if self._clusters is None else self._clusters
        for label, (n, total) in records.items():
            before = mine.get(label)
            mine[label] = (n, total) if before is None else (before[0] + n, before[1] + total)

    @property
    def n(self) -> NDArray:
        """How many vectors counted, [..]."""
        assert self._n is not None, "nothing was added"
        return self._n

    @property
    def units(self) -> NDArray:
        """Independent units among them, [..]: sequences, or clusters with at least one vector."""
        if self._clusters is None:
            return self.n
        return np.stack([n > 0 for n, _ in self._clusters.values()]).sum(axis=0)

    @property
    def mean(self) -> NDArray:
        """Mean vectors [.., k]."""
        return np.where(self.n[..., None] > 0, self._mean, np.nan)

    @property
    def covariance(self) -> NDArray:
        """Covariance [.., k, k] of the mean vectors."""
        products = self._products
        if self._clusters is not None:
            products = np.zeros_like(products)
            for n, total in self._clusters.values():
                apart = total - n[..., None] * self._mean
                products += apart[..., :, None] * apart[..., None, :]
        units = self.units
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.where(units > 1, units / (units - 1) / self.n**2, np.nan)
        return products * scale[..., None, None]


def propagated(gradient: NDArray, covariance: NDArray) -> NDArray:
    """Standard error [..] of a function of means, from its gradient [.., k] and their covariance [.., k, k]."""
    with np.errstate(invalid="ignore"):
        squared = np.einsum("...i,...ij,...j->...", gradient, covariance, gradient)
    return np.sqrt(np.maximum(squared, 0.0))


def _by_cluster(known: NDArray, filled: NDArray, clusters: NDArray) -> dict[Hashable, Record]:
    labels, index = np.unique(clusters, return_inverse=True)
    n = np.zeros((len(labels), *known.shape[1:]), dtype=np.int64)
    total = np.zeros((len(labels), *filled.shape[1:]))
    np.add.at(n, index, known)
    np.add.at(total, index, filled)
    return {label.item(): (n[i], total[i]) for i, label in enumerate(labels)}
