"""The page and the figures of the study, from the lines that `study.py` wrote; nothing here is typed by hand.

python recipes/benchmarks/study_page.py docs/results-from-scratch.jsonl docs/results-from-scratch.md
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from curve_labels import label_ends
from study import BATCH_SIZES, METHODS, measured, possible

from lgvit_hf.evaluation.plots import style

BACKBONES = {"vit": "ViT", "deit": "DeiT, distillation token", "swin": "Swin"}
OURS = "ours"
# at which methods are compared
AT_DROP, AT_SIZE = 0.01, 8
# at most seven: more cannot be told apart
DRAWN = {
    "ours": ("ours", style.BLUE),
    "ours_frozen": ("ours, frozen backbone", style.LIGHT_BLUE),
    "blocks6": ("6 blocks", style.RED),
    "truncated": ("LGViT, cut off", style.GREY),
    "lgvit": ("LGViT", style.GREEN),
    "sdn": ("SDN", style.ORANGE),
    "avit": ("A-ViT", style.PURPLE),
}

HEAD = """# Models trained from scratch

An appendix of the [results](results.md), where a backbone uses its depth.

Every figure on this page is from `recipes/benchmarks/study.py`; `recipes/benchmarks/study_page.py` wrote it. Small
models, trained from scratch for minutes on a CPU: accuracies are far from what longer training gives, comparisons
between rows are what counts. Thresholds were chosen on validation samples so that the accuracy is at most so many
points below the *plain backbone*'s, which was trained without exits, and as cheap as can be: for ours by the search
of `lgvit calibrate`, for the others one number for all exits. Accuracies and times are of test samples. *Speed-up* is
wall-clock, one thread, against the head-free backbone, in turn; a row without exits is timed against the plain
backbone. A dash: no threshold is accurate enough on the validation samples. ± is half the 95 % interval of the drop
(paired samples); where there are several seeds, figures are means.

A longer run would change how much the last blocks add to those before them, which is what early exit depends on: where
they add little, a model that is cut off or smaller is hard to beat. It would not change what heads and decisions cost.

Images are JPEG re-encodings of 32 pixels (CIFAR-10; 100 classes of Tiny-ImageNet), so accuracies do not compare with
those on the originals.
"""


def read(file):
    """The lines, the newest of each method."""
    keys = ("data", "backbone", "seed", "method")
    return list({tuple(row[key] for key in keys): row for row in measured(Path(file))}.values())


def groups(rows):
    """By data set and backbone, then by method, the lines of all seeds."""
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["data"], row["backbone"]][row["method"]].append(row)
    order = list(METHODS)
    return {
        cell: dict(sorted(by_method.items(), key=lambda entry: order.index(entry[0])))
        for cell, by_method in sorted(found.items())
    }


def points(lines, drop, size):
    """Of every seed, the point at a drop and a batch size; methods without thresholds have one for all drops."""
    found = []
    for row in lines:
        found += [p for p in row["points"] if p["batch_size"] == size and p.get("asked_drop", drop) == drop]
    return found


def beside(drop):
    """A drop in words."""
    return f"{100 * abs(drop):.1f} pt {'below' if drop > 0 else 'above'}"


def mean(values):
    return statistics.fmean(values)


def table_of_cells(cells, drop, size):
    """Markdown: by the clock, every method in every cell; what cannot be set for a drop says where it is."""
    names = [name for name in METHODS if any(name in by_method for by_method in cells.values())]
    yield "| method | " + " | ".join(f"{data}, {BACKBONES[backbone]}" for data, backbone in cells) + " |"
    yield "|---" * (len(cells) + 1) + "|"
    for name in names:
        row = []
        for by_method in cells.values():
            there = points(by_method.get(name, []), drop, size)
            if not there:
                row.append("-" if name in by_method else "")
                continue
            at = "" if "asked_drop" in there[0] else f", {beside(mean(p['drop'] for p in there))}"
            row.append(f"{mean(p['speed_up'] for p in there):.2f}x{at}")
        yield f"| {METHODS[name].title} | " + " | ".join(row) + " |"


def table_at(by_method, drop):
    """Markdown: every method at one drop."""
    sizes = " | ".join(f"batch {size}" for size in BATCH_SIZES)
    yield f"| METHOD | | accuracy | drop | layers | MACs | {sizes} |"
    yield "|---" * (6 + len(BATCH_SIZES)) + "|"
    for name, lines in by_method.items():
        at = {size: points(lines, drop, size) for size in BATCH_SIZES}
        title = lines[0]["title"]
        if not all(at.values()):
            yield f"| `{name}` | {title} |" + " - |" * (4 + len(BATCH_SIZES))
            continue
        first = at[AT_SIZE]
        clock = " | ".join(f"{mean(p['speed_up'] for p in at[size]):.2f}x" for size in BATCH_SIZES)
        yield (
            f"| `{name}` | {title} | {mean(p['accuracy'] for p in first):.1%} "
            f"| {100 * mean(p['drop'] for p in first):+.2f} ± {100 * mean(p['drop_plus_minus'] for p in first):.2f} "
            f"| {mean(p['layer_speed_up'] for p in first):.2f}x | {mean(p['macs_speed_up'] for p in first):.2f}x "
            f"| {clock} |"
        )


def table_of_drops(by_method, size):
    """Markdown: by the clock at one batch size, every method at every drop."""
    drops = sorted(
        {p["asked_drop"] for lines in by_method.values() for r in lines for p in r["points"] if "asked_drop" in p}
    )
    yield "| method | " + " | ".join(f"{100 * drop:g} pt" for drop in drops) + " |"
    yield "|---" * (len(drops) + 1) + "|"
    for lines in by_method.values():
        cells = []
        for drop in drops:
            there = points(lines, drop, size)
            cells.append(f"{mean(p['speed_up'] for p in there):.2f}x" if there else "-")
        yield f"| {lines[0]['title']} | " + " | ".join(cells) + " |"


def table_of_exits(by_method):
    """Markdown: the accuracy of each exit on all test samples."""
    with_exits = {name: lines for name, lines in by_method.items() if lines[0].get("depths")}
    depths = sorted({depth for lines in with_exits.values() for depth in lines[0]["depths"]})
    yield "| trained as | " + " | ".join(map(str, depths)) + " | heads, of all MACs |"
    yield "|---" * (len(depths) + 2) + "|"
    seen = set()
    for lines in with_exits.values():
        accuracies = {
            depth: mean(row["exit_accuracies"][row["depths"].index(depth)] for row in lines)
            for depth in lines[0]["depths"]
        }
        if tuple(accuracies.values()) in seen:
            continue
        seen.add(tuple(accuracies.values()))
        cells = " | ".join(f"{100 * accuracies[depth]:.1f}" if depth in accuracies else "" for depth in depths)
        yield f"| {lines[0]['title']} | {cells} | {mean(row['head_share'] for row in lines):.1%} |"


def table_of_runtimes(by_method, size):
    """Markdown: PyTorch and ONNX Runtime, against transformers' own model in PyTorch."""
    with_exports = {name: lines for name, lines in by_method.items() if lines[0].get("exported")}
    if not with_exports:
        return
    runtimes = list(
        dict.fromkeys((e["runtime"], e["early_exit"]) for e in next(iter(with_exports.values()))[0]["exported"])
    )
    names = [f"{runtime}{', early' if leaves else ''}" for runtime, leaves in runtimes]
    yield "| method | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for lines in with_exports.values():
        cells = []
        for runtime in runtimes:
            there = [
                e
                for row in lines
                for e in row["exported"]
                if (e["runtime"], e["early_exit"]) == runtime and e["batch_size"] == size
            ]
            cells.append(f"{mean(e['accuracy'] for e in there):.1%}, {mean(e['speed_up'] for e in there):.2f}x")
        yield f"| {lines[0]['title']} | " + " | ".join(cells) + " |"


def draw(by_method, title, file, size=AT_SIZE):
    """Accuracy on test rows against wall-clock speed-up."""
    figure = style.new_figure(8, 4.8)
    axes, ends = figure.subplots(), []
    for name, (label, color) in DRAWN.items():
        rows = by_method.get(name, [])
        there = sorted(
            (p["speed_up"], p["accuracy"]) for row in rows for p in row["points"] if p["batch_size"] == size
        )
        if there:
            shape = {"linewidth": 2.4, "marker": "o"} if name == OURS else {"linewidth": 1.6, "marker": "x"}
            axes.plot(*zip(*there, strict=True), color=color, **shape)
            ends.append((*there[-1], label, color))
    label_ends(axes, ends)
    plain = mean(row["plain_accuracy"] for lines in by_method.values() for row in lines)
    axes.axhline(plain, color="black", linewidth=0.8, linestyle=":")
    axes.set_title(f"{title} (dotted: the plain backbone)", loc="left", fontsize=10)
    axes.set(
        xlabel=f"times as fast as the plain backbone, by the clock, batch {size}", ylabel="accuracy on test images"
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f}%")
    style.hide_frame(axes)
    style.save(figure, file)


def speed(by_method, name, drop=AT_DROP, size=AT_SIZE):
    """By the clock, `None` where no setting is accurate enough."""
    there = points(by_method.get(name, []), drop, size)
    return mean(p["speed_up"] for p in there) if there else None


def verdict(by_method):
    """Whether ours is ahead of each method that can be set for a drop, what a smaller model and LGViT's ideas do."""
    ours = speed(by_method, OURS)
    others = {
        name: speed(by_method, name)
        for name, lines in by_method.items()
        if not name.startswith(OURS) and any("asked_drop" in p for row in lines for p in row["points"])
    }
    if OURS in by_method and ours is None:
        yield f"At {100 * AT_DROP:g} pt none of our settings is accurate enough."
    if ours is not None:
        ahead = [by_method[n][0]["title"] for n, value in others.items() if value is not None and value >= ours]
        said = f"behind {', '.join(ahead)}" if ahead else "ahead of every other that has a setting for it"
        title = by_method[OURS][0]["title"]
        yield f"At {100 * AT_DROP:g} pt and batch {AT_SIZE}, *{title}* is at {ours:.2f}x, {said}."
    cut_off = points(by_method.get("truncated", []), AT_DROP, AT_SIZE)
    if cut_off:
        blocks, lost = mean(p["depth"] for p in cut_off), 100 * mean(p["drop"] for p in cut_off)
        yield f"LGViT cut off after block {blocks:g} is {lost:.1f} pt below the plain backbone."
    smaller = points(by_method.get("blocks6", []), AT_DROP, AT_SIZE)
    if smaller:
        lost, times = mean(p["drop"] for p in smaller), mean(p["speed_up"] for p in smaller)
        yield f"Six blocks, trained for as many epochs as backbone and exits together: {beside(lost)}, {times:.2f}x."
        if ours is not None and lost <= AT_DROP and times > ours:
            yield "So six blocks are faster."
    for what, name, other in (
        ("Two stages against one", "lgvit", "lgvit1"),
        ("LGViT's exits against linear ones, trained alike", "lgvit", "linear"),
    ):
        if name in by_method and other in by_method:
            pair = (speed(by_method, key) for key in (name, other))
            yield f"{what}: {' and '.join('not accurate enough' if s is None else f'{s:.2f}x' for s in pair)}."


def page(rows, folder):
    """All of it; figures are written to `folder`."""
    yield HEAD
    machines = {json.dumps(row["machine"], sort_keys=True) for row in rows}
    yield (
        "Machines: "
        + "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(m).items()) for m in sorted(machines))
        + ".\n"
    )
    cells = groups(rows)
    yield (
        f"Wall-clock speed-up at batch {AT_SIZE}, at most {100 * AT_DROP:g} point below the plain backbone on the "
        "validation samples (drops on test samples are in the sections below); what has no thresholds is so far below "
        "or above on the test samples:\n"
    )
    yield from table_of_cells(cells, AT_DROP, AT_SIZE)
    yield ""
    for (data, backbone), by_method in cells.items():
        any_row = next(iter(by_method.values()))[0]
        seeds = sorted({row["seed"] for lines in by_method.values() for row in lines})
        budget, timing = any_row["budget"], any_row["timing"]
        yield f"## {data}, {BACKBONES[backbone]}\n"
        yield (
            f"Plain backbone {mean(r['plain_accuracy'] for ls in by_method.values() for r in ls):.1%}; "
            f"{any_row['rows']['validation']} validation and {any_row['rows']['test']} test samples; epochs: backbone "
            f"{budget['backbone']:g}, with exits {budget['joint']:g}, exits alone {budget['exits']:g}; seeds "
            f"{', '.join(map(str, seeds))}. {' '.join(verdict(by_method))}\n"
        )
        yield (
            f"```bash\npython recipes/benchmarks/study.py --data {data}=FOLDER --output runs/study \\\n    "
            f"--backbones {backbone} --methods METHOD --seeds {' '.join(map(str, seeds))} --epochs "
            f"{budget['backbone']:g} --joint-epochs {budget['joint']:g} --exit-epochs {budget['exits']:g} \\\n    "
            f"--images {timing['images']} --repeats {timing['repeats']}\n```\n"
        )
        missing = [name for name in METHODS if name not in by_method and possible(name, backbone)]
        if missing:
            yield f"Not measured yet: {', '.join(f'`{name}`' for name in missing)}.\n"
        picture = f"results_{data}_{backbone}.png"
        draw(by_method, f"{data}, {BACKBONES[backbone]}", folder / picture)
        yield f"![accuracy against wall-clock speed-up]({picture})\n"
        yield f"At most {100 * AT_DROP:g} point below on validation samples; accuracy and drop are of test samples:\n"
        yield from table_at(by_method, AT_DROP)
        yield f"\nWall-clock speed-up at batch {AT_SIZE}, for every drop:\n"
        yield from table_of_drops(by_method, AT_SIZE)
        yield "\nAccuracy of each exit on all test samples, in percent, by blocks run:\n"
        yield from table_of_exits(by_method)
        runtimes = list(table_of_runtimes(by_method, AT_SIZE))
        if runtimes:
            yield (
                f"\nAt {100 * AT_DROP:g} point, as chosen for batch 1, timed at batch {AT_SIZE} against transformers' "
                "own model in PyTorch:\n"
            )
            yield from runtimes
        yield ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="results.jsonl of study.py")
    parser.add_argument("page", help="Markdown file; its figures stand beside it")
    options = parser.parse_args()
    target = Path(options.page)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(page(read(options.results), target.parent)).rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
