"""Every kind of disorder, put into the storage folder of a real search: named, repaired, and gone the next time."""

import hashlib
import json
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from searching import Watched, free_port
from typer.testing import CliRunner

import segadapt as api
from segadapt.platform.cli.main import app
from segadapt.platform.doctor.findings import Finding
from segadapt.platform.errors import UsageError
from segadapt.platform.experiment import tune_state
from segadapt.platform.ray_internals.trials import HASHES
from segadapt.platform.storage import leases
from segadapt.platform.storage.checkpoints import delete, put_away
from segadapt.platform.storage.driving import driving
from segadapt.platform.storage.files import file_system, keeps_locks_apart
from segadapt.platform.storage.folders import Place
from segadapt.platform.tracking.client import waiting_folder
from segadapt.platform.tracking.outbox import Outbox
from segadapt.platform.tracking.tags import NOT_KEPT

NAME = Watched.NAME


@dataclass
class Case:
    """A copy of the search's storage folder, and what a disorder is made of."""

    root: Path
    trials: Mapping[str, str]
    """Trial ids by the name of their run."""
    noted: dict[str, Any] = field(default_factory=dict)
    """What the disorder took away, to compare with after the repair."""

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.root}/mlflow.db")

    def run(self, name: str) -> Any:
        client = self.client
        experiment = client.get_experiment_by_name(NAME)
        assert experiment is not None
        (found,) = (run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == name)
        return found

    @property
    def study(self) -> Any:
        return optuna.load_study(study_name=NAME, storage=f"sqlite:///{self.root}/optuna.db")

    def proposal(self, name: str) -> Any:
        found = [trial for trial in self.study.trials if trial.user_attrs.get("trial_id") == self.trials[name]]
        return found[0]

    def sql(self, database: str, *statements: str) -> None:
        with closing(sqlite3.connect(self.root / database)) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    def forget_end(self, name: str) -> None:
        """Leave a run in MLflow as a kill just before its end does."""
        run_id = self.run(name).info.run_id
        ends = "('segadapt.checkpoint', 'segadapt.best_step', 'mlflow.note.content', 'segadapt.failure')"
        self.sql(
            "mlflow.db",
            f"update runs set status = 'RUNNING', end_time = null where run_uuid = '{run_id}'",
            f"update tags set value = 'running' where key = 'segadapt.state' and run_uuid = '{run_id}'",
            f"delete from tags where run_uuid = '{run_id}' and key in {ends}",
            f"delete from latest_metrics where run_uuid = '{run_id}' and key like 'best/%'",
        )

    def ray(self, name: str, **changes: Any) -> None:
        """Change what Ray saved of a trial; `gone=True` takes the trial out."""
        (path,) = (self.root / "ray" / NAME).glob("experiment_state-*.json")
        content = json.loads(path.read_text())
        kept = []
        for trial, more in content["trial_data"]:
            decoded = json.loads(trial)
            if decoded["trial_id"] == self.trials[name]:
                if changes.get("gone"):
                    continue
                decoded |= changes
            kept.append([json.dumps(decoded), more])
        path.write_text(json.dumps({**content, "trial_data": kept}))
        (path.parent / HASHES).unlink(missing_ok=True)

    def checkpoint(self, name: str) -> Path:
        return self.root / self.run(name).data.tags["segadapt.checkpoint"]


def doctor(root: Path, **options: Any) -> list[Finding]:
    return list(api.doctor(place=Place(str(root)), **options))


def faults(findings: list[Finding]) -> list[str]:
    return [found.text for found in findings if found.level == "fault" and not found.repaired]


@pytest.fixture
def case(watched: Watched, tmp_path: Path) -> Case:
    root = tmp_path / "runs"
    watched.copy_storage(root)
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        found = database.execute(
            "select name, value from runs join tags using (run_uuid) where key = 'segadapt.trial_id'"
        )
        return Case(root, dict(found.fetchall()))


def test_a_search_that_runs_is_left_alone(watched: Watched) -> None:
    about = [finding for finding in watched.findings if finding.subject == NAME]
    assert [finding.text for finding in about] == ["A command works on it now: it is left alone"]
    assert not any(finding.repaired for finding in watched.findings)
    assert "refused" not in watched.output + watched.errors


def test_what_another_command_has_locked_is_left_alone_and_what_is_repaired_is_locked(case: Case) -> None:
    case.forget_end("sdca-001")
    place = Place(case.root)
    with driving(place.folders, NAME):
        before = (case.root / "mlflow.db").read_bytes()
        for fix in (True, False):
            about = [finding for finding in doctor(case.root, fix=fix) if finding.subject == NAME]
            assert [finding.text for finding in about] == ["A command works on it now: it is left alone"]
        assert (case.root / "mlflow.db").read_bytes() == before
    repairing = api.doctor(place=place, fix=True)
    assert next(finding for finding in repairing if finding.subject == NAME).repaired
    with pytest.raises(UsageError, match="One command at a time must work on an experiment"):
        api.search(resume=NAME, place=place)
    with pytest.raises(UsageError, match="One `doctor --fix` at a time must repair a storage folder"):
        doctor(case.root, fix=True)
    assert faults(list(repairing)) == faults(doctor(case.root)) == []


@pytest.mark.parametrize("said", [True, False], ids=["works", "begins"])
def test_what_a_command_works_on_or_may_begin_with_is_left_alone(said: bool, case: Case) -> None:
    case.forget_end("sdca-001")
    case.client.delete_tag(case.run("sdca-002").info.run_id, "segadapt.key")  # on another day a trial that is missing
    box = Outbox.create(waiting_folder(Place(case.root, "http://elsewhere")))
    if said:
        box.append("end_lost", {"experiment": NAME, "prefix": f"{NAME}/", "known": []})
    before = (case.root / "mlflow.db").read_bytes()
    findings = doctor(case.root, fix=True)
    assert faults(findings) == []
    assert "A command works on it now: it is left alone" in [found.text for found in findings if found.subject == NAME]
    assert (case.root / "mlflow.db").read_bytes() == before
    box._records.close()  # as when its process ends
    assert len(faults(doctor(case.root))) == 2


def test_absolute_paths_of_earlier_versions_are_sound_in_a_folder_that_was_moved(case: Case) -> None:
    for name, root in (("sdca-001", case.root), ("sdca-002", Path("/gone/runs"))):
        run = case.run(name)
        noted = root / run.data.tags["segadapt.checkpoint"]
        case.client.set_tag(run.info.run_id, "segadapt.checkpoint", str(noted))
    assert faults(doctor(case.root)) == []


def test_what_is_sound_is_left_as_it_is(case: Case) -> None:
    def contents() -> dict[Path, str]:
        files = (path for path in case.root.rglob("*") if path.is_file() and path.parent.name != "locks")
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = contents()
    findings = doctor(case.root, fix=True)
    assert [found for found in findings if found.level != "ok"] == []
    assert any("agree on 4 trials" in found.text for found in findings)
    assert contents() == before


def test_a_checkpoint_that_was_not_kept_is_no_fault_and_its_end_is_known(case: Case) -> None:
    tags = case.run("sdca-001").data.tags
    put_away(case.root / "ray" / NAME, case.trials["sdca-001"], "target_val/miou")
    delete(case.root / "ray" / NAME, case.trials["sdca-001"])
    case.client.set_tag(case.run("sdca-001").info.run_id, "segadapt.checkpoint", NOT_KEPT)
    assert faults(doctor(case.root)) == []
    case.forget_end("sdca-001")
    doctor(case.root, fix=True)
    assert faults(doctor(case.root)) == []
    assert case.run("sdca-001").data.tags == {**tags, "segadapt.checkpoint": NOT_KEPT}


def lacking_end(case: Case) -> None:
    case.noted["run"] = case.run("sdca-001")
    case.forget_end("sdca-001")


def has_end(case: Case) -> None:
    was, now = case.noted["run"], case.run("sdca-001")
    assert (now.info.status, now.data.tags) == (was.info.status, was.data.tags)
    assert {**was.data.metrics, **now.data.metrics} == was.data.metrics
    assert abs(now.info.end_time - was.info.end_time) < 60_000


def zombie(case: Case) -> None:
    case.forget_end("sdca-002")
    case.ray("sdca-002", status="RUNNING")
    number = case.proposal("sdca-002")._trial_id
    case.sql("optuna.db", f"update trials set state = 'RUNNING', datetime_complete = null where trial_id = {number}")


def is_interrupted(case: Case) -> None:
    run = case.run("sdca-002")
    assert (run.info.status, run.data.tags["segadapt.state"]) == ("KILLED", "interrupted")
    assert case.proposal("sdca-002").state.name == "RUNNING", "--resume goes on with it"
    history = case.client.get_metric_history(run.info.run_id, "time/evaluation")
    assert run.info.end_time == max(entry.timestamp for entry in history)


def zombie_search(case: Case) -> None:
    case.forget_end(NAME)


def search_is_interrupted(case: Case) -> None:
    assert (case.run(NAME).info.status, case.run(NAME).data.tags["segadapt.state"]) == ("KILLED", "interrupted")


def lost_run(case: Case) -> None:
    parent = case.run(NAME)
    tags = {"segadapt.key": f"{NAME}/unsaved", "segadapt.kind": "trial", "segadapt.state": "running"}
    case.client.create_run(parent.info.experiment_id, tags=tags, run_name="sdca-004")


def is_lost(case: Case) -> None:
    assert (case.run("sdca-004").info.status, case.run("sdca-004").data.tags["segadapt.state"]) == ("KILLED", "lost")


def duplicate_run(case: Case) -> None:
    run = case.run("sdca-001")
    tags = {"segadapt.key": run.data.tags["segadapt.key"], "segadapt.kind": "trial", "segadapt.method": "sdca"}
    case.noted["run"] = case.client.create_run(run.info.experiment_id, tags=tags, run_name="again").info.run_id


def is_marked(case: Case) -> None:
    run = case.client.get_run(case.noted["run"])
    assert run.data.tags["segadapt.duplicate_of"] == case.run("sdca-001").info.run_id
    names = [row.name for row in api.runs(NAME, place=Place(str(case.root))).rows]
    assert sorted(names) == ["sdca-001", "sdca-002", "sdca-003"]


def missing_run(case: Case) -> None:
    case.noted["run"] = run = case.run("sdca-001")
    for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
        case.sql("mlflow.db", f"delete from {table} where run_uuid = '{run.info.run_id}'")


def is_recorded(case: Case) -> None:
    was, now = case.noted["run"], case.run("sdca-001")
    assert now.data.tags["segadapt.recovered"] == "from Ray's state"
    assert now.data.params == was.data.params
    for tag in ("segadapt.state", "segadapt.checkpoint", "segadapt.key", "mlflow.parentRunId", "segadapt.seed"):
        assert now.data.tags[tag] == was.data.tags[tag]
    assert now.data.metrics == {name: was.data.metrics[name] for name in now.data.metrics}
    assert {"target_val/miou", "best/target_val/miou"} <= set(now.data.metrics)
    assert now.info.status == "FINISHED"


def contradiction(case: Case) -> None:
    case.noted["run"] = run = case.run("sdca-001")
    case.client.set_tag(run.info.run_id, "segadapt.state", "failed")
    case.client.set_tag(run.info.run_id, "segadapt.failure", "made up")
    case.client.set_terminated(run.info.run_id, "FAILED", run.info.end_time)


def running_proposal(case: Case) -> None:
    case.noted["trial"] = case.proposal("sdca-001")
    number = case.noted["trial"]._trial_id
    case.sql(
        "optuna.db",
        f"update trials set state = 'RUNNING', datetime_complete = null where trial_id = {number}",
        f"delete from trial_values where trial_id = {number}",
    )


def is_told(case: Case) -> None:
    was, now = case.noted["trial"], case.proposal("sdca-001")
    assert (now.state, now.values, now.params) == (was.state, was.values, was.params)


def lost_proposal(case: Case) -> None:
    trial = case.study.ask()
    trial.suggest_float("method.temperature", 0.5, 150, log=True)
    trial.set_user_attr("trial_id", "unsaved")
    case.noted["params"] = trial.params


def is_proposed_again(case: Case) -> None:
    lost, again = case.study.trials[-2:]
    assert (lost.state.name, lost.user_attrs["lost"]) == ("FAIL", True)
    assert again.state.name == "WAITING"
    assert again.system_attrs["fixed_params"] == case.noted["params"]


def duplicate_proposals(case: Case) -> None:
    study = case.study
    study.add_trial(case.proposal("sdca-001"))
    study.ask().set_user_attr("trial_id", case.trials["sdca-001"])


def proposals_are_noted(case: Case) -> None:
    assert case.study.user_attrs["duplicates"] == [3]
    assert [trial.state.name for trial in case.study.trials[3:]] == ["COMPLETE", "FAIL"]


def missing_proposal(case: Case) -> None:
    case.noted["trial"] = trial = case.proposal("sdca-003")
    tables = ("trial_values", "trial_params", "trial_user_attributes", "trial_intermediate_values", "trials")
    for table in tables:
        case.sql("optuna.db", f"delete from {table} where trial_id = {trial._trial_id}")


def is_added(case: Case) -> None:
    was, now = case.noted["trial"], case.proposal("sdca-003")
    assert (now.state, now.values, now.params) == (was.state, was.values, was.params)
    assert now.distributions == was.distributions


def checkpoint_gone(case: Case) -> None:
    shutil.rmtree(case.checkpoint("sdca-001"))


def checkpoint_is_cleared(case: Case) -> None:
    assert "segadapt.checkpoint" not in case.run("sdca-001").data.tags


def checkpoint_cut_short(case: Case) -> None:
    os.truncate(case.checkpoint("sdca-002") / "state.pt", 1000)


def checkpoint_is_set_aside(case: Case) -> None:
    tags = case.run("sdca-002").data.tags
    assert "segadapt.checkpoint" not in tags
    gone = case.root / tags["segadapt.checkpoint_gone"]
    assert not gone.exists()
    assert (gone.with_name(f"broken_{gone.name}") / "state.pt").stat().st_size == 1000, "not deleted"


OUTSIDE = f"ray/{NAME}"
"""A folder of the storage that is no checkpoint; the repair would set it aside with all that is in it."""


def leads_out(case: Case) -> None:
    case.client.set_tag(case.run("sdca-003").info.run_id, "segadapt.checkpoint", OUTSIDE)


def tag_is_cleared(case: Case) -> None:
    tags = case.run("sdca-003").data.tags
    assert "segadapt.checkpoint" not in tags
    assert tags["segadapt.checkpoint_gone"] == OUTSIDE
    assert (case.root / OUTSIDE / "record.json").is_file()


def stale_lease(case: Case) -> None:
    folder = case.root / "stages" / ".leases" / ("0" * 32)
    taken = leases.take(folder, leases.Owner("other", "source_only"))
    assert isinstance(taken, leases.Lease)
    taken._stop.set()
    taken._thread.join()
    os.utime(folder / "1", (time.time() - 100, time.time() - 100))


def lease_is_free(case: Case) -> None:
    assert leases.holder_of(case.root / "stages" / ".leases" / ("0" * 32)) is None


def unfinished_copy(case: Case) -> None:
    folder = case.root / "stages" / f".{'1' * 32}.{'2' * 32}"
    folder.mkdir()
    os.utime(folder, (time.time() - 7200, time.time() - 7200))


def copy_is_removed(case: Case) -> None:
    assert not any(path.name.startswith(".1") for path in (case.root / "stages").iterdir())


def broken_stage(case: Case) -> None:
    case.noted["stage"] = folder = min(path for path in (case.root / "stages").iterdir() if path.name[0] != ".")
    os.truncate(folder / "state.pt", 1000)


def stage_is_removed(case: Case) -> None:
    assert not case.noted["stage"].exists()


def begun_stages(case: Case) -> None:
    hashes = [max(path.name for path in (case.root / "stages").iterdir())]
    (case.root / "ray" / f"{NAME}.stages-sdca" / "begun.json").write_text(json.dumps(hashes))


def stages_are_over(case: Case) -> None:
    assert not (case.root / "ray" / f"{NAME}.stages-sdca" / "begun.json").exists()


def waiting_records(case: Case) -> None:
    box = Outbox.create(waiting_folder(Place(case.root)))
    box.append("set_tags", {"key": f"{NAME}/{case.trials['sdca-001']}", "tags": {"late": "yes"}})
    box._records.close()  # as when its process ends


def records_arrived(case: Case) -> None:
    assert case.run("sdca-001").data.tags["late"] == "yes"


def half_made_folder(case: Case) -> None:
    (case.root / ".mlflow.db.new").mkdir()


def folder_is_removed(case: Case) -> None:
    assert not (case.root / ".mlflow.db.new").exists()


Disorder = tuple[Callable[[Case], None], str, Callable[[Case], None]]
"""What makes it, how it is named, and what holds once it is repaired."""

DISORDERS: dict[str, list[Disorder]] = {
    "killed drivers": [
        (lacking_end, "MLflow lacks the end of sdca-001", has_end),
        (zombie, "sdca-002 is running (RUNNING) in MLflow, but no driver lives", is_interrupted),
        (zombie_search, f"{NAME} is running (RUNNING) in MLflow, but no driver lives", search_is_interrupted),
        (lost_run, "sdca-004 is running (RUNNING) in MLflow, but no driver lives", is_lost),
        (lost_proposal, "is RUNNING there, but Ray does not know it", is_proposed_again),
    ],
    "contradictions": [
        (contradiction, "sdca-001 is failed (FAILED) in MLflow, but finished in Ray's state", has_end),
        (running_proposal, "is RUNNING there, but finished in Ray's state", is_told),
    ],
    "duplicates": [
        (duplicate_run, "MLflow has 2 runs of sdca-001", is_marked),
        (duplicate_proposals, "The study has 3 trials", proposals_are_noted),
    ],
    "gaps": [
        (missing_run, "MLflow lacks the trial", is_recorded),
        (missing_proposal, "The study lacks the trial", is_added),
    ],
    "checkpoints": [
        (checkpoint_gone, "The checkpoint of sdca-001 is gone", checkpoint_is_cleared),
        (checkpoint_cut_short, "The checkpoint of sdca-002 is cut short", checkpoint_is_set_aside),
        (leads_out, "The tag segadapt.checkpoint of sdca-003 leads out of the storage folder", tag_is_cleared),
    ],
    "storage": [
        (half_made_folder, "is MLflow's database, half made", folder_is_removed),
        (stale_lease, "The lease on the stage source_only 000000000000 is stale", lease_is_free),
        (unfinished_copy, "is a copy that was never finished", copy_is_removed),
        (begun_stages, "holds shared stages that were begun and never finished", stages_are_over),
        (broken_stage, "is cut short", stage_is_removed),
        (waiting_records, "1 records of 1 ended commands wait", records_arrived),
    ],
}


@pytest.mark.parametrize("kind", DISORDERS)
def test_a_disorder_is_named_repaired_and_gone(kind: str, case: Case) -> None:
    for make, _, _ in DISORDERS[kind]:
        make(case)
    found = faults(doctor(case.root))
    for _, named, _ in DISORDERS[kind]:
        assert sum(named in text for text in found) == 1, (named, found)
    assert len(found) == len(DISORDERS[kind]), found
    repaired = [entry.text for entry in doctor(case.root, fix=True) if entry.repaired]
    assert sorted(repaired) == sorted(found), "looking had changed nothing, and all of it is repaired"
    for _, _, holds in DISORDERS[kind]:
        holds(case)
    assert [entry.text for entry in doctor(case.root) if entry.level != "ok"] == []


def test_an_experiment_that_was_deleted_in_mlflows_page_is_named_by_each_command_and_restored(case: Case) -> None:
    place = Place(str(case.root))
    before = {row.name: (row.state, row.best, row.checkpoint) for row in api.runs(NAME, place=place).rows}
    case.client.delete_experiment(case.run(NAME).info.experiment_id)
    commands: list[Callable[[], object]] = [
        lambda: api.runs(NAME, place=place),
        lambda: api.status(NAME, place=place),
        lambda: api.report(NAME, place=place),
        lambda: api.trial_log("best", NAME, place=place),
        lambda: api.evaluate("best", NAME, place=place),
        lambda: api.finish("best", NAME, place=place),
        lambda: api.export("best", NAME, place=place),
    ]
    for command in commands:
        with pytest.raises(UsageError, match=r"was deleted there.*`segadapt doctor --fix` restores it"):
            command()
    (fault,) = faults(doctor(case.root))
    assert fault == "It was deleted in MLflow, but its folder is in the storage folder"
    doctor(case.root, fix=True)
    assert faults(doctor(case.root)) == []
    assert {row.name: (row.state, row.best, row.checkpoint) for row in api.runs(NAME, place=place).rows} == before


def test_what_a_kill_left_of_tunes_files_gives_way_to_what_was_saved_before(case: Case) -> None:
    folder = case.root / "ray" / NAME
    assert tune_state.mend(folder) is None
    for kind in ("experiment_state", "callback-states", "search_gen_state", "searcher-state"):
        (path,) = folder.glob(f"{kind}-*")
        whole = path.read_bytes()
        for size in (len(whole) // 2, 0):
            os.truncate(path, size)
            assert tune_state.damaged(folder) == [path.name]
            assert f"({path.name}): going on from" in str(tune_state.mend(folder))
            assert path.read_bytes() == whole
    later = folder / "experiment_state-session-000099.json"
    later.touch()  # a session that had hardly begun
    (found,) = faults(doctor(case.root))
    assert f"{later.name}" in found
    assert [entry.text for entry in doctor(case.root, fix=True) if entry.repaired] == [found]
    assert not later.exists()
    assert [entry.text for entry in doctor(case.root) if entry.level != "ok"] == []
    os.truncate(folder / tune_state.ARCHIVE, 1000)
    assert tune_state.mend(folder) is None, "which nobody needs"
    os.truncate(path, 0)
    with pytest.raises(UsageError, match=f"must be whole to go on, but {path.name}"):
        tune_state.mend(folder)
    for checkpoint in folder.glob("*/checkpoint_*"):
        shutil.rmtree(checkpoint)
    assert "beginning anew" in str(tune_state.mend(folder))
    assert not (folder / "tuner.pkl").exists()
    assert tune_state.damaged(folder) == []


def damages(whole: bytes, count: int) -> Iterator[bytes]:
    """Yield contents with bytes that were changed, lost or zeroed, as of a failing disk."""
    draw = random.Random(len(whole))
    for _ in range(count):
        content, begin = bytearray(whole), draw.randrange(len(whole))
        end = min(len(whole), begin + draw.choice([1, 1, 4, 512]))
        match draw.randrange(3):
            case 0:
                content[begin] ^= draw.randrange(1, 256)
            case 1:
                content[begin:end] = bytes(byte ^ 0xFF for byte in content[begin:end])
            case _:
                del content[begin:end]
        yield bytes(content)


def test_every_damage_to_tunes_files_is_seen_and_mended(case: Case) -> None:
    folder = case.root / "ray" / NAME
    names = [path.name for path in folder.glob("*-*.*") if path.suffix in (".json", ".pkl")] + [tune_state.TUNER]
    assert len(names) >= 5
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        for content in damages(whole, 150):
            path.write_bytes(content)
            assert tune_state.damaged(folder) == [name]
        assert f"({name}): going on from" in str(tune_state.mend(folder))
        assert path.read_bytes() == whole
    for path in (folder / name for name in names):
        path.unlink()
        assert "(missing)" in " ".join(tune_state.damaged(folder)), "a search without it would begin anew"
        assert "going on from" in str(tune_state.mend(folder))
    assert tune_state.mend(folder) is None
    for path in (folder / HASHES, folder / f"{tune_state.TUNER}.sha256"):
        path.unlink()  # as an earlier version leaves it
    assert tune_state.mend(folder) is None
    for name in names:
        whole = (folder / name).read_bytes()
        for content in damages(whole, 150):
            (folder / name).write_bytes(content)
            assert set(tune_state.damaged(folder)) <= {name}, "without a hash not all is seen, but nothing fails"
        (folder / name).write_bytes(whole)


def test_the_command_ends_with_1_until_all_is_repaired(case: Case) -> None:
    checkpoint_gone(case)
    called = [
        CliRunner().invoke(app, ["doctor", "--storage", str(case.root), *words])
        for words in (["--json"], ["--fix"], [])
    ]
    assert [done.exit_code for done in called] == [1, 0, 0]
    (fault,) = (found for found in json.loads(called[0].stdout) if found["level"] == "fault")
    assert (fault["subject"], fault["repairable"], fault["repaired"]) == (NAME, True, False)
    assert f"repaired {NAME}: The checkpoint of sdca-001 is gone" in called[1].stdout
    assert "0 faults, 0 warnings" in called[2].stdout


def test_a_half_made_database_gives_way_to_a_new_one(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute("create table experiments (name text)")
    (found,) = faults(doctor(root))
    assert "half made" in found
    assert [entry.repaired for entry in doctor(root, fix=True) if entry.level == "fault"] == [True]
    assert len(list(root.glob("mlflow.db.half-made-*"))) == 1
    assert faults(doctor(root)) == []
    (root / "mlflow.db").write_bytes(b"SQLite format 3\0" + bytes(4000))
    (found,) = faults(doctor(root, fix=True))
    assert "mlflow.db" in found


def test_what_does_not_answer_is_named(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    study = f"postgresql+psycopg://me:secret@{address}/none"
    findings = list(api.doctor(place=Place(tmp_path, f"http://{address}", study), address=address))
    assert {found.subject for found in findings if found.level == "fault"} == {"tracking", "study", "cluster"}
    assert not any("secret" in str(found) for found in findings)


def test_mounts_tell_whether_nodes_see_each_others_locks(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/vda / ext4 rw 0 0\nhost:/a /data nfs4 rw,vers=4.2,local_lock=none 0 0\n"
        "host:/b /data/old nfs rw,vers=3,nolock,local_lock=all 0 0\n"
    )
    found = {path: file_system(Path(path), mounts) for path in ("/home", "/data/runs", "/data/old/runs")}
    assert [kind for kind, _ in found.values()] == ["ext4", "nfs4", "nfs"]
    assert [keeps_locks_apart(*entry) for entry in found.values()] == [False, False, True]


def as_kept(study: Any) -> list[Any]:
    """What a study holds of its trials, but for times."""
    return [(each.state, each.params, each.values, each.intermediate_values, each.user_attrs) for each in study.trials]


@pytest.mark.parametrize("lost", ["is missing", "is empty", "is damaged", "holds no study"])
def test_a_search_without_its_study_is_refused_first_and_doctor_makes_the_study_anew(lost: str, case: Case) -> None:
    file, before = case.root / "optuna.db", as_kept(case.study)
    whole = file.read_bytes()
    left = {"is missing": None, "is empty": b"", "is damaged": whole[: len(whole) // 2], "holds no study": whole}[lost]
    if left is None:
        file.unlink()
    else:
        file.write_bytes(left)
    if lost == "holds no study":
        optuna.delete_study(study_name=NAME, storage=f"sqlite:///{file}")
    content = file.read_bytes() if file.exists() else None
    for goes_on in ({"resume": NAME}, {"extend": NAME}, {"fork": NAME, "name": "other"}):
        with pytest.raises(UsageError, match=f"must be there to go on from it, but {file} {lost}.*doctor --fix"):
            api.search(**goes_on, place=Place(case.root))
    with pytest.raises(UsageError, match=f"{NAME}.*It is in the storage folder: omit --study-uri"):
        api.search(resume=NAME, place=Place(case.root, study_uri=f"sqlite:///{case.root}/other.db"))
    assert (file.read_bytes() if file.exists() else None) == content, "nothing was made in its place"
    assert not (case.root / "other.db").exists()
    assert not (case.root / "ray" / "other").exists()
    named = [text for text in faults(doctor(case.root)) if f"{file} {lost}" in text]
    assert named
    assert (file.read_bytes() if file.exists() else None) == content, "looking changes nothing"
    mended = doctor(case.root, fix=True)
    assert any(finding.repaired and finding.subject == NAME for finding in mended)
    assert faults(mended) == []
    assert as_kept(case.study) == before
    assert [entry.text for entry in doctor(case.root) if entry.level != "ok"] == []


def test_a_study_that_an_earlier_version_kept_elsewhere_is_not_made_a_second_time(case: Case) -> None:
    record = case.root / "ray" / NAME / "record.json"
    content = json.loads(record.read_text())
    assert content.pop("study") == "", "it is noted where the study is"
    record.write_text(json.dumps(content))
    before = as_kept(case.study)
    (case.root / "optuna.db").unlink()
    (warning,) = (finding for finding in doctor(case.root, fix=True) if finding.level == "warning")
    assert "Give --study-uri" in warning.advice
    assert not (case.root / "optuna.db").exists()
    study = f"sqlite:///{case.root}/optuna.db"
    assert any(finding.repaired for finding in api.doctor(place=Place(case.root, study_uri=study), fix=True))
    assert as_kept(case.study) == before
