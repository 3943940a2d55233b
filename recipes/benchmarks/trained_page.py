"""The page and the figure of the lines that `trained_exits.py compare` wrote; no result is typed by hand.

    python recipes/benchmarks/trained_page.py docs/trained_exits.jsonl docs/results.md
    python recipes/benchmarks/trained_page.py docs/trained_exits_tiny_imagenet.jsonl docs/results-tiny-imagenet.md \\
        --study tiny_imagenet
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from curve_labels import label_ends
from trained_exits import DROPS, METHODS, OURS, PLAIN
from trained_rows import ROWS, Blocks

from lgvit_hf.evaluation.plots import style

TITLES = {
    "joint": "backbone with linear exits, then `lgvit grow`",
    "joint+ensemble": "backbone with linear exits, then `lgvit grow`, ensemble",
    "frozen": "backbone, then `lgvit grow`",
    "frozen+ensemble": "backbone, then `lgvit grow`, ensemble",
    "grown": "`lgvit grow` on the plain backbone",
    "grown+ensemble": "`lgvit grow` on the plain backbone, ensemble",
    "mixed": "`lgvit grow`, then joint training",
    "mixed+ensemble": "`lgvit grow`, then joint training, ensemble",
    "lora": "`lgvit grow`, then LoRA",
    "lora+ensemble": "`lgvit grow`, then LoRA, ensemble",
    "cut_off": "any exit, cut off there",
    "one_confidence": "our exits, one confidence for all",
    "shorter": "fewer blocks",
    "toast": "TOAST",
    "sdn": "SDN",
    "pabee": "PABEE",
    "pcee": "PCEE",
    "performance_control": "calibrated confidence (performance control)",
    "zero_time_waste": "Zero Time Waste's ensemble",
    "berxit": "BERxiT, by confidence",
    "vit_ee": "ViT-EE",
    "lgvit1": "LGViT, stage one",
    "lgvit": "LGViT, two stages",
    "sdn+auto": "SDN's training, our search and ensemble",
    "berxit+auto": "BERxiT's training, our search and ensemble",
    "vit_ee+auto": "ViT-EE's training, our search and ensemble",
    "lgvit1+auto": "LGViT's stage one, our search and ensemble",
    "lgvit+auto": "LGViT's training, our search and ensemble",
    "avit": "A-ViT",
}
# answers all samples at one depth
STATIC = ("cut_off", "shorter")
# with ours at most seven: more cannot be told apart
DRAWN = {
    "lgvit+auto": ("LGViT, our search (dashed)", style.GREEN, "--"),
    "shorter": ("fewer blocks", style.RED, "-"),
    "cut_off": ("cut off at one exit", style.GREY, "-"),
    "lgvit": ("LGViT", style.GREEN, "-"),
    "sdn": ("SDN", style.ORANGE, "-"),
    "toast": ("TOAST", style.PURPLE, "-"),
}


# what the first sentences are about
AT_DROP, AT_SIZE = 0.01, 8
HEAD = """# {title}

{answer}

![speed-up by points of accuracy]({figure})

{about}

- *The plain backbone* is `plain`: fine-tuned in the same small steps as all else.
- *Settings* (thresholds, which exits, none) of all methods are searched for on held-out training images. A method is
  read at the cheapest of them that is at most so many points below the plain backbone on the {samples} test images: at
  equal unseen accuracy, but kinder the more settings and rows a method has (on CIFAR-10, by resampling, 0.02 to 0.04
  points).
- *Times as fast*: one thread, against the plain backbone, in turn. Blocks and heads are timed in batches of 1 to 32,
  and composed by where the test images exit; with a gate and an ensemble, where a method has either.
- What is never so accurate takes the plain backbone itself (1.0x). Intervals of 95 % are of the test images, drawn
  again in pairs, not of the training.
- *All rows* learn {steps}

Machine: {machine}. Training of the rows below took {hours:.1f} core-hours.
"""
COMMANDS = """{start}Any of the rows (`toast…` after `plain`), and then all of the page:

```bash
python recipes/benchmarks/trained_exits.py train ROW --model {model} --data {data} --runs runs/trained
python recipes/benchmarks/trained_exits.py time --data {data} --runs runs/trained --repeats {repeats}
python recipes/benchmarks/trained_exits.py compare --data {data} --runs runs/trained \\
    --headline {headline} --output docs/{lines}
python recipes/benchmarks/trained_page.py docs/{lines} docs/{page} --study {study}
```

Rows that are not trained yet: {missing}.
"""


@dataclass(frozen=True)
class Study:
    """What one page says and the other does not.

    Args:
        title (`str`): Of the page.
        about (`str`): Which checkpoint all rows begin with, and what was known when they were planned.
        steps (`str`): How the rows learn.
        repeats (`int`): Rounds of timing.
        model, data (`str`): As the commands call checkpoint and images.
        start (`str`, *optional*): How the checkpoint is made, if it was made for this study.
    """

    title: str
    about: str
    steps: str
    repeats: int
    model: str
    data: str
    start: str = ""


CIFAR10 = Study(
    title="What was measured",
    about="""\
A ViT-S fine-tuned on CIFAR-10 (84 pixels, 12 blocks), the checkpoint that all rows begin with; 40 core-minutes of the
same machine were planned for each, but for TOAST, which is fitted after `plain`; what they took is below, but for what
a stop cut short. Each row was trained once: what another training of it would give is not in any interval. Ours had
more tries: `frozen` and `joint` were planned after `mixed` and the published methods had been read on the test images,
the methods' own recipes were not changed. *{headline}*
was named to stand first before its own were read. On 100 classes: [Tiny-ImageNet](results-tiny-imagenet.md). Models
trained from scratch in minutes are in the [appendix](results-from-scratch.md).""",
    steps="""in bfloat16 (but for `lgvit grow`), on images as they are, neither cropped nor mirrored, the
  backbone in small steps (1e-5; 2e-5 where blocks are missing). That larger steps on crops gain less was found with
  ours and the plain backbone, on these test images; new exits of published methods learn at 3e-3, the best of three
  pilots on crops, which was not tuned anew. Rows of fewer blocks learn from labels, ours from the full model too.""",
    repeats=5,
    model="cifar10_vit_s/",
    data="cifar10/",
)
TINY_IMAGENET = Study(
    title="What was measured on 100 classes",
    about="""\
A ViT-S (56 pixels, 12 blocks) fine-tuned on Tiny-ImageNet-100, JPEG images of 32 pixels, the checkpoint that all rows
begin with; 40 core-minutes of the same machine were planned for each; what they took is below. Each row was trained
once. The checkpoint had an hour of one core and is far from what it could be: every row learns much in its minutes.
Rows and places of exits were decided on [CIFAR-10](results.md), before any of these images was read, but for
`grown`: where exits are grown in the same 40 minutes, 20 are left for the backbone, too few here (`joint`). So `grown`
was added, after `joint` had been read on the test images: exits on `plain` as it is, for which it takes minutes that
all others do not have. No published method was trained here.""",
    steps="""in float32, on images as they are, neither cropped nor mirrored, the backbone in the small steps of
  [CIFAR-10](results.md) (1e-5; 2e-5 where blocks are missing): of the plain backbone 120 steps of 4e-5 gave less on
  held-out images. Rows of fewer blocks learn from labels, ours from the full model too.""",
    repeats=12,
    model="backbone/",
    data="tiny_imagenet/",
    start="""The checkpoint, from a DINOv2-small in an hour of one core, where `cosine.yaml` holds
`lr_scheduler_type: cosine`, and what it answers before any of the rows:

```bash
lgvit convert --from dinov2 dinov2_small/ start/ --image-size 56 56
lgvit train --stage head --model start/ --data tiny_imagenet/ --output head/ --max-train-samples 16000
lgvit train --config cosine.yaml --stage backbone --model head/ --data tiny_imagenet/ --output backbone/ \\
    --epochs 1.6 --batch-size 64 --augment random_resized --crop-scale 0.6 1.0 --learning-rate 1e-4 --warmup-steps 50
lgvit evaluate backbone/ --data tiny_imagenet/
```

""",
)
STUDIES = {"cifar10": CIFAR10, "tiny_imagenet": TINY_IMAGENET}


def read(file):
    """The first line, those of rows by name, of methods at a drop, and of whole curves by method and batch size."""
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    rows = {line["row"]: line for line in lines if "row" in line}
    at_drop = {(line["method"], line["batch_size"], line["drop"]): line for line in lines if "drop" in line}
    curves = {(line["method"], line["batch_size"]): line for line in lines if "drops" in line}
    return lines[0], rows, at_drop, curves


def told(ratio):
    """A ratio and its interval."""
    return "{:.2f}x ({:.2f}-{:.2f})".format(*ratio)


def answer(headline, rows, at_drop, curves, sizes):
    """When to exit early, when to cut the model off, when to quantise."""
    rivals = [name for name in METHODS if name.removesuffix("+ensemble") not in OURS and (name, AT_SIZE) in curves]
    yield exit_early(headline, rows, at_drop, sizes, rivals)
    yield cut_off(headline, rows, at_drop, curves, [name for name in STATIC if name in rivals])
    yield (
        "**Only quantise** where the model must stay as it is: what int8 alone gives, and with exits, is measured "
        "[by runtime](runtimes.md#what-was-measured)."
    )


def exit_early(headline, rows, at_drop, sizes, rivals):
    """What ours gains and took to train, and who is ahead of it or level."""
    each = ", ".join(f"{told(at_drop[headline, size, AT_DROP]['over_plain'])} at batch {size}" for size in sizes)
    over = {name: [at_drop[name, size, AT_DROP]["headline_over"] for size in sizes] for name in rivals}
    ahead = [name for name in rivals if min(high for *_, high in over[name]) < 1]
    level = [name for name in rivals if min(low for _, low, _ in over[name]) <= 1 and name not in ahead]
    said = [f"{each_of(ahead)} faster at some batch size"] if ahead else []
    said += [f"not clearly faster than {each_of(level)}"] if level else []
    everyone = f"faster than each of the {len(rivals)} other ways to answer below, by intervals, at every batch size"
    advice = "Not everywhere exit early" if ahead else "Exit early"
    took, plain_took = (f"{rows[row]['core_minutes']:.0f}" for row in (METHODS[headline].rows[0], PLAIN))
    below = f"at most {100 * AT_DROP:g} pt below the plain backbone"
    return (
        f"**{advice}**: in one training of each, {below}, *{TITLES[headline]}* (trained for {took} "
        f"core-minutes, the plain backbone for {plain_took}) gains {each}; "
        f"{'; '.join(said) or everyone}."
    )


def each_of(names):
    """Methods in a sentence."""
    return " and ".join(f"*{TITLES[name]}*" for name in names)


def cut_off(headline, rows, at_drop, curves, static):
    """From which drop on one depth for all is faster, and what fewer blocks lose."""
    ours = curves[headline, AT_SIZE]
    of_each = [[value for value, *_ in curves[name, AT_SIZE]["over_plain"]] for name in static]
    best = [max(values) for values in zip(*of_each, strict=True)]
    ahead = [value >= other for (value, *_), other in zip(ours["over_plain"], best, strict=True)]
    from_here = next((place for place in range(len(ahead)) if not any(ahead[place:])), None)
    drops = [100 * drop for drop in ours["drops"]]
    where = f"at no drop up to {drops[-1]:g} pt" if from_here is None else f"from {drops[from_here]:g} pt on"
    fewer = {name: line["accuracies"][-1] for name, line in rows.items() if isinstance(ROWS[name][0], Blocks)}
    lost = " and ".join(
        f"`{name}` is {100 * (rows[PLAIN]['accuracies'][-1] - accuracy):.1f} pt below"
        for name, accuracy in fewer.items()
    )
    at_one = max(at_drop[name, AT_SIZE, AT_DROP]["over_plain"] for name in static)
    return (
        f"**Cut the model off**, at an exit or by taking fewer blocks, {where} (batch {AT_SIZE}): at "
        f"{100 * AT_DROP:g} pt that is {told(at_one)} as fast{f'; fine-tuned for as long, {lost}' * bool(lost)}."
    )


def table_of_methods(headline, at_drop, drop, sizes):
    """Markdown: every method by the clock, the fastest at batch 1 first, and the headline over it at that size."""
    found = {
        name: [at_drop[name, size, drop] for size in sizes] for name in METHODS if (name, sizes[0], drop) in at_drop
    }
    yield f"| | {' | '.join(f'batch {size}' for size in sizes)} | {TITLES[headline]} over it, batch {sizes[0]} |"
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
        what = f"`{name}`: {TITLES[name]}" if name in TITLES else f"`{name}`"
        yield f"| {what} | {line['core_minutes']:.0f} | " + " | ".join(cells) + " |"


def draw(headline, curves, file, batch_size):
    """How much faster than the plain backbone, by points of accuracy below it, with 95 % intervals."""
    figure = style.new_figure(8, 4.8)
    axes, ends = figure.subplots(), []
    for name, (label, color, line) in {headline: ("ours", style.BLUE, "-"), **DRAWN}.items():
        if (name, batch_size) not in curves:
            continue
        curve = curves[name, batch_size]
        drops, (values, lows, highs) = [100 * drop for drop in curve["drops"]], zip(*curve["over_plain"], strict=True)
        axes.plot(drops, values, color=color, linestyle=line, linewidth=2.4 if label.startswith("ours") else 1.6)
        axes.fill_between(drops, lows, highs, color=color, alpha=0.12, linewidth=0)
        ends.append((drops[-1], values[-1], label, color))
    label_ends(axes, ends)
    axes.set_xticks(range(int(max((end[0] for end in ends), default=0)) + 1))
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="points of accuracy below the plain backbone, test images", ylabel="times as fast, by the clock")
    axes.set_title(f"Up is better (batch {batch_size}; bands: 95 % intervals)", loc="left", fontsize=10)
    style.hide_frame(axes)
    style.save(figure, file)


def page(name, file, target):
    """All of it, of a study; the figure is written beside it."""
    study = STUDIES[name]
    about, rows, at_drop, curves = read(file)
    headline, sizes = about["headline"], sorted({size for _, size, _ in at_drop if size})
    figure = target.with_suffix(".png")
    draw(headline, curves, figure, AT_SIZE)
    yield HEAD.format(
        title=study.title,
        answer="\n\n".join(answer(headline, rows, at_drop, curves, sizes)),
        figure=figure.name,
        about=study.about.format(headline=TITLES[headline]),
        samples=rows[PLAIN]["samples"],
        steps=study.steps,
        machine=", ".join(f"{key} {value}" for key, value in about["machine"].items()),
        hours=about["core_minutes"] / 60,
    )
    for drop in reversed(DROPS):
        yield f"Times as fast as the plain backbone, at most {100 * drop:g} pt below it:\n"
        yield from table_of_methods(headline, at_drop, drop, sizes)
        yield ""
    yield "Accuracy right after each block, on the test images, in percent:\n"
    yield from table_of_rows(rows)
    missing = ", ".join(f"`{name}`" for name in ROWS if name not in rows)
    yield "\n" + COMMANDS.format(
        **vars(study), study=name, headline=headline, lines=Path(file).name, page=target.name, missing=missing
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="of `trained_exits.py compare --output`")
    parser.add_argument("page", type=Path, help="Markdown file; its figure stands beside it")
    parser.add_argument("--study", choices=STUDIES, default="cifar10", help="what the page says of its checkpoint")
    options = parser.parse_args()
    text = "\n".join(page(options.study, options.results, options.page)).rstrip("\n") + "\n"
    options.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
