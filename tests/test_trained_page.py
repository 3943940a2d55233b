"""`recipes/benchmarks/trained_page.py`: the page says what the lines say, and labels of curves do not overlap."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks"


@pytest.fixture(scope="module")
def page():
    """The script, which imports others by name, as when it is run."""
    sys.path.insert(0, str(BENCHMARKS))
    import trained_page

    yield trained_page
    sys.path.remove(str(BENCHMARKS))


def lines_of(page):
    yield {"machine": {"processor": "EPYC", "threads": 1}}
    yield {"row": "first8", "core_minutes": 41.2, "samples": 100, "exits": [8], "accuracies": [0.8]}
    yield {"row": "frozen", "core_minutes": 40.7, "samples": 100, "exits": [2, 12], "accuracies": [0.7, 0.85]}
    for size in (0, 1, 8):
        for name, ratio in (("frozen", 1.75), ("shorter", 1.25)):
            around = [ratio, ratio - 0.1, ratio + 0.1]
            for drop in page.DROPS:
                yield {
                    "method": name,
                    "batch_size": size,
                    "drop": drop,
                    "over_plain": around,
                    "headline_over": [2, 1.5, 3],
                }
            yield {"method": name, "batch_size": size, "drops": [0.0, 0.01], "over_plain": [[1.0, 1.0, 1.0], around]}


def test_the_page_says_what_the_lines_say(page, tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines_of(page)))
    monkeypatch.setattr(sys, "argv", ["trained_page.py", str(results), str(tmp_path / "page.md")])
    page.main()
    text = (tmp_path / "page.md").read_text()
    assert "| `lgvit grow` | 1.75x (1.65-1.85) | 1.75x (1.65-1.85) | 2.00x (1.50-3.00) |" in text
    assert "| fewer blocks | 1.25x (1.15-1.35) |" in text
    assert "| `first8` | 41 |  | 80.0 |  |" in text and "| `frozen` | 41 | 70.0 |  | 85.0 |" in text
    assert text.index("| `lgvit grow` |") < text.index("| fewer blocks |") and "processor EPYC" in text
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_all_methods_have_titles_and_few_are_drawn(page):
    assert {*page.TITLES} == {*page.METHODS} - {"plain"} and {*page.DRAWN} <= {*page.TITLES} and len(page.DRAWN) <= 7


@pytest.mark.parametrize("heights", [[1.0, 1.0, 1.0], [3.0, 1.0, 1.05, 2.0], [1.0]])
def test_labels_are_apart_and_in_order(page, heights):
    placed = page.apart(heights, 0.1)
    order = sorted(range(len(heights)), key=lambda number: heights[number])
    assert all(placed[b] - placed[a] >= 0.1 - 1e-6 for a, b in zip(order, order[1:], strict=False))
    assert sum(placed) == pytest.approx(sum(heights))
