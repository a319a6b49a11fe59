"""Baselines: most popular, ItemKNN, EASE and ALS, on the same arrays as our own models.

Every baseline is fitted on a matrix of who met what and scores histories of the same shape. What
can be chosen is chosen on the validation events over the small grids in :data:`GRIDS`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from tfrec import metrics
from tfrec.data.interactions import Interactions
from tfrec.index import Ragged, TopK, top_k

Floats = NDArray[np.float32]

EASE_LIMIT = 20_000
"""Catalogs above this size get no EASE: see its memory and time."""

_CELLS = 1 << 24  # of a dense block of scores or similarities: 64 MiB in float32


class Baseline(Protocol):
    """What every baseline offers. Column 0, the unknown item, has no score."""

    def fit(self, matrix: sp.csr_array) -> Self:
        """Learns from ``matrix`` float32 (users, n + 1) of weights, as :func:`matrix_of` makes."""

    def scores(self, histories: sp.csr_array) -> Floats:
        """float32 (batch, n + 1): a score of every item for each row of ``histories``."""


def matrix_of(interactions: Interactions, num_items: int) -> sp.csr_array:
    """Who met what, as a sparse matrix of ones.

    Events of weight 0 and of the unknown item are left out; repeated ones count once. Event
    weights are not read: a baseline sees what the protocol calls a positive event.

    Args:
      interactions: The events to count.
      num_items: Items of the catalog without the unknown one.

    Returns:
      float32 (num_users, num_items + 1), rows sorted.
    """
    known = (interactions.item > 0) & (interactions.weight > 0)
    user, item = interactions.user[known], interactions.item[known]
    shape = (interactions.num_users, num_items + 1)
    matrix = sp.csr_array((np.ones(len(user), np.float32), (user, item)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


@dataclass
class Popular:
    """The most popular items, the same for all."""

    counts: Floats = field(init=False, repr=False)

    def fit(self, matrix: sp.csr_array) -> Self:
        """See :class:`Baseline`."""
        self.counts = np.asarray(matrix.sum(axis=0), np.float32).ravel()
        return self

    def scores(self, histories: sp.csr_array) -> Floats:
        """See :class:`Baseline`."""
        return np.tile(self.counts, (histories.shape[0], 1))


@dataclass
class ItemKnn:
    """Cosine between items' users (Sarwar et al. 2001, Deshpande and Karypis 2004).

    An item's score is the sum over its nearest neighbours in the history. Where `implicit` keeps
    the neighbours of each item *met*, this keeps those of each item *scored*, as most evaluation
    suites do: measured better on MovieLens-100K and 1M.

    Attributes:
      neighbours: Neighbours kept of each item scored.
      weights: float32 (n + 1, n + 1); column j holds the neighbours of item j, not itself.
    """

    neighbours: int = 100
    weights: sp.csr_array = field(init=False, repr=False)

    def fit(self, matrix: sp.csr_array) -> Self:
        """See :class:`Baseline`."""
        norms = np.sqrt(np.asarray(matrix.power(2).sum(axis=0)).ravel())
        unit = (matrix @ sp.diags_array(1 / np.maximum(norms, 1e-12))).astype(np.float32).tocsc()
        transposed = unit.T.tocsr()
        rows = max(1, _CELLS // matrix.shape[1])
        parts = []
        for start in range(0, matrix.shape[1], rows):
            block = (transposed[start : start + rows] @ unit).toarray()
            block[np.arange(len(block)), start + np.arange(len(block))] = 0
            parts.append(_largest_of_rows(block, self.neighbours))
        self.weights = sp.vstack(parts).T.tocsr()
        return self

    def scores(self, histories: sp.csr_array) -> Floats:
        """See :class:`Baseline`."""
        return np.asarray((histories @ self.weights).toarray(), np.float32)


@dataclass
class Ease:
    """The linear item-item model in closed form (EASE: Steck 2019, arXiv:1905.03375).

    Needs 16 bytes x items^2 of memory and about items^3 multiplications: 0.2 GB for 3,700 items,
    6.4 GB for 20,000.

    Attributes:
      regularization: Added to the diagonal of the co-occurrence matrix, in events.
      weights: float32 (n + 1, n + 1), from the item met (row) to the item scored (column); the
        diagonal and everything of row 0 are 0.
    """

    regularization: float = 200.0
    weights: Floats = field(init=False, repr=False)

    def fit(self, matrix: sp.csr_array) -> Self:
        """See :class:`Baseline`."""
        with _blas_threads(matrix.shape[1]):
            return self.fit_gram(gram(matrix))

    def fit_gram(self, products: Floats) -> Self:
        """Fits from :func:`gram`, which several regularizations may share."""
        regular = products.astype(np.float64)
        regular[np.diag_indices_from(regular)] += self.regularization
        inverse = _inverse(regular)
        self.weights = np.empty(products.shape, np.float32)
        np.divide(inverse, -np.diag(inverse), out=self.weights, casting="same_kind")
        np.fill_diagonal(self.weights, 0)
        return self

    def scores(self, histories: sp.csr_array) -> Floats:
        """See :class:`Baseline`."""
        return np.asarray(histories @ self.weights, np.float32)

    def strongest(self, per_item: int) -> sp.csr_array:
        """The ``per_item`` weights of largest size into each item, as float32 (n + 1, n + 1) CSR.

        Rows are the items met and columns the items scored, as in ``weights``.
        """
        return _largest_of_rows(np.ascontiguousarray(self.weights.T), per_item).T.tocsr()


@dataclass
class Als:
    """Weighted matrix factorisation by alternating least squares (Hu et al. 2008), by `implicit`.

    Attributes:
      factors: Width of the factors.
      regularization: L2 penalty.
      alpha: Confidence of an event over that of no event.
      bm25: Multiply the confidence by the BM25 weight, which is lower for busy users and popular
        items (K1 = 100, B = 0.8, as in implicit's own examples).
      iterations: Alternations.
      seed: Of the first factors.
    """

    factors: int = 128
    regularization: float = 5.0
    alpha: float = 1.0
    bm25: bool = False
    iterations: int = 15
    seed: int = 1
    _model: Any = field(init=False, repr=False)
    _rarity: Floats = field(init=False, repr=False)
    _mean_length: float = field(init=False, repr=False)

    def fit(self, matrix: sp.csr_array) -> Self:
        """See :class:`Baseline`."""
        known = np.asarray(matrix.sum(axis=0), np.float32).ravel()
        self._rarity = np.log(np.float32(matrix.shape[0])) - np.log1p(known)
        self._mean_length = float(matrix.sum() / matrix.shape[0])
        with threadpool_limits(1, user_api="blas"):
            from implicit.cpu.als import AlternatingLeastSquares

            self._model = AlternatingLeastSquares(
                factors=self.factors,
                regularization=self.regularization,
                alpha=self.alpha,
                iterations=self.iterations,
                random_state=self.seed,
                num_threads=os.cpu_count() or 1,
            )
            self._model.fit(self._confidence(matrix), show_progress=False)
        return self

    def scores(self, histories: sp.csr_array) -> Floats:
        """See :class:`Baseline`. Users are solved for anew, so they need not be known."""
        with threadpool_limits(1, user_api="blas"):
            rows = np.arange(histories.shape[0])
            users = self._model.recalculate_user(rows, self._confidence(histories))
        return np.asarray(users @ self._model.item_factors.T, np.float32)

    def _confidence(self, matrix: sp.csr_array) -> sp.csr_matrix:
        weighted = sp.csr_matrix(matrix)  # implicit does not know csr_array
        if self.bm25:
            length = np.diff(matrix.indptr) / self._mean_length
            norm = np.repeat(0.2 + 0.8 * length, np.diff(matrix.indptr)).astype(np.float32)
            weighted.data = 101 / (100 * norm + 1) * self._rarity[matrix.indices]
        return weighted


@dataclass(frozen=True)
class Choice:
    """A baseline with the settings that did best on the validation events.

    Attributes:
      name: Key of :data:`GRIDS`.
      model: Fitted on everything before the test events.
      settings: What was chosen.
      tried: Each point of the grid with its validation ``ndcg@10``.
    """

    name: str
    model: Baseline
    settings: Mapping[str, Any]
    tried: list[dict[str, Any]]


GRIDS: dict[str, list[dict[str, Any]]] = {
    "popular": [{}],
    "item_knn": [{"neighbours": n} for n in (50, 20, 100, 200)],
    "ease": [{"regularization": r} for r in (200.0, 20.0, 50.0, 100.0, 500.0, 1000.0)],
    "als": [
        {"alpha": 1.0, "regularization": 5.0, "bm25": False},
        {"alpha": 5.0, "regularization": 20.0, "bm25": False},
        {"alpha": 0.3, "regularization": 5.0, "bm25": True},
        {"alpha": 1.0, "regularization": 20.0, "bm25": True},
    ],
}
"""Settings tried for each baseline; the first serve where there is nothing to validate on."""


def why_not(name: str, num_items: int) -> str:
    """Why a baseline is not fitted to a catalog of this size; empty if it is."""
    if name == "ease" and num_items > EASE_LIMIT:
        return (
            f"EASE inverts a matrix of items x items; {num_items:,} items are above {EASE_LIMIT:,}"
        )
    return ""


def choose(
    name: str,
    select: sp.csr_array,
    targets: Ragged,
    refit: sp.csr_array,
    seed: int = 1,
) -> Choice:
    """Tries the grid of a baseline on the validation events, then fits the best on all before test.

    Args:
      name: Key of :data:`GRIDS`.
      select: float32 (users, n + 1), the events before validation; the histories while choosing.
      targets: The validation items of each user; users without any are not counted.
      refit: float32 (users, n + 1), the events before test.
      seed: Of ALS.

    Returns:
      The model fitted on ``refit``, with what was tried.
    """
    with _blas_threads(refit.shape[1]):
        return _choose(name, select, targets, refit, seed)


def recommend(
    model: Baseline,
    histories: sp.csr_array,
    users: NDArray[np.integer],
    k: int,
    exclude_history: bool = True,
) -> TopK:
    """The ``k`` best items of each user.

    Args:
      model: A fitted baseline.
      histories: float32 (all users, n + 1).
      users: (U,) rows of ``histories``.
      k: How many.
      exclude_history: Leave out the items of the user's row.

    Returns:
      TopK of (U, k).
    """
    n = histories.shape[1] - 1
    ids = np.arange(1, n + 1, dtype=np.int32)
    scores = np.full((len(users), k), -np.inf, np.float32)
    found = np.zeros((len(users), k), np.int32)
    size = max(1, _CELLS // (n + 1))
    for start in range(0, len(users), size):
        rows = histories[users[start : start + size]]
        seen = Ragged(rows.indptr.astype(np.int64), rows.indices.astype(np.int32))
        best = top_k(model.scores(rows)[:, 1:], ids, k, seen if exclude_history else None)
        scores[start : start + size], found[start : start + size] = best.scores, best.ids
    return TopK(scores, found)


def _choose(
    name: str, select: sp.csr_array, targets: Ragged, refit: sp.csr_array, seed: int
) -> Choice:
    grid, tried = GRIDS[name], []
    users = np.flatnonzero(targets.lengths)
    if len(grid) > 1 and len(users):
        wanted, fit = targets.take(users), _fitter(name, select, seed)
        for settings in tqdm(grid, desc=f"{name}: choosing", unit="fit", leave=False):
            found = recommend(fit(settings), select, users, 10)
            ndcg = metrics.ranking(found.ids, wanted.ids, wanted.offsets, [10])["ndcg@10"]
            tried.append({**settings, "ndcg@10": float(ndcg.mean())})
    best = int(np.argmax([point["ndcg@10"] for point in tried])) if tried else 0
    return Choice(name, _fitter(name, refit, seed)(grid[best]), grid[best], tried)


def _fitter(name: str, matrix: sp.csr_array, seed: int) -> Callable[[Mapping[str, Any]], Baseline]:
    """What makes a fitted baseline out of settings, sharing what does not depend on them."""
    if name == "ease":
        products = gram(matrix)
        return lambda settings: Ease(**settings).fit_gram(products)
    if name == "popular":
        return lambda _: Popular().fit(matrix)
    if name == "als":
        return lambda settings: Als(**settings, seed=seed).fit(matrix)
    return lambda settings: ItemKnn(**settings).fit(matrix)


def _blas_threads(num_items: int) -> threadpool_limits:
    """One BLAS thread for matrices that are small, as many as there are for others.

    Beside a busy neighbour on one of two cores, choosing EASE for 1,682 items took 24 s with two
    BLAS threads, which wait for each other, and 2 s with one. ALS has threads of its own.
    """
    return threadpool_limits(1 if num_items <= 5_000 else None, user_api="blas")


def gram(matrix: sp.csr_array) -> Floats:
    """Co-occurrence counts of items, ``matrix.T @ matrix``: float32 (n + 1, n + 1).

    Users are taken in dense blocks: the result is dense anyway, and counts are exact in float32
    to 16 million.
    """
    columns = matrix.shape[1]
    products = np.zeros((columns, columns), np.float32)
    rows = max(256, _CELLS // columns)
    for start in range(0, matrix.shape[0], rows):
        block = matrix[start : start + rows].toarray()
        products += block.T @ block
    return products


def carry_over(
    weights: Floats,
    text: Floats,
    attributes: Floats,
    words: sp.csr_array,
    counts: NDArray[np.integer[Any]],
    seed: int = 0,
) -> Floats:
    """Gives items without events the weights that what they read like tells.

    Kernel ridge regression from an item's text and attributes to its column of weights, learned on
    the items with events: content to collaborative filtering as in CB2CF (Barkan et al. 2019,
    arXiv:1611.00384), on a linear model as in MARec (Monteil et al. 2024, arXiv:2404.13298). The
    kernel is exp(2 (cosine - 1)) of the text vector beside half the attributes, the ridge 1: found
    on validation items of MovieLens-1M, where both matter little. Whether the words themselves
    count too (names tell much, in long texts) is decided by the error of each column foretold from
    the others, leave-one-out, an item's error counting as often as it has events.

    Args:
      weights: float32 (n + 1, n + 1), from the item met (row) to the item scored (column).
      text: float32 (n + 1, text width); width 0: none.
      attributes: float32 (n + 1, attribute width).
      words: float32 (n + 1, words), of :func:`tf_idf`; width 0: none.
      counts: int (n + 1,), events of each item.
      seed: Draws the items, :data:`_FORETOLD` at most, on which is decided.

    Returns:
      float32 (n + 1, n + 1): the same, the columns of other items that say something of themselves
      filled. Takes 16 bytes x items^2 and about items^3 multiplications, as EASE does.
    """
    rows = np.flatnonzero(counts)
    said = text.any(axis=1) | attributes.any(axis=1) | (np.diff(words.indptr) > 0)
    cold = np.flatnonzero((counts == 0) & said)
    cold = cold[cold > 0]
    if not len(rows) or not len(cold):
        return weights

    dense = np.concatenate([text, 0.5 * attributes], axis=1)

    def kernel(these: NDArray[np.intp], those: NDArray[np.intp], share: float) -> Any:
        """float64 (a, b) of two sets of items."""
        worded = words * np.sqrt(share)
        squares = np.square(dense).sum(axis=1) + np.asarray(worded.power(2).sum(axis=1)).ravel()
        length = np.sqrt(np.maximum(squares, 1e-12))
        cosine = dense[these] @ dense[those].T + (worded[these] @ worded[those].T).toarray()
        cosine /= length[these, None] * length[None, those]
        return np.exp(2 * (cosine - 1)).astype(np.float64)

    def regular(some: NDArray[np.intp], share: float) -> Any:
        """float64 (a, a), the kernel of some items and the ridge."""
        found = kernel(some, some, share)
        found[np.diag_indices_from(found)] += 1.0
        return found

    def error(share: float, some: NDArray[np.intp]) -> float:
        """Of the columns of some items, each foretold from the others."""
        inverse = _inverse(regular(some, share))
        missed = (inverse @ weights[:, some].T) / np.diag(inverse)[:, None]
        return float(np.square(missed).sum(axis=1) @ counts[some])

    share = 0.0
    if words.nnz:
        some = rows
        if len(rows) > _FORETOLD:
            some = np.sort(np.random.default_rng(seed).choice(rows, _FORETOLD, replace=False))
        share = min(_WORDS, key=lambda share: error(share, some))
    told = scipy.linalg.solve(
        regular(rows, share),
        kernel(rows, cold, share),
        assume_a="pos",
        overwrite_a=True,
        overwrite_b=True,
    )
    out = weights.copy()
    out[:, cold] = weights[:, rows] @ told.astype(np.float32)
    return out


_WORDS = (0.0, 0.5, 1.0)
"""Shares of words beside the text's vector that are tried."""

_FORETOLD = 4000


def tf_idf(texts: Sequence[str]) -> sp.csr_array:
    """float32 (n, words) of unit rows: TF-IDF of the words that are in two texts or more.

    The logarithm of a word's count and of how rare it is (Salton and Buckley 1988).
    """
    counted = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    texts_with = Counter(word for counts in counted for word in counts)
    column = {w: i for i, w in enumerate(sorted(w for w, n in texts_with.items() if n > 1))}
    starts, places, values = [0], [], []
    for counts in counted:
        for word, count in counts.items():
            if word in column:
                places.append(column[word])
                values.append((1 + np.log(count)) * np.log(len(texts) / texts_with[word]))
        starts.append(len(places))
    shape = (len(texts), len(column))
    table = sp.csr_array((np.array(values, np.float32), places, starts), shape=shape)
    norms = np.sqrt(np.asarray(table.power(2).sum(axis=1)).ravel())
    unit: sp.csr_array = sp.csr_array(sp.diags_array(1 / np.maximum(norms, 1e-9)) @ table)
    return unit


def _inverse(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of a symmetric positive definite matrix, in its own memory."""
    # LAPACK works on columns; the transpose of a symmetric matrix in rows is that, uncopied.
    factor, failed = scipy.linalg.lapack.dpotrf(matrix.T, lower=1, overwrite_a=1)
    if not failed:
        factor, failed = scipy.linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
    if failed:
        raise np.linalg.LinAlgError("the regularized co-occurrence matrix cannot be inverted")
    upper: NDArray[np.float64] = factor.T
    for start in range(0, len(upper), 512):
        part = slice(start, start + 512)
        corner = np.triu(upper[part, part])
        upper[part, part] = corner + np.triu(corner, 1).T
        upper[start + 512 :, part] = upper[part, start + 512 :].T
    return upper


def _largest_of_rows(block: Floats, k: int) -> sp.csr_array:
    """The k entries of largest size of each row; zeros are not stored."""
    columns = block.shape[1]
    if k < columns:
        size = np.abs(block)
        threshold = np.partition(size, columns - k, axis=1)[:, columns - k, None]
        block = np.where(size >= threshold, block, 0)
    return sp.csr_array(block)
