"""Which head and which policy gain most on a frozen backbone, by the clock, at equal accuracy on the test samples.

    python recipes/benchmarks/frozen_features.py CHECKPOINT --data DATA --cache CACHE --train 16384 --flip
    python recipes/benchmarks/frozen_exits.py CHECKPOINT --cache CACHE --train      # heads, three seeds: minutes
    python recipes/benchmarks/frozen_exits.py CHECKPOINT --cache CACHE --time       # on an idle machine: a minute
    python recipes/benchmarks/frozen_exits.py CHECKPOINT --cache CACHE --read --output docs/frozen_exits.jsonl

Heads learn from the labels and the backbone's own answers in equal parts. Policies are searched for on half of the
held-out samples at the measured costs of each batch size; all that is reported is on the test samples. The drop is
against the plain backbone's final classifier there. At a drop, each curve is read at the cheapest of its policies (or
static models) within it. Intervals: paired bootstrap over the test samples, curves read anew in each resample, means
over the seeds. Static models: the backbone cut off after a block with the same head, and those that `--static` names.
"""

import argparse
import copy
import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from frozen_features import Pooled, open_caches, open_frozen, read_answers, read_states, samples_of
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from lgvit_hf import ExitTable
from lgvit_hf.data.batches import in_batches
from lgvit_hf.evaluation.calibration import fit_temperature
from lgvit_hf.evaluation.cost_table import CostTable, cost_table, machine, measured_sizes
from lgvit_hf.evaluation.costs import model_macs
from lgvit_hf.evaluation.gate_fitting import fit_gate
from lgvit_hf.evaluation.predictions import replayed_exits, shares
from lgvit_hf.evaluation.search import candidates
from lgvit_hf.evaluation.threshold_search import RANGES, confidence_scores, uniform_thresholds
from lgvit_hf.evaluation.timing import time_interleaved, time_parts
from lgvit_hf.files import write_json
from lgvit_hf.hub.loading import example_image, load_highway
from lgvit_hf.losses import distillation_loss
from lgvit_hf.policies import build_policy
from lgvit_hf.segments import State
from lgvit_hf.training.cached_states import TokenShape
from lgvit_hf.training.linear_fit import whitening

DROPS = (0.005, 0.01, 0.02)
BATCH_SIZES = (1, 8, 32)
RESAMPLES = 1000
PLOTTED = [round(0.0025 * number, 4) for number in range(13)]
# of linear classifiers: penalties of the squared weights, from the strongest, and steps of L-BFGS for each
PENALTIES, STEPS = (1e-3, 3e-4, 1e-4), 25
# of classifiers with a hidden layer: epochs times samples, and the batch size
SAMPLES_SEEN, BATCH = 300_000, 256
TEMPERATURE = 2.0  # of the distillation
# heads that read all tokens, from a cache of their own (`frozen_features.py --head`)
MAP_HEADS, MAP_EPOCHS, MAP_BATCH = ("conv1_1",), 6, 64


# -- heads --------------------------------------------------------------------------------------------------------


def head_inputs(head, vectors):
    """What the classifier of a head reads, `[N, F]` float32, of the pooled vectors `[N, V, D]` of one exit."""
    *prefix, mean, normed_mean, normed_max = vectors.float().unbind(1)
    normalised = partial(F.layer_norm, normalized_shape=mean.shape[1:], eps=1e-6)
    if head == "concat":
        return torch.cat([*map(normalised, prefix), normed_mean] if prefix else [normed_mean, normed_max], 1)
    if head == "average":
        return normalised(mean + prefix[0] if prefix else mean)
    return prefix[0] if prefix else normed_mean


def half_distilled(logits, teacher, labels):
    """The labels' cross-entropy and the distillation of the backbone's own answers, in equal parts."""
    # the distillation loss is a mean over the classes too
    distilled = distillation_loss(logits, teacher, TEMPERATURE) * logits.shape[1]
    return (F.cross_entropy(logits, labels) + distilled) / 2


def linear_classifiers(white, matrix, teacher, labels):
    """One for each of `PENALTIES` on its squared weights before the whitening, each at the optimum of its loss."""
    weight = torch.zeros(white.shape[1], teacher.shape[1], requires_grad=True)
    bias = torch.zeros(teacher.shape[1], requires_grad=True)
    for penalty in PENALTIES:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

        def loss(penalty=penalty, optimizer=optimizer):
            optimizer.zero_grad()
            value = half_distilled(white @ weight + bias, teacher, labels) + penalty * (matrix @ weight).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        yield partial(torch.addmm, bias.detach().clone(), mat2=weight.detach().clone())


def dense_classifier(white, teacher, labels):
    """A dense layer as wide as its input, tanh and a classifier."""
    width = white.shape[1]
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, teacher.shape[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    epochs, steps = max(1, SAMPLES_SEEN // len(white)), len(white) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(white))[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            half_distilled(model(white[batch]), teacher[batch], labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model


def train_exit(inputs, teacher, labels, seed, has_hidden, judged_on):
    """A function from raw inputs to logits `[N, C]`; `judged_on` are inputs, teacher and labels to choose on.

    A seed draws seven eighths of the samples, and the order of the batches where there are any.
    """
    torch.manual_seed(seed)
    drawn = torch.randperm(len(inputs))[: len(inputs) * 7 // 8]
    mean, scale, matrix = whitening(inputs[drawn])

    def whitened(raw):
        return (raw - mean) / scale @ matrix

    white, others, *answers = whitened(inputs[drawn]), whitened(judged_on[0]), teacher[drawn], labels[drawn]
    if has_hidden:
        found = [dense_classifier(white, *answers)]
    else:
        found = list(linear_classifiers(white, matrix, *answers))
    with torch.no_grad():
        best = min(found, key=lambda classify: half_distilled(classify(others), *judged_on[1:]).item())
    return lambda raw: best(whitened(raw)).detach()


def train_map_head(head, shape, states, teacher, labels, seed):
    """As `train_exit`, of a head that reads all tokens: AdamW on raw states `[N, tokens, width]`."""
    torch.manual_seed(seed)
    head, drawn = copy.deepcopy(head).float().train(), torch.randperm(len(states))[: len(states) * 7 // 8]
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.05)
    steps = MAP_EPOCHS * (len(drawn) // MAP_BATCH)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in range(MAP_EPOCHS):
        for batch in drawn[torch.randperm(len(drawn))][: len(drawn) // MAP_BATCH * MAP_BATCH].split(MAP_BATCH):
            optimizer.zero_grad()
            half_distilled(shape.answer(head, states[batch].float()), teacher[batch], labels[batch]).backward()
            optimizer.step()
            schedule.step()
    head.eval()

    @torch.no_grad()
    def classify(raw):
        return torch.cat([shape.answer(head, part.float()) for part in raw.split(MAP_BATCH)])

    return classify


def train_tables(model, cache, head, seed):
    """The exit tables of the held-out and of the test samples under new heads, kept in the cache."""
    folder, classes = cache / "tables", model.config.num_labels
    if (folder / f"{head}-{seed}-test.safetensors").exists():
        return
    mirrored, kind = ["mirrored"] if (cache / "mirrored").exists() else [], TokenShape if head in MAP_HEADS else Pooled
    seen = open_caches(cache, ["train", *mirrored], classes, kind)
    teacher, labels = read_answers(seen)
    parts = {name: open_caches(cache, [name], classes, kind) for name in ("held_out", "test")}
    truths, answers = {name: read_answers(part) for name, part in parts.items()}, {name: [] for name in parts}
    for index, position in enumerate(model.config.exit_positions):
        states = read_states(seen, index)
        others = {name: read_states(part, index) for name, part in parts.items()}
        if head in MAP_HEADS:
            classify = train_map_head(model.exits[index], seen[0].shapes[index], states, teacher, labels, seed)
        else:
            has_hidden = head == "linear" and model.head_shape(position).num_prefix == 1
            others = {name: head_inputs(head, part) for name, part in others.items()}
            judged_on = [values[1::2] for values in (others["held_out"], *truths["held_out"])]
            classify = train_exit(head_inputs(head, states), teacher, labels, seed, has_hidden, judged_on)
        for name, values in others.items():
            answers[name].append(classify(values))
    depths, costs = [*model.config.exit_positions, model.config.num_blocks], model_macs(model)
    folder.mkdir(exist_ok=True)
    for name, (logits, truth) in truths.items():
        table = ExitTable(torch.stack([*answers[name], logits]), truth, depths, costs)
        table.save(folder / f"{head}-{seed}-{name}.safetensors")
    print(head, seed, " ".join(f"{share:.1%}" for share in table.accuracies()), flush=True)


def fitted_half(held_out):
    """The half of the held-out samples that policies are fitted on; the other one chooses the heads' penalties."""
    return held_out.select(torch.arange(0, len(held_out), 2))


# -- the clock ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def time_all(model, gate, static, repeats):
    """Cost tables under `confidence` and `gate`, and seconds of the static models at each batch size, in turn."""
    segments, pixels = model.segments(), example_image(model, max(BATCH_SIZES))
    policies = {"confidence": build_policy({"name": "confidence", "threshold": 0.5}, len(segments) - 1)}
    policies["gate"] = build_policy(gate, len(segments) - 1)
    walks = {name: {size: [] for size in measured_sizes(BATCH_SIZES, len(pixels))} for name in policies}
    runs = {}

    def walk(name, size):
        walks[name][size].append(time_parts(segments, State({"pixel_values": pixels[:size]}), policies[name]))

    def cut_off(last, size):
        state = State({"pixel_values": pixels[:size]})
        for segment in segments[: last + 1]:
            state = segment.advance(state)
        return segments[last].answer(state)

    for name, of_size in walks.items():
        runs |= {f"{name} {size}": partial(walk, name, size) for size in of_size}
    for size in BATCH_SIZES:
        runs |= {f"cut-{segment.depth} {size}": partial(cut_off, n, size) for n, segment in enumerate(segments)}
        runs |= {f"{name} {size}": partial(other, pixels[:size]) for name, other in static.items()}
    seconds = {name: statistics.median(times) for name, times in time_interleaved(runs, repeats=repeats).items()}
    kept = {name: {size: found[-repeats:] for size, found in of_size.items()} for name, of_size in walks.items()}
    tables = {name: cost_table(model, of_size).to_dict() for name, of_size in kept.items()}
    names = [*(f"cut-{segment.depth}" for segment in segments), *static]
    apart = {name: {size: seconds[f"{name} {size}"] for size in BATCH_SIZES} for name in names}
    return {"machine": machine(model), "tables": tables, "static": apart}


def static_answers(folder, cache, checkpoint, data):
    """Which test samples a model without exits (`lgvit shorten`) answers rightly, `[N]` bool, kept in the cache."""
    file = cache / f"static-{Path(folder).name}.npy"
    if not file.exists():
        model, (images, _) = load_highway(folder).float().eval(), samples_of(checkpoint, data)["test"]
        with torch.no_grad():
            batches = in_batches(images, 64)
            right = [model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"] for batch in batches]
        np.save(file, torch.cat(right).numpy())
    return np.load(file)


# -- curves -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Policies or static models on N test samples.

    Args:
        drops (`np.ndarray`): `[P, N]`: 1 where only the plain backbone is right, -1 where only this one is, else 0.
        costs (`np.ndarray`): `[P, N]` milliseconds.
    """

    drops: np.ndarray
    costs: np.ndarray

    def joined(self, other):
        """Both together."""
        return Curve(np.concatenate([self.drops, other.drops]), np.concatenate([self.costs, other.costs]))


def read_at(drops, costs, drop):
    """The least cost within a drop, of `[P, ...]` mean drops and costs; infinite where none is."""
    return np.where(drops <= drop + 1e-9, costs, np.inf).min(0)


def resample_weights(num_samples, resamples, seed=0):
    """How often each sample is drawn, over their number: `[N, R + 1]`; the first column is the samples themselves."""
    drawn = np.random.default_rng(seed).multinomial(num_samples, np.full(num_samples, 1 / num_samples), resamples)
    return (np.concatenate([np.ones((1, num_samples)), drawn]).T / num_samples).astype(np.float32)


def paired_ratios(ours, rivals, weights, drop):
    """What a rival costs over what ours costs, each read at a drop: of the samples, then of each resample, `[R + 1]`.

    Both are lists of curves, one per seed; the means over the seeds are compared.
    """
    read = [
        np.mean([read_at(curve.drops @ weights, curve.costs @ weights, drop) for curve in curves], 0)
        for curves in (ours, rivals)
    ]
    return read[1] / read[0]


def interval(values):
    """The value, and its 95 % interval from the resamples behind it."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return [round(float(number), 4) for number in (values[0], low, high)]


def policy_curve(test, found, table, batch_size):
    """The curve of some policies at the costs of a batch size."""
    right, parts, drops, costs = test.right.numpy().astype(np.float32), table.at(batch_size), [], []
    for settings in found:
        left, evaluated = replayed_exits(test, settings)
        of_exit = np.array([parts.of_exit(index, evaluated) for index in range(len(right))])[left.numpy()]
        exact = table.mean_latency(shares(left, len(right)), evaluated, batch_size)
        costs.append(of_exit * exact / of_exit.mean())
        drops.append(right[-1] - np.take_along_axis(right, left.numpy()[None], 0)[0])
    return Curve(np.array(drops, np.float32), np.array(costs, np.float32))


def static_curve(test, times, batch_size, others):
    """The plain backbone, what is left of it after each block, and other static models (`[N]` bool right, by name)."""
    right = [*test.right.numpy(), *others.values()]
    names = [*(f"cut-{depth}" for depth in test.depths), *others]
    costs = [1e3 * times["static"][name][str(batch_size)] / batch_size for name in names]
    drops = np.array(right[len(test.depths) - 1] * np.float32(1) - np.array(right, np.float32), np.float32)
    return Curve(drops, np.repeat(np.array(costs, np.float32)[:, None], len(test), 1))


def uniform_policies(half, temperatures):
    """One confidence for all exits, all of them evaluated."""
    scores = confidence_scores(half, "confidence", temperatures).numpy()
    cuts = [float(cut[0]) for cut in uniform_thresholds(scores, RANGES["confidence"], 100)]
    return [{"name": "confidence", "threshold": cut, "temperature": list(temperatures)} for cut in cuts]


def all_curves(cache, head, seeds, times, batch_size, others):
    """By name, a curve per seed: what is searched for under each policy, one uniform confidence, and static models."""
    curves = {}
    for seed in range(seeds):
        half = fitted_half(ExitTable.load(cache / "tables" / f"{head}-{seed}-held_out.safetensors"))
        test = ExitTable.load(cache / "tables" / f"{head}-{seed}-test.safetensors")
        temperatures = tuple(fit_temperature(exit_logits, half.labels) for exit_logits in half.logits)
        tables = {name: CostTable(**table) for name, table in times["tables"].items()}
        static = static_curve(test, times, batch_size, others)
        found = {"static": static}
        plain = Curve(*(part[len(test.depths) - 1 :][:1] for part in (static.drops, static.costs)))
        uniform = uniform_policies(half, temperatures)
        found["uniform"] = plain.joined(policy_curve(test, uniform, tables["confidence"], batch_size))
        for name, table in tables.items():
            policies = candidates(half, table.at(batch_size), name, temperatures)
            found[name] = plain.joined(policy_curve(test, policies, table, batch_size))
        for name, curve in found.items():
            curves.setdefault(name, []).append(curve)
    return curves


def report(name, cache, heads, seeds, others):
    """The lines of one model: of each head, policy, batch size and drop."""
    for head in heads:
        times = json.loads((cache / f"times-{head}.json").read_text())
        tables = [ExitTable.load(cache / "tables" / f"{head}-{seed}-test.safetensors") for seed in range(seeds)]
        accuracies = np.mean([table.accuracies() for table in tables], 0).round(4).tolist()
        about = {"model": name, "head": head, "seeds": seeds}
        yield {**about, "accuracies": accuracies, "exits": tables[0].depths, "machine": times["machine"]}
        weights = resample_weights(len(tables[0]), RESAMPLES)
        for batch_size in BATCH_SIZES:
            curves = all_curves(cache, head, seeds, times, batch_size, others)
            plain = [Curve(0 * curve.drops[:1], curves["uniform"][0].costs[:1]) for curve in curves["static"]]
            rivals = {"plain": plain, "static": curves["static"], "uniform": curves["uniform"]}
            for policy in curves:
                for drop in DROPS:
                    ratios = {
                        f"over_{rival}": interval(paired_ratios(curves[policy], rivals[rival], weights, drop))
                        for rival in rivals
                        if rival != policy
                    }
                    yield {**about, "batch_size": batch_size, "policy": policy, "drop": drop, **ratios}
                read = [paired_ratios(curves[policy], plain, weights[:, :1], drop)[0] for drop in PLOTTED]
                line = {**about, "batch_size": batch_size, "policy": policy, "drops": PLOTTED}
                yield {**line, "speed_ups": [round(float(ratio), 4) for ratio in read]}


def plot(lines, file, head="conv1_1", batch_size=1):
    """Speed-up over the plain backbone at each drop, of each model under `gate`, `uniform` and `static`."""
    import matplotlib.pyplot as plt

    # by policy: its label, at which of the drops it stands, and how far above the curve
    names = {"gate": ("gate", 4, 8), "uniform": ("one confidence", 8, -16), "static": ("static", 12, -14)}
    models = list(dict.fromkeys(line["model"] for line in lines))
    figure, axes = plt.subplots(1, len(models), figsize=(4 * len(models), 3.4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for line in lines:
            known = (line["model"], line["head"], line.get("batch_size")) == (model, head, batch_size)
            if known and "speed_ups" in line and line["policy"] in names:
                drawn = axis.plot([100 * drop for drop in line["drops"]], line["speed_ups"])[0]
                label, place, above = names[line["policy"]]
                axis.annotate(
                    label,
                    (100 * line["drops"][place], line["speed_ups"][place]),
                    (0, above),
                    textcoords="offset points",
                    ha="right" if above > 0 or place == 12 else "left",
                    color=drawn.get_color(),
                )
        axis.set(title=model, xlabel="accuracy drop on test samples (points)")
        axis.set_ylim(bottom=1)
    axes[0][0].set_ylabel(f"speed-up by the clock, batch {batch_size}")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--cache", required=True, type=Path, help="what frozen_features.py filled")
    parser.add_argument("--heads", nargs="+", default=["concat", "average", "linear"])
    parser.add_argument("--positions", type=int, nargs="+", help="blocks before the exits (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10, help="rounds of timing")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--read", action="store_true")
    parser.add_argument(
        "--static", nargs="*", default=[], help="folders of models without exits, as `lgvit shorten` saves"
    )
    parser.add_argument("--data", help="of the static models' answers")
    parser.add_argument("--plot", type=Path, help="PNG file of what `--output` holds")
    parser.add_argument("--output", type=Path, help="JSON lines that are added to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    static = {Path(folder).name: load_highway(folder).float().eval() for folder in options.static}
    for head in options.heads:
        model = open_frozen(options.checkpoint, head, options.positions)
        if options.train:
            for seed in range(options.seeds):
                train_tables(model, options.cache, head, seed)
        if options.time:
            half = fitted_half(ExitTable.load(options.cache / "tables" / f"{head}-0-held_out.safetensors"))
            write_json(options.cache / f"times-{head}.json", time_all(model, fit_gate(half), static, options.repeats))
    if options.read:
        others = {
            Path(folder).name: static_answers(folder, options.cache, options.checkpoint, options.data)
            for folder in options.static
        }
        for line in report(Path(options.checkpoint).name, options.cache, options.heads, options.seeds, others):
            print(json.dumps(line), flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    if options.plot:
        plot([json.loads(line) for line in options.output.read_text().splitlines()], options.plot)


if __name__ == "__main__":
    main()
