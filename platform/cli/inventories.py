"""What there is, on the screen: settings, datasets, shared stages, and what is not sound."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from segadapt.platform.cli.tables import console
from segadapt.platform.settings.text import duration_text, setting_text, size_text

if TYPE_CHECKING:
    from segadapt.platform.doctor.findings import Finding
    from segadapt.platform.settings.config import Key
    from segadapt.platform.storage.cache import CacheContent, CachedStage, Pruned, RunningLease
    from segadapt.platform.storage.folders import Place
    from segadapt.trainables.core.data.checking import DatasetReport
    from segadapt.trainables.core.data.recognition import Recognised

_GROUPS = {
    "method": ("method",),
    "training": ("trainer", "optimizer", "warmup", "seed"),
    "data and network": ("data", "network"),
    "augmentation": ("augmentation",),
}
"""Sections of settings by the group that they are shown in; others are the method's."""

_SHOWN_SIZES = 5
"""Most image sizes that a report on a dataset names."""


def show_settings(entries: "Sequence[tuple[Key, str, Mapping[str, Any]]]") -> None:
    """Show the settings of a method in groups, those that are searched first.

    Args:
        entries: Of each its key, the range that is searched, if any, and its values in presets.
    """
    from rich.padding import Padding

    screen = console()
    groups: dict[str, list[tuple[Key, str, Mapping[str, Any]]]] = {group: [] for group in ("searched", *_GROUPS)}
    for key, searched, presets in entries:
        section = key.name.partition(".")[0]
        group = next((name for name, sections in _GROUPS.items() if section in sections), "method")
        groups["searched" if searched else group].append((key, searched, presets))
    for group, settings in groups.items():
        if settings:
            screen.print(f"\n{group}")
        for key, searched, presets in settings:
            facts = [key.type, *([f"searched {searched}"] if searched else [])]
            facts += [f"{name}: {setting_text(value)}" for name, value in presets.items()]
            screen.print(f"  {key.name}={setting_text(key.default)}  ({', '.join(facts)})", soft_wrap=True)
            screen.print(Padding(key.doc, (0, 0, 0, 6), expand=False))


def show_cache(content: "CacheContent", place: "Place") -> None:
    """Show the shared stages, the leases on them and what was left over."""
    from rich.table import Table

    from segadapt.platform.storage.command_lines import command_line

    screen = console()
    table = Table(box=None)
    for column in ("stage", "by", "data", "network", "seed", "steps", "size", "age", "unused", "hash", "needed by"):
        table.add_column(column, justify="right" if column in ("seed", "steps", "size", "age", "unused") else "left")
    for stage in content.stages:
        names = ("stage", "method", "data", "network", "seed", "steps")
        what = [str(getattr(stage.description, name)) if stage.description else "?" for name in names]
        times = [duration_text(stage.age_s), duration_text(stage.unused_s)]
        table.add_row(*what, size_text(stage.bytes), *times, stage.hash[:12], ", ".join(stage.needed_by) or "-")
    if content.stages:
        screen.print(table)
    for lease in content.leases:
        screen.print(_lease_text(lease), markup=False, soft_wrap=True)
    if content.left_over:
        screen.print(
            f"{len(content.left_over)} left-over copies of dead processes; "
            f"`{command_line('cache', 'prune', '--older-than', 30, place=place)}` removes them"
        )
    screen.print(f"{len(content.stages)} stages, {size_text(content.bytes)}")


def show_pruned(pruned: "Pruned", *, dry_run: bool) -> None:
    """Show what was removed from the stage cache."""
    screen = console()
    removed = "would be removed" if dry_run else "removed"
    for stage in pruned.stages:
        screen.print(f"{removed}: {_stage_text(stage)}, {size_text(stage.bytes)}", markup=False, soft_wrap=True)
    for stage in pruned.kept:
        why = f"needed by {', '.join(stage.needed_by)}" if stage.needed_by else "an experiment began to need it"
        screen.print(f"kept: {_stage_text(stage)}, {why}", markup=False, soft_wrap=True)
    for lease in pruned.leases:
        screen.print(f"{removed}: the lease of a dead process: {_lease_text(lease)}", markup=False, soft_wrap=True)
    if pruned.left_over:
        screen.print(f"{removed}: {len(pruned.left_over)} left-over copies of dead processes")
    screen.print(f"{'would free' if dry_run else 'freed'} {size_text(pruned.bytes)}")


def show_findings(examination: "Iterable[Finding]", place: "Place") -> "list[Finding]":
    """Show what a check-up finds as it comes; returns it."""
    from rich.text import Text

    from segadapt.platform.storage.command_lines import command_line

    screen = console()
    styles = {"ok": "green", "warning": "yellow", "fault": "bold red", "repaired": "green"}
    findings = []
    for finding in examination:
        findings.append(finding)
        level = "repaired" if finding.repaired else finding.level
        parts = [finding.text, finding.meaning, "" if finding.repaired else finding.advice]
        line = Text.assemble((f"{level:9}", styles[level]), (f"{finding.subject}: ", "bold"))
        screen.print(line.append(". ".join(part.rstrip(".") for part in parts if part)), soft_wrap=True)
    count = {level: sum(entry.level == level and not entry.repaired for entry in findings) for level in styles}
    repaired = sum(entry.repaired for entry in findings)
    mendable = sum(entry.repair is not None for entry in findings)
    screen.print(
        f"\n{count['fault']} faults, {count['warning']} warnings"
        + (f", {repaired} repaired" if repaired else "")
        + (f"; `{command_line('doctor', '--fix', place=place)}` repairs {mendable}" if mendable else "")
    )
    return findings


def _stage_text(stage: "CachedStage") -> str:
    what = "a stage"
    if (computed := stage.description) is not None:
        what = f"{computed.stage} ({computed.data}, {computed.network}, seed {computed.seed}, {computed.steps} steps)"
    return f"{stage.hash[:12]} {what}, unused for {duration_text(stage.unused_s)}"


def _lease_text(lease: "RunningLease") -> str:
    state = "computes" if lease.alive else f"gave no sign for {duration_text(lease.age_s)} while computing"
    return f"{lease.owner} {state} {lease.stage} {lease.hash[:12]}"


def show_dataset(report: "DatasetReport") -> None:
    """Show what a dataset holds and all that is wrong with it."""
    from itertools import groupby

    from rich.table import Table

    screen = console()
    for name, split in report.splits.items():
        sizes = ", ".join(f"{size} ({count})" for size, count in list(split.sizes.items())[:_SHOWN_SIZES])
        more = len(split.sizes) - _SHOWN_SIZES
        sizes += f" and {more} more" if more > 0 else ""
        screen.print(
            f"{name}: {split.images} images, {split.labels} labels, about {size_text(split.packed_bytes)} packed"
        )
        screen.print(f"  sizes: {sizes or '-'}", soft_wrap=True)
        labelled = sum(split.pixels.values())
        if labelled:
            table = Table(box=None, title=f"{report.kind} {name}: classes")
            for column in ("class", "pixels", "labels with it"):
                table.add_column(column, justify="left" if column == "class" else "right")
            for label, pixels in split.pixels.items():
                table.add_row(label, f"{pixels / labelled:.2%}", str(split.images_with.get(label, "")))
            screen.print(table)
    for note in report.notes:
        screen.print(f"note: {note}", markup=False, soft_wrap=True)
    for problem, faults in groupby(sorted(report.faults, key=lambda fault: fault.problem), lambda fault: fault.problem):
        alike = list(faults)
        screen.print(f"\n{problem} ({len(alike)}):", markup=False)
        for fault in alike:
            screen.print(f"  {fault.path}  {fault.detail}".rstrip(), markup=False, soft_wrap=True)
    for warning in report.warnings:
        screen.print(f"warning: {warning}", markup=False, soft_wrap=True)
    if report.faults or report.warnings:
        counts = [f"{len(report.faults)} faults"] + [f"{len(report.warnings)} warnings"] * bool(report.warnings)
        screen.print(f"\n{', '.join(counts)} in {report.root}", markup=False, soft_wrap=True)
    else:
        screen.print(f"{report.root} is sound.", markup=False, soft_wrap=True)


def show_recognised(recognised: "Recognised", root: str) -> None:
    """Show which layout a folder has, what it holds and what is missing."""
    screen = console()
    screen.print(f"{root} has the layout of {recognised.layout}.", soft_wrap=True)
    for split, pairs in recognised.splits.items():
        labels = sum(label is not None for _, label in pairs)
        screen.print(f"{split}: {len(pairs)} images, {labels} labels")
    names = ", ".join(name for name, _, _ in recognised.classes)
    screen.print(f"{len(recognised.classes)} classes, from {recognised.source}: {names}", soft_wrap=True)
    for lack in recognised.missing:
        screen.print(f"note: {lack}", soft_wrap=True)
