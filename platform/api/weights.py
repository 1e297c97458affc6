"""Pretrained weights in the storage folder."""

from segadapt.platform.storage.folders import HERE, Place
from segadapt.platform.storage.weights import PRETRAINED, StoredWeights, store_weights, stored_weights


def weights_fetch(
    network: str, weights: str = PRETRAINED, *, licence: str | None = None, place: Place = HERE
) -> StoredWeights:
    """Put pretrained weights into the storage folder, where trials with `network.weights=pretrained` find them.

    Fetched again, they stay as they are.

    Args:
        network: Value of `network.name` that they are for, such as timm:vit_small_patch14_dinov2.
        weights: `pretrained`: timm's. A path ending in .pth, .pt or .safetensors: that file, in the names of timm,
            torchvision or EfficientNet-PyTorch. Of the papers' networks also torchvision's name, such as IMAGENET1K_V1.
        licence: Under which they are; None: as timm or the hub says, and of a file unknown.
        place: Where the storage folder is; it is made if there is none.

    Returns:
        What was stored: its source, licence, size in bytes and SHA-256.

    Raises:
        UsageError: If there is no such network, the weights cannot be had or do not fit it, or it has others there.

    Example:
        >>> import segadapt, timm, torch
        >>> torch.save(timm.create_model("test_vit").state_dict(), "vit.pth")
        >>> stored = segadapt.weights_fetch("timm:test_vit", "vit.pth", licence="apache-2.0")
        >>> stored.network, stored.licence, len(stored.sha256)
        ('timm:test_vit.r160_in1k', 'apache-2.0', 64)
    """
    return store_weights(place.prepared(), network, weights, licence)


def weights_list(*, place: Place = HERE) -> list[StoredWeights]:
    """Return the pretrained weights in the storage folder, by the networks they are for.

    Args:
        place: Where the storage folder is.

    Returns:
        The weights: the network, source, licence, size in bytes and SHA-256 of each.

    Raises:
        UsageError: If there is no storage folder, or weights in it are damaged.

    Example:
        >>> import segadapt
        >>> [(stored.network, stored.licence) for stored in segadapt.weights_list()]
        [('timm:test_vit.r160_in1k', 'apache-2.0')]
    """
    return stored_weights(place.existing())
