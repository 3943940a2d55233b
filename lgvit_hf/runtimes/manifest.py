"""The manifest of an exported folder: what its files are, by which they are known to be those that were verified."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import leads_out, write_json
from ..hub.report_keys import current_names
from ..policies import ExitPolicy, FixedPolicy
from ..serving.device.info import Description, are_counts, are_digests, is_digest
from ..serving.device.pixels import PixelSettings

LAYOUTS = ("single", "segments", "all_exits")
PRECISIONS = ("float32", "float16", "int8", "int8-static")
QUANTIZED = ("int8", "int8-static")
THRESHOLDS = ("optional", "input", "fixed")
MANIFEST = "manifest.json"
_FILE = re.compile(r"\w[\w.-]*\.onnx")


# fields of a policy that stay adjustable in the exported file, and what their inputs are called there
PARAMETERS = {
    "threshold": "exit_thresholds",
    "entropy_threshold": "exit_entropy_thresholds",
    "patience": "exit_patience",
}


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds an exported highway: ONNX files and their manifest."""
    return (Path(folder) / MANIFEST).is_file() and any(Path(folder).glob("*.onnx"))


def exits_that_run(policy: ExitPolicy, num_exits: int) -> list[int]:
    """Indices of the exits that a policy evaluates, the one that answers all remaining samples included.

    Args:
        policy (`ExitPolicy`): A built-in one.
        num_exits (`int`): The final classifier counted.
    """
    if isinstance(policy, FixedPolicy):
        return [policy.exit_index]
    return [index for index in range(num_exits - 1) if not policy.skips(index)] + [num_exits - 1]


@dataclass(frozen=True)
class Manifest(Description):
    """What `export_onnx` says of the folder it wrote; nothing outside the folder is read.

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
        ensemble (`dict`, *optional*): The `exit_ensemble` as exported; a single file answers with this one.
        thresholds (`str`): One of `THRESHOLDS`: inputs of a single file that may be given, must be, or are none.
        inputs (`dict[str, list[float]]`): Of a single file, these inputs with the policy's numbers.
        image (`dict`, *optional*):
            How `prepare` makes pixels of an image, tried against the image processor; nothing where that does more.
        weights (`str`, *optional*):
            Digest of the model's weights, where the files answer as it does, so that its calibration is theirs.
    """

    FILE = MANIFEST
    KIND = "an exported highway"
    WRITER = "`lgvit export`"
    AGAIN = "export it again"

    layout: str
    precision: str
    files: dict[str, str]
    depths: list[int]
    exits: list[int]
    policy: dict[str, Any]
    macs: dict[str, list[float]]
    versions: dict[str, str]
    checks: dict[str, Any]
    ensemble: dict[str, Any] | None = None
    thresholds: str = "optional"
    inputs: dict[str, list[float]] = field(default_factory=dict)
    image: PixelSettings | None = None
    weights: str | None = None

    @property
    def digest(self) -> str:
        """A SHA-256 of the files."""
        return hashlib.sha256(json.dumps(self.files).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write it to a folder."""
        write_json(folder / MANIFEST, {"what": "lgvit export", **asdict(self)})

    @classmethod
    def _check_link(cls, file: Path) -> None:
        """A link that leads out of the folder is refused, but for those of the Hub's cache."""
        if leads_out(file):
            raise ValueError(f"{file} is a link out of its folder, which is not followed")

    @classmethod
    def _current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        macs = settings.get("macs")
        return {**settings, "macs": current_names(macs)} if isinstance(macs, dict) else settings

    def _checks(self) -> dict[str, bool]:
        num_exits = len(self.depths) if are_counts(self.depths, 1) else 0
        lengths = {"single": 1, "all_exits": 1, "segments": num_exits}
        return {
            "layout": self.layout in LAYOUTS,
            "precision": self.precision in PRECISIONS,
            "depths": num_exits > 0,
            "files": are_digests(self.files, _FILE) and len(self.files) == lengths.get(str(self.layout)),
            "exits": are_counts(self.exits) and self.exits[-1] < num_exits,
            "policy": isinstance(self.policy, dict) and isinstance(self.policy.get("name"), str),
            "macs": isinstance(self.macs, dict)
            and set(self.macs) == {"backbone_costs", "heads"}
            and all(isinstance(numbers, list) and len(numbers) == num_exits for numbers in self.macs.values())
            and {type(number) for numbers in self.macs.values() for number in numbers} <= {int, float},
            "versions": isinstance(self.versions, dict),
            "checks": isinstance(self.checks, dict),
            "ensemble": self.ensemble is None
            or (isinstance(self.ensemble, dict) and set(self.ensemble) == {"weights", "bias"}),
            "thresholds": self.thresholds in THRESHOLDS,
            "image": self.image is None
            or (isinstance(self.image, dict) and set(self.image) == set(PixelSettings.__annotations__)),
            "weights": self.weights is None or is_digest(self.weights),
            "inputs": isinstance(self.inputs, dict)
            and all(isinstance(numbers, list) for numbers in self.inputs.values())
            and {type(number) for numbers in self.inputs.values() for number in numbers} <= {int, float},
        }
