"""The report: one page that holds all it shows, says what is given and nothing else, and is whole or not there."""

import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.evaluation.figures import curve, place_labels, scatter
from infinite_id_jax.evaluation.markdown import write_markdown
from infinite_id_jax.evaluation.metrics import Estimate
from infinite_id_jax.evaluation.report import Cell, Claims, Figure, ImageGrid, Report, Section, Table, write_report

NAN = float("nan")
HOSTILE = "a <b>bold</b> \"prompt\" & <script>alert('x')</script>"
VOID = {"meta", "img", "br", "line", "circle"}


class Page(HTMLParser):
    """A page's elements and text; raises where tags are not balanced."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def picture(side: int, seed: int = 0) -> Image.Image:
    """Smooth, as photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def embedded(attributes: dict[str, str]) -> Image.Image:
    kind, content = attributes["src"].split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == f"data:{image.get_format_mimetype()}"
    return image


POINTS = {
    "Infinite-ID": (Estimate(0.34, 0.33, 0.35), Estimate(0.9, 0.7, 1.1)),
    "mutual attention": (Estimate(0.316, 0.31, 0.32), Estimate(-1.6, -1.8, -1.4)),
    "nobody scored": (Estimate(NAN, NAN, NAN), Estimate(NAN, NAN, NAN)),
    "one person": (Estimate(0.33, NAN, NAN), Estimate(0.1, NAN, NAN)),
}


@pytest.fixture(scope="module")
def diagram() -> bytes:
    return scatter(POINTS)


def everything(folder: Path, diagram: bytes) -> Report:
    """A report with all that a report can have; one of its pictures is a file."""
    picture(200, seed=1).save(folder / "drawn.png")
    table = Table(
        ["Method", "M_Face", "Pictures"],
        [["ours", Estimate(-0.6891, -0.7, -0.68), 2000], [HOSTILE, Estimate(NAN, NAN, NAN), 3]],
        HOSTILE,
    )
    cells = [Cell(picture(48), ["face 0.69", HOSTILE]), Cell(folder / "drawn.png"), Cell(None, ["no face"])]
    claims = [
        {
            "claim": HOSTILE,
            "difference": [0.1, 0.05, 0.15],
            "verdict": "confirmed",
            "no_face_zero": [0.04, 0.03, 0.05],
        },
        {"claim": "cost", "difference": [-0.01, -0.03, 0.01], "verdict": "not confirmed", "bound": -0.02},
        {"claim": "gain", "difference": [-0.1, -0.2, -0.05], "verdict": "contradicted"},
        {"claim": "unknown", "difference": [NAN, NAN, NAN], "verdict": "not confirmed"},
    ]
    sections = [
        Section("Numbers & claims", HOSTILE, [table, Claims(claims)]),
        Section("Pictures", "", [ImageGrid([HOSTILE, "drawn", "none"], [(HOSTILE, cells)], "all of one person")]),
        Section("Diagrams", "", [Figure(HOSTILE, diagram)]),
    ]
    return Report(HOSTILE, "What was found.", sections, {"people": 100, HOSTILE: HOSTILE})


def test_tables_and_claims_for_a_document(tmp_path, diagram):
    report = everything(tmp_path, diagram)
    path = write_markdown(tmp_path / "out", report)
    assert [file.name for file in path.parent.iterdir()] == ["tables.md"]
    text = path.read_text()
    assert "<" not in text  # a cell is not a tag
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [3] * 4 + [4] * 6  # a table of two rows and one of four claims
    assert rows[2] == ["ours", "-0.689 (-0.700 to -0.680)".replace("-", "\N{MINUS SIGN}"), "2000"]
    assert rows[3][1:] == ["\N{EN DASH}", "3"]
    assert [row[1] for row in rows[6:]] == ["confirmed", "not confirmed", "contradicted", "not confirmed"]
    assert [row[3] for row in rows[6:]] == ["0.040 (0.030 to 0.050)", *"\N{EN DASH}" * 3]
    assert "Diagrams" not in text
    broken = Report("a | b\nc", "", [Section("s", "", [Table(["x|y"], [["1\n2"]])])])
    assert write_markdown(tmp_path, broken).read_text().splitlines()[-3:] == ["| x\\|y |", "| --- |", "| 1 2 |"]


def test_a_page_holds_all_it_shows(tmp_path, diagram):
    path = write_report(tmp_path / "out", everything(tmp_path, diagram))
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    page = Page(path)
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "style"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    assert not re.search(r"url\(|@import", path.read_text())
    (links, ids) = ([a["href"][1:] for a in page.all("a")], [s["id"] for s in page.all("section")])
    assert links == ids
    assert len(ids) == 4  # the settings too

    small, large, svg = page.all("img")
    np.testing.assert_array_equal(np.asarray(embedded(small)), np.asarray(picture(48)))
    shown = embedded(large)
    assert shown.size == (200, 200) == (int(large["width"]), int(large["height"]))
    off = np.abs(np.asarray(shown, float) - np.asarray(picture(200, seed=1), float))
    assert off.mean() < 2  # of 255; measured 0.8
    assert base64.b64decode(svg["src"].split(";base64,")[1]) == diagram


def test_a_page_says_what_it_is_given(tmp_path, diagram):
    page = Page(write_report(tmp_path, everything(tmp_path, diagram)))
    # The title twice, a setting twice, and once each in a claim, a paragraph, a row, a note, a caption, two heads.
    assert page.texts.count(HOSTILE) == 11
    assert {"b", "script"}.isdisjoint(tag for tag, _ in page.elements)
    assert page.all("img")[0]["alt"] == f"{HOSTILE}, {HOSTILE}. face 0.69. {HOSTILE}"
    assert all(image["alt"] for image in page.all("img"))
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings == ["h1", "h2", "h2", "h2", "h2"]
    for text in ("\u22120.689", "\u22120.700 to \u22120.680", "2000", "\u2013", "no face", "0.050 to 0.150"):
        assert text in page.texts
    verdicts = [text for text in page.texts if text in ("confirmed", "not confirmed", "contradicted")]
    assert verdicts == ["confirmed", "not confirmed", "contradicted", "not confirmed"]


def test_a_bar_lies_on_the_side_that_the_verdict_says(tmp_path):
    claims = [
        {"claim": "", "difference": [0.1, 0.05, 0.15], "verdict": "confirmed"},
        {"claim": "", "difference": [-0.01, -0.015, 0], "verdict": "confirmed", "bound": -0.02},
        {"claim": "", "difference": [0.01, -0.03, 0.05], "verdict": "not confirmed"},
        {"claim": "", "difference": [-0.1, -0.2, -0.05], "verdict": "contradicted"},
        {"claim": "", "difference": [0.0, 0.0, 0.0], "verdict": "not confirmed"},
    ]
    page = Page(write_report(tmp_path, Report("t", "s", [Section("c", "", [Claims(claims)])])))
    bars = [(float(a["x1"]), float(a["x2"])) for a in page.all("line") if a["class"] == "reach"]
    middle = float(next(a["x1"] for a in page.all("line") if a["class"] == "bound"))
    sides = ["right" if low > middle else "left" if high < middle else "across" for low, high in bars]
    assert sides == ["right", "right", "across", "left", "across"]
    assert all(0 <= low <= high <= 2 * middle for low, high in bars)


def test_figures_are_shown_as_what_they_are(tmp_path):
    cells = [0.0004, -0.0, 0.00001234, 1234.56, 7, 0.0]
    page = Page(write_report(tmp_path, Report("t", "s", [Section("x", "", [Table(list("abcdef"), [cells])])])))
    assert page.texts[-6:] == ["4.0e\u221204", "0.000", "1.2e\u221205", "1234.6", "7", "0.000"]


def test_equal_reports_give_equal_bytes(tmp_path, diagram):
    one = write_report(tmp_path / "one", everything(tmp_path, diagram)).read_bytes()
    two = write_report(tmp_path / "two", everything(tmp_path, scatter(POINTS))).read_bytes()
    assert one == two


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_picture_that_cannot_be_read_is_named_and_nothing_is_left(tmp_path, content):
    path, out = tmp_path / "lost.png", tmp_path / "out"
    if content:
        path.write_bytes(content)
    report = Report("t", "s", [Section("x", "", [ImageGrid(["a"], [("row", [Cell(path)])])])])
    with pytest.raises(InputError, match=r"lost\.png cannot be shown"):
        write_report(out, report)
    assert not out.exists()

    out.mkdir()
    (out / "report.html").write_text("the one before")
    with pytest.raises(InputError):
        write_report(out, report)
    assert [file.read_text() for file in out.iterdir()] == ["the one before"]


def test_large_pictures_are_made_smaller(tmp_path):
    report = Report("t", "s", [Section("x", "", [ImageGrid(["a"], [("row", [Cell(picture(1024))])])])])
    assert embedded(Page(write_report(tmp_path, report)).all("img")[0]).size == (512, 512)


def test_diagrams_need_nothing_outside_and_leave_no_trace(diagram):
    import matplotlib

    before = dict(matplotlib.rcParams)
    lines = {"M_Face": [Estimate(0.7, 0.68, 0.72), Estimate(0.6, NAN, NAN)], "CLIP-T": [Estimate(0.3, 0.3, 0.3)] * 2}
    names = {"x_label": "side", "y_label": "similarity", "baselines": {"impostors": 0.3}}
    drawn = curve(["full", "half"], lines, **names)
    assert drawn == curve(["full", "half"], lines, **names)
    assert drawn != curve(["full", "half"], lines, **names | {"baselines": {"impostors": 0.2}})
    assert dict(matplotlib.rcParams) == before
    for svg in (drawn.decode(), diagram.decode()):
        assert not re.search(r'(?:href|src)="(?!#)', svg)
        assert "<text" not in svg  # outlines: the reader's fonts change nothing
    assert scatter({}) != diagram


def test_labels_keep_off_each_other():
    rng = np.random.default_rng(0)
    points = rng.uniform(100, 300, (12, 2))  # twelve names, crowded
    sizes = np.stack([rng.uniform(40, 110, 12), np.full(12, 11.0)], axis=1)
    obstacles = points[:, None] + np.array([[-5.0, -5.0], [5.0, 5.0]])
    bounds = np.array([[0.0, 0.0], [450.0, 330.0]])
    corners = place_labels(points, sizes, obstacles, bounds)
    boxes = np.concatenate([np.stack([corners, corners + sizes], axis=1), obstacles])
    shared = np.minimum(boxes[:12, None, 1], boxes[None, :, 1]) - np.maximum(boxes[:12, None, 0], boxes[None, :, 0])
    area = np.maximum(shared, 0).prod(axis=-1)
    np.fill_diagonal(area, 0)
    assert area.max() == 0
    assert (corners >= bounds[0]).all()
    assert (corners + sizes <= bounds[1]).all()
    nearest = np.clip(points, corners, corners + sizes)
    assert np.linalg.norm(nearest - points, axis=1).max() < 70


def test_a_diagram_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="evaluate"):
        scatter(POINTS)
