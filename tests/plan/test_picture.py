import dataclasses
from xml.etree import ElementTree

import pytest

from loretta.plan import train_svg
from loretta.tt import TTShape, plan_shape, shape_from_modes


def drawn(shape: TTShape, caption: str = "q_proj down"):
    return ElementTree.fromstring(train_svg(shape, caption))


@pytest.mark.parametrize("sizes", [(768, 64), (4096, 16), (10007, 8), (1, 5), (7, 1)])
def test_every_mode_and_inner_rank_is_drawn(sizes):
    shape = plan_shape(*sizes, rank=5)
    texts = drawn(shape).findall("text")
    modes = [text.text for text in texts if text.get("class") is None]
    ranks = [text.text for text in texts if text.get("class") == "rank"]
    assert modes == [str(mode) for mode in shape.modes]
    assert ranks == [str(rank) for rank in shape.ranks[1:-1]]


def test_the_boundary_lies_between_input_and_output():
    svg = drawn(plan_shape(768, 64, rank=5))
    boundary = float(svg.find("line[@class='boundary']").get("x1"))
    boxes = [(float(box.get("x")), box.get("class")) for box in svg.findall("rect")]
    assert [kind for _, kind in boxes] == ["input"] * 3 + ["output"] * 2
    assert max(x for x, kind in boxes if kind == "input") < boundary < min(x for x, kind in boxes if kind == "output")


def test_a_straddling_mode_is_cut_through_its_box():
    svg = drawn(shape_from_modes(8192, 64, (16, 16, 16, 8, 4, 4), 8))
    box = svg.find("rect[@class='cut']")
    boundary = float(svg.find("line[@class='boundary']").get("x1"))
    assert float(box.get("x")) < boundary < float(box.get("x")) + float(box.get("width"))
    assert "2·4" in [text.text for text in svg.findall("text")]


def test_a_caption_is_shown_literally():
    assert drawn(plan_shape(8, 8, rank=2), '<b>&"').get("aria-label").startswith('<b>&": ')


def test_the_report_shows_each_shape_once_and_names_its_places():
    from loretta.record import ParameterCounts, RunRecord, Train
    from loretta.report import render

    shape = plan_shape(32, 8, rank=3)
    train = Train(at="query <b>", count=2, **dataclasses.asdict(shape))
    counts = ParameterCounts(cores=1, biases=0, norms=0, head=0, other=0, total=10)
    record = RunRecord(
        config={}, command="loretta train", versions={}, model="m", task="t", method="rep", kind="classification",
        seed=0, device="cpu", sizes={}, metric="accuracy", higher_is_better=True, parameters=counts, adapter_bytes=4,
        train_seconds=1.0, peak_memory_bytes=1, history=[], best_step=1, validation={},
        test=None, trains=[train, train],
    )  # fmt: skip
    page = render([record])
    assert page.count('<svg class="train"') == 1
    assert "2 × query &lt;b&gt;" in page
    assert "<b>" not in page
    with pytest.raises(ValueError, match="does not fit"):
        Train(**{**train.model_dump(), "n_in": 9})
