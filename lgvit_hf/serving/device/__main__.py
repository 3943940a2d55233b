"""`python -m lgvit_part IMAGE... [--next URL]`, in the folder of a part: answer image files, with the next parts."""

import argparse
import sys
from pathlib import Path

from .loop import probabilities
from .part import Part
from .remote import STATE_DTYPES, RemoteHighway
from .rgb import read_image


def main() -> int:
    """Print one line per image; 2 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m lgvit_part", description="Answer image files with a part.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--next", metavar="URL", help="service of the next part")
    parser.add_argument("--state-dtype", choices=STATE_DTYPES, default="float32", help="sent to it (float32)")
    # copied beside a part, this file stands in a folder in it
    parser.add_argument("--part", default=Path(__file__).resolve().parents[1], help="folder of the part")
    options = parser.parse_args()
    try:
        part = Part(options.part)
        highway = RemoteHighway(part, options.next, state_dtype=options.state_dtype)
        for file in options.images:
            try:
                image = read_image(file)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            answers = highway({"pixel_values": part.pixels(image)[None]})
            label, share = int(answers["logits"][0].argmax()), probabilities(part.info, answers)[0].max()
            note = ", degraded: no deeper part could be reached" if answers["degraded"][0] else ""
            print(f"{file} {part.info.labels[label]} {share:.1%} after {answers['exit_layer'][0]} blocks{note}")
    except (OSError, ValueError) as error:
        print(f"lgvit_part: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
