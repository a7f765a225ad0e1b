"""The kernels on numpy and its BLAS: as fast as any on a CPU, and there with every backend."""

from __future__ import annotations

from . import bases, products, ranks


class NumpyRules:
    """`Rules` on all cores that the process may use."""

    median = staticmethod(ranks.median)
    trimmed_mean = staticmethod(ranks.trimmed_mean)
    inner_products = staticmethod(products.inner_products)
    canonical = staticmethod(bases.canonical)
