"""Draws the pictures of docs/images that show a page: python tests/browser/screenshots.py"""

import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `browser`, when run as a script

import numpy as np
from browser import jupyter
from browser.chromium import Chromium
from browser.live import LivePage, cells, choose
from PIL import Image

import imaginelens as il
from imaginelens.view.colour import ColourScale
from imaginelens.view.demo import run_demo
from imaginelens.view.explorer import explore

IMAGES = Path(__file__).parents[2] / "docs" / "images"
MOST_BYTES = 250_000
PIXELS = 1.5  # for each CSS pixel
OF_SCALE = 41


def main(folder: Path = IMAGES) -> None:
    """Write explorer.png, explorer-dark.png, explorer-page.png, explorer-notebook.png, demo.png."""
    explorer(folder)
    notebook(folder)
    demo(folder)


def demo(folder: Path) -> None:
    """The report of the demo, down to its first pair of inputs."""
    with tempfile.TemporaryDirectory() as scratch, Chromium(Path(scratch) / "chromium") as browser:
        page = run_demo(Path(scratch) / "demo")
        browser.size(1200, 1875)
        browser.open(page)
        _write(browser.screenshot(), folder / "demo.png")


def explorer(folder: Path) -> None:
    """The widget as it is, in the dark, and as a saved page."""
    lens = il.load("latent-content")
    widget = explore(lens, lens.task(n=4, seed=0))
    with tempfile.TemporaryDirectory() as scratch, Chromium(Path(scratch) / "chromium") as browser:
        browser.size(1100, 1200, scale=PIXELS)
        live = LivePage(browser, widget, Path(scratch) / "live.html")
        _measure(live, "layer 1, position latent[0]")
        _keep(browser, folder / "explorer.png")
        page = widget.to_html(Path(scratch) / "page.html")

        live.choose("tab", "image cells")
        _measure(live, "layer 0, position image[0][2, 2]")
        browser.size(1100, 1200, dark=True, scale=PIXELS)
        _keep(browser, folder / "explorer-dark.png")

        browser.size(720, 1900, scale=PIXELS)
        browser.open(page)
        browser.click(cells(browser)["layer 1, position latent[0]"][1])
        _keep(browser, folder / "explorer-page.png", "body")
    widget.close()


def notebook(folder: Path) -> None:
    """The widget in JupyterLab, where the image's cells were measured and one was run."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        jupyter.Jupyter(Path(scratch) / "jupyter") as lab,
        Chromium(Path(scratch) / "chromium") as browser,
    ):
        browser.size(1180, 1240, scale=PIXELS)
        jupyter.explore(lab, browser)
        choose(browser, "tab", "image cells")
        browser.until("document.querySelector('.il-under') !== null", seconds=jupyter.SECONDS)
        browser.until(f"/click a cell/.test({jupyter.STATUS})", seconds=jupyter.SECONDS)
        browser.click("button[name=map]")
        browser.until(f"/rows measured/.test({jupyter.STATUS})", seconds=jupyter.SECONDS)
        browser.click(cells(browser)["layer 0, position image[0][2, 2]"][1])
        browser.until(f"/, effect/.test({jupyter.STATUS})", seconds=jupyter.SECONDS)
        browser.move((1.0, 1.0))
        browser.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
        browser.drawn()
        _write(browser.screenshot(), folder / "explorer-notebook.png")


def _measure(live: LivePage, cell: str) -> None:
    """Measure all cells, and run one."""
    live.press("map")
    live.settle()
    live.browser.click(cells(live.browser)[cell][1])
    live.settle()
    live.browser.move((1.0, 1.0))


def _keep(browser: Chromium, path: Path, selector: str = ".il-explorer") -> None:
    """Save an element, with some space around it."""
    browser.drawn()
    left, top, width, height = browser.box(selector)
    box = (max(0.0, left - 10), max(0.0, top - 10), width + 20, height + 20)
    _write(browser.screenshot(box), path)


def _write(data: bytes, path: Path) -> None:
    """Save a picture as PNG with few colours.

    Raises:
        ValueError: the file would be too large for the documentation.
    """
    shot = Image.open(io.BytesIO(data)).convert("RGB")
    out = io.BytesIO()
    _few_colours(shot).save(out, "PNG", optimize=True)
    if out.tell() > MOST_BYTES:
        raise ValueError(f"{path.name} has {out.tell()} bytes, more than {MOST_BYTES}")
    path.write_bytes(out.getvalue())


def _few_colours(shot: Image.Image) -> Image.Image:
    """A palette for the picture, and the colours of the scale, which are few of its pixels."""
    common = shot.quantize(256 - OF_SCALE, kmeans=2).getpalette("RGB") or []
    scale = ColourScale(1.0).rgb(np.linspace(-1, 1, OF_SCALE)).round().astype(int)
    palette = Image.new("P", (1, 1))
    palette.putpalette(common[: 3 * (256 - OF_SCALE)] + scale.ravel().tolist())
    return shot.quantize(palette=palette, dither=Image.Dither.NONE)


if __name__ == "__main__":
    main()
