"""The page of a report: what it holds, that names in it stay texts, and how it is used in a browser."""

import base64
import hashlib
import json
import re
import tomllib
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from madformer.config import write_config
from madformer.config.loading import load_experiment
from madformer.report import Report, build_report, curves_of_runs, write_report
from madformer.report.figures import view
from tests.browser import browser, needs_browser
from tests.conftest import ROOT
from tests.points import at, point, recorded, tuned
from tests.report.curves import curve

HOSTILE = "</script><img src=x onerror=alert(1)> [a](https://example.org) ![b](https://example.org/b.png) <!-- report -->"


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the texts of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.texts = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attributes = self.found[-1] if self.found else ("", {})
        if tag == "script" and (name := attributes.get("id") or "code") not in self.scripts:
            self.scripts[name] = data
        self.texts += data


def made(root: Path, title: str = "Digits", name: str = "d2") -> Report:
    """Three designs: one with two seeds, one that was tuned, and one with another metric, trained for longer."""
    metrics = {"fd_digits": 30.0, "precision_digits": 0.5, name: 1.0}
    both = [
        curve(root, "d2", *(point(nfe, 0, metrics=metrics | {"fd_digits": 1000 / nfe + seed}) for nfe in (16, 32)), seed=seed)
        for seed in (0, 1)
    ]
    chosen = curve(root, "d4", point(16, 70.0), point(32, 30.0), *tuned(16, 40.5, 74.0))
    longer = curve(root, "d8", point(16, 7.0, **at(2000)), point(32, 3.0, **at(2000)))
    named = [*(replace(each, label=name) for each in both), chosen, longer]
    return build_report(named, title, "fd_digits")


COMMAND = "madformer report 'a b.yaml'"


@dataclass(frozen=True)
class Written:
    """A report's page as it was written."""

    report: Report
    path: Path
    page: Elements


def written(report: Report, folder: Path) -> Written:
    write_report(report, folder, "report")
    return Written(report, folder / "report.html", Elements((folder / "report.html").read_text()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    return written(replace(made(root), command=COMMAND), root / "out")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    return written(replace(made(root, HOSTILE, HOSTILE), command=COMMAND), root / "out")


def test_the_page_has_the_data_of_the_json_and_what_to_switch(plain):
    page, shown = plain.page, json.loads(plain.page.scripts["view"])
    assert json.loads(page.scripts["report"]) == json.loads(plain.path.with_suffix(".json").read_text())
    assert shown == json.loads(json.dumps(view(plain.report, ("nfe", "flops", "seconds"))))
    assert [(look["design"], look["sampling"]) for look in shown["looks"].values()] == [
        ("d2", "fixed: ddim, uniform"), ("d4", "fixed: ddim, uniform"), ("d4", "tuned"), ("d8", "fixed: ddim, uniform"),
    ]  # fmt: skip
    assert shown["looks"]["d4"]["dashes"] and not shown["looks"]["d4 · tuned"]["dashes"], "solid is tuned"
    assert shown["metrics"] == {"fd_digits": "lower", "precision_digits": "higher", "d2": "lower"}
    assert [cost["key"] for cost in shown["costs"] if cost["shown"]] == ["nfe", "tflops_per_image", "seconds_per_image"]
    assert {"designs", "samplings", "metrics", "costs", "shown"} <= {attributes.get("id") for _, attributes in page.found}
    assert "2026-01-01" in page.texts and COMMAND in page.texts


def test_the_page_asks_nobody_for_anything_and_runs_no_other_script(plain):
    [policy] = [attributes["content"] for _, attributes in plain.page.found if attributes.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(plain.page.scripts["code"].encode()).digest()).decode()
    for rule in (
        "default-src 'none'",
        "img-src data:",
        f"script-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ):
        assert rule in policy.split("; ")
    assert all(attributes["src"].startswith("data:image/") for _, attributes in plain.page.found if "src" in attributes)
    text = plain.path.read_text()
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text


def test_names_are_texts(plain, hostile):
    shapes = [[(tag, sorted(attributes)) for tag, attributes in each.page.found] for each in (plain, hostile)]
    assert shapes[0] == shapes[1]
    links = [attributes["href"] for tag, attributes in hostile.page.found if tag == "a"]
    assert links == [f"../{name}/evaluations.jsonl" for name in ("d2-s0", "d2-s1", "d4-s0", "d8-s0")]
    assert HOSTILE in hostile.page.texts and json.loads(hostile.page.scripts["report"])["title"] == HOSTILE
    assert "<" not in hostile.page.scripts["report"] + hostile.page.scripts["view"]


def test_the_page_says_what_differs_between_runs_and_where_their_records_lie(tmp_path):
    for name, changes in {'q"&uo?ted#': [], "plain": ["optimizer.lr=0.1", "seed=1"]}.items():
        write_config(load_experiment(ROOT / "experiments/digits.yaml", changes), tmp_path / "runs" / name)
        recorded(tmp_path / "runs" / name, point(16, 70.0))
    page = written(build_report(curves_of_runs(sorted((tmp_path / "runs").iterdir())), "Two"), tmp_path / "out").page
    assert "optimizer.lr: 0.1, 0.0" in page.texts and "seed: 1, 0" in page.texts
    assert "data.source" not in page.texts, "which both have"
    links = [unquote(attributes["href"]) for tag, attributes in page.found if tag == "a"]
    assert [(tmp_path / "out" / link).resolve().parent.name for link in links] == ["plain", 'q"&uo?ted#']
    assert all((tmp_path / "out" / link).is_file() for link in links)


def test_an_elastic_run_is_listed_with_all_its_depths(tmp_path):
    elastic = curve(tmp_path, "d2", point(16, 70.0))
    curves = [elastic, replace(elastic, label="d8", axes={"model.diffusion_depth": 8}), curve(tmp_path, "d4", point(16, 60.0))]
    page = written(build_report(curves, "Depths"), tmp_path / "out").page
    assert "<td>2, 8</td>" in (tmp_path / "out/report.html").read_text()
    assert [attributes["href"] for tag, attributes in page.found if tag == "a"] == [
        "../d2-s0/evaluations.jsonl",
        "../d4-s0/evaluations.jsonl",
    ]


def test_designs_of_several_training_lengths_are_not_ranked_without_a_word(plain, tmp_path):
    said = "Not all designs were trained for as many steps (d2: 1,000, d4: 1,000, d8: 2,000): all comparisons are across these"
    assert said in plain.report.caution.replace("*", "") and plain.report.caution in plain.report.markdown()
    assert said[:46] in plain.page.texts and json.loads(plain.page.scripts["report"])["caution"].startswith(said)
    assert not build_report([curve(tmp_path, "d16", point(16, 7.0))], "One").caution


def test_the_package_has_the_page_s_files():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["madformer"]
    shipped = {path for pattern in settings for path in (ROOT / "madformer").glob(pattern)}
    assert shipped >= {ROOT / f"madformer/report/page/page.{kind}" for kind in ("html", "css", "js")}


@needs_browser
@pytest.mark.parametrize(("kind", "name"), [("plain", "d2"), ("hostile", HOSTILE)])
def test_the_page_in_a_browser(kind, name, request):
    with browser() as window:
        window.open(request.getfixturevalue(kind).path.as_uri())

        def count(selector: str) -> int:
            return window.run("return document.querySelectorAll(arguments[0]).length", selector)

        assert (count("#charts svg"), count("#charts svg:first-child .series")) == (3, 12)
        for toggled, charts, series in ((name, 3, 9), ("tuned", 3, 6), ("precision_digits", 6, 6), ("fd_digits", 3, 0)):
            window.click("label", toggled)
            assert (count("#charts svg"), count("#charts .series")) == (charts, series), toggled
        window.click("label", name)
        assert count(".front.alone[d*=L]") == 3, "the front of equal values is one point, which can be seen"
        window.click("label", name)
        window.click("label", "fd_digits")
        window.click("label", "sampling time, ms per image")
        assert count("#charts svg") == 4
        move = """
            const svg = document.querySelector('#charts svg'), box = svg.querySelector('.mark').getBoundingClientRect();
            svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.x + 9, clientY: box.y + 9}));
            return document.querySelector('#tooltip').textContent;
        """
        assert re.match(r"d4\nNFE 16, 2 steps\nfd_digits 70.0\n", window.run(move))
        assert window.run("document.querySelector('main button').click(); return document.querySelector('dialog').open")
        assert window.run("return document.documentElement.scrollWidth <= window.innerWidth"), "nothing wider than the window"
        assert window.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
