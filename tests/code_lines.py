"""Code lines of the package: without blank lines, comments and docstrings.

python tests/code_lines.py               # a line per folder, and the sum
python tests/code_lines.py ../old/lgvit_hf
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "lgvit_hf"
WITHOUT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source):
    """Number of lines that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in WITHOUT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def main(package):
    """Print the sums."""
    sums = Counter()
    for file in package.rglob("*.py"):
        folder = file.relative_to(package).parts[0] if file.parent != package else "."
        sums[folder] += code_lines(file.read_text(encoding="utf-8"))
    for folder, number in sorted(sums.items()):
        print(f"{folder:12} {number:6}")
    print(f"{'all':12} {sum(sums.values()):6}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
