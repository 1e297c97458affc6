"""The command that looks whether everything is sound."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from segadapt.platform.cli.inventories import show_findings
from segadapt.platform.cli.options import AsJson, place, shared

if TYPE_CHECKING:
    from segadapt.platform.storage.folders import Place


@shared(place=place)
def doctor(
    place: "Place",
    fix: Annotated[
        bool, typer.Option("--fix", help="Repair what can be repaired; never what a command works on.")
    ] = False,
    as_json: AsJson = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to look at; without it none is joined.")] = None,
) -> None:
    """Look whether environment, storage, tracking and cluster are sound, and Ray, Optuna and MLflow agree.

    Exit status: 0 sound, or all repaired; 1 faults are left; 2 wrong usage.
    """
    from segadapt.platform.api import operation

    examination = operation.doctor(place=place, address=address, fix=fix)
    findings = list(examination) if as_json else show_findings(examination, place)
    if as_json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=1))
    sys.exit(1 if any(finding.level == "fault" and not finding.repaired for finding in findings) else 0)
