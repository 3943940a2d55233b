"""Ways to make one checkpoint faster, after equal core-minutes: exits of several kinds, fewer blocks, TOAST, A-ViT.

    python recipes/benchmarks/trained_exits.py train plain --model CHECKPOINT --data DATA --runs RUNS
    python recipes/benchmarks/trained_exits.py train mixed --model CHECKPOINT --data DATA --runs RUNS
    python recipes/benchmarks/trained_exits.py time --data DATA --runs RUNS --repeats 5
    python recipes/benchmarks/trained_exits.py compare --data DATA --runs RUNS --output docs/trained_exits.jsonl

Rows are described in `trained_rows.py`. One thread each. How many steps fit into a row's minutes is measured first, in
CPU time; a run keeps a checkpoint about every ten minutes, and the same command goes on from the newest. `compare`
keeps the exit tables of the held-out and the test samples beside each run, searches for policies on the held-out ones,
and reads them all on the test samples against the backbone alone.
"""

import argparse
import json
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from frozen_exits import BATCH_SIZES, PLOTTED, Curve, interval, read_at, resample_weights
from frozen_features import samples_of
from study_settings import singles
from trained_halting import answers_of, costs_of, halting_model, time_batches
from trained_rows import ROWS, core_minutes, train_row

from lgvit_hf import AViT, ExitTable
from lgvit_hf.ensemble import with_ensemble
from lgvit_hf.evaluation.calibration import fit_temperature
from lgvit_hf.evaluation.cost_table import CostTable, cost_table, machine, measured_sizes
from lgvit_hf.evaluation.ensemble_fitting import fit_ensemble
from lgvit_hf.evaluation.exit_table import collect
from lgvit_hf.evaluation.gate_fitting import fit_gate
from lgvit_hf.evaluation.predictions import replayed_exits, shares
from lgvit_hf.evaluation.search import candidates
from lgvit_hf.evaluation.timing import PartTimes, time_interleaved, time_parts
from lgvit_hf.files import write_json
from lgvit_hf.hub.loading import example_image, load_highway
from lgvit_hf.policies import build_policy
from lgvit_hf.segments import State

DROPS = (0.005, 0.01)


@dataclass(frozen=True)
class Method:
    """How rows answer; those of several are read together, at the cheapest of all of their settings.

    Args:
        rows (`tuple[str, ...]`): Of `trained_rows.py`.
        policy (`str`, *optional*):
            The only one, as published; `"fixed"` answers all samples at one exit; by default whatever `"auto"` finds.
        ensemble (`bool`, *optional*, defaults to `False`): Whether exits answer by a running ensemble.
    """

    rows: tuple[str, ...]
    policy: str = "auto"
    ensemble: bool = False


# the backbone alone, which all is compared with
PLAIN = "plain"
OURS = ("joint", "frozen", "grown", "mixed", "lora")
PUBLISHED = ("sdn", "berxit", "vit_ee", "lgvit1", "lgvit")
METHODS = {
    **{row: Method((row,)) for row in OURS},
    **{f"{row}+ensemble": Method((row,), ensemble=True) for row in OURS},
    "cut_off": Method((*OURS, *PUBLISHED), "fixed"),
    "one_confidence": Method(OURS, "confidence"),
    "shorter": Method(("first4", "first6", "first8", "first10", "second6")),
    "toast": Method(("toast4_4", "toast5_6", "toast5_7")),
    "sdn": Method(("sdn",), "confidence"),
    "pabee": Method(("sdn",), "patience"),
    "pcee": Method(("sdn",), "patience_confidence"),
    "performance_control": Method(("sdn",), "calibrated_confidence"),
    "zero_time_waste": Method(("sdn",), "confidence", ensemble=True),
    "berxit": Method(("berxit",), "confidence"),
    "vit_ee": Method(("vit_ee",), "confidence"),
    "lgvit1": Method(("lgvit1",), "confidence"),
    "lgvit": Method(("lgvit",), "confidence"),
    # what is ours of a method, and not its training
    **{f"{row}+auto": Method((row,), ensemble=True) for row in PUBLISHED},
    "avit": Method(("avit",)),
}


def table_of(name, row, place, runs):
    """The exit table of a row on the `held_out` or the `test` samples, kept with its model."""
    folder = runs / row / "model"
    file = folder / f"{name}.safetensors"
    if not file.exists():
        items, order = samples_of(folder, place["data"])[name]
        samples, halting = torch.utils.data.Subset(items, list(order)), halting_model(folder)
        table = answers_of(halting, samples) if halting else collect(load_highway(folder).float().eval(), samples)
        table.save(file)
    return ExitTable.load(file)


def time_rows(rows, place, runs, repeats):
    """Cost tables of all rows, measured in turn; of those with the same exits together.

    Each is opened twice: where its weights lie in memory alone makes a tenth of the time. And each walks under a
    confidence (`simple`) and under a gate on a running ensemble (`rich`), which take time themselves. Until the last,
    rounds are kept in `rounds/`: a stopped run goes on after those of the same exits on the same machine.
    """
    calls, models, found = {}, {}, {}
    for row in [*rows, *rows]:
        folder = runs / row / "model"
        if tokens_halt := halting_model(folder):
            models[row], images = tokens_halt, first_images(folder, place["data"], 2 * max(BATCH_SIZES))
            for size in BATCH_SIZES:
                times = found.setdefault(name_of(row, tokens_halt), {}).setdefault(size, [])
                calls[len(calls)] = partial(time_batches, times, tokens_halt, images.split(size))
            continue
        model = load_highway(folder).float().eval()
        segments, pixels, models[row] = model.segments(), example_image(model, max(BATCH_SIZES)), model
        held_out = table_of("held_out", row, place, runs) if len(segments) > 1 else None
        for kind, policy in policies_of(held_out).items():
            for size in measured_sizes(BATCH_SIZES, len(pixels)):
                times = found.setdefault(name_of(row, model, kind), {}).setdefault(size, [])
                calls[len(calls)] = partial(time_part, times, segments, pixels[:size], policy)
    about, kept = {"timed": sorted(found), "machine": machine(models[rows[0]])}, runs / "rounds"
    rounds = in_rounds(calls, found, about, kept, repeats)
    tables = {row: tables_of(row, model, rounds) for row, model in models.items()}
    write_json(runs / "times.json", {"machine": about["machine"], "tables": tables})
    shutil.rmtree(kept)


def in_rounds(calls, found, about, folder, repeats):
    """Call all in turn, so often in all, and give what each round has found, by name and batch size."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number}.json" for number in range(len([*folder.iterdir()]) + repeats)]
    kept = [json.loads(file.read_text()) for file in files if file.exists()]
    rounds = [each["found"] for each in kept if each["about"] == about]
    if len(rounds) < repeats:
        time_interleaved(calls, repeats=1, warm_up=0)  # to warm up
    while len(rounds) < repeats:
        for sizes in found.values():
            for times in sizes.values():
                times.clear()
        time_interleaved(shuffled(calls, seed=len(rounds)), repeats=1, warm_up=0)
        file = next(file for file in files if not file.exists())
        write_json(file, {"about": about, "found": found})
        rounds.append(json.loads(file.read_text())["found"])
    return rounds


def shuffled(calls, seed):
    """The same calls in another order."""
    return dict(random.Random(seed).sample([*calls.items()], len(calls)))


def tables_of(row, model, rounds):
    """Cost tables of a row by what it is timed under."""
    if isinstance(model, AViT):
        return dict.fromkeys(("simple", "rich"), costs_of(all_of(rounds, name_of(row, model))).to_dict())
    tables = {}
    for kind in ("simple", "rich"):
        walks = all_of(rounds, name_of(row, model, kind))
        parts = {size: [PartTimes(**walk) for walk in times] for size, times in walks.items()}
        tables[kind] = cost_table(model, parts).to_dict()
    return tables


def all_of(rounds, name):
    """Times by batch size, of all rounds."""
    return {int(size): [each for found in rounds for each in found[name][size]] for size in rounds[0][name]}


def name_of(row, model, kind=""):
    """Under which times of a row are kept, and of all that run the same."""
    return row if isinstance(model, AViT) else f"{exits_of(model)} {kind}"


def policies_of(held_out):
    """What rows are timed under; without a table, because there are no exits, nothing is evaluated."""
    if held_out is None:
        return dict.fromkeys(("simple", "rich"), build_policy({"name": "never"}, 0))
    exits, num_labels = len(held_out.depths) - 1, held_out.logits.shape[-1]
    gate = build_policy(fit_gate(held_out), exits)
    return {
        "simple": build_policy({"name": "confidence", "threshold": 0.5}, exits),
        "rich": with_ensemble(gate, fit_ensemble(held_out), exits + 1, num_labels),
    }


def first_images(folder, data, number):
    """Test images as a model takes them, `[number, C, H, W]`."""
    items, _ = samples_of(folder, data)["test"]
    return torch.stack([torch.as_tensor(items[index]["pixel_values"]) for index in range(number)])


def exits_of(model):
    """What tells how long a model takes from others of one backbone."""
    config = model.config
    blocks = config.num_blocks, tuple(getattr(config, "linear_blocks", None) or ())
    return *blocks, tuple(config.exit_positions), tuple(config.exit_types)


@torch.no_grad()
def time_part(found, segments, pixels, policy):
    """Add the times of one walk."""
    found.append(asdict(time_parts(segments, State({"pixel_values": pixels}), policy)))


def settings_of(method, held_out, costs):
    """What a method may be set to, found on the held-out samples; always also what never exits early."""
    found = [{"name": "never"}]
    if len(held_out.depths) == 1:
        return found
    if method.policy == "fixed":
        return found + [{"name": "fixed", "exit_index": index} for index in range(len(held_out.depths) - 1)]
    if method.policy in ("auto", "calibrated_confidence"):
        temperatures = tuple(fit_temperature(logits, held_out.labels) for logits in held_out.policy_logits())
        return found + candidates(held_out, costs, method.policy, temperatures, choose_exits=method.policy == "auto")
    return found + singles(held_out, method.policy)


def curve_of(row, method, place, runs, plain_right, batch_size):
    """A row on the test samples, at the measured costs of a batch size, or in MACs if that is 0."""
    test = table_of("test", row, place, runs)
    held_out = table_of("held_out", row, place, runs) if len(test.depths) > 1 else test
    if method.ensemble:
        ensemble = fit_ensemble(held_out)
        held_out, test = replace(held_out, ensemble=ensemble), replace(test, ensemble=ensemble)
    tables = dict.fromkeys(("simple", "rich"))
    if batch_size:
        known = json.loads((runs / "times.json").read_text())["tables"][row]
        tables = {kind: CostTable(**table) for kind, table in known.items()}
    costs = {kind: table.at(batch_size) if table else test.known_costs for kind, table in tables.items()}
    drops, spent = [], []
    for settings in settings_of(method, held_out, costs["rich" if method.ensemble else "simple"]):
        kind = "rich" if method.ensemble or settings["name"] == "gate" else "simple"
        left, evaluated = (
            replayed_exits(test, settings) if len(test.depths) > 1 else (torch.zeros(len(test)).long(), [])
        )
        answered = test.answered_right(evaluated).gather(0, left[None])[0]
        of_exit = np.array([costs[kind].of_exit(index, evaluated) for index in range(len(test.depths))])[left.numpy()]
        if table := tables[kind]:
            of_exit *= table.mean_latency(shares(left, len(test.depths)), evaluated, batch_size) / of_exit.mean()
        drops.append(plain_right - answered.numpy().astype(np.float32))
        spent.append(of_exit)
    return Curve(np.array(drops, np.float32), np.array(spent, np.float32))


def compare(methods, headline, place, runs, batch_sizes):
    """A line of all, one per row, and those of `at_batch_size` for each of several (0: MACs).

    `headline` is the method that is compared with each of the others.
    """
    timed = runs / "times.json"
    machine_of_times = json.loads(timed.read_text())["machine"] if timed.exists() else None
    rows = dict.fromkeys([PLAIN, *(row for method in methods.values() for row in method.rows)])
    yield {"machine": machine_of_times, "core_minutes": core_minutes(rows, runs), "headline": headline}
    for row in rows:
        table = table_of("test", row, place, runs)
        about = {"row": row, "core_minutes": core_minutes([row], runs), "samples": len(table)}
        yield {**about, "exits": table.depths, "accuracies": [round(each, 4) for each in table.accuracies()]}
    # new processes: one that is forked does not have the threads that its parent's libraries wait for
    spawn = get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for lines in pool.map(partial(at_batch_size, methods, headline, place, runs), batch_sizes):
            yield from lines


def at_batch_size(methods, headline, place, runs, batch_size):
    """Of each method a line per drop below the plain backbone, and one with many drops."""
    right = table_of("test", PLAIN, place, runs).right[-1].numpy().astype(np.float32)
    weights, of_plain = resample_weights(len(right), 1000), Method((PLAIN,))
    floor = curve_of(PLAIN, of_plain, place, runs, right, batch_size)
    drawn, lines = {}, []
    for name, method in {"plain": of_plain, **methods}.items():
        of_rows = [curve_of(row, method, place, runs, right, batch_size) for row in method.rows]
        # who is never as accurate may take the plain backbone itself
        curve = reduce(Curve.joined, of_rows, floor)
        drawn[name] = curve.drops @ weights, curve.costs @ weights
    for name in methods:
        about = {"method": name, "batch_size": batch_size}
        for drop in DROPS:
            line = {**about, "drop": drop, "over_plain": speed_up(drawn[name], drawn["plain"], drop)}
            if headline in drawn and name != headline:
                line["headline_over"] = speed_up(drawn[headline], drawn[name], drop)
            lines.append(line)
        over = [speed_up(drawn[name], drawn["plain"], drop) for drop in PLOTTED]
        lines.append({**about, "drops": PLOTTED, "over_plain": over})
    return lines


def of_trained(rows):
    """All methods with those of their rows that are trained; but for those without any."""
    methods = {name: replace(m, rows=tuple(row for row in m.rows if row in rows)) for name, m in METHODS.items()}
    return {name: method for name, method in methods.items() if method.rows}


def speed_up(ours, rival, drop):
    """What a rival takes over what we take at a drop, and its 95 % interval; both as mean drops and costs."""
    (our_drops, our_costs), (rival_drops, rival_costs) = ours, rival
    return interval(read_at(rival_drops, rival_costs, drop) / read_at(our_drops, our_costs, drop))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "time", "compare"))
    parser.add_argument("names", nargs="*", help="rows; of `compare` methods; by default those whose rows are trained")
    parser.add_argument("--model", help="a plain fine-tuned checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="of the backbone alone; see each row")
    parser.add_argument("--runs", type=Path, required=True, help="folder for models and tables")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of timing")
    parser.add_argument("--macs", action="store_true", help="compare in MACs, without `time` before")
    parser.add_argument(
        "--headline", default="joint+ensemble", help="which method is compared with each of the others"
    )
    parser.add_argument("--output", type=Path, help="JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trained = [row for row in ROWS if (options.runs / row / "model" / "config.json").exists()]
    place = {"model": options.model, "data": options.data, "learning_rate": options.learning_rate}
    if options.action == "train":
        for row in options.names or ROWS:
            train_row(row, place, options.runs)
    elif options.action == "time":
        time_rows(options.names or trained, place, options.runs, options.repeats)
    else:
        methods, lines, sizes = of_trained(trained), [], (0,) if options.macs else (0, *BATCH_SIZES)
        if missing := {*options.names, options.headline} - {*methods}:
            parser.error(f"no row of {', '.join(sorted(missing))} is trained in {options.runs}")
        methods = {name: method for name, method in methods.items() if name in (options.names or methods)}
        for line in compare(methods, options.headline, place, options.runs, sizes):
            print(json.dumps(line), flush=True)
            lines.append(json.dumps(line) + "\n")
        if options.output:
            options.output.write_text("".join(lines))


if __name__ == "__main__":
    main()
