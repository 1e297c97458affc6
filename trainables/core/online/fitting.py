"""Whether online self-training fits the data, known before the first step."""

from segadapt.trainables.core.data.batch import DomainData
from segadapt.trainables.core.data.sampling import generator
from segadapt.trainables.core.data.transforms import AugmentationConfig, Domain, Size, draw_geometry
from segadapt.trainables.core.online.terms import OnlineTerms, check_sizes


def check_online(online: OnlineTerms, data: DomainData, augmentation: AugmentationConfig) -> None:
    """Refuse data that the terms of online self-training cannot act on.

    Args:
        online: The terms.
        data: Both domains, of which the first images are looked at.
        augmentation: How training images are resized and cut.

    Raises:
        ValueError: If features of things are to be kept and no class is a thing, or images are to be mixed and differ
            in size.
    """
    online.see_classes(data.classes.names)
    if online.config.mixes:
        check_sizes(_trained_size(data, augmentation, "source"), _trained_size(data, augmentation, "target"))


def _trained_size(data: DomainData, augmentation: AugmentationConfig, domain: Domain) -> Size:
    """Return the size of the first training image of a domain, as a step sees it."""
    image = (data.source if domain == "source" else data.target).image(0)
    shape = (image.shape[-2], image.shape[-1])
    geometry = draw_geometry(shape, augmentation, domain, generator(domain))
    return geometry.crop or geometry.size
