"""The manifest of an exported folder: what its files are, by which they are known to be those that were verified."""

from __future__ import annotations

import json
import re
import reprlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..files import leads_out, write_json
from ..hub.report_keys import current_names
from ..policies import ExitPolicy
from ..serving.device.info import file_digest, is_digest

LAYOUTS = ("single", "segments", "all_exits")
PRECISIONS = ("float32", "float16", "int8")
MANIFEST = "manifest.json"
_FILE = re.compile(r"\w[\w.-]*\.onnx")


# fields of a policy that stay adjustable in the exported file, and what their inputs are called there
PARAMETERS = {
    "threshold": "exit_thresholds",
    "entropy_threshold": "exit_entropy_thresholds",
    "patience": "exit_patience",
}


def exits_that_run(policy: ExitPolicy, num_exits: int) -> list[int]:
    """Indices of the exits that a policy asks, the one that answers what is left included.

    Args:
        policy (`ExitPolicy`): A built-in one.
        num_exits (`int`): The final classifier counted.
    """
    if policy.name == "fixed":
        return [policy.exit_index]
    return [index for index in range(num_exits - 1) if not policy.skips(index)] + [num_exits - 1]


@dataclass(frozen=True)
class Manifest:
    """What `export_onnx` says of the folder it wrote.

    Args:
        layout (`str`): One of `LAYOUTS`.
        precision (`str`): One of `PRECISIONS`.
        files (`dict[str, str]`): SHA-256 of each ONNX file, by name, in the order in which they run.
        depths (`list[int]`): Blocks run before each exit of the whole highway, the final classifier last.
        exits (`list[int]`): Indices of the exits that are in the files.
        policy (`dict`): The exit policy as exported; a single file decides by a policy of this name.
        macs (`dict[str, list[float]]`): `backbone_costs` and `heads` of the highway, MACs of one image.
        versions (`dict[str, str]`): Of the packages that wrote it.
        checks (`dict`): What was run against PyTorch, and how close it came.
    """

    layout: str
    precision: str
    files: dict[str, str]
    depths: list[int]
    exits: list[int]
    policy: dict[str, Any]
    macs: dict[str, list[float]]
    versions: dict[str, str]
    checks: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write it to a folder."""
        write_json(folder / MANIFEST, {"what": "lgvit export", **asdict(self)})

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read the manifest of an exported folder, and check the folder's files by it.

        Nothing outside the folder is read: links that lead out of it are refused, but for those of the Hub's cache.

        Raises:
            OSError: There is none.
            ValueError: It is not what `export_onnx` writes, or a file is not the one that was exported.
        """
        folder = Path(folder)
        file = folder / MANIFEST
        if not file.is_file():
            raise OSError(f"{folder}: no {MANIFEST} there, not an exported highway")
        _check_link(file)
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            manifest = cls(**{name: value for name, value in settings.items() if name != "what"})
            manifest = replace(manifest, macs=current_names(manifest.macs))
            manifest._check()
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} is not what `lgvit export` writes ({error})") from error
        for name, digest in manifest.files.items():
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing; export it again")
            _check_link(folder / name)
            if file_digest(folder / name) != digest:
                raise ValueError(f"{folder / name} is not the file that was exported; export it again")
        return manifest

    def _check(self) -> None:
        """Raise `ValueError` for a field that does not hold what it should."""
        num_exits, files = len(self.depths) if _are_counts(self.depths, 1) else 0, self.files
        lengths = {"single": 1, "all_exits": 1, "segments": num_exits}
        good = {
            "layout": self.layout in LAYOUTS,
            "precision": self.precision in PRECISIONS,
            "depths": num_exits > 0,
            "files": isinstance(files, dict)
            and len(files) == lengths.get(str(self.layout))
            and all(_FILE.fullmatch(name) and is_digest(digest) for name, digest in files.items()),
            "exits": _are_counts(self.exits, 0) and self.exits[-1] < num_exits,
            "policy": isinstance(self.policy, dict) and isinstance(self.policy.get("name"), str),
            "macs": isinstance(self.macs, dict)
            and set(self.macs) == {"backbone_costs", "heads"}
            and all(_are_numbers(numbers, num_exits) for numbers in self.macs.values()),
            "versions": isinstance(self.versions, dict),
            "checks": isinstance(self.checks, dict),
        }
        for name, is_good in good.items():
            if not is_good:
                raise ValueError(f"{name}={reprlib.repr(getattr(self, name))}")


def _are_counts(values: Any, least: int) -> bool:
    """Whether this is a list of ascending integers."""
    if not isinstance(values, list) or not values or not all(type(value) is int for value in values):
        return False
    return values[0] >= least and all(before < after for before, after in zip(values, values[1:], strict=False))


def _are_numbers(values: Any, length: int) -> bool:
    return isinstance(values, list) and len(values) == length and all(type(value) in (int, float) for value in values)


def _check_link(file: Path) -> None:
    if leads_out(file):
        raise ValueError(f"{file} is a link out of its folder, which is not followed")
