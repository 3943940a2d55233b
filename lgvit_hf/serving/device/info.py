"""`part.json`: what a part of a split highway is, takes and gives, and by which files; checked when it is read."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from .pixels import PixelSettings

PART_FILE = "part.json"
SCHEMA = 1
# of `part.json`, whose memory may have any shape since 2
PART_SCHEMA = 2
PART_FORMATS = ("onnx", "safetensors")
WEIGHTS = "model.safetensors"
PART_FILES = {"config.json", WEIGHTS}  # of safetensors
# names of a policy's memory in a state, beside the tensors of the highway
MEMORY = "memory."
# in one sample of an array
MAX_NUMBERS = 1 << 28
LEAVES = ("policy", "nobody", "everybody")
_NAME = re.compile(r"[\w.-]{1,100}")
_Described = TypeVar("_Described", bound="Description")


class Array(TypedDict):
    """An array of a message: `shape` is that of one sample; the batch comes first."""

    dtype: str
    shape: list[int]


class Exit(TypedDict):
    """An exit of a part: see `PartInfo.exits`."""

    index: int
    leave: str
    grid: list[int] | None


class Description:
    """A JSON file in a folder that says what the other files are, by their digests; checked when it is read.

    A frozen dataclass derives from it; what the class attributes hold appears in errors.
    """

    FILE = KIND = WRITER = AGAIN = ""
    files: dict[str, str]

    @classmethod
    def load(cls: type[_Described], folder: str | Path) -> _Described:
        """Read a folder's description, and check the files beside it by it.

        Raises:
            OSError: There is none.
            ValueError: It is not what its writer writes, or a file is another than was written.
        """
        folder = Path(folder)
        file = folder / cls.FILE
        if not file.is_file():
            raise OSError(f"{folder}: no {cls.FILE} there, not {cls.KIND}")
        cls._check_link(file)
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            settings.pop("what", None)
            described = cls(**cls._current(settings))
            for name, is_good in described._checks().items():
                if not is_good:
                    raise ValueError(f"{name}={reprlib.repr(getattr(described, name))}")
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{file} is not what {cls.WRITER} writes ({error})") from error
        for name, digest in described.files.items():
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing; {cls.AGAIN}")
            cls._check_link(folder / name)
            if file_digest(folder / name) != digest:
                raise ValueError(f"{folder / name} is not the file that was written; {cls.AGAIN}")
        return described

    @classmethod
    def _check_link(cls, file: Path) -> None:
        """Raise `ValueError` for a link that is not followed."""
        if file.is_symlink():
            raise ValueError(f"{file} is a link, which is not followed; {cls.AGAIN}")

    @classmethod
    def _current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """The fields, as this version calls them."""
        return settings

    def _checks(self) -> dict[str, bool]:
        """Whether each field holds what it should."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PartInfo(Description):
    """What `split` says of a part. Arrays are given by `dtype` and `shape` of one sample; the batch comes first.

    Args:
        model (`str`): SHA-256 of the whole model, its policy and its cuts: parts of one split have the same.
        index (`int`): Which part, from 0.
        parts (`int`): How many there are.
        format (`str`): `onnx` or `safetensors`.
        takes (`dict`), gives (`dict`):
            Arrays by name. The first part takes `pixel_values`; the last gives none. What starts with `memory.` is the
            policy's.
        memory (`dict`): What the policy's memory of a sample starts with, a number or nested lists of any shape.
        depths (`list[int]`): Blocks run before each exit of the whole highway, the final classifier last.
        start (`int`): Of the segments of the whole highway, the first one here.
        exits (`list[dict]`):
            Of this part, in order: `index`, in the whole highway, and which samples exit (`leave`): those that the
            `policy` lets exit, `nobody` (it only answers where no deeper part can be reached) or `everybody`; and the
            `grid` of patches with which the state comes to its segment, if it has one.
        policy (`dict`): With its thresholds and temperatures, of all exits.
        labels (`list[str]`): Classes.
        image (`dict`, *optional*): How `prepare` makes pixels of an image, or nothing if that takes the processor.
        files (`dict[str, str]`): SHA-256 of each file, by name; of `onnx` in the order in which they run.
        versions (`dict[str, str]`), checks (`dict`): Of the packages that wrote it; how close it came to the model.
    """

    FILE = PART_FILE
    KIND = "a part of a split highway"
    WRITER = "`split`"
    AGAIN = "split the model again"

    model: str
    index: int = 0
    parts: int = 1
    format: str
    takes: dict[str, Array]
    gives: dict[str, Array] = field(default_factory=dict)
    memory: dict[str, Any]
    depths: list[int]
    start: int = 0
    exits: list[Exit] = field(default_factory=list)
    policy: dict[str, Any]
    labels: list[str]
    image: PixelSettings | None = None
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> dict[str, Array]:
        """Arrays of the answers to every sample."""
        numbers = {"exit_index": "int64", "exit_layer": "int64", "exit_score": "float32", "degraded": "uint8"}
        return {
            "logits": {"dtype": "float32", "shape": [len(self.labels)]},
            **{name: {"dtype": dtype, "shape": []} for name, dtype in numbers.items()},
        }

    @property
    def words(self) -> dict[str, str]:
        """What a message to this part must say of itself."""
        return {"schema": str(SCHEMA), "model": self.model, "part": str(self.index)}

    def as_json(self) -> dict[str, Any]:
        """What `part.json` holds."""
        return {"what": "lgvit part", "schema": PART_SCHEMA, **asdict(self)}

    @classmethod
    def _current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        schema = settings.pop("schema", None)
        if schema not in range(1, PART_SCHEMA + 1):
            raise ValueError(f"schema={reprlib.repr(schema)}, but this version reads 1 to {PART_SCHEMA}")
        return settings

    def _checks(self) -> dict[str, bool]:
        num_exits = len(self.depths) if are_counts(self.depths) else 0
        num_decisions = len(self.files) - len(self.exits)  # one for all exits, or one for each
        return {
            "model": is_digest(self.model),
            "index": _is_count(self.index) and _is_count(self.parts) and self.index < self.parts,
            "format": self.format in PART_FORMATS,
            "takes": _are_arrays(self.takes) and bool(self.takes),
            "gives": _are_arrays(self.gives) and bool(self.gives) == (self.index < self.parts - 1),
            "memory": isinstance(self.memory, dict) and all(map(_are_numbers, self.memory.values())),
            "depths": num_exits > 0,
            "exits": isinstance(self.exits, list)
            and are_counts([each["index"] for each in self.exits])
            and self.exits[-1]["index"] < num_exits
            and all(
                set(each) == {"index", "leave", "grid"}
                and each["leave"] in LEAVES
                and (each["grid"] is None or all(map(_is_count, each["grid"])))
                for each in self.exits
            ),
            "start": _is_count(self.start) and all(self.start <= each["index"] for each in self.exits),
            "policy": isinstance(self.policy, dict) and isinstance(self.policy.get("name"), str),
            "labels": isinstance(self.labels, list) and bool(self.labels) and all(map(is_text, self.labels)),
            "image": self.image is None or isinstance(self.image, dict),
            "files": are_digests(self.files, _NAME)
            and (num_decisions in (1, len(self.exits)) if self.format == "onnx" else {*self.files} == PART_FILES),
        }


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _are_numbers(value: Any) -> bool:
    """Whether this is a number, or lists of such that are alike."""
    return type(value) in (int, float) or (isinstance(value, list) and all(map(_are_numbers, value)))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def are_counts(values: Any, least: int = 0) -> bool:
    """Whether this is a list of at least one integer, ascending from at least `least`."""
    if not isinstance(values, list) or not values or not all(map(_is_count, values)):
        return False
    return values[0] >= least and values == sorted(set(values))


def is_text(value: Any) -> bool:
    """Whether UTF-8 can write it: half a pair of surrogates is no text."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def is_digest(value: Any) -> bool:
    """Whether this is a SHA-256 as `file_digest` writes it."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def are_digests(files: Any, name: re.Pattern[str]) -> bool:
    """Whether this is a dict of digests by names that match a pattern."""
    return isinstance(files, dict) and all(name.fullmatch(file) and is_digest(files[file]) for file in files)


def _are_arrays(value: Any) -> bool:
    return isinstance(value, dict) and all(
        set(each) == {"dtype", "shape"}
        and each["dtype"] in ("float32", "int64")
        and isinstance(each["shape"], list)
        and all(map(_is_count, each["shape"]))
        and math.prod(each["shape"]) <= MAX_NUMBERS
        for each in value.values()
    )
