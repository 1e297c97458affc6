"""The surrogate that searches are compared on: what its file promises."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np

from segadapt import search_spaces

FOLDER = Path(__file__).parents[1] / "benchmarks" / "surrogate"


def load_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("surrogate_model", FOLDER / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


surrogate = load_model().Surrogate()
SPACE, PRESETS = search_spaces.load(surrogate.method)


def test_its_space_is_the_methods() -> None:
    assert list(surrogate.space) == list(SPACE)
    assert (FOLDER / "surrogate.json").stat().st_size < 200_000


def test_curves_are_deterministic_and_lie_between_0_and_1() -> None:
    ends = [(d.choices if hasattr(d, "choices") else (d.low, d.high)) for d in SPACE.values()]
    corners = [
        dict(zip(SPACE, corner, strict=True)) for corner in itertools.islice(itertools.product(*ends), 0, None, 8)
    ]
    for seed, values in enumerate([*corners, PRESETS["paper"], PRESETS["streets"]]):
        curve = surrogate.curve(values)
        noisy = surrogate.noisy_curve(values, seed)
        assert curve.shape == noisy.shape == (len(surrogate.steps),)
        assert ((curve >= 0) & (curve <= 1)).all()
        assert ((noisy >= 0) & (noisy <= 1)).all()
        assert np.array_equal(noisy, surrogate.noisy_curve(dict(reversed(values.items())), seed))
    assert not np.array_equal(surrogate.noisy_curve(PRESETS["paper"], 0), surrogate.noisy_curve(PRESETS["paper"], 1))


def test_the_tuned_preset_beats_the_published_one() -> None:
    assert surrogate.final(PRESETS["streets"]) > surrogate.final(PRESETS["paper"])
