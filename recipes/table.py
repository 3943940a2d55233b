"""Write the table of `recipes/README.md` from the files in `recipes/configs/`.

python recipes/table.py          # rewrite it
python recipes/table.py --check  # exit code 1 where it is out of date
"""

import sys
from pathlib import Path

import yaml

HOME = Path(__file__).parent
BEGIN, END = "<!-- made by recipes/table.py -->", "<!-- end -->"


def rows():
    """One line of Markdown per file: what its first comment says, and its settings."""
    yield "| recipe | what it is | stage | exits | strategy | policy | epochs |"
    yield "|---|---|---|---|---|---|---|"
    for file in sorted((HOME / "configs").glob("*/*.yaml")):
        text = file.read_text(encoding="utf-8")
        settings, name = yaml.safe_load(text), file.relative_to(HOME / "configs")
        what = text.splitlines()[0].removeprefix("# ")
        heads, positions = settings.get("exit_types"), settings.get("exit_positions")
        exits = "-" if positions is None else f"{_said(heads)} after {_said(positions)}"
        policy = settings.get("exit_policy") or {}
        said = ", ".join(f"{key} {value}" for key, value in policy.items() if key != "name")
        yield (
            f"| [`{name}`](configs/{name}) | {what} | {settings.get('stage', 1)} | {exits} "
            f"| {settings.get('strategy', '-')} | {policy.get('name', '-')} {said} | {settings['epochs']} |"
        )


def _said(value):
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def readme():
    """The README as it should be."""
    text = (HOME / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return "\n".join([f"{before}{BEGIN}", *rows(), f"{END}{after}"])


if __name__ == "__main__":
    wanted = readme()
    if "--check" in sys.argv:
        sys.exit(int(wanted != (HOME / "README.md").read_text(encoding="utf-8")))
    (HOME / "README.md").write_text(wanted, encoding="utf-8")
