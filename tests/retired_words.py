"""Words that the code and the pages no longer use, and what they say instead: CONTRIBUTING.md, "Words".

    python tests/retired_words.py

Prints each place; the exit code is 1 where there is one. A line that must hold such a word (a key that is already on
disk, an old name that still works) says so by "old name" in a comment.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RETIRED = {
    r"\bAs of `": "See `",
    r"\b[Ss]ureness\b": "confidence",
    r"\b[Tt]runks?\b": "backbone",
    r"\b[Ss]urvivors?\b": "samples that have not exited",
    r"\brows? (that |which )?(leave|leaves|left|stay|stays|survive|go on)\b": "samples that exit, go on",
    r"\b(rows?|samples?|images?) (that|which) (are|is) (not )?sure\b": "samples that (do not) exit early",
    r"\b(leave|leaves|leaving|left) early\b": "exits early, early exit",
    r"\b(nobody|everybody|who) (leaves|stays|is left|has left)\b": "no sample exits, all samples exit",
    r"\bexits? (that )?(is|are|be) (not )?asked\b|\basked exits?\b": "evaluated / skipped exits",
    r"\b(exits?|heads?) (that )?(is|are|be)?\s?switched off\b": "skipped exits",
    r"\bright there\b": "accuracy of exited samples",
    r"\bright of all\b": "accuracy of this exit on all samples",
    r"\b(behind|below|above) (the )?(exit|block)s?\b": "after / before, deeper / shallower than",
    r"\b[Tt]he one wait\b": "host sync",
    r"\bSEED_NAMES\b": "LEGACY_ALIASES",
    r"\bkeeps_nan\b": "nan_never_exits",
    r"\b(house|room)s?\b": "package, module",
}
READS_OLD_NAMES = "report_keys.py"
PLACES = ("lgvit_hf/**/*.py", "recipes/**/*.py", "docs/**/*.md", "README.md", "CONTRIBUTING.md")


def found():
    """`path:line: word -> what to say` of each place."""
    for pattern in PLACES:
        for file in sorted(ROOT.glob(pattern)):
            if file.name == READS_OLD_NAMES:
                continue
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                if "old name" in line or "DeprecationWarning" in line:
                    continue
                for word, instead in RETIRED.items():
                    if match := re.search(word, line):
                        yield f"{file.relative_to(ROOT)}:{number}: {match[0]!r}: say {instead}"


if __name__ == "__main__":
    places = list(found())
    print("\n".join(places) or "no retired word")
    sys.exit(bool(places))
