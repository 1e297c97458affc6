"""A contact sheet of both domains."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segadapt.trainables.core.data.streets.config import CLASSES, StreetsConfig
from segadapt.trainables.core.data.streets.images import load_streets


def contact_sheet(config: StreetsConfig, path: Path, samples: int = 6) -> None:
    """Write a PNG that shows both domains: a row per sample, images beside their labels in the class colours.

    Args:
        config: The benchmark to show; its validation images are drawn.
        path: Where the PNG goes; the folder must exist.
        samples: Rows, at most; `config.val_images` if that is fewer.
    """
    _, evaluation = load_streets(config)
    colours = np.array(CLASSES.colors, np.uint8)
    zoom, gap, caption = 2, 4, 16
    cell_width, cell_height = config.width * zoom + gap, config.height * zoom + gap
    rows = min(samples, config.val_images)
    sheet = Image.new("RGB", (4 * cell_width + gap, rows * cell_height + gap + caption), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, (domain, images) in enumerate((("source", evaluation.source), ("target", evaluation.target))):
        left = gap + 2 * place * cell_width
        pen.text((left, 3), f"{domain} image", fill="black", font=font)
        pen.text((left + cell_width, 3), f"{domain} label", fill="black", font=font)
        for row in range(rows):
            picture = images.image(row).permute(1, 2, 0).numpy()
            for column, cell in enumerate((picture, colours[images.label(row).numpy()])):
                enlarged = Image.fromarray(cell).resize(
                    (config.width * zoom, config.height * zoom), Image.Resampling.NEAREST
                )
                sheet.paste(enlarged, (left + column * cell_width, caption + gap + row * cell_height))
    sheet.save(path, format="PNG")
