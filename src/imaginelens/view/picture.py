"""An input image under the grid of its image tokens, each cell with its (row, column)."""

from imaginelens.view.markup import Markup, element
from imaginelens.view.png import image_address
from imaginelens.view.report import GridCell, Picture

_LABEL_FROM = 0.11  # a cell narrower than this share of the image gets no written coordinates


def picture_svg(picture: Picture) -> Markup:
    """The image at its own aspect ratio; coordinates are image pixels."""
    width, height = picture.image.size
    smooth = "pixelated" if max(width, height) < 200 else "auto"
    image = element(
        "image",
        href=image_address(picture.image),
        width=width,
        height=height,
        preserveAspectRatio="none",
        style=f"image-rendering:{smooth}",
    )
    cells = [_cell(cell, width) for cell in picture.cells]
    return element(
        "svg",
        image,
        *cells,
        class_="picture",
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=_alt(picture),
    )


def _alt(picture: Picture) -> str:
    if not picture.cells:
        return picture.alt
    rows = 1 + max(cell.row for cell in picture.cells)
    columns = 1 + max(cell.column for cell in picture.cells)
    return f"{picture.alt}, with its {rows} by {columns} grid of image tokens drawn on it"


def _cell(cell: GridCell, image_width: int) -> Markup:
    left, top, right, bottom = cell.box
    line = max(0.35, image_width / 260)
    box = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    return element(
        "g",
        element("title", f"image token at row {cell.row}, column {cell.column}\npixels {cell.box}"),
        element(
            "rect",
            **box,
            fill="transparent",
            stroke="#000",
            stroke_opacity=0.35,
            stroke_width=line * 2,
        ),
        element("rect", **box, fill="none", stroke="#fff", stroke_opacity=0.9, stroke_width=line),
        _coordinates(cell, image_width) if right - left >= image_width * _LABEL_FROM else None,
        class_="grid-cell",
        data_row=cell.row,
        data_column=cell.column,
    )


def _coordinates(cell: GridCell, image_width: int) -> Markup:
    size = image_width / 23
    return element(
        "text",
        f"{cell.row},{cell.column}",
        x=cell.box[0] + size * 0.35,
        y=cell.box[1] + size * 1.12,
        font_size=size,
        fill="#fff",
        stroke="#000",
        stroke_width=size / 6,
        stroke_opacity=0.6,
        paint_order="stroke",
        font_weight=600,
    )
