"""The experiment files of the papers: what they say is known, complete, and can be trained."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import pytest

import segadapt as api
from segadapt import search_spaces
from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import TrialConfig, anchored, keys, read_experiment, resolve
from segadapt.platform.storage.folders import Place
from segadapt.trainables.core.data.class_lists import SUBSETS
from segadapt.trainables.core.data.datasets import DataConfig, load_data
from segadapt.trainables.core.networks import NETWORKS
from segadapt.trainables.core.training.config import stage_steps

ROOT = Path(__file__).parents[1]
PAPERS = ROOT / "examples" / "papers"
CAFFE = "deeplabv2_resnet101_caffe"


class Published(NamedTuple):
    """What methods/*.md says of a benchmark, written down a second time."""

    network: str
    warmup_steps: int
    warmup_lr: float
    steps: int
    batch: tuple[int, int]  # images of each domain per micro-batch, micro-batches
    lr: float
    head_lr: float
    schedule: float  # length of the poly schedule of a stage in steps; its power is 0 where the rate is constant
    target_size: tuple[int, int] | None
    crop: tuple[int, int] | None


SDCA = Published("deeplabv2_resnet101", 20000, 5e-4, 40000, (4, 1), 2.5e-4, 2.5e-3, 62500, (512, 1024), None)
PLCA = Published(CAFFE, 1, 2.5e-4, 10416, (4, 2), 2.5e-4, 2.5e-4, 30 * 372, (730, 1460), (730, 730))
BICL = Published(CAFFE, 40000, 2.3e-4, 100000, (2, 1), 2.3e-4, 7.5e-4, 12000, (730, 1460), (730, 730))
CLST = Published(CAFFE, 40000, 2.5e-4, 60000, (2, 1), 2.5e-4, 2.5e-3, 10000, (512, 1024), (512, 1024))
DRSL = Published("deeplabv2_resnet101", 100000, 2.5e-4, 13928, (2, 1), 5e-5, 5e-4, 0, None, (512, 1024))
PUBLISHED = {
    "sdca_gta5": SDCA,
    "sdca_synthia": SDCA,
    "plca_gta5": PLCA,
    "plca_synthia": PLCA._replace(steps=2976, schedule=10 * 372),
    "bicl_gta5": BICL,
    "bicl_synthia": BICL._replace(steps=94000, schedule=11280),
    "clst_gta5": CLST,
    "clst_synthia": CLST,
    "drsl_gta5": DRSL,
    "drsl_synthia": DRSL,
}
ONLINE_512: dict[str, Any] = {
    "warmup.steps": 0,
    "optimizer.name": "adamw",
    "optimizer.lr": 6e-5,
    "optimizer.head_lr_factor": 10,
    "optimizer.weight_decay": 0.01,
    "optimizer.decay_norms": False,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 1500,
    "trainer.steps": 40000,
    "trainer.batch_size": 2,
    "augmentation.target_size": (512, 1024),
    "augmentation.crop": (512, 512),
    "network.align_corners": False,
    "online.threshold": 0.968,
    "online.mix_weight": 1.0,
    "online.margins": (30 / 1024, 240 / 1024, 0.0, 0.0),
}
DAFORMER = ONLINE_512 | {
    "online.teacher_rate": 0.001,
    "online.mask": "none",
    "online.rare_class_temperature": 0.01,
    "online.feature_distance": 0.005,
    "method.mean_over": "all",
}
ONLINE = {
    "dacs": ONLINE_512 | {"online.teacher_rate": 0.01, "online.mask": "none", "online.feature_distance": 0.0},
    "daformer": DAFORMER,
    "mic": DAFORMER | {"online.mask": "block", "online.mask_ratio": 0.7, "online.mask_block": 1 / 16},
    "vfmuda": {
        "warmup.steps": 0,
        "optimizer.lr": pytest.approx(5e-5 * 8**0.5, rel=1e-4),
        "optimizer.backbone_lr_factor": 0.1,
        "optimizer.decay_norms": True,
        "optimizer.warmup_start": 1e-3,
        "optimizer.warmup_decays": False,
        "trainer.steps": 40000,
        "trainer.batch_size": 8,
        "augmentation.crop": (1024, 1024),
        "network.input_scale": 1.1,
        "online.teacher_rate": 0.001,
        "online.teacher_norm": "average",
        "online.mirrored": True,
        "online.mask": "token",
        "online.mask_ratio": 0.7,
        "online.augment_of": "image",
        "online.rare_class_temperature": 0.05,
        "online.margins": (0.03, 0.25, 0.03, 0.03),
        "method.mean_over": "valid",
    },
}
"""The same of `methods/online_self_training.md`, of both benchmarks."""
ONLINE_NAMES = [f"{recipe}_{source}" for recipe in ONLINE for source in ("gta5", "synthia")]
SMALL_NETWORKS: dict[str, dict[str, Any]] = {
    "dacs": {},
    "daformer": {"network.name": "timm:test_convnext", "online.feature_distance": 0.0},
    "mic": {"network.name": "timm:test_convnext", "online.feature_distance": 0.0},
    "vfmuda": {"network.name": "timm:test_vit", "trainer.eval_window": [32, 32]},
}
"""Networks of seconds: without pretrained weights, no feature is kept near them."""
SOURCE_SIZES = {
    "sdca_gta5": (720, 1280),
    "sdca_synthia": (760, 1280),
    "clst_gta5": (512, 932),
    "clst_synthia": (512, 862),
}
OWN_VALUES = {
    "bicl_gta5": {"optimizer.head_lr_factor"},
    "bicl_synthia": {"optimizer.head_lr_factor", "method.forward_weight", "method.backward_weight"},
    "drsl_gta5": {"method.rare_crop_chance"},
    "drsl_synthia": {"method.rare_crop_chance"},
}
"""Searched settings that a file fixes; the others are left to the search and to the preset `paper`."""

TINY: dict[str, Any] = {
    "network.name": "compact",
    "network.weights": "none",
    "network.freeze_norm": None,
    "warmup.steps": 1,
    "trainer.steps": 2,
    "trainer.eval_every": 2,
    "trainer.batch_size": 2,
    "trainer.accumulate": 1,
    "augmentation.source_size": [32, 64],
    "augmentation.target_size": [32, 64],
    "augmentation.shorter_side": [32, 40],
    "augmentation.crop": [32, 32],
}
SMALL = {
    "data.streets.height": 32,
    "data.streets.width": 64,
    "data.streets.train_images": 6,
    "data.streets.val_images": 2,
}


def values_of(name: str) -> dict[str, Any]:
    return read_experiment(PAPERS / f"{name}_cityscapes.yaml")


def method_of(name: str) -> str:
    recipe = name.split("_")[0]
    return "online_self_training" if recipe in ONLINE else recipe


def config_of(name: str) -> TrialConfig:
    return resolve(method_of(name), values_of(name))


def test_there_is_a_file_for_every_method_and_benchmark() -> None:
    names = {f"{name}_cityscapes.yaml" for name in (*PUBLISHED, *ONLINE_NAMES)}
    assert {path.name for path in PAPERS.iterdir()} == names


@pytest.mark.parametrize("name", ONLINE_NAMES)
def test_a_file_of_online_self_training_says_what_was_published_and_its_preset_agrees(name: str) -> None:
    recipe, source = name.split("_")
    config = config_of(name)
    assert (config.data.name, config.data.classes) == (f"{source}-cityscapes", {"gta5": 19, "synthia": 16}[source])
    for key, expected in ONLINE[recipe].items():
        section, field = key.split(".")
        assert getattr(getattr(config, section), field) == expected, key
    for key, published in search_spaces.load("online_self_training")[1][recipe.replace("vfm", "vfm_")].items():
        section, field = key.split(".")
        assert getattr(getattr(config, section), field) == published, key


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_says_what_was_published(name: str) -> None:
    method, source = name.split("_")
    expected, config = PUBLISHED[name], config_of(name)
    assert set(values_of(name)) <= set(keys(method))
    assert config.data.name == f"{source}-cityscapes"
    assert config.data.classes == {"gta5": 19, "synthia": 16}[source]

    assert config.network.name == expected.network
    weights = config.network.weights
    assert weights == ("weights/resnet101_caffe.pth" if expected.network == CAFFE else "IMAGENET1K_V1")
    assert config.network.align_corners == (method != "plca")

    optimizer, trainer = config.optimizer, config.trainer
    assert optimizer.lr is not None
    assert optimizer.head_lr_factor is not None
    assert (optimizer.lr, optimizer.lr_factor) == (expected.lr, 1.0)
    assert optimizer.lr * config.warmup.lr_factor == pytest.approx(expected.warmup_lr)
    assert optimizer.lr * optimizer.head_lr_factor == pytest.approx(expected.head_lr, rel=1e-3)
    assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 5e-4)
    assert optimizer.poly_power == (0.9 if expected.schedule else 0.0)

    assert (config.warmup.steps, trainer.steps) == (expected.warmup_steps, expected.steps)
    assert (trainer.batch_size, trainer.accumulate) == expected.batch

    augmentation = config.augmentation
    assert augmentation.target_size == expected.target_size
    assert augmentation.source_size == SOURCE_SIZES.get(name)
    assert augmentation.crop == expected.crop


@pytest.mark.parametrize("name", PUBLISHED)
def test_stages_take_the_published_steps(name: str) -> None:
    from segadapt.trainables import method_class

    expected, config = PUBLISHED[name], config_of(name)
    plan = method_class(config.method_name).plan(config.method)
    steps = stage_steps(plan, config.warmup.steps, config.trainer.steps)
    own = [steps[stage.name] for stage in plan if not stage.shared and stage.share > 0]
    assert sum(own) == expected.steps
    assert (
        own
        == {
            "sdca": [expected.steps],
            "plca": [expected.steps],
            "bicl": [expected.steps // 10] * 10,
            "clst": [10000] * 6,
            "drsl": [5000, 2976, 2976, 2976],
        }[config.method_name]
    )
    if expected.schedule:
        assert config.optimizer.horizon * own[-1] == pytest.approx(expected.schedule)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_searched_is_left_to_the_search_and_starts_as_published(name: str) -> None:
    method = name.split("_")[0]
    space, presets = search_spaces.load(method)
    assert set(values_of(name)) & set(space) == OWN_VALUES.get(name, set())
    resolved = config_of(name).as_dict()
    for key, published in presets[search_spaces.DEFAULT_PRESET].items():
        if key not in values_of(name):
            section, field = key.split(".")
            assert resolved[section][field] == published


@pytest.mark.parametrize("name", [*PUBLISHED, *ONLINE_NAMES])
def test_a_file_never_trains_without_its_data_or_its_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    method, source = method_of(name), name.split("_")[1]
    values = values_of(name)
    with pytest.raises(UsageError, match=f"root of a {source} dataset must be an existing folder"):
        api.train(method, values, place=Place(tmp_path / "runs"))
    if values["network.name"] == CAFFE:
        values |= {"data.source": None, "data.target": None, "data.classes": "auto"}
        with pytest.raises(UsageError, match="must be an existing file, but there is none at"):
            api.train(method, values, place=Place(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_networks_take_the_input_of_their_weights() -> None:
    assert NETWORKS["deeplabv2_resnet101"].published == "resnet101"
    assert NETWORKS[CAFFE].published is None


def test_files_of_weights_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert anchored({"network.weights": "a/b.pth"}) == {"network.weights": f"{tmp_path}/a/b.pth"}
    for weights in ("IMAGENET1K_V1", "none", None, "/c.safetensors"):
        assert anchored({"network.weights": weights}) == {"network.weights": weights}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with streets as the three datasets store images."""
    folder = tmp_path_factory.mktemp("datasets")
    for kind in ("gta5", "synthia", "cityscapes"):
        api.data_make(str(folder / kind), SMALL, layout=kind)
    return folder


def tiny(name: str, datasets: Path) -> dict[str, Any]:
    """What turns a file into seconds of training: sizes and counts, nothing else."""
    source = name.split("_")[1]
    small = {key: value for key, value in TINY.items() if key in values_of(name) or key != "augmentation.shorter_side"}
    if "augmentation.crop" not in values_of(name):
        del small["augmentation.crop"]
    small |= SMALL_NETWORKS.get(name.split("_")[0], {})
    return {**small, "data.source": f"{source}:{datasets}/{source}", "data.target": f"cityscapes:{datasets}/cityscapes"}


@pytest.mark.parametrize("source", ["gta5", "synthia"])
def test_the_class_protocol_is_that_of_the_benchmark(source: str, datasets: Path) -> None:
    data = DataConfig(
        source=f"{source}:{datasets}/{source}",
        target=f"cityscapes:{datasets}/cityscapes",
        classes=config_of(f"sdca_{source}").data.classes,
    )
    assert load_data(data)[0].classes.names == SUBSETS["19" if source == "gta5" else "16"]


@pytest.mark.parametrize("name", [*PUBLISHED, *ONLINE_NAMES])
def test_a_file_trains_at_a_tiny_size(name: str, datasets: Path, tmp_path: Path) -> None:
    from segadapt.platform.trial.training import build_method
    from segadapt.trainables import method_class
    from segadapt.trainables.core.training.config import TrainerSettings
    from segadapt.trainables.core.training.trainer import Trainer

    config = resolve(method_of(name), {**values_of(name), **tiny(name, datasets)})
    data, evaluation = load_data(config.data)
    method = build_method(config, len(data.classes))
    plan = method_class(config.method_name).plan(config.method)
    settings = TrainerSettings(config.trainer, config.optimizer, config.augmentation, config.seed)
    reported: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], write: Callable[[Path], None] | None) -> None:
        reported.append(metrics)

    Trainer(method, plan, data, evaluation, settings, report, tmp_path).run()
    assert reported[-1]["finished"]
    assert {metrics["stage"] for metrics in reported} == {stage.name for stage in plan}


@pytest.mark.slow
def test_a_paper_is_trained_from_packed_data_and_evaluated_from_the_command_line(
    segadapt: Callable[..., CompletedProcess[str]], datasets: Path
) -> None:
    for kind, size in (("gta5", ()), ("cityscapes", ("--size", "16", "32"))):
        packed = segadapt("data", "pack", kind, str(datasets / kind), f"packed-{kind}", *size)
        assert packed.returncode == 0, packed.stderr
    words = [f"{key}={json.dumps(value)}" for key, value in tiny("plca_gta5", datasets).items()]
    words = [word.replace('="', "=").removesuffix('"') for word in words]
    words = [word for word in words if not word.startswith(("data.source=", "data.target="))]
    words += ["data.source=shards:packed-gta5", "data.target=shards:packed-cityscapes"]
    file = str(PAPERS / "plca_gta5_cityscapes.yaml")
    done = segadapt("train", "plca", "--config", file, "--name", "plca-gta5", *words)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "19 classes are trained: road, sidewalk" in said
    assert "packed from cityscapes, resized to 32x16" in said
    done = segadapt("evaluate", "best", "--search", "plca-gta5", "--protocol", "cityscapes-19", "--aggregation", "0.5")
    assert done.returncode == 0, done.stderr
    assert "target_val/miou_19" in done.stdout


def test_the_page_shows_every_file_and_every_command_of_it_is_one() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text()
    for path in PAPERS.iterdir():
        recipe, source, _ = path.stem.split("_")
        assert f"segadapt train {method_of(recipe)} --config examples/papers/{path.name}" in page
        assert f"--config examples/papers/{path.name}" in path.read_text()
        assert f"data.source={source}:" in path.read_text()
