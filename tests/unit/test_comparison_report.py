"""The report of a comparison: one page that loads nothing, curves that can be told apart, pictures side by side."""

import re
from html.parser import HTMLParser
from itertools import combinations, pairwise

import numpy as np
import pandas
import pytest
from compare_runs import main
from compared import write_run, write_time
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from qwen_image.comparison.curves import DARK, DASHES, LIGHT, POINTS, curves_svg, line_style
from qwen_image.comparison.pictures import find_samples
from qwen_image.comparison.report import STYLE
from qwen_image.comparison.runs import read_runs
from qwen_image.sampling.prompts import load_prompts

NASTY = "<script>alert(1)</script>\"'&<img src=x onerror=y>$a_b$"
# linear light as it is seen without one kind of cone, by Machado, Oliveira and Fernandes (2009), severity 1
SEEN = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
EMPTY = {"meta", "br", "img", "path", "use"}


class Page(HTMLParser):
    """Collects elements and attributes; elements must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A project of three runs with pictures, and a run without, after their comparison."""
    project = tmp_path_factory.mktemp("compared") / "project"
    (project / "results").mkdir(parents=True)
    (project / "prompts.txt").write_text(f"{NASTY} --w 64 --h 32 --d 5\n星 --w 32 --h 32\n", encoding="utf-8")
    write_run(project, "better", validation=[0.3, 0.4], sample_prompts="prompts.txt", network_args=[NASTY])
    write_run(project, "nasty", validation=[0.6, 0.5], sample_prompts="prompts.txt", output_name="a'<b>&\"")
    write_run(project, "same", validation=[0.7, 0.8], sample_prompts="prompts.txt", seed=7)
    write_run(project, "without")
    write_time(project, "better", 4.0)
    paint(project, "better", "better", "red")
    paint(project, "better", "better-best", "green")
    paint(project, "nasty", "a'<b>&\"", "blue")
    paint(project, "same", "same", "gray", count=1, seed=7)
    return project, compare(project)


def compare(project):
    """Compare all runs of a project and return the files by name."""
    folder = project / "results/compare"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        assert main(["--output_dir", str(folder)]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def paint(project, run, stem, colour, count=2, seed=42):
    """Write the first pictures of a LoRA."""
    folder = project / "results/samples" / run
    folder.mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(load_prompts(project / "prompts.txt", seed=seed)[:count]):
        Image.new("RGB", (prompt.width, prompt.height), colour).save(folder / f"{stem}_{index:02d}_{prompt.seed}.png")


def test_the_page_loads_and_runs_nothing(compared):
    text = compared[1]["report.html"].decode()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "a", "base", "form"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("data:image/jpeg;base64,", "#"))
    assert not re.findall(r"url\((?!#)|@import", text)
    # names of XML's own, which nothing is loaded from
    assert set(re.findall(r"https?://[^\"]*", text)) <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}


def test_user_text_is_shown_as_it_is(compared):
    page = Page(compared[1]["report.html"].decode())
    assert NASTY in page.texts
    assert "a'<b>&\"" in page.texts and "星" in page.texts
    assert {a["alt"] for tag, a in page.elements if tag == "img"} >= {f"better, best: step 1: {NASTY}"}


def test_what_differs_is_marked(compared):
    text = compared[1]["report.html"].decode()
    marked = re.findall(r'<td class="setting other">(.*?)</td>', text)
    # of four runs one has arguments, one another seed, one neither prompts nor validation
    assert sorted(len(value) > 9 for value in marked) == [False] * 3 + [True]
    assert {"7", "0", "not set"} <= set(marked)


def test_pictures_are_of_the_lora_that_is_ranked(compared):
    project, files = compared
    runs = read_runs(sorted((project / "results/train").iterdir()))
    samples = find_samples(runs)
    assert samples.labels == ["better, best: step 1", "a'<b>&\", step 2", "same, step 2"]
    assert [file and file.name.split("_")[0] for file in samples.files[0]] == ["better-best"] * 2
    assert samples.files[2][1] is None, "a picture that is not there leaves a gap"
    assert [prompt[:4] for prompt in samples.prompts] == [NASTY[:4], "星"]
    (project / "sheet.png").write_bytes(files["samples.png"])
    with Image.open(project / "sheet.png") as sheet:
        assert (0, 128, 0) in {colour for _, colour in sheet.getcolors(1 << 24)}
        assert (255, 0, 0) not in {colour for _, colour in sheet.getcolors(1 << 24)}


def test_equal_runs_give_equal_bytes_and_only_times_may_differ(compared):
    project, files = compared
    assert compare(project) == files
    write_time(project, "better", 8.0)
    again = compare(project)
    assert again["samples.png"] == files["samples.png"]
    paths = [project / name for name in ("before.tsv", "after.tsv")]
    for path, content in zip(paths, (files["runs.tsv"], again["runs.tsv"]), strict=True):
        path.write_bytes(content)
    before, after = (pandas.read_csv(path, sep="\t") for path in paths)
    times = ["train_seconds", "steps_per_second"]
    assert list(before["run"]) == ["better", "a'<b>&\"", "same", "without"]
    assert before.drop(columns=times).equals(after.drop(columns=times))
    assert not before[times].equals(after[times])


def test_without_pictures_there_is_no_sheet(tmp_path):
    write_run(tmp_path, "a")
    stale = tmp_path / "results/compare/samples.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier comparison")
    files = compare(tmp_path)
    assert files.keys() == {"report.html", "runs.tsv"}
    page = Page(files["report.html"].decode())
    assert "Samples" not in page.texts and "1 run" in page.texts


def test_the_curves_show_every_run_and_all_of_its_length(tmp_path):
    runs = read_runs([
        write_run(tmp_path, "a", losses=[1 / step for step in range(1, 5 * POINTS)]),
        write_run(tmp_path, "b", losses=[0.5], validation=[0.4]),
        write_run(tmp_path, "c", losses=[float("nan"), float("inf"), 0.7]),
    ])  # fmt: skip
    svg = curves_svg(runs)
    assert svg == curves_svg(runs)
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert not re.findall("|".join(LIGHT), svg), "colours are the page's"
    assert all(f"var(--line-{index})" in svg for index in range(3))
    assert len(svg) < 150_000
    assert "log" not in curves_svg(runs[1:])


def test_lines_can_be_told_apart_and_read_on_both_pages():
    styles = [line_style(index) for index in range(len(LIGHT) * len(DASHES))]
    assert len(set(styles)) == len(styles)
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in pairwise(styles))
    light, dark = re.findall(r"--page: (#\w+)", STYLE)
    for page, colours in ((light, LIGHT), (dark, DARK)):
        # what accessibility guidelines ask of graphics
        assert min(contrast(page, colour) for colour in colours) >= 3
    texts, faints, marks = (re.findall(rf"--{name}: (#\w+)", STYLE) for name in ("text", "faint", "mark"))
    for page, text, faint, mark in zip((light, dark), texts, faints, marks, strict=True):
        # and of text
        assert min(contrast(page, text), contrast(page, faint), contrast(mark, text)) >= 4.5


@pytest.mark.parametrize("kind", SEEN)
def test_colours_differ_for_colour_blind_readers(kind):
    for colours in (LIGHT, DARK):
        light = np.array([linear_light(colour) for colour in colours]) @ np.array(SEEN[kind]).T
        # back to the screen's scale
        seen = np.where(light <= 0.0031308, light * 12.92, 1.055 * np.clip(light, 0.0031308, 1) ** (1 / 2.4) - 0.055)
        labs = rgb2lab(np.clip(seen, 0, 1)[None])[0]
        assert min(deltaE_ciede2000(one, other) for one, other in combinations(labs, 2)) >= 18


def contrast(one, other):
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour):
    return float(np.dot(linear_light(colour), (0.2126, 0.7152, 0.0722)))


def linear_light(colour):
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
