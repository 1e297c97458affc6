"""What happens to a trial, told to Python's `logging`: whoever runs the trial decides where it goes."""

import logging
from typing import Any

logger = logging.getLogger(__name__)


def note(
    event: str,
    message: str,
    *,
    level: int = logging.INFO,
    stage: str | None = None,
    step: int | None = None,
    **fields: Any,
) -> None:
    """Tell that something happened.

    Args:
        event: What happened, in one word that programs look for.
        message: What happened, in a sentence for people.
        level: Level of `logging`.
        stage: Name of the stage in which it happened.
        step: Step of the trial.
        fields: What else there is to know, as plain values.
    """
    logger.log(level, "%s", message, extra={"event": event, "stage": stage, "step": step, "fields": fields})
