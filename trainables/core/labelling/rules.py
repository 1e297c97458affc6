"""The rules by which pseudo labels were written, as functions of a single image: their thresholds are in the files."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segadapt.trainables.core.labelling.ensemble import decode_ensemble, encode_ensemble
from segadapt.trainables.core.labelling.quality import LabelRule
from segadapt.trainables.core.labelling.self_paced import self_paced_labels
from segadapt.trainables.core.labelling.share import select_confident_share
from segadapt.trainables.core.labelling.thresholds import (
    confidence_and_prediction,
    confidence_at,
    keep_confident,
    select,
)
from segadapt.trainables.core.networks import Segmenter


def written_rule(provenance: Mapping[str, Any], segmenter: Segmenter) -> LabelRule:
    """Return the rule that labelled the target set, with the thresholds that it had there.

    Args:
        provenance: How the labels were written. `ensemble` means the first round, whose average is the prediction.
        segmenter: The deployed network, as which the rule up-samples.
    """
    thresholds = torch.tensor(provenance["thresholds"], dtype=torch.float64)

    def label(image: Tensor, logits: Tensor, size: tuple[int, int]) -> Tensor:
        match provenance["rule"]:
            case "quantile" | "fixed":
                return select(*confidence_and_prediction(segmenter.upsample(logits, size)), thresholds)
            case "global_local":
                share = provenance["local_share"]
                return select_confident_share(segmenter.upsample(logits, size), thresholds.float(), share=share)
            case "self_paced":
                return self_paced_labels(segmenter.upsample(logits, size).softmax(1), thresholds.float())
            case "ensemble":
                average = decode_ensemble(encode_ensemble(logits.double().softmax(1)))
                confidence_and_class = confidence_at(average, size, align_corners=segmenter.align_corners)
                return keep_confident(*confidence_and_class, thresholds)
        raise ValueError(f"The rule of written pseudo labels must be a known one, but is {provenance['rule']!r}.")

    return label


def by_network(rule: LabelRule, network: Segmenter) -> LabelRule:
    """Return a rule that looks at the logits of `network`, such as a teacher, in place of the deployed one's."""

    def label(image: Tensor, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return rule(image, network(network.normalise(image)).logits.float(), size)

    return label
