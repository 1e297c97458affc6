"""Pictures of evaluations and studies."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from segadapt.platform.objective import Objective


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Any:
    """Draw a confusion matrix, each row (true class) as shares of its pixels; returns a matplotlib figure."""
    import numpy as np
    from matplotlib.figure import Figure

    counts = np.asarray(confusion, dtype=float)
    rows = counts.sum(1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros_like(counts), where=rows > 0)
    figure = Figure(figsize=(1.8 + 0.55 * len(classes),) * 2, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    axes.set_title(f"{title}: share of each true class")
    for row in range(len(classes)):
        for column in range(len(classes)):
            share = shares[row, column]
            if share >= 0.005:
                color = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, shrink=0.8)
    return figure


def study_figures(study: Any, objective: Objective) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield file names and makers of a study's plots that its trials allow, interactive and as PNG.

    Importance and parallel coordinates need two completed trials with unlike parameters. Of several goals the leading
    one is drawn, and the front of the first two or three beside.
    """
    import optuna
    from optuna.trial import TrialState

    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    names = ["optimization_history"]
    if len(completed) >= 2:
        names += ["slice", "parallel_coordinate"]
        if len({tuple(trial.params.values()) for trial in completed}) >= 2:
            names.append("param_importances")
    several = len(objective.goals) > 1
    if several and completed:
        names.append("pareto_front")

    def settings(name: str) -> dict[str, Any]:
        if name == "pareto_front":
            goals = objective.goals[:3]
            return {"targets": lambda trial: trial.values[: len(goals)], "target_names": list(goals)}
        leading = objective.goals.index(objective.leading)
        target = {"target": lambda trial: trial.values[leading]} if several else {}
        return {**target, "target_name": objective.leading}

    def interactive(name: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few trials make importances uncertain
            return getattr(optuna.visualization, f"plot_{name}")(study, **settings(name))

    def picture(name: str) -> Any:
        import matplotlib

        matplotlib.use("Agg")
        import numpy as np
        from optuna.visualization import matplotlib as drawn

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same, and optuna marks its matplotlib plots as experimental
            axes = getattr(drawn, f"plot_{name}")(study, **settings(name))
        axes = np.ravel(axes)[0]
        axes.figure.set_size_inches(12, 6)
        return axes.figure

    for name in names:
        yield f"plots/{name}.html", partial(interactive, name)
        yield f"plots/{name}.png", partial(picture, name)
