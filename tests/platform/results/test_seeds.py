"""Configurations over several seeds."""

import math

import pytest
from scipy import stats

from segadapt.platform.results.seeds import rerank, verdict


def test_the_mean_decides_with_students_interval() -> None:
    runs = {"a": {1: 0.60, 2: 0.70, 3: 0.65}, "b": {3: 0.68, 1: 0.64, 2: 0.74}}
    first, second = rerank(runs)
    assert (first.name, second.name) == ("b", "a")
    low, high = stats.t.interval(0.95, 2, loc=first.mean, scale=stats.sem(list(runs["b"].values())))
    assert first.mean - first.half_width == pytest.approx(low)
    assert first.mean + first.half_width == pytest.approx(high)
    lacks = [0.04, 0.04, 0.03]
    assert second.behind == pytest.approx(sum(lacks) / 3)
    paired = stats.t.interval(0.95, 2, loc=0, scale=stats.sem(lacks))[1]
    assert second.behind_half_width == pytest.approx(paired)
    assert not second.within_noise, "paired by seed the difference is clear, though the intervals overlap"
    assert verdict([first, second]) == "b is better than the others beyond the noise of 3 seeds."


def test_differences_are_paired_by_seed() -> None:
    _, second = rerank({"a": {1: 0.6, 2: 0.7}, "b": {1: 0.72, 2: 0.6}})
    assert second.behind_half_width == pytest.approx(stats.t.interval(0.95, 1, loc=0, scale=stats.sem([0.12, -0.1]))[1])


def test_a_difference_within_noise_is_said() -> None:
    ranking = rerank(
        {"a": {1: 0.6, 2: 0.7, 3: 0.65}, "b": {1: 0.7, 2: 0.61, 3: 0.66}, "c": dict.fromkeys((1, 2, 3), 0.1)}
    )
    assert verdict(ranking) == "b leads, but within the noise of seeds a may be as good."


def test_only_seeds_that_all_have_count() -> None:
    first, second = rerank({"a": {1: 0.6, 2: 0.9}, "b": {1: 0.7}})
    assert (first.name, first.mean, second.mean) == ("b", 0.7, 0.6)
    assert first.half_width is None
    assert second.within_noise, "one seed settles nothing"
    assert rerank({"a": {1: 0.5}, "b": {2: 0.5}}) == []
    assert not math.isnan(first.mean)
