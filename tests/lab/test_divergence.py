"""Perplexity, divergence and agreement on distributions small enough to know the answer."""

import math

import numpy as np
import pytest

from lab.divergence import ROWS, Scores, kl_divergence, log_softmax, perplexity_difference, surprise


def logits_of(*rows):
    return np.log(np.array(rows, np.float64)).astype(np.float32)


def scored(logits, against, targets):
    scores = Scores()
    scores.add(logits, against, np.array(targets))
    return scores


def test_log_probabilities_sum_to_one_whatever_the_size_of_the_logits():
    rows = np.array([[0, 0, 0, 0], [1e4, 1e4 - 1, -1e4, 0], [-3e38, -3e38, -3e38, -3e38]], np.float32)
    np.testing.assert_allclose(np.exp(log_softmax(rows)).sum(axis=-1), 1, rtol=1e-12)
    np.testing.assert_allclose(log_softmax(rows)[0], -math.log(4), rtol=1e-12)


def test_surprise_takes_the_token_that_came():
    log_probs = log_softmax(logits_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8]))
    np.testing.assert_allclose(surprise(log_probs, np.array([0, 1])), [math.log(2), math.log(10)], rtol=1e-6)


def test_divergence_has_a_direction():
    fair, biased = log_softmax(logits_of([0.5, 0.5])), log_softmax(logits_of([0.25, 0.75]))
    from_fair = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    from_biased = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert from_fair != pytest.approx(from_biased, rel=0.01)
    np.testing.assert_allclose(kl_divergence(fair, biased), from_fair, rtol=1e-6)
    np.testing.assert_allclose(kl_divergence(biased, fair), from_biased, rtol=1e-6)


def test_scores_call_the_other_one_against():
    biased, fair = logits_of([0.25, 0.75]), logits_of([0.5, 0.5])
    expected = kl_divergence(log_softmax(fair), log_softmax(biased))
    assert scored(biased, fair, [0]).divergence == pytest.approx(float(expected[0]))


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    rows = np.full((3 * ROWS + 1, 11), 7.5, np.float32)
    assert scored(rows, rows, [i % 11 for i in range(len(rows))]).perplexity == pytest.approx(11)


def test_equal_logits_are_at_no_distance():
    rows = np.random.default_rng(0).normal(size=(2 * ROWS + 3, 50)).astype(np.float32)
    scores = scored(rows, rows, np.arange(len(rows)))
    assert (scores.divergence, scores.divergence_p99, scores.agreement) == (0, 0, 1)
    assert perplexity_difference(scores, scores, len(rows))[0] == 0


def test_adding_in_pieces_changes_nothing():
    generator = np.random.default_rng(1)
    rows, other = (generator.normal(size=(40, 30)).astype(np.float32) for _ in range(2))
    targets = generator.integers(0, 30, 40)
    whole, pieces = scored(rows, other, targets), Scores()
    for start, end in ((0, 1), (1, 20), (20, 40)):
        pieces.add(rows[start:end], other[start:end], targets[start:end])
    for name in ("perplexity", "divergence", "divergence_p99", "agreement"):
        assert getattr(whole, name) == getattr(pieces, name), name
    assert 0 < whole.agreement < 1


def test_rows_without_a_target_are_left_out():
    rows = logits_of([0.5, 0.5], [0.9, 0.1], [0.1, 0.9])
    assert scored(rows, rows, [0, 0]).perplexity == pytest.approx(math.sqrt(2 / 0.9))


def test_difference_is_relative_and_its_error_is_that_of_windows():
    fair = logits_of(*[[0.5, 0.5]] * 4)
    tested = logits_of([0.4, 0.6], [0.4, 0.6], [0.25, 0.75], [0.25, 0.75])
    a, b = scored(tested, fair, [0] * 4), scored(fair, fair, [0] * 4)
    difference, error = perplexity_difference(a, b, 2)
    assert difference == pytest.approx(a.perplexity / b.perplexity - 1)
    means = math.log(0.5 / 0.4), math.log(0.5 / 0.25)
    assert error == pytest.approx(abs(means[0] - means[1]) / 2)


def test_one_window_has_no_error():
    fair = scored(logits_of([0.5, 0.5]), logits_of([0.5, 0.5]), [0])
    assert math.isnan(perplexity_difference(fair, fair, 1)[1])
