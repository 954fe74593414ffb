"""What a study's figures draw, and that a browser lays them out."""

import shutil
import subprocess
from pathlib import Path

import pytest
from report.pages import Page
from report.study_runs import Folder

from loretta.report.figures import compact
from loretta.report.folder import report_on
from loretta.report.study import section_of
from loretta.report.study_figures import count_of, pareto, smooth
from loretta.studies.results import collect


def test_the_figure_of_the_average_and_its_front(folder: Path):
    page = Page(report_on(folder, "html"))
    words = page.texts["desc"][0]
    # means of the tasks: (0.6 + 0.5, 0.6, 0.7) / 2 and, for two seeds, 0.75 and 0.82
    assert "Small: 60 at 100" in words
    assert "Big: 78.5 at 1,000" in words
    assert "Big, paper: 81.75 at 100,000" in words
    assert "Pareto front: 60 at 100, 78.5 at 1,000" in words


def test_a_printed_point_alone_is_in_the_legend(tmp_path: Path):
    made = Folder(tmp_path, tasks=["sst2"])
    made.score("big", "sst2", (None,))
    made.score("small", "sst2", (0.6,))
    page = Page(report_on(made.write(), "html"))
    assert "Big, paper" in page.figures[0]


def test_a_count_at_an_axis_is_short():
    counts = (7, 54_321, 999_499, 999_999, 1.5e6, 999_999_999)
    assert [compact(count) for count in counts] == ["7", "54.3K", "999K", "1M", "1.5M", "1B"]


def test_pareto_by_hand():
    points = [(10, 0.5), (20, 0.4), (30, 0.7), (30, 0.8), (40, 0.8), (5, 0.1)]
    assert pareto(points) == [5, 0, 3]
    assert pareto(points, higher=False) == [5]
    assert pareto([(1, 3.0), (2, 2.0), (3, 2.0)], higher=False) == [0, 1]
    assert pareto([]) == []


@pytest.mark.parametrize(
    ("printed", "count"),
    [("0.10M", 1e5), ("6738.42M", 6.73842e9), ("12K", 12e3), (None, None), ("?", None), ("", None)],
)
def test_printed_counts_are_read(printed: str | None, count: float | None):
    assert count_of(printed) == (None if count is None else pytest.approx(count))


def test_smoothing_by_hand():
    curve, window = smooth([[(1, 1.0), (2, 3.0)], [(1, 2.0)]])
    assert window == 1
    assert curve == [(1, 1.5, pytest.approx(0.5**0.5)), (2, 3.0, 0.0)]
    # 400 evaluations: windows of 20, from 10 before to 9 after
    curve, window = smooth([[(step, float(step)) for step in range(400)]])
    assert window == 20
    assert curve[200][:2] == (200, 199.5)
    assert curve[0][:2] == (0, 4.5)
    assert curve[200][2] == pytest.approx(35**0.5)  # of 20 neighbouring integers: 20 * 21 / 12
    assert smooth([]) == ([], 1)


def test_bars_end_where_scores_do(tmp_path: Path):
    made = Folder(tmp_path, view="ranks", tasks=["sst2"])
    made.score("small", "sst2", (0.8, 0.9), args={"tensor_rank": 2})
    made.score("big", "sst2", (0.500, 0.501), args={"tensor_rank": 2})
    (group, _) = section_of(collect(made.write()), tmp_path).groups
    (chart,) = group.charts
    small, big = chart.lines[:2]
    # half widths 12.706205 * 0.05 and 12.706205 * 0.0005
    assert (small.low, small.high) == (pytest.approx([85 - 63.531], abs=1e-3), [100.0])
    assert (big.low, big.high) == (pytest.approx([50.05 - 0.635], abs=1e-3), pytest.approx([50.05 + 0.635], abs=1e-3))
    assert chart.note.startswith("Bars: 95% interval over seeds, cut off where no score can be.")


def test_curves_are_of_all_seeds(tmp_path: Path):
    made = Folder(tmp_path, view="curves", tasks=["sst2"])
    made.score("big", "sst2", (0.9, 0.9))
    (group,) = section_of(collect(made.write()), tmp_path).groups
    assert group.opened
    (chart,) = group.charts
    (line,) = chart.lines
    assert (line.x, line.y) == ([1, 2, 4], [1.0, 0.5, 0.25])
    assert line.low == line.high == line.y  # both seeds are equal


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no `chromium` on PATH")
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_lays_the_page_out_without_scrolling_sideways(folder: Path, tmp_path: Path, width: int):
    html = report_on(folder, "html")
    assert "content=\"default-src 'none'" in html
    # the page allows no script, the copy that is measured does; all that is folded is open
    measured = html.replace("default-src 'none'", "default-src 'unsafe-inline'").replace("<details>", "<details open>")
    script = (
        "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth].join(), '*')</script></body>"
    )
    (tmp_path / "inner.html").write_text(measured.replace("</body>", script))
    # in a frame, since windows are not made as narrow as a telephone
    frame = f'<iframe src="inner.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    heard = "<script>onmessage = event => document.title = event.data</script>"
    (tmp_path / "page.html").write_text(f"<title></title>{heard}{frame}")
    dom = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--hide-scrollbars",
            "--dump-dom", (tmp_path / "page.html").as_uri(),
        ],
        check=True, capture_output=True, text=True, timeout=600,
    ).stdout  # fmt: skip
    assert f"<title>{width},{width}</title>" in dom


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no `chromium` on PATH")
@pytest.mark.parametrize(("look", "page", "line"), [(1, (255, 255, 255), "0072b2"), (0, (21, 24, 28), "4da3e0")])
def test_a_browser_paints_it_light_and_dark(folder: Path, tmp_path: Path, look: int, page: tuple[int, ...], line: str):
    from matplotlib.image import imread

    (tmp_path / "page.html").write_text(report_on(folder, "html"))
    subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            f"--blink-settings=preferredColorScheme={look}", f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1280,1600", (tmp_path / "page.html").as_uri(),
        ],
        check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    pixels_YXC = (imread(tmp_path / "shot.png")[..., :3] * 255).round()
    assert tuple(pixels_YXC[2, 2]) == page
    rgb = [int(line[i : i + 2], 16) for i in (0, 2, 4)]
    assert (pixels_YXC == rgb).all(axis=-1).sum() > 20
