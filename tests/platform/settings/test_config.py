import pickle
from pathlib import Path

import pytest

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import (
    anchored,
    keys,
    override,
    parse_assignments,
    read_experiment,
    resolve,
    sections,
)
from segadapt.trainables import METHODS


@pytest.mark.parametrize("method", [method.name for method in METHODS])
def test_defaults_resolve_and_every_key_is_documented(method: str) -> None:
    assert resolve(method, {}).method_name == method
    undocumented = [key.name for key in keys(method).values() if not key.doc]
    assert not undocumented


def test_values_land_where_their_key_says() -> None:
    config = resolve("sdca", {"method.temperature": 2, "data.streets.shift": 0.5, "seed": 3, "optimizer.lr": 0.1})
    assert (config.method.temperature, config.data.streets.shift, config.seed, config.optimizer.lr) == (2, 0.5, 3, 0.1)


def test_learning_rates_follow_from_the_network_unless_given() -> None:
    compact, pretrained = (
        resolve("sdca", {}),
        resolve("sdca", {"network.name": "deeplabv2_resnet101", "network.weights": "IMAGENET1K_V2"}),
    )
    assert (pretrained.optimizer.lr, pretrained.optimizer.head_lr_factor) == (2.5e-4, 10.0)
    assert compact.optimizer.head_lr_factor == 1.0
    assert resolve("sdca", {"optimizer.head_lr_factor": 5}).optimizer.head_lr_factor == 5


def test_all_faults_are_reported_at_once_with_what_to_do() -> None:
    with pytest.raises(UsageError) as caught:
        resolve("sdca", {"method.temperatur": 1, "trainer.steps": "many", "method.confidence_threshold": 2.0})
    message = str(caught.value)
    assert "There is no setting 'method.temperatur'. Did you mean 'method.temperature'?" in message
    assert "'trainer.steps' must be of type int, but got 'many'" in message
    assert "method.confidence_threshold must lie in [0, 1], but got 2.0" in message


def test_entries_of_a_mapping_may_have_keys_of_their_own() -> None:
    values = {"method.kept_method": "sdca", "method.kept_settings.temperature": 5.0}
    config = resolve("self_training", values)
    assert config.method.kept_settings == {"temperature": 5.0}
    for key in ("seed.temperature", "trainer.steps.temperature"):
        with pytest.raises(UsageError, match=f"There is no setting '{key}'"):
            resolve("self_training", {key: 5})


@pytest.mark.parametrize(
    ("word", "value"),
    [("a=1", 1), ("a=1e-3", 1e-3), ("a=true", True), ("a=null", None), ("a=x y", "x y"), ("a=[1, 2]", [1, 2])],
)
def test_values_are_parsed_by_what_they_look_like(word: str, value: object) -> None:
    assert parse_assignments([word]) == {"a": value}


@pytest.mark.parametrize(
    "text",
    [
        "folder:D/run #2",
        "folder:D/run: 2",
        "run #2",
        "3 # 4",
        "key: value",
        "- a",
        "12:30",
        "2026-11-30",
        "100%",
        "*star",
        "&anchor x",
        "!tag x",
        "l[0]",
        "{a}/b",
        "q'q",
        "| x",
        "> x",
        "@x",
        "`x`",
        "a, b",
        "x y ",
        "a=b",
        "~name",
        "0#1",
    ],
)
def test_words_are_taken_literally_unless_they_are_numbers_or_begin_as_a_list_a_mapping_or_a_quotation(
    text: str,
) -> None:
    assert parse_assignments([f"a={text}"]) == {"a": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", True),
        ("~", None),
        (".5", 0.5),
        ("-1e3", -1000),
        ("{a: 1}", {"a": 1}),
        ("[a #b]", "[a #b]"),
        ("'1'", "1"),
        ('"a: #b"', "a: #b"),
        ("[x, 'a #b']", ["x", "a #b"]),
    ],
)
def test_what_is_meant_as_a_value_is_read_as_one(text: str, value: object) -> None:
    assert parse_assignments([f"a={text}"]) == {"a": value}


def test_roots_of_data_are_made_absolute_and_kept_whatever_their_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for root in ("x #1", "c: d", "p%20q", "k=v", "l[0]", "{a}", "q'q", '"dq"', "Straße_日本", "~nobody-here/x", "null"):
        settings = anchored(parse_assignments([f"data.source=folder:{root}", "network.weights=w #1.pth"]))
        assert settings == {"data.source": f"folder:{tmp_path / root}", "network.weights": str(tmp_path / "w #1.pth")}


@pytest.mark.parametrize("words", [["steps"], ["=1"], ["a=1", "a=2"]])
def test_malformed_assignments_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_assignments(words)


def test_an_experiment_file_may_nest_or_dot(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("trainer:\n  steps: 5\nmethod.temperature: 1.5\n")
    assert read_experiment(path) == {"trainer.steps": 5, "method.temperature": 1.5}
    path.write_text("- 1")
    with pytest.raises(UsageError, match="KEY: VALUE"):
        read_experiment(path)
    with pytest.raises(UsageError, match="readable"):
        read_experiment(tmp_path / "absent.yaml")


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="source_only"):
        resolve("nonesuch", {})


def test_settings_that_follow_from_others_follow_anew_when_those_change() -> None:
    shared = resolve("sdca", {"network.name": "compact", "seed": 3})
    searched = {"network.name": "deeplabv2_resnet101", "method.temperature": 2.0}
    config = pickle.loads(pickle.dumps(override(shared, searched)))
    assert config == resolve("sdca", {"network.name": "compact", "seed": 3, **searched})
    assert config.optimizer.lr != shared.optimizer.lr
    assert override(shared, {}) is shared


def test_what_a_configuration_was_resolved_from_is_not_logged() -> None:
    assert set(resolve("sdca", {"seed": 3}).as_dict()) == {"method_name", "seed", *sections("sdca")}
