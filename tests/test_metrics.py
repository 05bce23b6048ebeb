"""Metrics against closed forms and simulations; intervals that hold for people and noise, not for pictures."""

import numpy as np
import pytest

from infinite_id_jax.errors import InputError
from infinite_id_jax.evaluation import claims
from infinite_id_jax.evaluation.metrics import (
    Estimate,
    Scores,
    above,
    cosine,
    difference,
    diversity,
    frechet_distance,
    half_way,
    identity_fidelity,
    impostor_bar,
    interval,
    kid,
    kid_interval,
    monotone_share,
    pairwise_cosine,
    trusted_diversity,
    verdict,
)

NAN = float("nan")


def people(count: int, each: int = 1) -> np.ndarray:
    return np.repeat([f"person {i}" for i in range(count)], each)


def table(values: np.ndarray, names: np.ndarray, clusters: np.ndarray | None = None) -> Scores:
    """One method's scores `x`; people are clusters of their own unless others are given."""
    return Scores(np.full(len(names), "ours"), names, names if clusters is None else clusters, {"x": values})


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def test_cosines():
    a, b = np.array([[3.0, 0], [0, 2], [0, 0]]), np.array([[1.0, 1], [0, 5], [1, 0]])
    np.testing.assert_allclose(cosine(a, b), [np.sqrt(0.5), 1, NAN])
    np.testing.assert_allclose(pairwise_cosine(a, b)[:2], [[np.sqrt(0.5), 0, 1], [np.sqrt(0.5), 1, 0]], atol=1e-12)


def test_columns_of_different_length_are_no_table():
    names = np.array(["ours", "ours"])
    with pytest.raises(InputError, match=r"m_face \(1,\)"):
        Scores(names, people(2), people(2), {"m_face": np.ones(1)})


def test_rows_of_a_method():
    scores = Scores(np.array(["a", "b", "a"]), people(3), np.array([7, 7, 8]), {"x": np.array([1.0, 2.0, 3.0])})
    mine = scores.of("a")
    assert list(mine.identity) == ["person 0", "person 2"]
    assert list(mine.cluster) == [7, 8]
    assert list(mine.values["x"]) == [1, 3]


def test_an_interval_leaves_out_what_was_not_scored():
    values = np.array([1.0, NAN, 3.0, 5.0, NAN])
    names = np.array(["a", "a", "b", "b", "c"])  # nothing of c was scored
    estimate = interval(values, names)
    assert estimate.value == 3  # over pictures, not over people's means
    # Of two people, a quarter of the resamples hold a alone and a quarter b alone.
    assert (estimate.low, estimate.high) == (1, 4)
    assert np.isnan(interval(np.array([NAN]), people(1))).all()
    alone = interval(np.array([1.0, 2.0]), people(1, 2))
    assert alone.value == 1.5
    assert np.isnan(alone[1:]).all()  # one person says nothing of others


def test_an_interval_is_the_same_each_time_and_another_with_another_seed():
    values = np.random.default_rng(0).normal(size=40)
    assert interval(values, people(40)) == interval(values, people(40))
    assert interval(values, people(40)) != interval(values, people(40), seed=1)


def test_more_pictures_of_the_same_people_narrow_nothing():
    values = np.random.default_rng(0).normal(size=30)
    once, copied = interval(values, people(30)), interval(np.repeat(values, 9), people(30, 9))
    assert copied == pytest.approx(once, abs=1e-12)
    # Taken for different people, the copies would make it three times as narrow (measured 2.86).
    assert width(once) / width(interval(np.repeat(values, 9), people(270))) == pytest.approx(3, abs=0.3)


def test_an_interval_covers_what_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):  # 60 people whose level differs, 3 pictures each, the true mean 0
        values = np.repeat(rng.normal(size=60), 3) + rng.normal(size=180)
        estimate = interval(values, people(60, 3), resamples=400)
        hits += estimate.low < 0 < estimate.high
    assert 0.91 < hits / 400 < 0.98  # 95% is promised; measured 0.93; over pictures 0.78


def test_a_paired_difference_forgets_who_is_hard():
    rng = np.random.default_rng(0)
    level = np.repeat(rng.normal(size=50), 4)
    a, b = level + 0.3 + 0.1 * rng.normal(size=200), level + 0.1 * rng.normal(size=200)
    names = people(50, 4)
    paired = difference(table(a, names), table(b, names), "x")
    assert paired.value == pytest.approx(a.mean() - b.mean())
    assert paired.low > 0.25  # measured 0.280 to 0.316
    assert paired.high < 0.35
    assert width(paired) < width(interval(a, names)) / 10
    swapped = difference(table(b, names), table(a, names), "x")
    assert swapped == pytest.approx((-paired.value, -paired.high, -paired.low), abs=1e-3)


def test_a_difference_is_over_the_people_both_scored():
    a, b = np.array([1.0, 2.0, 100.0, 7.0]), np.array([NAN, 0.0, 1.0, 5.0])
    names_a, names_b = np.array(["a", "b", "c", "d"]), np.array(["c", "a", "b", "d"])
    estimate = difference(table(a, names_a), table(b, names_b), "x")  # c has no score on one side
    assert estimate.value == pytest.approx((1 + 2 + 7) / 3 - (0 + 1 + 5) / 3)
    assert np.isnan(difference(table(a, names_a), table(b, people(4)), "x")).all()  # nobody in common


def test_claims_pair_the_pictures_that_both_were_scored_on():
    """Where one method's face was never found in a prompt, that prompt says nothing of the other either."""

    def rows(scores):
        keys = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
        return [
            {"method": "m", "identity": i, "group": i, "prompt": p, "x": x}
            for (i, p), x in zip(keys, scores, strict=True)
        ]

    estimate = claims._paired(rows([0.8, None, 0.8, 0.5]), rows([0.8, 0.4, 0.8, 0.4]), "x")
    assert estimate.value == pytest.approx(0.1 / 3)
    assert np.isnan(claims._paired(rows([1, None, 1, None]), rows([None, 1, None, 1]), "x")).all()


def test_people_who_share_noise_are_drawn_together():
    """20 groups of 4 people whose noise differs more than they do, the true mean 0."""
    rng = np.random.default_rng(0)
    names, groups = people(80), np.repeat(np.arange(20), 4)
    hits = {"groups": 0, "people": 0}
    for _ in range(300):
        values = np.repeat(rng.normal(size=20), 4) + 0.3 * rng.normal(size=80)
        for name, clusters in (("groups", groups), ("people", names)):
            estimate = interval(values, clusters, resamples=300)
            hits[name] += estimate.low < 0 < estimate.high
    assert hits["groups"] / 300 > 0.87  # measured 0.91; 95% is promised, of many groups
    assert hits["people"] / 300 < 0.75  # measured 0.63

    level = np.repeat(rng.normal(size=20), 4)
    a, b = table(level + 0.5, names, groups), table(level, names, groups)
    assert difference(a, b, "x") == pytest.approx((0.5, 0.5, 0.5))  # what a group shares falls out
    one, other = (table(side.values["x"], names, np.zeros(80, int)) for side in (a, b))
    alone = difference(one, other, "x")
    assert np.isnan(alone[1:]).all()  # one group says nothing of other noise
    # Paired over people still: of one group, only those whom both scored.
    a.values["x"][1] = NAN
    b.values["x"][1] = 1e6
    assert difference(a, b, "x").value == pytest.approx(0.5)


def test_a_bar_is_taken_as_known():
    assert above(Estimate(0.5, 0.25, 1.0), 0.25) == (0.25, 0, 0.75)


@pytest.mark.parametrize(
    ("low", "high", "bound", "said"),
    [
        (0.1, 0.3, 0, "confirmed"),
        (-0.1, 0.3, 0, "not confirmed"),
        (-0.3, -0.1, 0, "contradicted"),
        (0.0, 0.0, 0, "not confirmed"),  # no difference at all
        (-0.01, 0.1, -0.02, "confirmed"),  # a small cost at most
        (-0.03, 0.1, -0.02, "not confirmed"),
        (-0.09, -0.03, -0.02, "contradicted"),
        (NAN, NAN, 0, "not confirmed"),
    ],
)
def test_verdicts(low, high, bound, said):
    assert verdict(Estimate((low + high) / 2, low, high), float(bound)) == said


def test_bars():
    bar = impostor_bar(np.arange(101) / 100)
    assert bar == pytest.approx(0.95)
    assert half_way(0.2, 0.9) == pytest.approx(0.55)


def test_fidelity_is_the_mean_of_z_scores():
    rng = np.random.default_rng(0)
    method = np.repeat(["a", "b", "c"], 20)
    face = np.repeat([0.2, 0.4, 0.6], 20)
    clip = np.repeat([30.0, 10.0, 20.0], 20)  # on another scale
    scores = Scores(method, np.tile(people(20), 3), np.tile(people(20), 3), {"face": face, "clip": clip})
    z = np.sqrt(1.5)
    axis = identity_fidelity(scores, ["face", "clip"])
    assert {name: e.value for name, e in axis.items()} == pytest.approx({"a": 0, "b": -z / 2, "c": z / 2})
    assert axis["c"] == pytest.approx((z / 2,) * 3)  # all people alike: no spread

    noisy = Scores(method, scores.identity, scores.cluster, {"face": face + 0.1 * rng.normal(size=60)})
    one = identity_fidelity(noisy, ["face"])
    assert one["a"].high < one["b"].low
    face[:20] = NAN
    with pytest.raises(InputError, match="a has no score in face"):
        identity_fidelity(scores, ["face"])


def test_share_of_rising_steps():
    rising, falling = np.linspace(0, 1, 5), np.linspace(1, 0, 5)
    assert monotone_share(np.stack([rising, rising]), people(2)) == (1, 1, 1)
    half = monotone_share(np.stack([rising, falling]), people(2))
    assert half == (0.5, 0, 1)
    gap = np.array([[0.0, NAN, 1.0, 2.0, 1.0]])
    assert monotone_share(gap, people(1)).value == 0.5  # of the two steps that have both ends


def test_diversity_is_within_people():
    features = np.array([[0.0, 0], [3, 4], [0, 1], [100, 0], [100, 2]])
    names = np.array(["a", "a", "a", "b", "b"])
    values, owners = diversity(features, names)
    assert list(values) == [25, 1, 9 + 9, 4]
    assert list(owners) == ["a", "a", "a", "b"]

    faces = np.array([[1.0, 0], [1, 0], [0, 1], [1, 0], [-1, 0]])  # one of a, and one of b, shows somebody else
    assert list(trusted_diversity(features, faces, names).values) == [25, 0, 0, -4]


def test_kid_by_hand():
    """Binkowski's Eq. 4 for three rows against two, written out."""
    a, b = np.array([[1.0, 0], [0, 1], [1, 1]]), np.array([[2.0, 0], [0, -1]])

    def k(x, y):
        return (x @ y / 2 + 1) ** 3

    within_a = (k(a[0], a[1]) + k(a[0], a[2]) + k(a[1], a[2])) / 3
    across = sum(k(x, y) for x in a for y in b) / 6
    assert kid(a, b) == pytest.approx(within_a + k(b[0], b[1]) - 2 * across, rel=1e-12)
    assert kid(b, a) == pytest.approx(kid(a, b), rel=1e-12)


def test_kid_is_unbiased():
    rng = np.random.default_rng(0)
    same = [kid(*rng.normal(size=(2, 30, 8))) for _ in range(300)]
    error = np.std(same) / np.sqrt(300)
    assert abs(np.mean(same)) < 3 * error  # measured 0.005 and an error of 0.008; with the diagonals it would be 0.56
    assert min(same) < 0
    a, b = rng.normal(size=(2, 500, 8))
    shifted = kid(a, b + 0.5)
    assert shifted > 10 * abs(kid(a, b))


def test_the_interval_of_kid_is_as_wide_as_kid_varies():
    rng = np.random.default_rng(0)
    names = people(40, 3)

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        """`a`, and `b` of the same people but shifted."""
        level = np.repeat(rng.normal(size=(40, 32)), 3, axis=0)
        noise = rng.normal(size=(2, 120, 32))
        return (level + noise[0]) / np.sqrt(2), (level + noise[1]) / np.sqrt(2) + 0.5

    estimates = [kid_interval(a, names, b, names) for a, b in (drawn() for _ in range(150))]
    spread = np.std([e.value for e in estimates])
    # Measured 0.98.
    assert np.mean([width(e) for e in estimates]) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.1)
    a, b = drawn()
    assert kid_interval(a, names, b, names).value == kid(a, b)


def test_leaving_a_person_out_is_leaving_the_rows_out():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 3)), rng.normal(size=(7, 3))
    of_a, of_b = np.array(list("aabbcc")), np.array(list("bbccddd"))
    by_hand = np.array([kid(a[of_a != name], b[of_b != name]) for name in "abcd"])
    value, low, high = kid_interval(a, of_a, b, of_b)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(3 / 4 * np.square(by_hand - by_hand.mean()).sum()))
    assert value == pytest.approx((high + low) / 2)
    with pytest.raises(InputError, match="fewer than two pictures"):
        kid_interval(a, np.array(["a"] * 6), b, of_b)


def test_frechet_distance_of_two_normal_distributions():
    rng = np.random.default_rng(0)

    def normal(mean: np.ndarray, covariance: np.ndarray, rows: int = 200) -> np.ndarray:
        """Rows whose mean and unbiased covariance are exactly these."""
        x = rng.normal(size=(rows, len(mean)))
        x -= x.mean(axis=0)
        x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
        return x @ np.linalg.cholesky(covariance).T + mean

    mean, variance = np.array([1.0, -2.0, 0.5]), np.array([4.0, 9.0, 0.25])
    expected = np.square(mean).sum() + np.square(np.sqrt(variance) - 1).sum()  # for covariances that commute
    assert frechet_distance(normal(np.zeros(3), np.eye(3)), normal(mean, np.diag(variance))) == pytest.approx(expected)

    # For those that do not, the eigenvalues of the product of two.
    root_a, root_b = rng.normal(size=(2, 3, 3))
    one, two = root_a @ root_a.T, root_b @ root_b.T
    trace = np.sqrt(np.linalg.eigvals(one @ two).real).sum()
    found = frechet_distance(normal(np.zeros(3), one), normal(np.zeros(3), two))
    assert found == pytest.approx(np.trace(one) + np.trace(two) - 2 * trace)

    few = rng.normal(size=(5, 64)).astype(np.float32)  # fewer pictures than features
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, few + 1) == pytest.approx(64, rel=1e-5)


@pytest.mark.parametrize("distance", [kid, frechet_distance])
def test_one_picture_has_no_distance(distance):
    with pytest.raises(InputError, match="Sets of 1 and 3 pictures"):
        distance(np.ones((1, 2)), np.ones((3, 2)))
