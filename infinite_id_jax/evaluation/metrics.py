"""Scores of pictures and what may be said of them: means with intervals over groups of people, differences, verdicts.

A score that could not be taken, such as that of a picture without a face, is nan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from infinite_id_jax.errors import InputError

# infinite_id_jax.typing brings jax, which a report of scores does not need.
Column = Shaped[np.ndarray, "n"]
Values = Float[np.ndarray, "n"]
Rows = Float[np.ndarray, "n d"]
Verdict = Literal["confirmed", "not confirmed", "contradicted"]

_CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A figure and the ends of its 95% interval; nan where nothing was scored, or nothing to judge the spread by."""

    value: float
    low: float
    high: float


class Pairs(NamedTuple):
    """A value for each pair of pictures of one person, and whose it is: what `interval` takes."""

    values: Float[np.ndarray, " p"]
    identities: Shaped[np.ndarray, " p"]


@dataclass(frozen=True)
class Scores:
    """A table with a row for each picture: who drew it, of whom, the cluster they belong to, and each metric's value.

    The pictures of a cluster stand or fall together: those of one person, and of all people who share noise. Raises
    InputError for columns of different length.
    """

    method: Column
    identity: Column
    cluster: Column
    values: Mapping[str, np.ndarray]  # [n] each, float, nan where not scored

    def __post_init__(self) -> None:
        columns = {"method": self.method, "identity": self.identity, "cluster": self.cluster, **self.values}
        lengths = {name: np.shape(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1 or len(np.shape(self.method)) != 1:
            listed = ", ".join(f"{name} {shape}" for name, shape in lengths.items())
            raise InputError(f"The columns of the scores are no table ({listed}): give a value for each picture.")

    def where(self, rows: Shaped[np.ndarray, " n"]) -> "Scores":
        """The rows that a mask [n] or indices name."""
        values = {name: column[rows] for name, column in self.values.items()}
        return Scores(self.method[rows], self.identity[rows], self.cluster[rows], values)

    def of(self, method: str) -> "Scores":
        """One method's rows."""
        return self.where(self.method == method)


def cosine(a: Rows, b: Rows) -> Values:
    """Cosine of each row of `a` with the same row of `b`; nan where either has no length."""
    return np.einsum("nd,nd->n", _unit(a), _unit(b))


def pairwise_cosine(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """Cosine of every row of `a` with every row of `b`; nan where either has no length."""
    return _unit(a) @ _unit(b).T


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, np.nan)


# Intervals. Clusters are drawn anew, not pictures: those of one person rise and fall together, and so do those of
# people who share noise. It is for people and noise not seen yet that a figure is to hold (Efron & Tibshirani 1993,
# the percentile bootstrap of clusters).


def interval(values: Values, clusters: Column, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over the scored pictures, with the percentile bootstrap over clusters (people, or groups of them).

    All pictures of a drawn cluster come along; clusters without a scored picture do not count. With fewer than two
    clusters the ends are nan.
    """
    scored = ~np.isnan(values)
    return _bootstrap([(values[scored], clusters[scored])], resamples, seed)


def difference(a: Scores, b: Scores, metric: str, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean of `a` minus mean of `b` over the people whom both scored, each resample drawing the same clusters for both.

    What makes one person, or the noise of a group, harder than another falls out of the difference.
    """
    scored = [side.where(~np.isnan(side.values[metric])) for side in (a, b)]
    people = np.intersect1d(scored[0].identity, scored[1].identity)
    both = [side.where(np.isin(side.identity, people)) for side in scored]
    return _bootstrap([(side.values[metric], side.cluster) for side in both], resamples, seed)


def above(estimate: Estimate, bar: float) -> Estimate:
    """How far an estimate lies above a bar, which is taken as known."""
    return Estimate(*(end - bar for end in estimate))


def _bootstrap(sides: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int, seed: int) -> Estimate:
    """Of (values, clusters) of the same clusters on each side: the first's mean, less the second's if there is one."""
    clusters = np.unique(sides[0][1])
    if not len(clusters):
        return Estimate(np.nan, np.nan, np.nan)
    sums, counts = np.stack([_per_cluster(values, of, clusters) for values, of in sides], axis=1)
    weights = np.concatenate([np.ones((1, len(clusters))), _draws(len(clusters), resamples, seed)])  # [1+resamples, k]
    means = (weights @ sums.T) / (weights @ counts.T)
    statistics = means[:, 0] - means[:, 1] if len(sides) == 2 else means[:, 0]
    return _estimate(statistics, len(clusters))


def _per_cluster(values: np.ndarray, of: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Sums and counts [2, k] of the values of each of `clusters`, which are sorted and all there are."""
    codes = np.searchsorted(clusters, of)
    sums = np.bincount(codes, values.astype(np.float64), len(clusters))
    return np.stack([sums, np.bincount(codes, minlength=len(clusters))])


def _draws(clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each is drawn [resamples, clusters]: as many draws as there are clusters, with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(float)


def _estimate(statistics: np.ndarray, clusters: int) -> Estimate:
    """Of a statistic [1 + resamples]: as observed, then resampled."""
    if clusters < 2:
        return Estimate(float(statistics[0]), np.nan, np.nan)
    low, high = np.quantile(statistics[1:], [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Estimate(float(statistics[0]), float(low), float(high))


def verdict(estimate: Estimate, bound: float = 0.0) -> Verdict:
    """What an interval says of the claim that a figure is greater than `bound`.

    Confirmed where the whole interval lies above it, contradicted where it lies below, else not confirmed. "A loss of
    0.02 at most" is a difference greater than -0.02.
    """
    return "confirmed" if estimate.low > bound else "contradicted" if estimate.high < bound else "not confirmed"


# Faces.


def impostor_bar(impostors: Float[np.ndarray, " p"]) -> float:
    """The similarity that 95 % of the pairs of two different people stay below."""
    return float(np.nanpercentile(impostors, 95))


def half_way(chance: float, judge: float) -> float:
    """The accuracy half-way between guessing and what the judge reaches on real pictures: an attribute's bar."""
    return (chance + judge) / 2


def identity_fidelity(
    scores: Scores, metrics: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Estimate]:
    """Each method's mean over `metrics` of its z-score among the methods (Infinite-ID Sec. A, the axis of Fig. 9).

    The scale is that of the observed means (standard deviation over the methods, not over samples of them); the
    interval resamples clusters, the same for all metrics. Raises InputError for a method without a score.
    """
    methods, clusters = np.unique(scores.method), np.unique(scores.cluster)
    weights = np.concatenate([np.ones((1, len(clusters))), _draws(len(clusters), resamples, seed)])
    axis = np.zeros((len(weights), len(methods)))
    for metric in metrics:
        column = scores.values[metric]
        scored = scores.where(~np.isnan(column))
        missing = set(methods) - set(scored.method)
        if missing:
            raise InputError(f"{min(missing)} has no score in {metric}: leave the method out of the comparison.")
        totals = [_per_cluster(s.values[metric], s.cluster, clusters) for s in map(scored.of, methods)]
        sums, counts = np.stack(totals, axis=1)  # [methods, k] each
        with np.errstate(invalid="ignore"):  # a resample without any score of a method is nan
            means = (weights @ sums.T) / (weights @ counts.T)
        spread = means[0].std()
        axis += (means - means[0].mean()) / (spread if spread > 0 else 1) / len(metrics)
    whole = axis[~np.isnan(axis).any(axis=1)]
    return {str(name): _estimate(whole[:, i], len(clusters)) for i, name in enumerate(methods)}


def monotone_share(
    similarities: Float[np.ndarray, "n k"], clusters: Column, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Share of neighbouring steps of an interpolation at which a similarity rises, of `n` rows of `k` steps each.

    For the similarity to whom one leaves, give its negative. Chance is 0.5.
    """
    steps = np.diff(similarities, axis=1)
    rises = np.where(np.isnan(steps), np.nan, steps > 0)
    return interval(rises.ravel(), np.repeat(clusters, rises.shape[1]), resamples=resamples, seed=seed)


# Variety and quality.


def diversity(features: Rows, identities: Column) -> Pairs:
    """Squared distance of the features of each pair of pictures of one person.

    Over LPIPS's scaled and flattened features this is LPIPS; over unit vectors it is 2 (1 - cosine).
    """
    first, second = _pairs_within(identities)
    gram = features.astype(np.float64) @ features.astype(np.float64).T  # the pairs themselves would fill the memory
    lengths = gram.diagonal()
    return Pairs(np.maximum(lengths[first] + lengths[second] - 2 * gram[first, second], 0), identities[first])


def trusted_diversity(
    features: Float[np.ndarray, "n d"], embeddings: Float[np.ndarray, "n e"], identities: Column
) -> Pairs:
    """`diversity` times the cosine of the pair's face embeddings (StableIdentity Sec. 4.1, Table 1).

    Pictures that differ because they show different people earn nothing. (The paper pairs each generated picture
    with a real one of its person; here each is paired with the others drawn of that person.)
    """
    first, second = _pairs_within(identities)
    values, names = diversity(features, identities)
    return Pairs(values * cosine(embeddings[first], embeddings[second]), names)


def _pairs_within(identities: np.ndarray) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    first, second = np.triu_indices(len(identities), k=1)
    same = identities[first] == identities[second]
    return first[same], second[same]


def kid(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Kernel distance of two sets of features: unbiased, so that it can fall below 0 (Binkowski et al. 2018, Eq. 4).

    The squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, made for features whose entries, not whose
    rows, are near 1. The figure depends on the features: name them with it. Under 2,000 pictures it comes before the
    Frechet distance, whose bias grows as the sets shrink. Raises InputError for fewer than two rows.
    """
    _need_two(a, b)

    def within(x: np.ndarray) -> float:
        gram = _kernel(x, x)
        return (gram.sum() - gram.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * _kernel(a, b).mean())


def kid_interval(
    a: Float[np.ndarray, "n d"],
    clusters_a: Shaped[np.ndarray, " n"],
    b: Float[np.ndarray, "m d"],
    clusters_b: Shaped[np.ndarray, " m"],
) -> Estimate:
    """`kid` of two whole sets with the jackknife over clusters: each is left out of both sets in turn.

    A bootstrap would count a cluster drawn twice as two that look alike. Near 0 the interval is wider than need be.
    Raises InputError where a set has fewer than two rows without one of the clusters.
    """
    both = np.unique(np.concatenate([clusters_a, clusters_b]))
    in_a, in_b = ((clusters[:, None] == both).astype(np.float64) for clusters in (clusters_a, clusters_b))
    left_a, left_b = (len(rows) - rows.sum(axis=0) for rows in (in_a, in_b))  # [k]
    if min(left_a.min(), left_b.min()) < 2:
        raise InputError("Without one of the people a set has fewer than two pictures: give pictures of more people.")

    def sums(gram: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Of the kernel without each cluster [k]."""
        blocks = rows.T @ gram @ columns  # [k, k]
        return gram.sum() - blocks.sum(axis=0) - blocks.sum(axis=1) + blocks.diagonal()

    def within(x: np.ndarray, rows: np.ndarray, left: np.ndarray) -> np.ndarray:
        gram = _kernel(x, x)
        np.fill_diagonal(gram, 0)
        return sums(gram, rows, rows) / (left * (left - 1))

    across = sums(_kernel(a, b), in_a, in_b) / (left_a * left_b)
    left_out = within(a, in_a, left_a) + within(b, in_b, left_b) - 2 * across
    reach = 1.96 * np.sqrt((len(both) - 1) * left_out.var())
    value = kid(a, b)
    return Estimate(value, float(value - reach), float(value + reach))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1) ** 3


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Frechet distance of the normal distributions fitted to two sets of features (Heusel et al. 2017, Eq. 6).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). It is FID only over Inception's pool3 features: name
    those that were used. Raises InputError for fewer than two rows.
    """
    _need_two(a, b)
    means, roots = zip(*(_moments(x.astype(np.float64)) for x in (a, b)), strict=True)
    # With C = R^T R, the trace of (C_a C_b)^(1/2) is the sum of the singular values of R_a R_b^T: no square root of
    # a product that rounding has made indefinite.
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + sum(np.square(r).sum() for r in roots) - 2 * shared)


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and a root R [min(n, d), d] of the unbiased covariance R^T R."""
    mean = x.mean(axis=0)
    return mean, np.linalg.qr(x - mean, mode="r") / np.sqrt(len(x) - 1)


def _need_two(a: np.ndarray, b: np.ndarray) -> None:
    if min(len(a), len(b)) < 2:
        raise InputError(f"Sets of {len(a)} and {len(b)} pictures have no distance: give two pictures or more to each.")
