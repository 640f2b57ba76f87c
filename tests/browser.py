"""Open TensorBoard's pages and those of reports in a real browser, Debian's Chromium. `make test-browser` installs it."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here: make test-browser")

FLAGS = (
    "headless",
    "no-sandbox",  # root has none
    "disable-gpu",
    "disable-dev-shm-usage",
    "disable-quic",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "no-first-run",
)

VISIBLE_ELEMENTS = """
function* visibleElements(selector, root = document) {  // also in shadow roots, where TensorBoard has nearly all
  for (const element of root.querySelectorAll('*')) {
    if (element.matches(selector) && element.getBoundingClientRect().height) yield element;
    if (element.shadowRoot) yield* visibleElements(selector, element.shadowRoot);
  }
}
"""

FIRST = "const element = [...visibleElements(arguments[0])].find(element => element.innerText.trim() == arguments[1]);"

CHARTS = """
const draw = card => {
  const all = selector => [...visibleElements(selector, card.shadowRoot ?? card)];
  const [title] = all('[itemprop=name]'), [plot] = all('.line-plot');
  return title && plot && {
    title: title.innerText,
    size: [plot.clientWidth, plot.clientHeight],
    curves: all('path.line').map(path => [getComputedStyle(path).stroke, path.getAttribute('d')]).reverse(),
    marks: all('path.symbol').map(path => [getComputedStyle(path).fill, [+path.getAttribute('x'), +path.getAttribute('y')]]),
  };
};
return [...visibleElements('tf-scalar-card, tf-custom-scalar-multi-line-chart-card')].map(draw).filter(chart => chart);
"""

LEGEND = """
const swatch = row => [...visibleElements('.isolator, .run-color-swatch', row)].map(icon => {
  const style = getComputedStyle(icon);
  return icon.matches('.isolator') ? style.color : style.backgroundColor;
});
const rows = [...visibleElements('.name-row, runs-data-table tb-data-table-content-row')];
return rows.map(row => [row.innerText.trim(), ...swatch(row)]).filter(row => row.length == 2);
"""


@dataclass(frozen=True)
class Chart:
    """A chart of the Scalars or the Custom Scalars; places are pixels from its upper left corner.

    The curves stand in the legend's order: TensorBoard draws the first run last, over the others.
    """

    title: str
    size: tuple[float, float]
    curves: list[tuple[str, list[tuple[float, float]]]]  # colour and corners
    marks: set[tuple[str, tuple[float, float]]]  # colour and place


class Browser:
    """A window of 1120 x 836, in which 5 pixels are drawn for 4 of the page."""

    def __init__(self, driver: Chrome) -> None:
        self._driver = driver
        metrics = {"width": 1120, "height": 836, "deviceScaleFactor": 1.25, "mobile": False}
        driver.set_script_timeout(120)  # where the machine has much else to do
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def open(self, url: str) -> None:
        """Another page; a new one also where only the fragment differs."""
        self._driver.get("about:blank")
        self._driver.get(url)

    def click(self, selector: str, text: str) -> None:
        """Click on the first such element with this text."""
        clicked = self.run(f"{FIRST} element?.click(); return Boolean(element)", selector, text)
        assert clicked, f"nothing to click on: {text}"

    def untick(self, selector: str, text: str) -> None:
        """Require a box without a tick. Click on a ticked one and fail: a page that starts may tick it again."""
        box = "const box = element?.querySelector('input') ?? element, ticked = box?.checked;"
        ticked = self.run(f"{FIRST} {box} if (ticked) box.click(); return ticked", selector, text)
        assert ticked is False, f"missing or ticked: {text}"

    def charts(self) -> list[Chart]:
        """The charts that can be seen, as they are at this moment."""
        return [
            Chart(
                chart["title"],
                tuple(chart["size"]),
                [(colour, _corners(path)) for colour, path in chart["curves"]],
                {(colour, tuple(place)) for colour, place in chart["marks"]},
            )
            for chart in self.run(CHARTS)
        ]

    def legend(self) -> dict[str, str]:
        """Runs and their colours, from top to bottom."""
        return dict(self.run(LEGEND))

    def picture(self, selector: str | None = None) -> bytes:
        """The window, or the first such element in it, as a PNG."""
        if selector is None:
            return self._driver.get_screenshot_as_png()
        [element, *_] = self.run("return [...visibleElements(arguments[0])]", selector) or [None]
        assert element is not None, f"nothing to see: {selector}"
        try:
            return element.screenshot_as_png
        except StaleElementReferenceException as gone:
            raise AssertionError(f"drawn anew: {selector}") from gone

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns; it may use `visibleElements`."""
        return self._driver.execute_script(VISIBLE_ELEMENTS + script, *arguments)


def _corners(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.e-]+),(-?[\d.e-]+)", path)]


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, without a past."""
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    driver = Chrome(options, Service(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
