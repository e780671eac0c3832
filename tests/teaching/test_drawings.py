"""Drawings: what they show is what the libraries compute, and all of it can be read."""

from __future__ import annotations

import base64
import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from qlora_helpers.base.errors import UserError
from qlora_helpers.runs.folder import Run
from qlora_helpers.teaching import drawings
from qlora_helpers.teaching.drawings import machines, rows, steps, weights

SVG = "{http://www.w3.org/2000/svg}"
MADE = {
    "quantised_block": drawings.quantised_block,
    "two weights": lambda: drawings.quantised_block([-123.456, 0.0]),
    "levels": drawings.levels,
    "low_rank": drawings.low_rank,
    "rank 2": lambda: drawings.low_rank(((1, 0), (0, 1), (2, 2)), ((1, 2, 3), (4, 5, 6)), ((0.1,) * 3,) * 3),
    "masked_row": drawings.masked_row,
    "a long row": lambda: drawings.masked_row(("internationalisation",) * 4, ("<&>",) * 3, padding=0),
    "packed_rows": drawings.packed_rows,
    "three rows": lambda: drawings.packed_rows((4, 2, 2), sequence=8),
    "training_loop": drawings.training_loop,
    "four_curves": drawings.four_curves,
    "to diagnose": lambda: drawings.four_curves(named=False),
    "several_gpus": drawings.several_gpus,
    "two gpus": lambda: drawings.several_gpus(2, layers=2),
    "run_folder": drawings.run_folder,
}


def texts(drawing: drawings.Drawing) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(drawing.svg()).iter(f"{SVG}text"))


def words(drawing: drawings.Drawing) -> list[str]:
    return [element.text or "" for element in texts(drawing)]


def extent(element: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a text in DejaVu Sans, which is wider than the fonts of most systems."""
    mono = "monospace" in element.get("font-family", "")
    font = FontProperties(
        family="DejaVu Sans Mono" if mono else "DejaVu Sans", weight=element.get("font-weight", "400")
    )
    size = float(element.get("font-size", "0"))
    width, *_ = TextToPath().get_text_width_height_descent(element.text, font, False)
    width *= size / font.get_size_in_points()
    x, y = float(element.get("x", "")), float(element.get("y", ""))
    left = x - {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor", "start")] * width
    return left, y - 0.75 * size, left + width, y + 0.22 * size


@pytest.fixture(params=MADE, name="drawing")
def _drawing(request):
    return MADE[request.param]()


def test_every_drawing_of_the_room_is_tried():
    assert set(drawings.__all__) - {"Drawing"} <= set(MADE)


def test_it_is_valid_has_a_title_and_a_description_and_follows_the_page(drawing):
    root = ElementTree.fromstring(drawing.svg())
    title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title.text == drawing.title and desc.text == drawing.description
    assert len(drawing.description) > 80 and drawing.description.endswith(".")
    assert root.get("aria-labelledby").split() == [title.get("id"), desc.get("id")]
    assert root.get("role") == "img" and root.get("fill") == "currentColor"
    fixed = re.findall(r'(?:fill|stroke)="(?!none|currentColor|var\(--qlora-)[^"]*"', drawing.svg())
    assert not fixed, "a colour that no theme changes"


def test_no_text_leaves_the_drawing_or_touches_another(drawing):
    places = [(element.text, extent(element)) for element in texts(drawing)]
    assert len(places) >= 6
    for text, (left, top, right, bottom) in places:
        assert 0 < left < right <= drawing.width - 4 and 0 < top < bottom < drawing.height, text
    for (one, a), (two, b) in itertools.combinations(places, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one!r} and {two!r} overlap"


def test_a_notebook_shows_an_image_with_its_own_card_and_a_terminal_the_description(drawing):
    shown = drawing._repr_html_()
    assert shown.startswith("<img ") and "<svg" not in shown
    image = base64.b64decode(re.search(r"base64,([\w+/=]+)", shown)[1]).decode()
    assert ElementTree.fromstring(image).find(f"{SVG}rect").get("class") == "card"
    assert "prefers-color-scheme: dark" in image
    assert repr(drawing) == f"{drawing.title}. {drawing.description}"


def test_two_drawings_on_a_page_share_no_id():
    ids = [name for make in MADE.values() for name in re.findall(r' id="([^"]+)"', make().svg())]
    assert len(ids) == len(set(ids))


def test_nf4_is_what_bitsandbytes_computes():
    import bitsandbytes.functional as bnb
    import torch

    known = bnb.get_4bit_type("nf4", device="cpu").tolist()
    assert weights.nf4_levels() == pytest.approx(known, abs=1e-6)
    block = torch.tensor([*weights.BLOCK, *[0.0] * 56])
    packed, state = bnb.quantize_4bit(block, blocksize=64, quant_type="nf4")
    numbers = [half for byte in packed.flatten().tolist() for half in (byte >> 4, byte & 15)][:8]
    restored = bnb.dequantize_4bit(packed, state).flatten()[:8].tolist()
    ours = weights.quantise(weights.BLOCK)
    assert list(ours.numbers) == numbers and ours.restored == pytest.approx(restored, abs=1e-6)
    drawn = words(drawings.quantised_block())
    assert [text for text in drawn if re.fullmatch("[01]{4}", text)] == [f"{n:04b}" for n in numbers]
    for value in restored:
        assert f"{value:.3f}".replace("-", "−") in drawn


def test_fp8_is_what_torch_computes():
    import torch

    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = sorted(set(every[every.isfinite()].tolist()))
    assert [448 * value for value in weights.fp8_levels()] == pytest.approx(finite, abs=1e-9)
    drawing = drawings.levels()
    assert f"FP8 (e4m3): {len(finite)} values in 8 bits" in words(drawing)
    assert drawing.svg().count('stroke-width="1.2"') == 16 + len(finite)


def test_the_change_is_the_product_that_is_drawn():
    import torch

    expected = (torch.tensor(weights.B) @ torch.tensor(weights.A)).flatten().tolist()
    drawn = words(drawings.low_rank())
    cells = [text.replace("−", "-") for text in drawn if re.fullmatch(r"−?\d+(\.\d)?", text)]
    assert [int(text) for text in cells[-16:]] == expected
    assert cells[:16] == [f"{value:.1f}" for row in weights.W for value in row]
    assert "8 numbers of B and A change all 16 of W." in drawn
    assert any(f"{8 * 2 * 8192:,} numbers instead of {8192 * 8192:,}" in text for text in drawn)


def test_the_answer_and_its_end_are_trained_and_nothing_else():
    drawn = words(drawings.masked_row(("a", "b"), ("c",), padding=2))
    assert drawn.count("−100") == 4 and drawn.count("c") == 2 and drawn.count("END") == 2
    assert rows.labels(("a", "b"), ("c",), 2) == ["−100", "−100", "c", "END", "−100", "−100"]


def test_who_attends_to_whom_is_the_trainers_own_mask():
    import torch

    from qlora_helpers.data.batches import block_diagonal_mask, positions_in_row

    segments = [1, 1, 1, 2, 2, 0]
    mask = block_diagonal_mask(torch.tensor([segments]))[0, 0].bool().tolist()
    assert rows.may_attend(segments, apart=True) == mask
    leaks = sum(map(sum, rows.may_attend(segments, apart=False))) - sum(map(sum, mask))
    assert f"{leaks} of the pairs join different rows" in drawings.packed_rows().description
    drawn = words(drawings.packed_rows())
    at = drawn.index("row 1")
    assert drawn[at + 1 : at + 12 : 2] == [str(one) for one in positions_in_row(torch.tensor([segments]))[0].tolist()]


def test_the_curves_are_what_they_are_called():
    made = steps.curves()
    assert set(made) == set(steps.SHAPES)
    train, evaluated = made["overfitting"]
    assert min(evaluated) < evaluated[-1] - 0.5 and train[-1] == pytest.approx(min(train), abs=0.2)
    assert max(map(max, made["nothing learned"])) - min(map(min, made["nothing learned"])) < 0.4
    assert made["too high a learning rate"][0][-1] > made["too high a learning rate"][0][0] + 1
    assert all(curve[-1] < curve[0] - 0.9 for curve in made["good"])


def test_what_is_to_be_diagnosed_is_not_named():
    hidden = drawings.four_curves(named=False)
    for name in steps.SHAPES:
        assert name not in hidden.description and not any(name in text for text in words(hidden))
        assert name in drawings.four_curves().description


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("way", machines.WAYS)
def test_together_the_gpus_hold_every_layer(way, gpus):
    together = [sum(shares) for shares in zip(*(machines.held(way, gpu, gpus, 8) for gpu in range(gpus)), strict=True)]
    assert together == [gpus if way.startswith("copies") else 1] * 8


def test_the_folder_is_that_of_a_run():
    run = Run("runs/example")
    paths = (
        *(run.config_path, run.data_dir, run.plan_path, run.status_path, run.progress_path, run.log_path),
        *(run.requests_dir, run.events_dir, run.checkpoints_dir, run.adapter_dir, run.evaluation_path, run.report_path),
    )
    assert [name.rstrip("/") for name, *_ in machines.FOLDER] == [path.name for path in paths]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: drawings.quantised_block([0.1]),
        lambda: drawings.quantised_block([0.0, 0.0]),
        lambda: drawings.quantised_block([float("nan"), 1.0]),
        lambda: drawings.low_rank(b=((1,), (2,))),
        lambda: drawings.low_rank(a=((1, 2),)),
        lambda: drawings.packed_rows((4, 3)),
        lambda: drawings.packed_rows(()),
        lambda: drawings.several_gpus(3),
        lambda: drawings.several_gpus(4, layers=6),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(UserError, match="can't be drawn; expected"):
        wrong()


def test_pictures_that_notebooks_store_are_those_that_are_drawn_now():
    found = set()
    for path in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            call = re.search(r"^drawings\.(\w+)\((named=False)?\)$", cell.source, re.MULTILINE)
            if call:
                drawing = getattr(drawings, call[1])(**({"named": False} if call[2] else {}))
                (stored,) = [output.data for output in cell.outputs if output.output_type == "execute_result"]
                assert stored["text/html"] == drawing._repr_html_(), f"{path.stem}: store its outputs again"
                found.add(call[1])
    assert found == set(drawings.__all__) - {"Drawing"}, "a drawing that no notebook shows"
