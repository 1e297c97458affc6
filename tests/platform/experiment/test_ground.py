"""What the losses of methods add to the training that they share: online self-training."""

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, TINY_WORDS
from searching import command

import segadapt
from segadapt.platform.experiment.planning import SearchRequest, plan_search
from segadapt.platform.storage.folders import Place

METHODS = ("sdca", "online_self_training")


@pytest.mark.parametrize(
    ("methods", "settings", "ground"),
    [
        (METHODS, {"online.enabled": True}, "online_self_training"),
        (METHODS, {}, None),
        (METHODS, {"sdca.online.enabled": "choice(true, false)"}, None),
        (("sdca", "bicl"), {"online.enabled": True}, None),
        (("online_self_training",), {}, None),
    ],
)
def test_methods_share_a_ground_where_all_have_its_terms(
    methods: tuple[str, ...], settings: dict[str, Any], ground: str | None, tmp_path: Path
) -> None:
    request = SearchRequest(methods=methods, settings={**TINY, **settings}, trials=4, rerank=2)
    record = plan_search(request, Place(str(tmp_path)))
    assert record.ground == ground
    assert record.repetitions == (6 if ground is None else 9), "the best two and the ground, on three seeds each"


@pytest.mark.slow
def test_a_search_of_methods_on_one_ground_says_what_each_adds(tmp_path: Path) -> None:
    words = [*METHODS, "--trials", "2", "--name", "ground", "online.enabled=true", *TINY_WORDS]
    searched = command(tmp_path, "search", *words, "--rerank", "1", "--seeds", "2", "--scheduler", "none")
    assert searched.returncode == 0, searched.stderr
    board = segadapt.runs("ground", place=segadapt.Place(str(tmp_path / "runs")))
    assert board.ground == "online_self_training"
    (sdca,) = board.additions
    repeated = {entry.name: entry.values for entry in board.reranked}
    method_of = {row.name: row.method for row in board.rows}
    alone = next(values for name, values in repeated.items() if method_of[name] == board.ground)
    sdca_values = next(values for name, values in repeated.items() if method_of[name] == "sdca")
    assert sdca.mean == pytest.approx(sum(sdca_values) / 2 - sum(alone) / 2)
    assert f"what losses add to online_self_training: {sdca}" in searched.stdout
    page = segadapt.report("ground", str(tmp_path / "page.html"), place=segadapt.Place(str(tmp_path / "runs")))
    assert "What the losses add" in page.read_text()
