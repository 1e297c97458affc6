import itertools

import pytest
from optuna.distributions import CategoricalDistribution

from segadapt import search_spaces
from segadapt.platform.settings.config import keys, resolve
from segadapt.trainables import METHODS

NAMES = [method.name for method in METHODS]


@pytest.mark.parametrize("method", NAMES)
def test_every_searched_key_is_a_setting(method: str) -> None:
    space, presets = search_spaces.load(method)
    assert set(space) <= set(keys(method))
    assert set(space) == set(presets["paper"])


@pytest.mark.parametrize("method", NAMES)
def test_every_corner_of_the_space_is_a_valid_configuration(method: str) -> None:
    space, _ = search_spaces.load(method)
    ends = [
        [distribution.choices[0], distribution.choices[-1]]
        if isinstance(distribution, CategoricalDistribution)
        else [distribution.low, distribution.high]
        for distribution in space.values()
    ]
    for corner in itertools.islice(itertools.product(*ends), 4096):
        resolve(method, dict(zip(space, corner, strict=True)))


@pytest.mark.parametrize("method", NAMES)
def test_every_preset_is_a_valid_configuration_in_the_space(method: str) -> None:
    space, presets = search_spaces.load(method)
    assert {"paper", "quick"} <= set(presets)
    for preset in presets.values():
        resolve(method, preset)
        for key in set(preset) & set(space):
            assert space[key]._contains(space[key].to_internal_repr(preset[key])), key


@pytest.mark.parametrize("method", NAMES)
def test_the_published_setting_lies_in_the_space_and_equals_the_defaults(method: str) -> None:
    space, presets = search_spaces.load(method)
    paper = presets["paper"]
    default, published = resolve(method, {}), resolve(method, paper)
    assert published == default
    for key, value in paper.items():
        assert space[key]._contains(space[key].to_internal_repr(value))


@pytest.mark.parametrize("method", NAMES)
def test_every_published_value_says_how_sure_it_is(method: str) -> None:
    space, _ = search_spaces.load(method)
    confidence = search_spaces.confidence(method)
    assert list(confidence) == list(space)
    assert set(confidence.values()) <= {"low", "medium", "high"}
