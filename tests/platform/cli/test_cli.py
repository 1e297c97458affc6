"""The command line as a user meets it: what is wrong is said once, before anything starts."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from commands import COMMAND
from conftest import TINY_WORDS

import segadapt as api
from segadapt.platform.cli.main import main

Call = Callable[..., CompletedProcess[str]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("search", "nonesuch"), "A method must be one of source_only"),
        (("search", "sdca", "method.temp=1"), "There is no setting 'method.temp'. Did you mean 'method.temperature'?"),
        (("search", "sdca", "trainer.steps=many"), "'trainer.steps' must be of type int, but got 'many'"),
        (("search", "sdca", "trainer.steps=0"), "trainer.steps must be at least 1, but got 0"),
        (("search", "sdca", "steps"), "A method must be one of"),
        (("train", "sdca", "steps"), "A setting must be written KEY=VALUE"),
        (("search", "sdca", "--trials", "0"), "must be positive"),
        (("search", "sdca", "--objective", "accuracy"), "--objective must be one of target_val/miou"),
        (("search", "sdca", "data.source=gta5:absent"), "data.source and data.target must be given together"),
        (
            ("search", "sdca", "data.source=gta5:absent", "data.target=cityscapes:absent"),
            "The root of a gta5 dataset must be an existing folder",
        ),
        (("train", "sdca", "data.source=kitti:a", "data.target=gta5:b"), "data.source must be KIND:ROOT with KIND one"),
        (("search", "sdca", "--name", "../escape"), "A name must be 1 to 100 letters"),
        (("search", "sdca", "--launcher", "rocket"), "--launcher must be auto, train or inprocess"),
        (("search", "sdca", "--storage", "s3://bucket"), "--storage must be a folder"),
        (("search",), "METHOD must be given"),
        (("search", "--resume", "absent"), "There must be an experiment 'absent'"),
        (("search", "sdca", "--config", "absent.yaml"), "An experiment file must be readable"),
        (("train", "sdca", "network.name=vgg19"), "A network must be one of compact"),
        (("train", "sdca", "network.weights=absent.pth"), "network.weights must be an existing file"),
        (("train", "sdca", "--launcher", "inprocess", "--workers-per-trial", "2"), "must have 1 worker per trial"),
        (("train", "sdca", "--tracking-uri", "http://127.0.0.1:9"), "--tracking-uri must name an MLflow server"),
        (("search", "sdca", "source_only"), "source_only must be searched alone"),
        (
            (
                *("search", "sdca", "method.temperature=100", "method.feature_gain=1", "method.output_gain=1"),
                *("method.confidence_threshold=0.9", "method.lovasz_weight=0.5", "optimizer.lr_factor=1"),
            ),
            "A search must vary something",
        ),
        (("search", "sdca", "--preset", "fast"), "--preset of sdca must be one of paper, quick"),
        (("search", "sdca", "clst", "clst.method.temp=1"), "There is no setting 'method.temp'"),
        (("search", "--extend", "absent"), "There must be an experiment 'absent'"),
        (("search", "--fork", "absent"), "There must be an experiment 'absent'"),
        (("search", "sdca", "--warm-start", "absent"), "There must be an experiment 'absent'"),
        (("search", "sdca", "--resume", "x", "--seed", "1"), "--resume takes methods and settings from the search 'x'"),
        (("search", "--resume", "x", "--time-budget", "9"), "--resume takes methods and settings from the search 'x'"),
        (("search", "--extend", "x", "--concurrent", "2"), "--extend takes methods and settings from the search 'x'"),
        (("search", "--extend", "x", "method.temperature=1"), "Leave them out; --fork begins a new search"),
        (("search", "sdca", "--sampler", "grid"), "--sampler must be one of auto, tpe, gp, cmaes, random, qmc"),
        (("search", "sdca", "clst", "--sampler", "gp"), "--sampler gp must have one method"),
        (("search", "sdca", "--scheduler", "pbt"), "--scheduler must be one of asha, asha-promote, median, hyperband"),
        (
            ("search", "sdca", "--objective", "target_val/miou,time/step", "--scheduler", "asha"),
            "--scheduler must be none for a Pareto front",
        ),
        (("search", "sdca", "--objective", "time/step"), "--objective must have a metric of quality"),
        (("search", "sdca", "--rerank", "2", "--seeds", "1"), "--seeds at least 2"),
        (("search", "sdca", "method.temperature=interval(2, 1)"), "A range must be interval(LOW, HIGH)"),
        (
            ("train", "source_only", "network.name=deeplabv3_resnet50", "trainer.batch_size=1"),
            "must be at least 2 with",
        ),
        (
            ("train", "sdca", "--workers-per-trial", "3", "trainer.batch_size=4"),
            "must be a multiple of the 3 workers, but got 4",
        ),
        (("search", "sdca", "warmup.steps=choice(10, 20)"), "A searched setting must act on the trials alone"),
        (
            ("search", "sdca", "--study-uri", "postgresql+psycopg://me:pw@127.0.0.1:1/x"),
            "--study-uri must be a database",
        ),
        (("status", "absent"), "must hold runs"),
        (("report", "absent"), "must hold runs"),
        (("runs", "absent"), "must hold runs"),
        (("finish", "best", "--search", "absent"), "must hold runs"),
        (("ui",), "must hold runs"),
        (("ui", "absent"), "must hold runs"),
        (("describe", "nonesuch"), "A method must be one of"),
        (("data", "show", "absent/sheet.png"), "The folder of the picture must exist"),
        (("data", "make", "town", "--format", "kitti"), "--format must be one of gta5, synthia, cityscapes, folder"),
        (("data", "check", "kitti", "."), "The kind of a dataset must be one of gta5"),
        (("data", "check", "gta5", "absent"), "The root of a gta5 dataset must be an existing folder"),
        (("data", "check", "folder", "."), "classes.yaml must list the classes"),
    ],
)
def test_wrong_usage_is_one_clear_error(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["segadapt", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capsys.readouterr().err
    assert ended.value.code == 2, errors
    assert message in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("runs/ray/*")), "nothing may be left behind"


def test_the_installed_command_exits_with_status_2() -> None:
    done = subprocess.run([COMMAND, "search", "nonesuch"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "A method must be one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(segadapt: Call) -> None:
    assert "Traceback" in segadapt("search", "nonesuch", "--debug").stderr


def test_help_and_a_trials_process_import_no_more_than_they_need() -> None:
    code = """
import sys

from segadapt.platform.cli.main import app

app(["--help"], standalone_mode=False)
print("in help:", *{"torch", "ray", "mlflow", "optuna", "numpy", "pydantic"} & set(sys.modules))
import segadapt.platform.trial.launchers

print("in a trial:", *{"torchvision", "ray", "mlflow", "optuna", "matplotlib", "torch._dynamo"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["in help:", "in a trial:"]


def test_dry_run_prints_configuration_and_space_and_touches_nothing(segadapt: Call, tmp_path: Path) -> None:
    tiny = [word for word in TINY_WORDS if not word.startswith("trainer.steps")]
    done = segadapt("search", "sdca", "--dry-run", "trainer.steps=33", "method.temperature=5.0", *tiny)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\n sdca +[\d.e-]+ +[\d.e-]+ +\S+ MiB", done.stdout), "seconds per step and evaluation, memory"
    assert "at a time: at most" in done.stdout
    assert re.search(r"sdca, all else as by default:\n.*trainer\.steps=33", done.stdout, re.DOTALL)
    assert done.stdout.index("at a time: at most") < 3000, "the plan is not far below"
    assert "method.feature_gain" in done.stdout
    assert "0.003 to 3 (log)" in done.stdout
    assert "method.temperature=5.0" in done.stdout
    assert not list(tmp_path.iterdir())


def options_of(shown: str) -> list[str]:
    return re.findall(r"^│ (--[a-z-]+)", shown, re.MULTILINE)


def test_help_shows_a_dozen_options_and_all_help_the_rest(segadapt: Call) -> None:
    for command in ("search", "train", "finish"):
        daily, all_ = (options_of(segadapt(command, option).stdout) for option in ("--help", "--help-all"))
        assert len(daily) <= 12 + len({"--help", "--help-all"})
        assert set(daily) < set(all_)
        assert {"--address", "--launcher", "--tracking-uri"} <= set(all_) - set(daily)
    assert {"--trials", "--objective", "--resume", "--dry-run", "--storage"} <= set(
        options_of(segadapt("search", "--help").stdout)
    )


@pytest.mark.parametrize("methods", [["sdca"], ["source_only"], ["sdca", "plca"]], ids=" ".join)
def test_what_plan_prints_is_read_back_as_the_same_search(methods: list[str], segadapt: Call, tmp_path: Path) -> None:
    ranges = ["optimizer.lr_factor=log_interval(0.5, 2)"] * (methods != ["source_only"])
    printed = segadapt("plan", *methods, "trainer.steps=33", *ranges)
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "my.yaml").write_text(printed.stdout)
    settings = {"trainer.steps": 33, **dict(word.split("=") for word in ranges)}
    planned, read = api.plan(methods, settings), api.plan(methods, config=str(tmp_path / "my.yaml"))
    assert read.record.configs == planned.record.configs
    for method, candidate in planned.record.candidates.items():
        assert read.record.candidates[method].space == candidate.space
        assert read.record.candidates[method].first == candidate.first
    changed = api.plan(methods, {"trainer.steps": 34}, config=str(tmp_path / "my.yaml"))
    assert {config.trainer.steps for config in changed.record.configs.values()} == {34}


def test_describe_shows_what_is_searched_first_and_cuts_no_name(segadapt: Call) -> None:
    shown = segadapt("describe", "sdca").stdout
    groups = [line for line in shown.splitlines() if line and not line.startswith((" ", "Next"))]
    assert groups == ["searched", "method", "training", "data and network", "augmentation"]
    for key, searched, _ in api.describe("sdca"):
        assert f"  {key.name}=" in shown
        assert bool(searched) == (shown.index(f"  {key.name}=") < shown.index("\nmethod\n"))


def test_a_fixed_setting_leaves_the_space() -> None:
    candidate = api.plan("sdca", {"method.temperature": 5.0}).record.candidates["sdca"]
    assert candidate.fixed["method.temperature"] == 5.0
    assert "method.temperature" not in candidate.space


def test_list_and_describe_tell_what_there_is(segadapt: Call) -> None:
    assert "sdca" in segadapt("list").stdout
    shown = segadapt("describe", "sdca").stdout
    assert "method.temperature" in shown
    assert "0.3 to 100 (log)" in shown


def test_describe_tells_the_size_of_a_network_and_the_share_that_is_trained(segadapt: Call) -> None:
    shown = segadapt("describe", "sdca", "network.name=timm:test_vit", "network.tune=lora").stdout
    assert "timm:test_vit: 405,056 parameters, of which 98,816 are trained (24.4 %)" in shown
    assert "weights" not in shown.splitlines()[-1], "it starts at random"
    pretrained = segadapt("describe", "sdca", "network.name=timm:test_vit", "network.weights=pretrained").stdout
    assert "It starts from the weights of timm/test_vit.r160_in1k, licence apache-2.0." in pretrained
    refused = segadapt("describe", "sdca", "network.name=timm:test_vit", "network.tune=lora", "network.lora_rank=0")
    assert "network.lora_rank must be at least 1, but got 0" in refused.stderr


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"network.name": "deeplabv2_resnet101"}, 43_090_016),
        ({"network.name": "deeplabv2_resnet101", "network.weights": "IMAGENET1K_V1"}, 42_984_672),
        ({"network.name": "deeplabv2_resnet101", "network.tune": "head"}, 589_856),
    ],
)
def test_the_size_of_a_network_counts_what_is_trained(settings: dict[str, str], trained: int) -> None:
    size = api.network_size("sdca", settings)
    assert (size.parameters, size.trained) == (43_090_016, trained)


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root writes anywhere")
def test_a_storage_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != locked and folder.is_relative_to("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o755)
    code = (
        "import sys; from segadapt.platform.storage.folders import open_storage\n"
        "try: open_storage(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, str(locked)], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("UsageError --storage must be a folder that can be written"), done.stderr


def test_a_full_disk_is_refused(segadapt: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGADAPT_MIN_FREE_BYTES", str(2**60))
    done = segadapt("search", "sdca")
    assert done.returncode == 2
    assert "MiB free" in done.stderr


def test_the_contact_sheet_is_a_picture(segadapt: Call, tmp_path: Path) -> None:
    from PIL import Image

    for words, written in (([], "streets.png"), (["sheet.png"], "sheet.png")):
        assert segadapt("data", "show", *words).stdout == f"Wrote {written}\n"
        with Image.open(tmp_path / written) as sheet:
            assert min(sheet.size) > 200
