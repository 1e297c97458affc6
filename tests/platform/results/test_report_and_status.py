"""What is told about a search: while it runs by `segadapt status`, and after it by `segadapt report`."""

import dataclasses
import html
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial
from searching import Watched, command, free_port, gallery_steps, steps_of, tracked

import segadapt as api
from segadapt.platform.results import status
from segadapt.platform.results.report import render
from segadapt.platform.results.seeds import rerank, verdict
from segadapt.platform.search.priorband import PROPOSAL, Proposal
from segadapt.platform.settings.states import TrialState
from segadapt.platform.storage.folders import Place

NAME, TRIALS = Watched.NAME, 3


@pytest.fixture(scope="module")
def told(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a search of three trials."""
    folder = tmp_path_factory.mktemp("told")
    watched.copy_storage(folder / "runs")
    return folder


def test_status_follows_a_search_from_another_process_and_ends_with_it(watched: Watched) -> None:
    first, last = watched.statuses[0], watched.statuses[-1]
    assert first["state"] == "running"
    assert (last["state"], last["running"], last["left_s"]) == ("finished", [], None)
    assert [sum(found["states"].values()) for found in watched.statuses] == sorted(
        sum(found["states"].values()) for found in watched.statuses
    )
    for found in watched.statuses:
        assert (found["search"], found["asked"], found["objective"]) == (NAME, TRIALS, "target_val/miou")
        assert all(trial["state"] in ("running", "paused") and trial["step"] <= 8 for trial in found["running"])
    seen = [trial for look in watched.looks for trial in look.running]
    assert any(trial.state is TrialState.RUNNING for trial in seen), "it ran while it was watched"
    assert any(trial.step for trial in seen)


def test_a_trial_is_stalled_that_is_silent_for_longer_than_any_was() -> None:
    def judged(*trials: tuple[TrialState, float, float]) -> list[bool]:
        active = [status.RunningTrial("name", state, 4, 0.5, heard, longest) for state, heard, longest in trials]
        return [trial.stalled for trial in status._judged(active)]

    running, paused = TrialState.RUNNING, TrialState.PAUSED
    assert judged((running, 3600, 0)) == [False], "nobody knows how long it takes"
    assert judged((running, 50, 1), (running, 70, 1), (paused, 70, 1)) == [False, True, False]
    assert judged((running, 70, 1), (running, 2, 600)) == [False, False]


def test_status_of_an_ended_search_counts_its_trials_and_rungs(told: Path) -> None:
    found = api.status(NAME, place=Place(str(told / "runs")))
    board = api.runs(NAME, place=Place(str(told / "runs")))
    trials = [row for row in board.rows if row.kind == "trial"]
    assert sum(found.states.values()) == len(trials) == TRIALS
    assert (found.best, found.best_name) == (trials[0].best, trials[0].name)
    assert found.rungs[0].reached == TRIALS
    stopped = sum(rung.reached - rung.continued for rung in found.rungs)
    assert stopped == found.states.get("stopped early", 0)
    shown = command(told, "status", NAME)
    assert shown.returncode == 0, shown.stderr
    assert trials[0].name in shown.stdout
    assert "finished" in shown.stdout
    unknown = command(told, "status", "nonesuch")
    assert unknown.returncode == 2
    assert NAME in unknown.stderr


def test_a_report_is_one_file_that_loads_nothing(told: Path, tmp_path: Path) -> None:
    path = api.report(NAME, str(tmp_path / "told.html"), place=Place(str(told / "runs")))
    page = path.read_text()
    board = api.runs(NAME, place=Place(str(told / "runs")))
    for row in board.rows:
        assert row.name in page
    assert page.count("data:image/png;base64,") >= 2, "galleries of source-only and best"
    assert f"segadapt search --resume {NAME} --rerank 3 --seeds 3 --storage {told}/runs" in page, "what to do next"
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?https?:", page)
    assert path.stat().st_size < 1_500_000, "it can be sent by mail"
    for row in board.rows:
        assert f"<title>{row.name}</title>" in page, "a curve tells its name"
    with pytest.raises(api.UsageError, match="must be writable"):
        api.report(NAME, str(tmp_path / "none" / "told.html"), place=Place(str(told / "runs")))


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_opens_without_network(told: Path, browser: Any, tmp_path: Path, scheme: Any) -> None:
    path = api.report(NAME, str(tmp_path / "told.html"), place=Place(str(told / "runs")))
    requests: list[str] = []
    errors: list[str] = []
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 900})
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    drawn = page.locator("svg.figure:visible").count()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
    assert [url for url in requests if url.startswith(("http:", "https:", "ws"))] == []
    assert errors == []
    assert drawn >= 3
    assert drawn == path.read_text().count('<svg class="figure"')
    dark = sum(int(part) for part in re.findall(r"\d+", background)[:3]) < 3 * 128
    assert dark == (scheme == "dark")


@pytest.mark.slow
def test_a_report_can_be_read_on_a_telephone_and_fills_a_wide_window(told: Path, browser: Any, tmp_path: Path) -> None:
    path = api.report(NAME, str(tmp_path / "told.html"), place=Place(str(told / "runs")))
    score = api.runs(NAME, place=Place(str(told / "runs"))).rows[0].best
    for width in (390, 1280):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width, (
            "the page itself does not scroll sideways"
        )
        cell = page.locator("table td", has_text=f"{score:.3f}").first.bounding_box()
        assert cell["x"] + cell["width"] <= width, "the score is in sight"
        assert page.locator("table").first.bounding_box()["width"] >= 0.9 * width
        page.screenshot(path=tmp_path / f"{width}.png", full_page=True)


@pytest.fixture
def served(told: Path) -> Iterator[str]:
    """The page of the search that `segadapt ui` prints, while it serves it."""
    port = free_port()
    program = str(Path(sys.executable).with_name("segadapt"))
    words = [program, "ui", NAME, "--port", str(port), "--storage", str(told / "runs")]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, process_group=0)
    assert server.stdout is not None
    assert "MLflow shows" in server.stdout.readline()
    name, _, page = server.stdout.readline().strip().partition(": ")
    assert name == NAME
    yield page
    os.killpg(server.pid, signal.SIGINT)
    server.wait(timeout=60)


@pytest.mark.slow
def test_the_ui_leads_from_a_search_to_the_gallery_of_its_best_trial(
    told: Path, served: str, browser: Any, tmp_path: Path
) -> None:
    best = api.runs(NAME, place=Place(str(told / "runs"))).rows[0].name
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(60_000)
    page.goto(served)
    page.get_by_text("streets-source-train").first.wait_for()
    page.screenshot(path=tmp_path / "runs.png")
    names = page.get_by_role("gridcell").get_by_role("link", name=re.compile(r"^sdca-\d+$")).all_inner_texts()
    assert names[0] == best, "one looks at the search, the best trial first, without a click"
    page.get_by_role("link", name=best, exact=True).first.click()
    page.get_by_text("Best checkpoint at step").wait_for()
    page.screenshot(path=tmp_path / "trial.png")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("gallery.png", exact=True).first.click()
    picture = page.locator("img[alt='gallery.png'], [role=tabpanel] img").first
    picture.wait_for()
    page.wait_for_function("() => [...document.images].some(image => image.naturalWidth > 100)")
    page.screenshot(path=tmp_path / "gallery.png")


def test_runs_say_in_words_what_they_are_and_keep_a_gallery_of_each_evaluation(told: Path) -> None:
    runs = tracked(told, NAME)
    best = api.runs(NAME, place=Place(str(told / "runs"))).rows[0]
    story = runs[NAME].data.tags["mlflow.note.content"]
    assert f"**{best.name}** is the best of {TRIALS} trials: target_val/miou {best.best:.3f} at step" in story
    baseline = api.runs(NAME, place=Place(str(told / "runs"))).baseline
    assert f"from the source-only network: target_val/miou {baseline:.3f} ({best.best - baseline:+.3f} since)" in story
    assert "`method.temperature=" in story
    assert story.count("- sdca-") == TRIALS - 1, "the others, too"
    for name in (NAME, best.name):
        inputs = {entry.dataset.name: entry for entry in runs[name].inputs.dataset_inputs}
        assert set(inputs) == {"streets-source-train", "streets-target-train", "streets-target-val"}
        contexts = {found: entry.tags[0].value for found, entry in inputs.items()}
        assert contexts["streets-target-val"] == "evaluation"
        assert runs[best.name].data.tags["segadapt.data"].startswith(inputs["streets-target-val"].dataset.digest)
    assert gallery_steps(told, runs[best.name]) == steps_of(told, runs[best.name])


def test_a_report_shows_importance_and_the_verdict_over_seeds(told: Path) -> None:
    study = optuna.create_study(direction="maximize")
    for number in range(6):
        distributions = {"optimizer.lr": FloatDistribution(0, 1)}
        params = {"optimizer.lr": number / 6}
        attributes = {PROPOSAL: Proposal(0.5, 0.01, 0.49, 250.0, is_published=True, origin="prior").as_dict()}
        trial = create_trial(value=number / 10, params=params, distributions=distributions, user_attrs=attributes)
        study.add_trial(trial)
    board = api.runs(NAME, selection=True, place=Place(str(told / "runs")))
    first, second = (row.name for row in board.rows[:2])
    ranking = rerank({first: {1: 0.5, 2: 0.6}, second: {1: 0.4, 2: 0.41}})
    board = dataclasses.replace(board, reranked=ranking, verdict=verdict(ranking))
    assert board.verdict
    client = MlflowClient(f"sqlite:///{told}/runs/mlflow.db")
    page = render(board, list(tracked(told, NAME).values()), client, study, Place(told / "runs"))
    assert all(f">{name}</text>" in page for name in ("fANOVA", "PED-ANOVA"))
    assert "Share of the differences between trials in target_val/miou" in page
    assert board.verdict in html.unescape(page)
    assert "The published setting does not transfer to your data" in page
    assert f"search --resume {NAME} --rerank" not in page, "it is done"


def test_a_report_of_several_goals_shows_each_and_their_front(told: Path) -> None:
    board = api.runs(NAME, place=Place(str(told / "runs")))
    rows = [
        dataclasses.replace(row, goals={"target_val/miou": 0.5, "time/step": 0.125 + number}, on_front=number == 0)
        for number, row in enumerate(board.rows)
    ]
    board = dataclasses.replace(board, rows=rows, objective="target_val/miou,time/step")
    client = MlflowClient(f"sqlite:///{told}/runs/mlflow.db")
    page = render(board, list(tracked(told, NAME).values()), client, None, Place(told / "runs"))
    assert "<th>target_val/miou</th><th>time/step</th>" in page
    assert "<td>0.125</td>" in page
    assert "Pareto front" in page.partition("Several goals")[2]
    assert ">time/step</text>" in page
    assert "on the Pareto front</text>" in page
