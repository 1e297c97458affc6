"""What timm knows of a model's pretrained weights: where they are, under which licence, and whether they can be had."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

UNKNOWN = "unknown"
"""A licence that nothing tells of."""

_ANSWER_S = 5.0
"""For the hub to answer at all. Its client tries for about 46 s, of which nobody would know the reason."""

_FILES = ("model.safetensors", "pytorch_model.bin")
"""What weights are called on the hub, in the order in which timm looks for them."""


@dataclass(frozen=True)
class ModelCard:
    """Where the pretrained weights of a model of timm come from, and under which licence."""

    source: str
    """Name on the hub, or an address."""
    licence: str
    """As its publishers name it, such as apache-2.0; `UNKNOWN` if nothing tells."""
    gated: bool = False
    """Whether the hub asks who wants them."""


def full_name(model: str) -> str:
    """Return the name of a model of timm with the tag of its weights, which may be left out: resnet50.a1_in1k."""
    import timm

    config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if config is None or not config.has_weights:
        return model
    architecture = model.partition(".")[0]
    return f"{architecture}.{config.tag}" if config.tag else architecture


def model_card(model: str, *, ask: bool = False) -> ModelCard:
    """Return where the weights of a model of timm come from.

    Args:
        model: timm's name of it.
        ask: Look at the model's page on the hub as well, which knows more and has to be reachable.
    """
    import timm

    config: Any = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if config is None or not config.has_weights:
        return ModelCard(f"timm's {model}", UNKNOWN)
    source, licence = config.hf_hub_id or config.url or config.file, config.license or UNKNOWN
    if not (ask and config.hf_hub_id):
        return ModelCard(str(source), licence)
    from huggingface_hub import model_info

    try:
        _check_reachable()
        page = model_info(config.hf_hub_id, timeout=_ANSWER_S)
    except Exception:  # its client's errors differ; what timm does not know stays unknown, and is said so
        return ModelCard(str(source), licence)
    on_page = page.card_data.get("license_name") or page.card_data.get("license") if page.card_data else None
    return ModelCard(str(source), licence if licence != UNKNOWN else str(on_page or UNKNOWN), bool(page.gated))


def source_options(model: str) -> dict[str, Any]:
    """Return how timm is to load the weights of a model: from where the hub's client has kept them, or from the hub.

    Raises:
        ConnectionError: If they were not downloaded yet and the hub does not answer.
    """
    import timm

    config: Any = timm.get_pretrained_cfg(model)
    if config is None or not config.hf_hub_id or config.custom_load:
        return {}
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = config.hf_hub_id.partition("@")
    for name in (config.hf_hub_filename,) if config.hf_hub_filename else _FILES:
        kept = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(kept, str):
            return {"pretrained_cfg_overlay": {"file": kept}}
    _check_reachable()
    return {}


def pretrained_state(model: str) -> Mapping[str, Tensor]:
    """Return the pretrained weights of a model of timm, under timm's names, its classifier included.

    Raises:
        OSError: If they cannot be had.
        RuntimeError: If what was had does not fit the model.
    """
    import timm

    network = timm.create_model(model, pretrained=True, **source_options(model))
    state: Mapping[str, Tensor] = network.state_dict()
    return state


def _check_reachable() -> None:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_ANSWER_S)
    except Exception as error:  # its client's errors differ between its versions
        raise ConnectionError(f"{constants.ENDPOINT} does not answer ({error}).") from error
