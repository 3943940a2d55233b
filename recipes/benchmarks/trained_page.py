"""The page and the figure of the lines that `trained_exits.py compare` wrote; no number is typed by hand.

python recipes/benchmarks/trained_page.py docs/trained_exits.jsonl docs/results.md
"""

import argparse
import json
from pathlib import Path

from trained_exits import DROPS, HEADLINE, METHODS
from trained_rows import ROWS

from lgvit_hf.evaluation.plots import style

TITLES = {
    "frozen": "`lgvit grow`",
    "frozen+ensemble": "`lgvit grow`, ensemble",
    "mixed": "`lgvit grow`, then mostly joint training",
    "mixed+ensemble": "`lgvit grow`, then mostly joint training, ensemble",
    "lora": "`lgvit grow`, then LoRA",
    "lora+ensemble": "`lgvit grow`, then LoRA, ensemble",
    "tuned": "mostly `lgvit grow`, then joint training",
    "tuned+ensemble": "mostly `lgvit grow`, then joint training, ensemble",
    "shorter": "fewer blocks",
    "toast": "TOAST",
    "sdn": "SDN",
    "sdn+auto": "SDN's exits, our search",
    "pabee": "PABEE",
    "pcee": "PCEE",
    "performance_control": "calibrated confidence (performance control)",
    "zero_time_waste": "Zero Time Waste's ensemble",
    "berxit": "BERxiT, by confidence",
    "vit_ee": "ViT-EE",
    "lgvit1": "LGViT, stage one",
    "lgvit": "LGViT, two stages",
    "avit": "A-ViT",
}
# at most seven: more cannot be told apart
DRAWN = {
    "tuned+ensemble": ("ours: grown, then trained jointly", style.BLUE, "-"),
    "frozen": ("ours: lgvit grow", style.BLUE, "--"),
    "shorter": ("fewer blocks", style.RED, "-"),
    "toast": ("TOAST", style.GREY, "-"),
    "lgvit": ("LGViT", style.GREEN, "-"),
    "sdn": ("SDN", style.ORANGE, "-"),
    "vit_ee": ("ViT-EE", style.PURPLE, "-"),
}


def read(file):
    """Lines of rows by name, of methods at a drop, and of whole curves by method and batch size; the machine."""
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    rows = {line["row"]: line for line in lines if "row" in line}
    at_drop = {(line["method"], line["batch_size"], line["drop"]): line for line in lines if "drop" in line}
    curves = {(line["method"], line["batch_size"]): line for line in lines if "drops" in line}
    return rows, at_drop, curves, next(line["machine"] for line in lines if "machine" in line)


def told(ratio):
    """A ratio and its interval."""
    return "{:.2f}x ({:.2f}-{:.2f})".format(*ratio)


def table_of_methods(at_drop, drop, sizes):
    """Markdown: every method by the clock, the fastest at batch 1 first, and the headline over it at that size."""
    found = {
        name: [at_drop[name, size, drop] for size in sizes] for name in METHODS if (name, sizes[0], drop) in at_drop
    }
    yield f"| | {' | '.join(f'batch {size}' for size in sizes)} | {TITLES[HEADLINE]} over it, batch {sizes[0]} |"
    yield "|---" * (len(sizes) + 2) + "|"
    for name, lines in sorted(found.items(), key=lambda entry: -entry[1][0]["over_plain"][0]):
        ahead = told(lines[0]["headline_over"]) if "headline_over" in lines[0] else ""
        yield f"| {TITLES[name]} | {' | '.join(told(line['over_plain']) for line in lines)} | {ahead} |"


def table_of_rows(rows):
    """Markdown: accuracy right after each block that has an exit, and what training took."""
    depths = sorted({depth for line in rows.values() for depth in line["exits"]})
    yield "| `ROW` | core-minutes | " + " | ".join(map(str, depths)) + " |"
    yield "|---" * (len(depths) + 2) + "|"
    for name in (name for name in ROWS if name in rows):
        line = rows[name]
        right = dict(zip(line["exits"], line["accuracies"], strict=True))
        cells = [f"{100 * right[depth]:.1f}" if depth in right else "" for depth in depths]
        yield f"| `{name}` | {line['core_minutes']:.0f} | " + " | ".join(cells) + " |"


def apart(heights, least):
    """Heights of labels, as near to the given ones as they can be, each at least so far from the next."""
    order, placed = sorted(range(len(heights)), key=lambda number: heights[number]), list(heights)
    for _ in range(200):
        for low, high in zip(order, order[1:], strict=False):
            missing = least - (placed[high] - placed[low])
            if missing > 1e-9:
                placed[low], placed[high] = placed[low] - missing / 2, placed[high] + missing / 2
    return placed


def draw(curves, file, batch_size):
    """How much faster than the plain backbone, by points of accuracy below it, with 95 % intervals."""
    figure = style.new_figure(8, 4.8)
    axes, ends = figure.subplots(), []
    for name, (label, color, line) in DRAWN.items():
        if (name, batch_size) not in curves:
            continue
        curve = curves[name, batch_size]
        drops, (values, lows, highs) = [100 * drop for drop in curve["drops"]], zip(*curve["over_plain"], strict=True)
        axes.plot(drops, values, color=color, linestyle=line, linewidth=2.4 if label.startswith("ours") else 1.6)
        axes.fill_between(drops, lows, highs, color=color, alpha=0.12, linewidth=0)
        ends.append((drops[-1], values[-1], label, color))
    low, high = axes.get_ylim()
    for (drop, value, label, color), height in zip(
        ends, apart([end[1] for end in ends], (high - low) / 20), strict=True
    ):
        axes.annotate(label, (drop, value), (drop + 0.08, height), color=color, va="center", fontsize=9)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="points of accuracy below the plain backbone, test images", ylabel="times as fast, by the clock")
    axes.set_title(f"Up is better (batch {batch_size}; bands: 95 % intervals)", loc="left", fontsize=10)
    axes.set_xlim(0, max((end[0] for end in ends), default=1) * 1.35)
    style.hide_frame(axes)
    style.save(figure, file)


def page(file, folder):
    """All of it; the figure is written to `folder`."""
    rows, at_drop, curves, machine = read(file)
    sizes = sorted({size for _, size, _ in at_drop if size})
    draw(curves, folder / "results.png", 8)
    yield "![speed-up by points of accuracy](results.png)\n"
    yield f"Machine: {', '.join(f'{key} {value}' for key, value in machine.items())}.\n"
    for drop in reversed(DROPS):
        yield f"Times as fast as the plain backbone, at most {100 * drop:g} points below it:\n"
        yield from table_of_methods(at_drop, drop, sizes)
        yield ""
    yield "Accuracy right after each block, on the test images, in percent:\n"
    yield from table_of_rows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="of `trained_exits.py compare --output`")
    parser.add_argument("page", type=Path, help="Markdown file; its figure stands beside it")
    options = parser.parse_args()
    text = "\n".join(page(options.results, options.page.parent)).rstrip("\n") + "\n"
    options.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
