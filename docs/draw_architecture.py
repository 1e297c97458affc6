"""Draw the rooms of `platform/` and what each imports, from the code, as docs/images/architecture.svg.

    python docs/draw_architecture.py [--check]

With --check nothing is written; exit status 1 says that the picture is not what the code looks like.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
sys.path.insert(0, str(ROOT / "tests"))

from test_layout import RULE, imports, modules  # noqa: E402  # the rule has one place

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 108, 46, 34, 16, 24
FOLDERS = (("search_spaces", "what may vary, and what each paper used"), ("trainables", "what is trained: torch alone"))


def room_imports() -> dict[str, set[str]]:
    """Return what each room imports of the others."""
    known = modules()
    edges: dict[str, set[str]] = {room: set() for rooms in RULE for room in rooms}
    for name, path in known.items():
        room = name.split(".")[2]
        edges[room] |= {module.split(".")[2] for module, _ in imports(ast.parse(path.read_text()), known)} - {room}
    return edges


def places() -> dict[str, tuple[float, float]]:
    """Return the upper left corner of each room: a column for each rank of the rule."""
    tallest = max(map(len, RULE))
    middle = MARGIN + tallest * (HEIGHT + GAP_Y) / 2
    return {
        room: (
            MARGIN + rank * (WIDTH + GAP_X),
            middle + (row - len(rooms) / 2) * (HEIGHT + GAP_Y) + GAP_Y / 2,
        )
        for rank, rooms in enumerate(RULE)
        for row, room in enumerate(rooms)
    }


def drawn() -> Iterator[str]:
    """Yield the lines of the picture."""
    where, edges = places(), room_imports()
    right = max(x for x, _ in where.values()) + WIDTH + MARGIN
    floor = max(y for _, y in where.values()) + HEIGHT + 2 * GAP_Y
    bottom = floor + len(FOLDERS) * (HEIGHT + GAP_Y) + MARGIN
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:g} {bottom:g}" font-family="sans-serif" '
        'font-size="13" text-anchor="middle">'
    )
    yield "<style>.line{stroke:#7a8699;fill:none;stroke-opacity:.45} .box{fill:#eef3fb;stroke:#3b6ea5}"
    yield ".base{fill:#f4f0e6;stroke:#9a7b34} text{fill:#1c2733} .small{font-size:11px;fill:#5a6675}</style>"
    yield f'<rect width="{right:g}" height="{bottom:g}" fill="white"/>'
    for room, imported in edges.items():
        for other in sorted(imported):
            (x1, y1), (x2, y2) = where[room], where[other]
            start, end = (x1, y1 + HEIGHT / 2), (x2 + WIDTH, y2 + HEIGHT / 2)
            lift = min(70.0, (start[0] - end[0]) / 9) * (-1 if start[1] <= end[1] else 1)
            bend = (start[0] - end[0]) / 2
            yield (
                f'<path class="line" d="M{start[0]:g} {start[1]:g} C{start[0] - bend:g} {start[1] + lift:g} '
                f'{end[0] + bend:g} {end[1] + lift:g} {end[0]:g} {end[1]:g}"><title>{room} imports {other}</title>'
                "</path>"
            )
    for room, (x, y) in where.items():
        count = sum(name.split(".")[2] == room for name in modules())
        shown = f"{count} module" + ("s" if count != 1 else "")
        yield f'<rect class="box" x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7"/>'
        yield f'<text x="{x + WIDTH / 2:g}" y="{y + 20:g}">{escape(room)}</text>'
        yield f'<text class="small" x="{x + WIDTH / 2:g}" y="{y + 36:g}">{shown}</text>'
    for row, (folder, says) in enumerate(FOLDERS):
        y = floor + row * (HEIGHT + GAP_Y)
        yield f'<rect class="base" x="{MARGIN}" y="{y:g}" width="{right - 2 * MARGIN:g}" height="{HEIGHT}" rx="7"/>'
        yield f'<text x="{right / 2:g}" y="{y + 20:g}">{folder}</text>'
        yield f'<text class="small" x="{right / 2:g}" y="{y + 36:g}">{says}; rooms above may import it</text>'
    yield "</svg>"


def main() -> int:
    """Draw, or compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    content = "\n".join(drawn()) + "\n"
    if not parser.parse_args().check:
        PICTURE.write_text(content)
        return 0
    return int(not PICTURE.is_file() or PICTURE.read_text() != content)


if __name__ == "__main__":
    sys.exit(main())
