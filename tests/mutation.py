"""Do the tests notice when the code is wrong? Random mutants of the parts on which everything rests, one at a time.

    .venv/bin/pip install cosmic-ray
    OMP_NUM_THREADS=1 .venv/bin/python -m tests.mutation --mutants 300 --seed 1 --output mutants.jsonl

A mutant is the package with one operator, comparison, number, boolean, `not`, `break` or loop changed (operators of
cosmic-ray). The seed draws 300 places and one change at each; a change of an annotation, of a docstring or of the
message of an error is no mutant. Each meets the tests of its file in a copy of the tree, in a process of its own,
until a test fails: killed. All pass: survived, and its diff is printed to be judged. Slower than the limit: timeout.
Lines of `--output` that are already there are not run again.
"""

import argparse
import ast
import difflib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "engine.py": ("tests/test_engine.py", "tests/test_modeling_vit.py"),
    "policies.py": ("tests/test_policies.py", "tests/test_engine.py", "tests/test_configuration.py"),
    "exit_policy.py": ("tests/test_policies.py", "tests/test_engine.py", "tests/test_configuration.py"),
    "losses.py": ("tests/test_losses.py", "tests/test_reference.py"),
    "heads.py": ("tests/test_heads.py", "tests/test_modeling_vit.py"),
    "exit_head.py": ("tests/test_heads.py", "tests/test_modeling_vit.py"),
    "evaluation/search.py": ("tests/test_calibration.py", "tests/test_evaluation.py"),
    "evaluation/threshold_search.py": ("tests/test_calibration.py", "tests/test_evaluation.py"),
    "evaluation/grid_search.py": ("tests/test_calibration.py", "tests/test_evaluation.py"),
    "evaluation/predictions.py": ("tests/test_calibration.py", "tests/test_evaluation.py"),
    "evaluation/risk_control.py": ("tests/test_bounds.py",),
}
# these two need arguments: names of variables
WITH_ARGUMENTS = {"core/VariableInserter", "core/VariableReplacer"}


class WithoutWords(ast.NodeTransformer):
    """Takes away what no test has to notice: annotations, docstrings, messages of errors."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Raise(self, node):
        return ast.Raise(exc=getattr(node.exc, "func", node.exc), cause=node.cause)

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)


def meaning(code):
    return ast.dump(WithoutWords().visit(ast.parse(code)))


def mutants(file, draw):
    """One random mutant `(file, code)` of each place of a file that can be mutated."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    source = (ROOT / "lgvit_hf" / file).read_text(encoding="utf-8")
    places = defaultdict(list)
    for name in sorted(set(cosmic_ray.plugins.operator_names()) - WITH_ARGUMENTS):
        operator = cosmic_ray.plugins.get_operator(name)()
        positions = [place for node in ast_nodes(get_ast(source)) for place in operator.mutation_positions(node)]
        for occurrence, place in enumerate(positions):
            places[place].append((operator, occurrence))
    unchanged = meaning(source)
    for _, changes in sorted(places.items()):
        code = mutate_code(source, *draw.choice(changes))
        try:
            if meaning(code) != unchanged:
                yield file, code
        except SyntaxError:
            pass


def difference(file, code):
    source = (ROOT / "lgvit_hf" / file).read_text(encoding="utf-8")
    lines = difflib.unified_diff(source.splitlines(), code.splitlines(), file, file, n=0, lineterm="")
    return "\n".join(list(lines)[2:])


def run_tests(tree, tests):
    """In a process of its own: pytest on `tests` of `tree`, whose code is the one imported."""
    import pytest

    os.chdir(tree)
    sys.path.insert(0, str(tree))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # of the other tree, where this script is
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--randomly-seed=1", "--timeout=0"]
    os._exit(pytest.main([*options, *tests]))


class Worker:
    """A copy of the tree in which one mutant after another is tested."""

    def __init__(self, folder):
        self.tree = Path(folder) / "main"
        shutil.copytree(
            ROOT, self.tree, ignore=shutil.ignore_patterns(".*", "demo_output", "__pycache__", "*.egg-info")
        )
        (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")

    def outcome(self, file, code, limit):
        path = self.tree / "lgvit_hf" / file
        source = path.read_text(encoding="utf-8")
        path.write_text(code, encoding="utf-8")
        try:
            # the server has imported what takes long, and forks
            process = multiprocessing.get_context("forkserver").Process(
                target=run_tests, args=(self.tree, [f"lgvit_hf/{file}", *TESTS[file]])
            )
            process.start()
            process.join(limit)
            if process.exitcode is None:
                process.kill()
                process.join()
                return "timeout"
            return "survived" if process.exitcode == 0 else "killed"
        finally:
            path.write_text(source, encoding="utf-8")


def main():
    """Draw the mutants, test them two at a time, print the score of each file and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300, help="seconds for the tests of one mutant")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--files", nargs="+", choices=TESTS, default=list(TESTS))
    options = parser.parse_args()

    draw = random.Random(options.seed)
    drawn = [mutant for file in TESTS for mutant in mutants(file, draw)]
    draw.shuffle(drawn)
    drawn = [mutant for mutant in drawn[: options.mutants] if mutant[0] in options.files]
    results = {}
    if options.output.is_file():
        lines = map(json.loads, options.output.read_text(encoding="utf-8").splitlines())
        results = {(line["file"], line["diff"]): line["outcome"] for line in lines}

    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "transformers", "pytest", "numpy"])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        idle = [Worker(Path(folder) / str(number)) for number in range(options.workers)]
        for file in options.files:  # an unchanged file must pass, or everything would count as killed
            source = (ROOT / "lgvit_hf" / file).read_text(encoding="utf-8")
            if (outcome := idle[0].outcome(file, source, options.limit)) != "survived":
                parser.exit(1, f"{file}: its tests do not pass on the unchanged code ({outcome})\n")

        def test(mutant):
            key = (mutant[0], difference(*mutant))
            if key in results:
                return
            worker = idle.pop()
            try:
                results[key] = worker.outcome(*mutant, options.limit)
            finally:
                idle.append(worker)
            line = json.dumps({"file": key[0], "diff": key[1], "outcome": results[key]})
            with options.output.open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")

        list(pool.map(test, drawn))

    outcomes = [(file, results[file, difference(file, code)]) for file, code in drawn]
    for (file, code), (_, outcome) in zip(drawn, outcomes, strict=True):
        if outcome != "killed":
            print(f"\n{outcome}: {file}\n{difference(file, code)}")
    print(f"\n{'file':24} mutants  killed  survived  timeout  score without time-outs")
    for name in [*options.files, "all"]:
        counts = Counter(outcome for file, outcome in outcomes if name in (file, "all"))
        judged = counts["killed"] + counts["survived"]
        score = f"{counts['killed'] / judged:.1%}" if judged else "-"
        print(
            f"{name:24} {counts.total():7} {counts['killed']:7} {counts['survived']:9} {counts['timeout']:8}  {score}"
        )


if __name__ == "__main__":
    main()
