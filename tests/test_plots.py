"""Figures: every one is a whole PNG, its texts can be read, and it says what its numbers say."""

import itertools
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from lgvit_hf.evaluation import plots
from lgvit_hf.evaluation.plots.style import short, short_names
from tests.seeds import rng

version_independent = pytest.mark.version_independent

LONG_NAMES = ["hand-held computer, hand-held microcomputer", "crane", "a $5 note or $10"]
EMPTY = {"samples": 0, "confidence": None, "accuracy": None}


def exits_of(number):
    """The third of each three is taken by nobody."""
    exits = []
    for index in range(number):
        rows = 0 if index % 3 == 2 else 1234
        right = {"accuracy_exited": 0.9 - 0.03 * index if rows else None, "accuracy_all": 0.2 + 0.03 * index}
        exits.append(
            {"exit_layer": index + 1, "head": "attention_r2", "samples": rows, "share": rows / 20000, **right}
        )
    return exits


def classes_of(number):
    return [
        {
            "name": f"{LONG_NAMES[index % 3]}" if index % 2 else f"class {index}",
            "samples": 50,
            "accuracy": (index * 7 % 50 + 1) / 50,
            "mean_depth": 4 + index * 13 % 80 / 10,
        }
        for index in range(number)
    ]


def confusion_of(number):
    matrix = np.diag(np.full(number, 40))
    for index in range(number):
        matrix[index, (index * 7 + 3) % number] += 10
    return matrix


def bins_of(rows):
    step = 1 / len(rows)
    return [
        {"samples": count, "confidence": (place + 0.5) * step, "accuracy": (place + 0.2) * step} if count else EMPTY
        for place, count in enumerate(rows)
    ]


def answer(depth, predicted="cat", label="cat", score=0.5):
    return {"depth": depth, "score": score, "predicted": predicted, "label": label}


def gallery_of(number, **changes):
    images = [np.full((8, 8, 3), index, dtype=np.uint8) for index in range(number)]
    return images, [answer(index % 12 + 1, **changes) for index in range(number)]


def scores_of(number, num_exits=2, **changes):
    images, answers = gallery_of(number, **changes)
    return images, [{**one, "depth": 4, "scores": np.linspace(0.2, 1, num_exits).tolist()} for one in answers]


def tokens_of(number, size=(16, 16), **changes):
    """Patches of 4 x 4 pixels, whose depths go from 1 to 12."""
    (height, width), images = size, []
    answers = [{"class_token": 12, **answer(12, **changes)} for _ in range(number)]
    for index, one in enumerate(answers):
        images.append(rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8))
        one["depths"] = np.arange(height * width // 16).reshape(height // 4, width // 4) % 12 + 1
    return images, answers


def depths_of(number):
    """Of 17 tokens of each image."""
    return (np.arange(17) * (np.arange(number)[:, None] + 3) // 5) % 12 + 1


def latency_of(*sizes, ideal=1.5):
    return [
        {"batch_size": size, "wall_clock_speed_up": 0.95, "layer_speed_up": 1.7, "ideal_speed_up": ideal}
        for size in sizes
    ]


def logs_of(number):
    """Three evaluations; the first of a mixed run knows the deepest exit alone."""
    logs = []
    for epoch in (1.0, 2.0, 3.0):
        exits = range(1, number + 1) if epoch > 1 else [number]
        figures = {f"eval_exit_{depth}_accuracy": (0.4 + 0.02 * depth) * epoch / 3 for depth in exits}
        logs.append({"epoch": epoch, "eval_accuracy": 0.3 * epoch, **figures})
    return logs


CURVE = [{"cost": cost, "accuracy": 0.8 + cost / 100} for cost in (3.0, 1.0, 2.0)]
POINT = {"cost": 4.0, "accuracy": 0.85}
OVERALL = {"accuracy": 0.8, "mean_macs": 2e6, "accuracy_full_model": 0.81, "backbone_macs": 4e6}
UNIT = "million MACs per image"


def report(exits, file):
    plots.plot_report({"exits": exits, "overall": OVERALL}, [{"accuracy": 0.5, "mean_macs": 1e6}], file)


PLOTS = {
    "report, 24 exits": partial(report, exits_of(24)),
    "pareto": lambda file: plots.plot_pareto(
        file,
        {f"method {number}": CURVE for number in range(6)},
        {"chosen": POINT, "full model": POINT, **{f"point {number}": POINT for number in range(5)}},
        unit=UNIT,
        asked_accuracy=0.84,
    ),
    "pareto, a point": lambda file: plots.plot_pareto(file, {"none": []}, {"full model": POINT}, unit="ms per image"),
    "exits, 24": lambda file: plots.plot_exits(file, {"exits": exits_of(24)}, measure="agreement"),
    "exits, 1": lambda file: plots.plot_exits(file, {"exits": exits_of(1)}),
    "reliability": lambda file: plots.plot_reliability(
        file,
        [
            {"name": f"block {depth}", "all": bins_of([2] * 15), "exited": bins_of([0, 1] * 7 + [1])}
            for depth in range(2)
        ],
    ),
    "reliability, none leaves": lambda file: plots.plot_reliability(
        file, [{"name": "block 4", "all": bins_of([2] * 15), "exited": None}]
    ),
    "reliability, no rows": lambda file: plots.plot_reliability(
        file, [{"name": "block 4", "all": [EMPTY] * 15, "exited": [EMPTY] * 15}]
    ),
    "classes, 1": lambda file: plots.plot_classes(file, classes_of(1)),
    "classes, 25": lambda file: plots.plot_classes(file, classes_of(25)),
    "classes, 1000": lambda file: plots.plot_classes(file, classes_of(1000)),
    "confusion, 1": lambda file: plots.plot_confusion(file, [[3]], LONG_NAMES[:1]),
    "confusion, 10": lambda file: plots.plot_confusion(file, confusion_of(10), [*LONG_NAMES] * 3 + ["cat"]),
    "confusion, none wrong": lambda file: plots.plot_confusion(file, np.eye(26, dtype=int), ["cat"] * 26),
    "confusion, 1000": lambda file: plots.plot_confusion(file, confusion_of(1000), (LONG_NAMES * 334)[:1000]),
    "gallery, 1": lambda file: plots.plot_gallery(file, *gallery_of(1, label=None, score=None)),
    "gallery, 3": lambda file: plots.plot_gallery(file, *gallery_of(3)),
    "gallery, 30": lambda file: plots.plot_gallery(
        file, *gallery_of(30, predicted=LONG_NAMES[0], label=LONG_NAMES[2])
    ),
    "scores, 1": lambda file: plots.plot_scores(file, *scores_of(1, label=None), depths=[4, 12]),
    "scores, 5 of 24 exits": lambda file: plots.plot_scores(
        file,
        *scores_of(5, num_exits=24, predicted=LONG_NAMES[0], label=LONG_NAMES[2]),
        depths=range(1, 25),
        score="largest probability",
        thresholds=23 * [0.8] + [None],
    ),
    "tokens, 1": lambda file: plots.plot_token_depths(file, *tokens_of(1, label=None), num_blocks=2),
    "tokens, 9 wide": lambda file: plots.plot_token_depths(
        file, *tokens_of(9, size=(16, 64), predicted=LONG_NAMES[0], label=LONG_NAMES[2]), num_blocks=24
    ),
    "tokens, 2 tall": lambda file: plots.plot_token_depths(file, *tokens_of(2, size=(64, 8)), num_blocks=12),
    "alive, 8 of 20": lambda file: plots.plot_tokens_alive(file, depths_of(20), shown=range(8), num_blocks=12),
    "alive, 20": lambda file: plots.plot_tokens_alive(file, depths_of(20), shown=range(20), num_blocks=12),
    "alive, 1": lambda file: plots.plot_tokens_alive(file, depths_of(1), shown=[0], num_blocks=24),
    "training, 24 exits": lambda file: plots.plot_training(file, logs_of(24)),
    "training, 1 exit": lambda file: plots.plot_training(file, logs_of(1)[:1]),
    "training, tokens": lambda file: plots.plot_training(file, [{"epoch": 1.0, "eval_accuracy": 0.5}]),
    "latency": lambda file: plots.plot_latency(file, latency_of(1, 8, 32, 128)),
    "latency, no ideal": lambda file: plots.plot_latency(file, latency_of(1, ideal=None)),
}


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Runs a function of `plots` and hands over its figure, which is not written."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **settings: figures.append(figure))

    def drawn(plot, *arguments, **settings):
        plot(tmp_path / "a.png", *arguments, **settings)
        return figures[-1]

    return drawn


@pytest.fixture
def written(monkeypatch):
    """The figure that was saved, the texts that were really drawn and the box of each in pixels."""
    figures, boxes, draw_figure, draw_text = [], {}, Figure.draw, Text.draw

    def draw_all(figure, renderer):
        figures[:] = [figure]
        boxes.clear()  # of an earlier round, which found the layout
        draw_figure(figure, renderer)

    def draw_one(text, renderer):
        if text.get_visible() and text.get_text().strip():
            boxes[text] = text.get_window_extent(renderer)
        draw_text(text, renderer)

    monkeypatch.setattr(Figure, "draw", draw_all)
    monkeypatch.setattr(Text, "draw", draw_one)
    return figures, boxes


@version_independent
@pytest.mark.parametrize("name", PLOTS)
def test_a_whole_picture_that_can_be_read(name, written, tmp_path):
    file = tmp_path / "new" / "a.png"
    PLOTS[name](file)
    assert [one.name for one in file.parent.iterdir()] == ["a.png"]
    with Image.open(file) as image:
        width, height = image.size
        assert image.format == "PNG" and 250 <= height <= 3500 and 250 <= width <= 3500
        assert len(image.convert("RGB").getcolors(width * height)) > 10

    (figure,), boxes = written
    assert len(boxes) >= 2
    for text, box in boxes.items():
        assert -1 <= box.x0 and box.x1 <= width + 1 and -1 <= box.y0 and box.y1 <= height + 1, text
        assert not is_math_text(text.get_text()) and "nan" not in text.get_text(), text
    # the box of a text that is turned by 45 degrees is larger than the text
    straight = [(text, box) for text, box in boxes.items() if text.get_rotation() % 90 == 0]
    left, bottom, right, top = np.array([box.padded(-1).extents for _, box in straight]).T
    over = (left[:, None] <= right) & (left <= right[:, None]) & (bottom[:, None] <= top) & (bottom <= top[:, None])
    pairs = [(straight[one][0], straight[other][0]) for one, other in np.argwhere(np.triu(over, 1))]
    assert not pairs, pairs

    for part in [figure, *figure.subfigs]:
        for legend, axes in itertools.product(part.legends, figure.axes):
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())


@version_independent
def test_pareto_says_what_was_chosen(draw):
    points = {"chosen": {"cost": 2.5, "accuracy": 0.8125}, "full model": POINT}
    figure = draw(plots.plot_pareto, {"one threshold": CURVE}, points, unit="ms per image", asked_accuracy=0.84)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["one threshold"].get_xdata().tolist() == [1, 2, 3]
    assert lines["one threshold"].get_ydata() == pytest.approx([81, 82, 83])
    assert {"chosen: 81.2% at 2.5 ms", "full model: 85.0% at 4 ms", "asked for: 84.0%"} <= lines.keys()
    through = [line for line in axes.lines if line.get_linestyle() == "--" and list(line.get_ydata()) == [85, 85]]
    assert len(through) == 1
    assert axes.get_xlabel() == "ms per image" and axes.get_ylabel() == "accuracy, %"


@version_independent
def test_training_says_which_exit_is_how_good_when(draw):
    (axes,) = draw(plots.plot_training, [*logs_of(2), {"epoch": 3.0, "eval_loss": 1.0}]).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["after block 1", "after block 2", "by the policy"]
    assert lines["after block 1"].get_ydata() == pytest.approx([np.nan, 28, 42], nan_ok=True)
    assert lines["after block 2"].get_ydata() == pytest.approx([44 / 3, 88 / 3, 44])
    assert lines["by the policy"].get_ydata() == pytest.approx([30, 60, 90])
    with pytest.raises(ValueError, match="evaluations is empty; give one evaluation with an accuracy"):
        draw(plots.plot_training, [])


def test_exits_that_nobody_takes(draw):
    leaving, right = draw(plots.plot_exits, {"exits": exits_of(4)}, measure="agreement").axes
    assert [bar.get_height() for bar in leaving.patches] == pytest.approx([6.17, 6.17, 0, 6.17])
    assert [text.get_text() for text in leaving.texts] == ["1,234", "1,234", "0", "1,234"]
    all_rows, exiting_samples = (line.get_ydata() for line in right.lines)
    assert all_rows == pytest.approx([20, 23, 26, 29])
    assert exiting_samples == pytest.approx([90, 87, np.nan, 81], nan_ok=True)
    assert [label.get_text() for label in right.get_xticklabels()][0] == "1 attention_r2"
    assert right.get_ylabel() == "agreement, %"


@version_independent
def test_reliability_by_hand(draw):
    sure = {"samples": 3, "confidence": 0.9, "accuracy": 0.5}
    unsure = {"samples": 1, "confidence": 0.4, "accuracy": 0.6}
    none = {"name": "block 5", "all": [unsure, sure], "exited": [EMPTY, EMPTY]}
    some = {"name": "block 4", "all": [unsure, sure], "exited": [EMPTY, {**sure, "samples": 2}]}
    figure = draw(plots.plot_reliability, [some, none])
    first, second, strip, _ = figure.axes
    # (1 * 0.2 + 3 * 0.4) / 4
    assert first.get_title() == "block 4\nECE 35.0%, exited 40.0%"
    assert second.get_title() == "block 5\nECE 35.0%, exited –"
    assert [bar.get_height() for bar in first.patches] == [60, 50]
    assert [bar.get_height() for bar in strip.patches] == [25, 75, 0, 50]
    diamonds = first.lines[1]
    assert np.nansum(diamonds.get_xdata()) == 90 and np.nansum(diamonds.get_ydata()) == 50


@version_independent
def test_few_classes_are_all_named(draw):
    classes = [*classes_of(25)[:3], {"name": "unseen", "samples": 0, "accuracy": None, "mean_depth": None}]
    figure = draw(plots.plot_classes, classes)
    depth, right = figure.axes
    names = [label.get_text() for label in depth.get_yticklabels()]
    assert names == ["class 0 (50)", "crane (50)", "class 2 (50)"]
    assert [bar.get_width() for bar in depth.patches] == pytest.approx([4, 5.3, 6.6])
    assert [bar.get_width() for bar in right.patches] == pytest.approx([2, 16, 30])
    assert figure.get_suptitle() == "Depth and accuracy of 3 classes (1 more without samples)"


@version_independent
def test_of_many_classes_the_extremes_are_named(draw):
    classes = classes_of(1000)
    classes[500]["mean_depth"], classes[600]["mean_depth"], classes[700]["accuracy"] = 1.0, 12.0, 0.0
    every, first, last, wrong = draw(plots.plot_classes, classes).axes
    assert len(every.lines[0].get_xdata()) == 1000 and not every.texts
    for axes, name in ((first, "class 500 (50)"), (last, "class 600 (50)"), (wrong, "class 700 (50)")):
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert len(labels) == 10 and labels[0] == name and all(len(label) < 40 for label in labels)
    depths = [bar.get_width() for bar in last.patches]
    assert depths == sorted(depths, reverse=True)


@version_independent
def test_confusion_of_few_classes(draw):
    figure = draw(plots.plot_confusion, [[199, 1, 0], [1, 0, 3], [0, 0, 0]], ["cat", "dog", "unseen"])
    axes = figure.axes[0]
    # the answer goes right, the truth down
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "100", (1, 0): "<1", (0, 1): "25", (2, 1): "75"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat (200)", "dog (4)", "unseen (0)"]


@version_independent
def test_confusion_of_many_classes(draw):
    matrix = np.diag(np.full(1000, 10))
    matrix[3, 999], matrix[998, 4], matrix[7, 1] = 30, 20, 5
    map_axes, pairs, _ = draw(plots.plot_confusion, matrix, [f"name {index}" for index in range(1000)]).axes
    labels = [label.get_text() for label in pairs.get_yticklabels()]
    assert labels == ["name 3 → name 999", "name 998 → name 4", "name 7 → name 1"]
    assert [text.get_text() for text in pairs.texts] == ["30 of 40", "20 of 30", "5 of 15"]
    cells = map_axes.collections[0].get_array()
    assert cells.shape == (100, 100)
    # ten classes of ten rows, 35 more: 30 of 135 go to the last ten
    assert cells[0, 99] == pytest.approx(100 * 30 / 135) and cells[0, 0] == pytest.approx(100 * 105 / 135)
    assert cells[50].sum() == pytest.approx(100)


@version_independent
def test_gallery_reads_only_what_it_draws(draw):
    read = []

    class Images:
        def __len__(self):
            return 100

        def __getitem__(self, index):
            read.append(index)
            return Image.new("L", (8, 8))

    answers = [answer(6) for _ in range(100)]
    answers[70] = answer(4, "dog", "cat", 0.876)
    answers[20] = answer(12, "cat", None, None)
    answers[99] = answer(11, "cat", "cat", float("nan"))
    figure = draw(plots.plot_gallery, Images(), answers)
    assert read == [70, *range(11), *range(89, 100), 20]
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels[0] == "block 4, 0.88\ndog ✗\nis cat"
    assert labels[1] == "block 6, 0.50\ncat ✓"
    assert labels[-2:] == ["block 11\ncat ✓", "block 12\ncat"]
    wrong, right = (axes.spines["left"] for axes in figure.axes[:2])
    assert wrong.get_linestyle() == "--" and right.get_linestyle() == "-"


@version_independent
def test_gallery_draws_no_image_twice(draw):
    for number in (2, 5, 25):
        images, answers = gallery_of(number)
        figure = draw(plots.plot_gallery, images, answers)
        shown = [int(axes.images[0].get_array().max()) for axes in figure.axes]
        assert len(shown) == len({*shown}) == min(number, 24)


@version_independent
def test_latency_beside_what_was_promised(draw):
    rows = latency_of(1, 8)
    rows[1]["ideal_speed_up"] = None
    (axes,) = draw(plots.plot_latency, rows).axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights[0] == [0.95, 0.95] and heights[2] == [1.7, 1.7]
    assert heights[1] == pytest.approx([1.5, np.nan], nan_ok=True)
    assert [text.get_text() for text in axes.texts] == ["0.95", "0.95", "1.50", "", "1.70", "1.70"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "8"]
    assert [bars.patches[0].get_hatch() for bars in axes.containers] == [None, "//", ".."]
    (axes,) = draw(plots.plot_latency, latency_of(1, ideal=None)).axes
    assert len(axes.containers) == 2


@version_independent
def test_scores_at_every_exit(draw):
    images, answers = gallery_of(5)
    for one, depth in zip(answers, (6, 4, 12, 6, 4), strict=True):
        one.update(depth=depth, scores=[0.25, None, 0.75])
    figure = draw(plots.plot_scores, images, answers, depths=[4, 6, 12], score="margin", thresholds=[0.7, None, None])
    pictures, charts = figure.axes[::2], figure.axes[1::2]
    assert [int(axes.images[0].get_array().max()) for axes in pictures] == [1, 4, 0, 2, 3]
    assert [axes.get_title(loc="left") for axes in charts[:3:2]] == ["block 4, 0.25: cat ✓", "block 6: cat ✓"]
    assert charts[3].get_title(loc="left") == "block 12, 0.75: cat ✓" and charts[0].get_ylabel() == "margin"
    lines = {line.get_label(): line for line in charts[0].lines}
    assert lines["seen by the policy"].get_xydata().tolist() == [[4, 0.25]]
    assert lines["not run any more"].get_xydata() == pytest.approx(np.array([[6, np.nan], [12, 0.75]]), nan_ok=True)
    assert lines["where it exited"].get_xydata().tolist() == [[4, 0.25]]
    assert lines["threshold"].get_ydata() == pytest.approx([0.7, np.nan, np.nan], nan_ok=True)
    last = {line.get_label(): line for line in charts[3].lines}
    assert last["where it exited"].get_xydata().tolist() == [[12, 0.75]]


@version_independent
def test_depths_lie_on_their_patches(draw):
    images = np.zeros((2, 8, 16, 3), dtype=np.uint8)
    images[0, :4, 12:] = (30, 60, 90)
    depths = np.array([[1, 2, 3, 6], [6, 5, 4, 3]])
    answers = [{"depths": depths, "class_token": 5, **answer(6, "dog", "cat")}] * 2
    figure = draw(plots.plot_token_depths, images, answers, num_blocks=6)
    image, _, heat, _, both, _, bar = figure.axes
    assert image.get_title() == "image 1\ndog ✗\nis cat\nCLS 5, patches 3.8"
    assert heat.images[0].get_array().tolist() == depths.tolist()
    assert {tuple(one.get_extent()) for axes in (image, heat, both) for one in axes.images} == {(0, 16, 8, 0)}
    grey, over = both.images
    assert (grey.get_array()[:4, 12:] == 60).all() and 0.3 < over.get_alpha() < 0.9
    # a colour for each block, and as many numbers beside it
    colors = {tuple(over.cmap(over.norm(block))) for block in range(1, 7)}
    assert len(colors) == 6 and sorted(bar.get_yticks()) == [1, 2, 3, 4, 5, 6]
    light = [np.dot(over.cmap(over.norm(block))[:3], (0.299, 0.587, 0.114)) for block in range(1, 7)]
    assert light == sorted(light)


@version_independent
def test_tokens_alive_by_hand(draw):
    (axes,) = draw(plots.plot_tokens_alive, [[1, 3, 3, 4], [4, 4, 4, 4]], shown=[0], num_blocks=4).axes
    one, mean = axes.lines
    assert one.get_xdata().tolist() == [1, 2, 3, 4] and one.get_ydata().tolist() == [100, 75, 75, 25]
    assert mean.get_ydata().tolist() == [100, 87.5, 87.5, 62.5]
    assert one.get_label() == "image 1" and mean.get_label() == "mean of all 2 images: 3.4 blocks a token"


@version_independent
def test_names_are_short_and_differ():
    assert short("a  name\nof $5", 40) == r"a name of \$5"
    assert short("hand-held microcomputer", 10) == "hand-held…"
    assert short_names(LONG_NAMES[:2] + ["hand-held computer"], 24) == [
        "hand-held computer #0",
        "crane",
        "hand-held computer #2",
    ]


@version_independent
@pytest.mark.parametrize(
    "plot, arguments",
    [
        (plots.plot_pareto, ({"none": []}, {})),
        (plots.plot_exits, ({"exits": []},)),
        (plots.plot_reliability, ([],)),
        (plots.plot_classes, ([],)),
        (plots.plot_classes, ([{"name": "cat", "samples": 0, "accuracy": None, "mean_depth": None}],)),
        (plots.plot_gallery, ([], [])),
        (plots.plot_latency, ([],)),
        (partial(plots.plot_scores, depths=[4]), ([], [])),
        (partial(plots.plot_token_depths, num_blocks=4), ([], [])),
        (partial(plots.plot_tokens_alive, shown=[], num_blocks=4), (np.zeros((0, 5)),)),
    ],
)
def test_nothing_to_draw(plot, arguments, tmp_path):
    settings = {"unit": UNIT} if plot is plots.plot_pareto else {}
    with pytest.raises(ValueError, match="nothing to draw: .* give one"):
        plot(tmp_path / "a.png", *arguments, **settings)
    assert not any(tmp_path.iterdir())


@version_independent
def test_parts_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"matrix has shape \(1, 2\), but there are 2 class_names"):
        plots.plot_confusion(tmp_path / "a.png", [[1, 2]], ["cat", "dog"])
    with pytest.raises(ValueError, match="0 class_names"):
        plots.plot_confusion(tmp_path / "a.png", np.zeros((0, 0)), [])
    with pytest.raises(ValueError, match="2 images but 1 answers"):
        plots.plot_gallery(tmp_path / "a.png", [1, 2], [answer(4)])
    with pytest.raises(ValueError, match="1 images but 0 answers"):
        plots.plot_token_depths(tmp_path / "a.png", [1], [], num_blocks=4)


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(b"before")
    with monkeypatch.context() as patch:

        def breaks(figure, target, **settings):
            target.write_bytes(b"half")
            raise OSError("disk full")

        patch.setattr("matplotlib.figure.Figure.savefig", breaks)
        with pytest.raises(OSError, match="disk full"):
            plots.plot_latency(file, latency_of(1))
    assert file.read_bytes() == b"before" and len([*tmp_path.iterdir()]) == 1
    plots.plot_latency(file, latency_of(1))
    assert file.read_bytes().startswith(b"\x89PNG")


@version_independent
def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lgvit-hf\[plots\]"'):
        plots.plot_latency(tmp_path / "a.png", latency_of(1))


@version_independent
def test_optional_packages_come_when_they_are_needed_and_without_global_state(tmp_path):
    code = (
        "import sys; from lgvit_hf.evaluation import plots, report;"
        "assert not {'matplotlib', 'evaluate'} & {*sys.modules};"
        "plots.plot_confusion(sys.argv[1], [[1]], ['cat']); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True, timeout=280)
