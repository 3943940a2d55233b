"""`recipes/benchmarks/trained_page.py`: the page says what the lines say, and labels of curves do not overlap."""

import json
import sys
from pathlib import Path

import pytest

OURS = "joint+ensemble"
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def page(benchmark):
    return benchmark("trained_page")


def lines_of(page, fewer_blocks=1.25, ahead_by=(2, 1.5, 3)):
    yield {"machine": {"processor": "EPYC", "threads": 1}, "core_minutes": 90.0, "headline": OURS}
    yield {"row": "plain", "core_minutes": 42.0, "samples": 100, "exits": [12], "accuracies": [0.86]}
    yield {"row": "first8", "core_minutes": 41.2, "samples": 100, "exits": [8], "accuracies": [0.8]}
    yield {"row": "joint", "core_minutes": 36.1, "samples": 100, "exits": [12], "accuracies": [0.86]}
    yield {"row": "frozen", "core_minutes": 40.7, "samples": 100, "exits": [2, 12], "accuracies": [0.7, 0.85]}
    for size in (0, 1, 8):
        for name, ratio in ((OURS, 1.85), ("frozen", 1.75), ("shorter", fewer_blocks)):
            around = [ratio, ratio - 0.1, ratio + 0.1]
            for drop in page.DROPS:
                yield {
                    "method": name,
                    "batch_size": size,
                    "drop": drop,
                    "over_plain": around,
                    "headline_over": ahead_by,
                }
            yield {"method": name, "batch_size": size, "drops": [0.0, 0.01], "over_plain": [[1.0, 1.0, 1.0], around]}


@pytest.fixture
def written(page, tmp_path, monkeypatch):
    """Writes the page of some lines."""

    def write(lines):
        results = tmp_path / "results.jsonl"
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
        monkeypatch.setattr(sys, "argv", ["trained_page.py", str(results), str(tmp_path / "page.md")])
        page.main()
        return (tmp_path / "page.md").read_text()

    return write


def test_the_page_says_what_the_lines_say(page, tmp_path, written):
    text = written(lines_of(page))
    assert "| backbone, then `lgvit grow` | 1.75x (1.65-1.85) | 1.75x (1.65-1.85) | 2.00x (1.50-3.00) |" in text
    assert "| fewer blocks | 1.25x (1.15-1.35) |" in text
    assert (
        "| `first8` | 41 |  | 80.0 |  |" in text
        and "| `frozen`: backbone, then `lgvit grow` | 41 | 70.0 |  | 85.0 |" in text
    )
    assert text.index("| backbone, then `lgvit grow` |") < text.index("| fewer blocks |") and "processor EPYC" in text
    assert (tmp_path / "page.png").stat().st_size > 10_000 and "](page.png)" in text
    first = text.split("![")[0]
    assert "ensemble* (trained for 36 core-minutes, the plain backbone for 42) gains 1.85x" in first
    assert "gains 1.85x (1.75-1.95) at batch 1, 1.85x (1.75-1.95) at batch 8; faster than each" in first
    assert (
        "**Exit early**" in first and "fewer blocks, at no drop up to 1 pt (batch 8): at 1 pt that is 1.25x" in first
    )
    assert "`first8` is 6.0 pt below" in first
    assert (
        "on the 100 test images" in text and "1.5 core-hours" in text and "`sdn`" in text.split("not trained yet")[1]
    )


@pytest.mark.parametrize(
    ("ahead_by", "advice", "said"),
    [
        ((0.9, 0.8, 1.1), "**Exit early**", "not clearly faster than *fewer blocks*."),
        ((0.7, 0.6, 0.8), "**Not everywhere exit early**", "; *fewer blocks* faster at some batch size."),
    ],
)
def test_the_page_says_so_where_another_wins(page, written, ahead_by, advice, said):
    first = written(lines_of(page, fewer_blocks=2.0, ahead_by=ahead_by)).split("![")[0]
    assert advice in first and said in first and "faster than each" not in first
    assert "by taking fewer blocks, from 1 pt on (batch 8)" in first


@pytest.mark.parametrize(
    ("study", "lines", "name"),
    [
        ("cifar10", "trained_exits.jsonl", "results.md"),
        ("tiny_imagenet", "trained_exits_tiny_imagenet.jsonl", "results-tiny-imagenet.md"),
    ],
)
def test_pages_of_the_documentation_are_those_of_their_lines(page, study, lines, name, tmp_path):
    text = "\n".join(page.page(study, DOCS / lines, tmp_path / name))
    assert text.rstrip("\n") + "\n" == (DOCS / name).read_text(encoding="utf-8")


def test_all_methods_have_titles_and_few_are_drawn(page):
    assert {*page.TITLES} == {*page.METHODS} and {*page.DRAWN} <= {*page.TITLES} and len(page.DRAWN) <= 6


@pytest.mark.parametrize("heights", [[1.0, 1.0, 1.0], [3.0, 1.0, 1.05, 2.0], [1.0]])
def test_labels_are_apart_and_in_order(benchmark, heights):
    placed = benchmark("curve_labels").apart(heights, 0.1)
    order = sorted(range(len(heights)), key=lambda number: heights[number])
    assert all(placed[b] - placed[a] >= 0.1 - 1e-6 for a, b in zip(order, order[1:], strict=False))
    assert sum(placed) == pytest.approx(sum(heights))
