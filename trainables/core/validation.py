"""One way to refuse a value: what must hold, what came, what to do."""


def check(holds: bool, requirement: str, value: object, advice: str = "") -> None:
    """Raise a ValueError that states the requirement and the value, unless it holds.

    Args:
        holds: Whether the requirement is met.
        requirement: What must hold, starting with the setting's dotted name.
        value: What came.
        advice: What to do, where the requirement does not say it.
    """
    if not holds:
        raise ValueError(f"{requirement}, but got {value!r}." + (f" {advice}" if advice else ""))
