"""Searches as a user runs them: a real Ray, a real study, a real MLflow database."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, TINY_WORDS, page_status, process_group_is_gone
from doors import Doors
from mlflow import MlflowClient
from searching import COMMAND, Watched, command, gallery_steps, steps_of, tracked, wait_for

import segadapt as api
from segadapt.platform.experiment.record import Candidate, Record
from segadapt.platform.settings.resources import Resources
from segadapt.platform.storage.folders import Place, Storage
from segadapt.trainables.core.training.checkpoint import file_hash, load_state, tensors_hash


@pytest.fixture(scope="module")
def searched(watched: Watched) -> tuple[Path, str]:
    """A folder in which a search of three trials was run, and what it printed."""
    return watched.folder, watched.output


Searched = tuple[Path, str]


def test_a_search_ends_with_a_leaderboard_and_the_next_commands(searched: Searched) -> None:
    folder, printed = searched
    assert re.search(r"sdca-001 step \d+/8 target_val/miou", printed)
    assert "min left" in printed or "s left" in printed
    for expected in ("sdca-streets: target_val/miou", "segadapt ui", "segadapt finish best --search sdca-streets"):
        assert expected in printed
    board = api.runs("sdca-streets", place=Place(str(folder / "runs")))
    assert [row.name for row in board.rows if row.kind == "trial"] != []
    assert board.baseline is not None
    values = [row.best for row in board.rows]
    assert values == sorted(values, key=lambda value: -(value or 0))


def test_a_search_listens_on_loopback_alone_from_its_start_to_its_end(watched: Watched) -> None:
    assert {name for _, name in watched.opened} >= {"gcs_server", "raylet"}
    assert not watched.to_others


def test_the_published_setting_is_the_first_trial(searched: Searched) -> None:
    folder, _ = searched
    params = tracked(folder, "sdca-streets")["sdca-001"].data.params
    assert (params["method.temperature"], params["method.confidence_threshold"]) == ("100.0", "0.9")


def test_every_trial_is_a_child_run_with_its_configuration_and_pictures(searched: Searched) -> None:
    folder, _ = searched
    runs = tracked(folder, "sdca-streets")
    parent = runs["sdca-streets"]
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    for name in ("sdca-001", "sdca-002", "sdca-003"):
        run = runs[name]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["segadapt.state"] in ("finished", "stopped early")
        assert {"target_val/miou", "source_val/miou", "target_val/iou/road", "loss/feature_target"} <= set(
            run.data.metrics
        )
        timed = {f"time/{name}" for name in ("step_median_ms", "step_p95_ms", "data_wait_share", "images_per_second")}
        assert timed | {"system/process_cpu_percentage", "system/process_memory_megabytes"} <= set(run.data.metrics)
        assert 0 < run.data.metrics["time/data_wait_share"] < 1
        artifacts = {entry.path for entry in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "environment.json", "gallery.png", "confusion", "per_class_iou.json"} <= artifacts
        assert steps_of(folder, run) == sorted(set(steps_of(folder, run)))
    assert parent.info.status == "FINISHED"
    plots = {entry.path for entry in client.list_artifacts(parent.info.run_id, "plots")}
    assert {"plots/optimization_history.html", "plots/optimization_history.png"} <= plots
    for page in (folder / "runs" / "mlartifacts").rglob("optimization_history.html"):
        assert not re.search(r"""src=["']?https?:""", page.read_text()), "it loads nothing from the network"


def test_every_run_keeps_its_log(searched: Searched) -> None:
    folder, _ = searched
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    for name, run in tracked(folder, "sdca-streets").items():
        if name == "sdca-streets":
            continue
        read = list(api.trial_log(name, "sdca-streets", place=Place(str(folder / "runs"))))
        events = [entry["event"] for entry in read]
        assert events[:3] == ["started", "start", "stage_begun"]
        assert events[-1] == "ended"
        evaluated = [entry["step"] for entry in read if entry["event"] == "evaluation"]
        assert sorted(set(evaluated)) == steps_of(folder, run)
        assert events.count("checkpoint") == len(evaluated)
        start = read[1]["fields"]
        assert {"host", "node", "pid", "device", "versions", "resumed_from"} <= set(start)
        assert start["values"].get("method.temperature") == float(run.data.params.get("method.temperature", "nan")) or (
            name == "source_only"
        )
        kept = Path(client.download_artifacts(run.info.run_id, "logs", str(folder)))
        lines = sorted(line for path in kept.glob("*.jsonl") for line in path.read_text().splitlines())
        assert [json.loads(line)["event"] for line in sorted(lines)] == events, "what MLflow has is the same"
        shutil.rmtree(kept)
    shown = command(folder, "logs", "best", "--search", "sdca-streets").stdout.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  driver +sdca-00\d is started\.", shown[0])
    unknown = command(folder, "logs", "nonesuch", "--search", "sdca-streets")
    assert unknown.returncode == 2
    assert "Those are: sdca-001, sdca-002, sdca-003, source_only." in unknown.stderr


def test_the_study_knows_stopped_trials_as_pruned(searched: Searched) -> None:
    import optuna
    from optuna.trial import TrialState

    folder, _ = searched
    study = optuna.load_study(study_name="sdca-streets", storage=f"sqlite:///{folder}/runs/optuna.db")
    states = {"finished": TrialState.COMPLETE, "stopped early": TrialState.PRUNED}
    expected = sorted(
        states[run.data.tags["segadapt.state"]].name
        for name, run in tracked(folder, "sdca-streets").items()
        if re.fullmatch(r"sdca-\d+", name)
    )
    assert sorted(trial.state.name for trial in study.trials) == expected
    assert all(trial.intermediate_values for trial in study.trials)


def test_tunes_state_keeps_few_numbers_of_a_trial(searched: Searched) -> None:
    folder, _ = searched
    state = max((folder / "runs" / "ray" / "sdca-streets").glob("experiment_state-*.json"))
    for trial in json.loads(state.read_text())["trial_data"]:
        kept = json.loads(trial[1])
        assert "target_val/miou" in kept["metric_analysis"]
        assert not any("iou/" in name or name.startswith(("loss/", "config/")) for name in kept["metric_analysis"])
        assert not any(name.startswith(("loss/", "config")) for name in kept["last_result"])


@pytest.mark.slow
def test_a_second_search_takes_another_name_and_loads_the_warm_up(searched: Searched) -> None:
    folder, _ = searched
    done = command(folder, "search", "sdca", "--trials", "1", *TINY_WORDS)
    assert done.returncode == 0, done.stderr
    assert "sdca: stages computed earlier are loaded: source_only, statistics." in done.stdout
    assert "sdca-streets-2" in done.stdout
    assert "source_only" not in tracked(folder, "sdca-streets-2")


def finish_name(folder: Path, trial: str) -> str:
    """The name of the run that the next finish of a trial with other settings gets."""
    number = len(list((folder / "runs" / "ray").glob(f"*.finish-{trial}-*"))) + 1
    return f"finish-{trial}" + (f"-{number}" if number > 1 else "")


@pytest.mark.slow
def test_finish_self_trains_the_best_trial_and_links_to_it(searched: Searched) -> None:
    folder, _ = searched
    done = command(folder, "finish", "best", "--search", "sdca-streets", "--rounds", "2", "trainer.steps=4")
    assert done.returncode == 0, done.stderr
    assert re.search(r"target_val/miou +0\.\d+ +0\.\d+ +[+-]0\.\d+", done.stdout)
    runs = tracked(folder, "sdca-streets")
    board = api.runs("sdca-streets", place=Place(str(folder / "runs")))
    best = next(row for row in board.rows if row.kind == "trial")
    run = runs[f"finish-{best.name}"]
    assert run.data.tags["mlflow.parentRunId"] == best.run_id
    assert steps_of(folder, run)[0] == 0, "evaluated before"
    before = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db").get_metric_history(run.info.run_id, "target_val/miou")
    assert before[0].value == pytest.approx(best.best, abs=1e-12), "starts from the trial's checkpoint exactly"
    (artifacts,) = (folder / "runs" / "ray").glob("*.finish-*/artifacts/*")
    made = [json.loads((artifacts / f"round_{number}" / "provenance.json").read_text()) for number in (1, 2)]
    trained = load_state(Path(str(best.checkpoint)))
    prefix = trained["deployed"] + "."
    network = {name.removeprefix(prefix): t for name, t in trained["state"].items() if name.startswith(prefix)}
    assert made[0]["network"] == tensors_hash(network), "the first round is labelled by the trial's network"
    assert made[1]["network"] != made[0]["network"]
    for number, provenance in enumerate(made, 1):
        assert run.data.metrics[f"round/{number}/labelled_share"] == provenance["labelled_share"]
        assert 0 <= run.data.metrics[f"round/{number}/target_val/miou"] <= 1
        assert run.data.tags[f"segadapt.round.{number}.labelled_by"] == provenance["network"]
    assert {"best checkpoint:", "last checkpoint:"} <= {line[:16] for line in done.stdout.splitlines()}
    unknown = command(folder, "finish", "nonesuch", "--search", "sdca-streets")
    assert unknown.returncode == 2
    assert "sdca-001" in unknown.stderr


@pytest.mark.slow
def test_a_finish_on_several_seeds_shows_their_spread_and_names_the_best(searched: Searched) -> None:
    folder, _ = searched
    words = ("--seeds", "2", "trainer.steps=2", "method.restart=true", "method.rule=fixed", "seed=3")
    name = finish_name(folder, "sdca-001")
    done = command(folder, "finish", "sdca-001", "--search", "sdca-streets", *words)
    assert done.returncode == 0, done.stderr
    runs = tracked(folder, "sdca-streets")
    found = {name: runs[name].data for name in (f"{name}.seed-3", f"{name}.seed-4")}
    assert [data.tags["segadapt.seed"] for data in found.values()] == ["3", "4"]
    best = max(found, key=lambda name: found[name].metrics["best/target_val/miou"])
    assert f"best: {best}" in done.stdout
    assert re.search(r"target_val/miou over 2 seeds: 0\.\d+ \+- 0\.\d+", done.stdout)
    shown = re.search(r"target_val/miou +(0\.\d+) +0\.\d+ ", done.stdout)
    assert shown is not None
    assert float(shown.group(1)) == pytest.approx(runs["sdca-001"].data.metrics["best/target_val/miou"], abs=6e-4)


@pytest.mark.slow
def test_a_finish_may_keep_the_losses_of_its_trial(searched: Searched) -> None:
    folder, _ = searched
    words = ("--keep-losses", "trainer.steps=2", "method.kept_settings.output_gain=0.0")
    name = finish_name(folder, "sdca-001")
    done = command(folder, "finish", "sdca-001", "--search", "sdca-streets", *words)
    assert done.returncode == 0, done.stderr
    trial = tracked(folder, "sdca-streets")["sdca-001"]
    run = tracked(folder, "sdca-streets")[name]
    logged = api.trial_log(name, "sdca-streets", place=Place(str(folder / "runs")))
    assert "pseudo_labels" in [entry["event"] for entry in logged]
    losses = {name for name in run.data.metrics if name.startswith("loss/")}
    assert {"loss/feature_source", "loss/feature_target", "loss/target_cross_entropy"} <= losses
    assert "loss/output_target" not in losses
    assert run.data.params["method.kept_method"] == "sdca"
    assert run.data.params["method.kept_settings.temperature"] == trial.data.params["method.temperature"]


def test_every_finish_of_a_trial_has_a_name_of_its_own(tmp_path: Path) -> None:
    from segadapt.platform.experiment.record import save_record
    from segadapt.platform.storage.folders import open_storage

    storage = open_storage(str(tmp_path / "runs"))

    def number(digest: str, trial: str = "sdca-001") -> int:
        candidates = {"self_training": Candidate(TINY)}
        name = f"s.finish-{trial}-{digest}"
        record = Record("finish", name, candidates, "target_val/miou", search="s", from_name=trial)
        return save_record(record, storage).number

    assert [number("a"), number("b"), number("c")] == [1, 2, 3]
    assert number("b") == 2, "the same settings go on in their own run"
    assert Record.load(storage, "s.finish-sdca-001-b").number == 2
    assert number("a", "sdca-002") == 1
    shutil.rmtree(storage.experiment("s.finish-sdca-001-a"))
    assert number("d") == 4


@pytest.mark.slow
def test_a_finish_whose_driver_was_killed_leaves_the_bytes_of_an_undisturbed_one(searched: Searched) -> None:
    folder, _ = searched
    words = ["finish", "best", "--search", "sdca-streets", "--rounds", "2", "trainer.steps=80", "trainer.eval_every=20"]
    known = set((folder / "runs" / "ray").glob("*.finish-*"))
    with (folder / "killed.txt").open("w") as output:
        driver = subprocess.Popen([COMMAND, *words], cwd=folder, stdout=output, stderr=output, process_group=0)
        try:
            said = lambda: (folder / "killed.txt").read_text()  # noqa: E731
            wait_for(lambda: re.search(r" step 60/", said()) is not None, "the second round")
        finally:
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
    assert " finished" not in said()
    (begun,) = set((folder / "runs" / "ray").glob("*.finish-*")) - known
    found = []
    for _ in ("gone on", "undisturbed"):
        done = command(folder, *words)
        assert done.returncode == 0, done.stderr
        runs = tracked(folder, "sdca-streets").values()
        assert len({run.info.run_name for run in runs if run.data.tags["segadapt.key"].startswith(begun.name)}) == 1
        last = re.search(r"last checkpoint: (.+)", done.stdout)
        assert last is not None
        labels = sorted(begun.glob("artifacts/*/round_*/*"))
        found.append([file_hash(path) for path in (Path(last.group(1)) / "state.pt", *labels)])
        shutil.rmtree(begun)
    assert len(found[0]) == 5, "the state, and of each round a file of labels and their provenance"
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_extended_search_knows_its_trials_and_ranks_the_best_over_seeds(searched: Searched) -> None:
    import optuna

    folder, _ = searched
    before = tracked(folder, "sdca-streets")
    words = ["--extend", "sdca-streets", "--trials", "2", "--rerank", "2", "--seeds", "2"]
    done = command(folder, "search", *words)
    assert done.returncode == 0, done.stderr
    assert "going on, 3/5 trials done" in done.stdout
    assert "5/5 trials done" in done.stdout
    runs = tracked(folder, "sdca-streets")
    assert {name for name in runs if re.fullmatch(r"sdca-\d+", name)} == {
        f"sdca-{number:03d}" for number in range(1, 6)
    }
    for name in ("sdca-001", "sdca-002", "sdca-003"):
        assert runs[name].info.end_time == before[name].info.end_time, "earlier trials are left alone"
    assert runs["sdca-streets"].data.tags["segadapt.trials"] == "5"
    study = optuna.load_study(study_name="sdca-streets", storage=f"sqlite:///{folder}/runs/optuna.db")
    assert len(study.trials) == 5
    board = api.runs("sdca-streets", place=Place(str(folder / "runs")))
    trials = [row.name for row in board.rows if row.kind == "trial"]
    assert {found.name for found in board.reranked} == set(trials[:2])
    for found in board.reranked:
        seeds = [runs[f"{found.name}.seed-{seed}"] for seed in (1, 2)]
        values = [run.data.metrics["best/target_val/miou"] for run in seeds]
        assert list(found.values) == values
        assert len(set(values)) == 2, "another seed is another run"
        assert {run.data.tags["segadapt.seed"] for run in seeds} == {"1", "2"}
        assert seeds[0].data.params["method.temperature"] == runs[found.name].data.params["method.temperature"]
        starts = {run.data.tags["segadapt.kind"] for name, run in runs.items() if name == "source_only"}
        assert starts == {"stage"}
    assert board.verdict == runs["sdca-streets"].data.tags["segadapt.verdict"]
    assert board.verdict in done.stdout
    assert "95 % interval" in done.stdout
    winner = runs[board.reranked[0].name]
    assert runs["sdca-streets"].data.tags["segadapt.best_trial"] == winner.data.tags["segadapt.trial_id"]


@pytest.mark.slow
def test_a_fork_counts_the_trials_that_fit_its_ranges(searched: Searched) -> None:
    import optuna

    folder, _ = searched
    words = ["--fork", "sdca-streets", "--trials", "1", "method.temperature=log_interval(1, 100)"]
    done = command(folder, "search", *words, "--name", "forked")
    assert done.returncode == 0, done.stderr
    runs = tracked(folder, "forked")
    assert runs["forked"].data.tags["segadapt.forked_from"] == "sdca-streets"
    assert all(float(run.data.params["method.temperature"]) >= 1 for name, run in runs.items() if "sdca" in name)
    storage = f"sqlite:///{folder}/runs/optuna.db"
    earlier = optuna.load_study(study_name="sdca-streets", storage=storage).trials
    study = optuna.load_study(study_name="forked", storage=storage).trials
    fit = [trial.number for trial in earlier if trial.params["method.temperature"] >= 1]
    assert 1 <= len(fit) < len(earlier), "the seed must put some trials on both sides"
    prior = [trial for trial in study if trial.user_attrs.get("prior") == "sdca-streets"]
    assert [trial.values for trial in prior] == [earlier[number].values for number in fit]
    assert len(study) == len(fit) + 1
    assert f"from sdca-streets: {len(fit)} trials count as prior points" in done.stdout
    assert f"{len(earlier) - len(fit)} (method.temperature outside the range)" in done.stdout


@pytest.mark.slow
def test_several_goals_end_in_a_front_or_in_ranks(warm: Path) -> None:
    words = ["search", "sdca", "--trials", "3", *TINY_WORDS]
    front = command(warm, *words, "--objective", "target_val/miou,time/step", "--name", "front")
    assert front.returncode == 0, front.stderr
    assert "* on the Pareto front" in front.stdout
    board = api.runs("front", place=Place(str(warm / "runs")))
    assert {row.state for row in board.rows} == {"finished"}, "trials on a front are compared at their end"
    best = max(board.rows, key=lambda row: row.goals["target_val/miou"])
    assert best.on_front
    assert board.rows[0].name == best.name
    plots = {path.name for path in (warm / "runs" / "mlartifacts" / "front").glob("*/artifacts/plots/*")}
    assert {"pareto_front.html", "pareto_front.png", "optimization_history.html"} <= plots
    goals = ("score/entropy", "score/flip_agreement")
    ranks = command(warm, *words, "--objective", "+".join(goals), "--name", "ranks")
    assert ranks.returncode == 0, ranks.stderr
    assert "mean rank" in ranks.stdout
    board = api.runs("ranks", place=Place(str(warm / "runs")))
    assert [row.score for row in board.rows] == sorted((row.score for row in board.rows), reverse=True)
    assert {goal for row in board.rows for goal in row.goals} == set(goals)
    parent = tracked(warm, "ranks")["ranks"]
    assert (
        tracked(warm, "ranks")[board.rows[0].name].data.tags["segadapt.trial_id"]
        == (parent.data.tags["segadapt.best_trial"])
    )


def test_the_ui_serves_the_runs_on_loopback_only(searched: Searched) -> None:
    import socket
    import urllib.request

    folder, _ = searched
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Doors() as doors:
        server = subprocess.Popen(
            [COMMAND, "ui", "--port", str(port)], cwd=folder, stdout=subprocess.PIPE, text=True, process_group=0
        )
        try:
            assert server.stdout is not None
            assert f"http://127.0.0.1:{port}" in server.stdout.readline()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
                assert b"MLflow" in page.read()
            for other in ("evil.example.com", "192.168.0.9"):  # where a web page may have its own name lead here
                assert page_status(f"http://127.0.0.1:{port}/", host=f"{other}:{port}") == 403
        finally:
            server.terminate()
            server.wait(timeout=60)
            wait_for(lambda: process_group_is_gone(server.pid), "MLflow to end with the command", timeout_s=30)
    assert doors.opened
    assert not doors.to_others


@pytest.mark.slow
def test_a_trial_that_fails_is_recorded_with_its_reason_and_the_search_goes_on(tmp_path: Path) -> None:
    from optuna.distributions import CategoricalDistribution

    space = {"optimizer.lr": CategoricalDistribution([1e12, 0.01])}
    record = Record(
        kind="search",
        name="failing",
        candidates={"source_only": Candidate(TINY, space, {"optimizer.lr": 1e12})},
        objective="target_val/miou",
        trials=4,
        concurrent=1,
    )
    script = tmp_path / "search.py"
    Storage(tmp_path / "runs").root.mkdir()
    record.save(Storage(tmp_path / "runs"))
    script.write_text("import segadapt\nprint(segadapt.search(resume='failing'))\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = tracked(tmp_path, "failing")
    trials = {name: run for name, run in runs.items() if name.startswith("source_only-")}
    assert len(trials) == 4
    for run in trials.values():
        if run.data.params["optimizer.lr"] == "0.01":
            assert run.info.status == "FINISHED"
        else:
            assert run.info.status == "FAILED"
            assert "NonFiniteLossError" in run.data.tags["segadapt.failure"]
            logged = list(api.trial_log(run.info.run_name, "failing", place=Place(str(tmp_path / "runs"))))
            (error,) = [entry for entry in logged if entry["event"] == "error"]
            assert "NonFiniteLossError" in error["fields"]["traceback"].splitlines()[-1]
            assert (logged[-1]["event"], logged[-1]["fields"]["state"]) == ("ended", "failed")
    assert {run.info.status for run in trials.values()} == {"FINISHED", "FAILED"}
    assert f"failed={sum(run.info.status == 'FAILED' for run in trials.values())}" in done.stdout
    board = command(tmp_path, "runs", "failing").stdout
    assert "failed: NonFiniteLossError" in board


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["asha", "asha-promote"])
def test_a_search_whose_driver_was_killed_goes_on_where_it_was(scheduler: str, warm: Path) -> None:
    words = [*TINY_WORDS, "trainer.steps=60", "trainer.eval_every=4"]
    words = [word for word in words if word not in ("trainer.steps=8", "trainer.eval_every=2")]
    options = ["--trials", "4", "--concurrent", "1", "--scheduler", scheduler]
    output = (warm / "first.txt").open("w")
    driver = subprocess.Popen(
        [COMMAND, "search", "sdca", *options, *words],
        cwd=warm,
        stdout=output,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    said = lambda: (warm / "first.txt").read_text()  # noqa: E731
    try:
        wait_for(lambda: re.search(r"sdca-00\d (finished|stopped|paused)", said()) is not None, "a first trial to end")
        wait_for(lambda: re.search(r"sdca-00[2-4] step (12|16|20)/", said()) is not None, "a later trial to go on")
        time.sleep(2.5)  # the state is saved once a second
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        output.close()
    ended = set(re.findall(r"(sdca-\d+) (?:finished|stopped early)", said()))
    last = dict(re.findall(r"(sdca-\d+) (step \d+|paused|finished|stopped)", said()))
    running = [name for name, event in last.items() if event.startswith("step")]
    board = api.runs("sdca-streets", place=Place(str(warm / "runs")))  # sends what was waiting, closes what was open
    assert {row.state for row in board.rows if row.name in running} <= {"interrupted"}
    for trial in {path.parent for path in (warm / "runs" / "ray" / "sdca-streets").glob("*/checkpoint_*")}:
        newest = max(trial.glob("checkpoint_*"))
        newest.rename(newest.with_name("checkpoint_000099"))  # as if it had come after Tune's last save of its state
    assert "RUNNING" not in {run.info.status for run in tracked(warm, "sdca-streets").values()}
    before = {name: steps_of(warm, run) for name, run in tracked(warm, "sdca-streets").items()}
    for kind, size in (("experiment_state", 1000), ("callback-states", 0), ("search_gen_state", 20)):
        (path,) = (warm / "runs" / "ray" / "sdca-streets").glob(f"{kind}-*")
        os.truncate(path, size)  # as if the kill had come while Tune copied them
    resumed = command(warm, "search", "--resume", "sdca-streets")
    assert resumed.returncode == 0, resumed.stderr
    assert "refused" not in resumed.stderr, "every record found its run"
    assert "Tune's files are damaged" in resumed.stdout
    for name in ended:
        assert f"{name} step" not in resumed.stdout, "finished trials are not run again"
        assert steps_of(warm, tracked(warm, "sdca-streets")[name]) == before[name]
    for name in running:
        first = re.search(rf"{name} step (\d+)/", resumed.stdout)
        assert first is not None
        assert int(first.group(1)) > 4, f"{name} was at {last[name]} and must go on from its checkpoint"
    runs = tracked(warm, "sdca-streets")
    trials = [run for name, run in runs.items() if re.fullmatch(r"sdca-\d+", name)]
    assert len(trials) == 4
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for run in trials:
        assert steps_of(warm, run) == list(range(4, steps_of(warm, run)[-1] + 1, 4)), "every step once"
    for name in running:
        logged = list(api.trial_log(name, "sdca-streets", place=Place(str(warm / "runs"))))
        starts = [entry["fields"]["resumed_from"] for entry in logged if entry["event"] == "start"]
        assert starts[0] is None
        assert "/checkpoint_" in starts[1]
        reached = {entry["step"] for entry in logged if entry["event"] == "evaluation"}
        assert reached == set(steps_of(warm, runs[name])), "nothing of either session is lost"
    with sqlite3.connect(warm / "runs" / "optuna.db") as study:
        states = [state for (state,) in study.execute("select state from trials")]
    assert "RUNNING" not in states
    assert sum(state in ("COMPLETE", "PRUNED") for state in states) == 4
    shutil.copytree(warm / "runs" / "stages", warm / "whole" / "runs" / "stages")
    whole = command(warm / "whole", "search", "sdca", *options, *words)
    assert whole.returncode == 0, whole.stderr
    undisturbed = tracked(warm / "whole", "sdca-streets")
    for run in trials:
        same = undisturbed[run.info.run_name]
        assert run.data.params == same.data.params, "proposals do not depend on the kill"
        assert run.data.tags["segadapt.state"] == same.data.tags["segadapt.state"], "nor do decisions"
        assert run.data.metrics["target_val/miou"] == same.data.metrics["target_val/miou"], "nor does training"


_TIMES = ("time/", "best/time/", "cost/", "system/")
"""Numbers that no two runs share."""


@pytest.mark.slow
def test_ray_train_and_the_trials_own_process_give_the_same_numbers(tmp_path: Path) -> None:
    numbers, noted = {}, {}
    for launcher in ("inprocess", "train"):
        words = ("--name", launcher, "--launcher", launcher, "--quiet")
        done = command(tmp_path, "train", "source_only", *words, *TINY_WORDS)
        assert done.returncode == 0, done.stderr
        assert f"{launcher}: target_val/miou" in done.stdout
        assert not re.search("trials done|took|Next", done.stdout), "nothing but what came out was asked for"
        run = tracked(tmp_path, launcher)["source_only"]
        assert run.info.status == "FINISHED"
        assert gallery_steps(tmp_path, run) == steps_of(tmp_path, run)
        numbers[launcher] = {key: value for key, value in run.data.metrics.items() if not key.startswith(_TIMES)}
        logged = api.trial_log("source_only", launcher, place=Place(str(tmp_path / "runs")))
        noted[launcher] = [(entry["event"], entry["rank"], entry["step"]) for entry in logged]
    assert numbers["train"] == numbers["inprocess"]
    assert noted["train"] == noted["inprocess"]


@pytest.mark.slow
def test_paused_trials_give_their_devices_back_beside_another_ray(warm: Path) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    bystander = subprocess.Popen(
        [ray, "start", "--head", "--port=0", "--num-cpus=1", "--include-dashboard=false", "--block"],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert bystander.stdout is not None
        wait_for(lambda: "Ray runtime started" in bystander.stdout.readline(), "another Ray to start")
        words = ["--trials", "3", "--scheduler", "asha-promote", "--launcher", "train"]
        done = command(warm, "search", "sdca", *words, *TINY_WORDS)
    finally:
        bystander.terminate()
        bystander.wait(timeout=60)
    assert done.returncode == 0, done.stderr
    assert "paused" in done.stdout
    states = [row.state for row in api.runs("sdca-streets", place=Place(str(warm / "runs"))).rows]
    assert len(states) == 3
    assert set(states) == {"finished", "stopped early"}


@pytest.mark.slow
def test_two_workers_train_a_trial_and_leave_a_checkpoint_to_finish(tmp_path: Path) -> None:
    with Doors() as doors:
        done = command(tmp_path, "train", "sdca", "--workers-per-trial", "2", *TINY_WORDS)
    assert done.returncode == 0, done.stderr
    assert "ray::RayTrainWo" in {name for _, name in doors.opened}, "they listen for each other"
    assert not doors.to_others
    (row,) = api.runs("train-sdca-streets", place=Place(str(tmp_path / "runs"))).rows
    assert row.state == "finished"
    assert row.checkpoint is not None
    assert (Path(row.checkpoint) / "state.pt").is_file()


@pytest.mark.slow
def test_several_methods_are_one_study_in_which_each_is_tried(tmp_path: Path) -> None:
    import optuna

    done = command(tmp_path, "search", "sdca", "drsl", "--trials", "5", "sdca.method.temperature=5.0", *TINY_WORDS)
    assert done.returncode == 0, done.stderr
    runs = tracked(tmp_path, "sdca-drsl-streets")
    trials = [run for name, run in runs.items() if re.fullmatch(r"(sdca|drsl)-\d+", name)]
    assert len(trials) == 5
    assert {run.info.status for run in trials} == {"FINISHED"}
    assert [name for name in sorted(runs, key=lambda name: name[-3:]) if name[-3:] in ("001", "002")] == [
        "sdca-001",
        "drsl-002",
    ]
    methods = [run.data.params["method"] for run in trials]
    assert min(methods.count("sdca"), methods.count("drsl")) >= 1
    for run in trials:
        assert run.data.tags["segadapt.method"] == run.data.params["method"]
        assert ("method.margin" in run.data.params) == (run.data.params["method"] == "drsl")
        assert "method.temperature" not in run.data.params, "fixed for SDCA, and DRSL has none"
    assert runs["source_only"].data.tags["segadapt.kind"] == "stage", "one warm-up for both"
    study = optuna.load_study(study_name="sdca-drsl-streets", storage=f"sqlite:///{tmp_path}/runs/optuna.db")
    assert {name.split(".")[0] for trial in study.trials for name in trial.params} == {"method", "sdca", "drsl"}
    finished = command(tmp_path, "finish", "best", "--search", "sdca-drsl-streets", "trainer.steps=4")
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
def test_a_warm_up_that_fails_ends_its_runs_as_failed_and_can_be_tried_again(tmp_path: Path) -> None:
    done = command(tmp_path, "search", "sdca", "--trials", "1", *TINY_WORDS, "warmup.lr_factor=1e12")
    assert done.returncode == 1
    assert "The shared stages did not finish" in done.stderr
    assert "NonFiniteLossError" in done.stderr
    runs = tracked(tmp_path, "sdca-streets")
    assert {name: run.info.status for name, run in runs.items()} == {"sdca-streets": "FAILED", "source_only": "FAILED"}
    again = command(tmp_path, "search", "--resume", "sdca-streets")
    assert again.returncode == 1
    assert "NonFiniteLossError" in again.stderr


@pytest.mark.slow
def test_a_time_budget_ends_a_search_with_what_it_has_and_resuming_gives_it_again(warm: Path) -> None:
    steps = [word for word in TINY_WORDS if not word.startswith("trainer.steps")]
    done = command(warm, "search", "sdca", "--trials", "500", "--time-budget", "25", *steps, "trainer.steps=20")
    assert done.returncode == 0, done.stderr
    runs = tracked(warm, "sdca-streets")
    trials = {name for name in runs if re.fullmatch(r"sdca-\d+", name)}
    assert 1 <= len(trials) < 100
    ended = {run.data.tags["segadapt.state"]: run.info.status for name, run in runs.items() if "-0" in name}
    assert set(ended) <= {"finished", "stopped early", "out of time"}
    assert ended.get("out of time", "KILLED") == "KILLED"
    assert runs["sdca-streets"].info.status == "FINISHED"
    assert "segadapt finish best" in done.stdout
    with sqlite3.connect(warm / "runs" / "optuna.db") as study:
        assert ("RUNNING",) not in study.execute("select state from trials").fetchall()

    resumed = command(warm, "search", "--resume", "sdca-streets")
    assert resumed.returncode == 0, resumed.stderr
    ended = {name: run.data.tags.get("segadapt.state") for name, run in tracked(warm, "sdca-streets").items()}
    later = {ended[name] for name in ended if re.fullmatch(r"sdca-\d+", name) and name not in trials}
    assert later & {"finished", "stopped early"}, "an evaluation takes longer than what was left of the first budget"


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_says_so_and_goes_on_when_asked(interrupt: signal.Signals, warm: Path) -> None:
    words = [word for word in TINY_WORDS if not word.startswith("trainer.steps")]
    with (warm / "first.txt").open("w") as output:
        driver = subprocess.Popen(
            [COMMAND, "search", "sdca", "--trials", "1", *words, "trainer.steps=60"],
            cwd=warm,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
            env={**os.environ, "TZ": "Etc/GMT-14"},  # as by a clock that is half a day ahead
        )
        said = lambda: (warm / "first.txt").read_text()  # noqa: E731
        wait_for(lambda: "sdca-001 step 4/" in said(), "the trial to go on")
        if interrupt == signal.SIGINT:
            os.killpg(driver.pid, interrupt)  # as a terminal does
        else:
            driver.terminate()
        assert driver.wait(timeout=120) == 130, said()
    assert "segadapt search --resume sdca-streets" in said()
    runs = tracked(warm, "sdca-streets")
    assert {runs[name].info.status for name in ("sdca-streets", "sdca-001")} == {"KILLED"}
    assert runs["sdca-001"].data.tags["segadapt.state"] == "interrupted"
    resumed = command(warm, "search", "--resume", "sdca-streets")
    assert resumed.returncode == 0, resumed.stderr
    assert "sdca-001 step 2/" not in resumed.stdout, "goes on from its checkpoint"
    runs = tracked(warm, "sdca-streets")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert steps_of(warm, runs["sdca-001"]) == list(range(2, 61, 2)), "every step once"
    if interrupt == signal.SIGTERM:
        again = command(warm, "search", "--resume", "sdca-streets")
        assert again.returncode == 0, again.stderr
        assert "sdca-001 step" not in again.stdout, "what was saved last counts, not what has the latest local time"


def test_more_than_the_cluster_has_is_refused_at_once(tmp_path: Path) -> None:
    done = command(tmp_path, "train", "source_only", "--workers-per-trial", "512", "trainer.batch_size=512")
    assert done.returncode == 2
    assert "The cluster must have what one trial takes (512 workers" in done.stderr
    assert not list(tmp_path.glob("runs/ray/*")), "the name stays free"


def test_options_are_checked() -> None:
    from segadapt.platform.errors import UsageError

    with pytest.raises(UsageError):
        Resources(workers=0)
