"""Experiments that another version of segadapt began: what it pickled cannot be read here, and is left alone."""

import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
from optuna.distributions import FloatDistribution

import segadapt as api
from segadapt.platform.doctor.examination import LEDGER_CHECKS
from segadapt.platform.doctor.ledgers import Ledgers
from segadapt.platform.doctor.ray_state import RayTrial
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment.events import Events, events_of_session
from segadapt.platform.experiment.record import Candidate, Record
from segadapt.platform.experiment.tune_state import TUNER, of_another_version
from segadapt.platform.storage.folders import Place, Storage

GONE = "segadapt.platform.events"
"""Where the events of experiments were defined before the platform had packages."""


def of_gone_module() -> bytes:
    """What was pickled of an experiment by a version whose modules have moved since."""
    module = ModuleType(GONE)
    earlier = type("Events", (), {"__module__": GONE})
    module.Events = earlier  # type: ignore[attr-defined]
    sys.modules[GONE] = module
    try:
        return pickle.dumps({"callbacks": [earlier()]})
    finally:
        del sys.modules[GONE]


PICKLES = {"moved": of_gone_module(), "changed": pickle.dumps({"callbacks": [Events]})}


@pytest.fixture(params=["moved", "changed"])
def begun(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A storage folder with a search that another version began."""
    place = Place(tmp_path / "runs")
    space = {"method.temperature": FloatDistribution(0.1, 10.0)}
    candidate = Candidate({"trainer.steps": 4}, space, {"method.temperature": 1.0})
    record = Record("search", "earlier", {"sdca": candidate}, "target_val/miou")
    record.save(place.folders)
    (place.folders.experiment("earlier") / TUNER).write_bytes(PICKLES[request.param])
    return place


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_refused_before_anything_is_touched(begun: Place) -> None:
    root = Path(begun.storage)
    before = contents(root)
    with pytest.raises(UsageError, match=r"begun by another version of segadapt.*--warm-start earlier"):
        api.search(resume="earlier", place=begun)
    assert contents(root) == before


def test_doctor_says_the_same(begun: Place) -> None:
    trial = RayTrial("a", "RUNNING", {}, None, None, None)
    folders = frozenset({"earlier"})
    ledgers = Ledgers("earlier", begun, None, [], {"earlier/a": trial}, folders, {}, None)
    (finding,) = LEDGER_CHECKS[-1](ledgers)
    assert finding.level == "warning"
    assert str(of_another_version(begun.folders, "earlier")) in finding.text


def test_what_this_version_wrote_goes_on(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert of_another_version(storage, "none") is None
    folder = storage.experiment("new")
    folder.mkdir(parents=True)
    written = pickle.dumps({"callbacks": [events_of_session]})
    (folder / TUNER).write_bytes(written)
    assert of_another_version(storage, "new") is None
    (folder / TUNER).write_bytes(written[:-9])
    assert of_another_version(storage, "new") is None, "what a kill cut short is mended, not refused"
