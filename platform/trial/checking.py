"""What of a trial's configuration can be wrong, looked at before a process is started."""

from collections.abc import Mapping
from dataclasses import replace

from segadapt.platform.errors import UsageError
from segadapt.platform.settings.config import TrialConfig, Values, resolve
from segadapt.platform.storage.folders import Storage
from segadapt.platform.storage.weights import with_stored_weights
from segadapt.platform.trial.training import build_method
from segadapt.trainables.core.data.batch import TargetImages
from segadapt.trainables.core.data.datasets import load_data
from segadapt.trainables.core.data.transforms import Domain
from segadapt.trainables.core.networks import NETWORKS, build_segmenter, least_side
from segadapt.trainables.core.online.fitting import check_online
from segadapt.trainables.core.validation import check


def checked_config(method: str, values: Values, storage: Storage) -> TrialConfig:
    """Return the configuration, having looked at everything that can be wrong before a process is started.

    Args:
        method: Name of the method.
        values: Settings by dotted key.
        storage: Where pretrained weights may be kept.

    Raises:
        UsageError: If something is wrong.
    """
    config = resolve(method, values)
    try:
        generated = config.data.name == "streets"  # nothing of it can be missing
        data = None if generated and not config.online.enabled else load_data(config.data)[0]
        images: dict[Domain, TargetImages] = {}
        if data is not None and not generated:
            images = {"source": data.source, "target": data.target}
        network = with_stored_weights(config.network, storage)
        if data is not None and config.online.enabled:
            built = build_method(replace(config, network=network), len(data.classes))
            if built.online is not None:
                check_online(built.online, data, config.augmentation)
            _check_sizes(config, least_side(built.segmenter), images)
        elif network.weights is not None or network.name not in NETWORKS:
            _check_sizes(config, least_side(build_segmenter(num_classes=2, **vars(network))), images)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return config


def _check_sizes(config: TrialConfig, least: int, images: Mapping[Domain, TargetImages]) -> None:
    """Make sure that the network is shown no image that is smaller than its patches.

    Args:
        config: Configuration of the trial.
        least: Least height and width of an image that the network takes.
        images: Training images by domain, the first of which is looked at; none if they are generated.

    Raises:
        ValueError: If it is.
    """
    augmentation, streets = config.augmentation, config.data.streets
    sizes = {f"augmentation.{name}": getattr(augmentation, name) for name in ("crop", "source_size", "target_size")}
    sizes["trainer.eval_window"] = config.trainer.eval_window
    if not images:
        sizes["data.streets.height, data.streets.width"] = streets.size
    for domain, images_of_domain in images.items() if least > 1 else ():
        if augmentation.crop is None and augmentation.size(domain) is None:
            sizes[f"the first {domain} image"] = tuple(images_of_domain.image(0).shape[-2:])
    for name, size in sizes.items():
        check(
            size is None or min(size) >= least,
            f"{name} must have sides of at least {least} pixels, a patch of {config.network.name}",
            list(size or ()),
            "Show larger images, or choose a network of smaller patches.",
        )
