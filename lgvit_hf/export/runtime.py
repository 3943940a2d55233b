"""`ORTHighway`: an exported highway in ONNX Runtime, with the call and the answers of the PyTorch model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from ..engine import Answers, replay, run_all, run_early
from ..losses import task_loss
from ..modeling_highway import HighwayOutput
from ..policies import ExitPolicy, build_policy
from ..segments import Segment, State
from .parts import PARAMETERS, exits_that_run

LAYOUTS = ("single", "segments", "all_exits")
MANIFEST = "manifest.json"


def parameter_inputs(policy: ExitPolicy, num_exits: int) -> dict[str, np.ndarray]:
    """What the adjustable inputs of a single file hold for a policy, all float32.

    Args:
        policy (`ExitPolicy`): A built-in one.
        num_exits (`int`): The final classifier counted.

    Example:

        >>> from lgvit_hf.policies import ConfidencePolicy
        >>> inputs = parameter_inputs(ConfidencePolicy(threshold=0.5), num_exits=3)
        >>> inputs["exit_thresholds"].tolist(), inputs["exit_temperatures"].tolist()
        ([0.5, 0.5], [1.0, 1.0, 1.0])
    """
    inputs = {"exit_temperatures": _spread(getattr(policy, "temperature", 1.0), num_exits, 1.0)}
    for name, called in PARAMETERS.items():
        if hasattr(policy, name):
            length = 1 if name == "patience" else num_exits - 1
            inputs[called] = _spread(getattr(policy, name), length, 0.0)
    return inputs


def _spread(value: float | Sequence[float], length: int, default: float) -> np.ndarray:
    numbers = [value] * length if isinstance(value, (int, float)) else list(value)
    return np.array([*numbers, *[default] * (length - len(numbers))], dtype=np.float32)


class ORTHighway(nn.Module):
    """A folder that `export_onnx` wrote, of any layout; needs onnxruntime, no Optimum.

    Args:
        folder (`Path`): What was exported.
        config (`PretrainedConfig`): Of the highway.
        manifest (`dict`): What `export_onnx` says of its files.
        sessions (`list[onnxruntime.InferenceSession]`): One, or one per segment.
    """

    main_input_name = "pixel_values"

    def __init__(self, folder: Path, config: PretrainedConfig, manifest: dict[str, Any], sessions: list[Any]):
        super().__init__()
        self.folder, self.config, self.manifest, self.sessions = folder, config, manifest, sessions
        self.layout, self.depths = manifest["layout"], manifest["depths"]
        self.exit_policy = build_policy(manifest["policy"], len(self.depths) - 1)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> ORTHighway:
        """Open an exported folder; its files must be those that were verified when it was written.

        Args:
            folder (`str` or `Path`): What `export_onnx` or `lgvit export` wrote.
            threads (`int`, *optional*): Of one operator; by default as ONNX Runtime chooses.
            providers (`Sequence[str]`, *optional*): ONNX Runtime's execution providers.

        Raises:
            ImportError: onnxruntime is not installed.
            OSError: There is no exported highway.
            ValueError: A file is not what the manifest says.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError('exported models run in ONNX Runtime: pip install "lgvit-hf[onnx]"') from error
        folder = Path(folder)
        manifest = read_export(folder)
        options = onnxruntime.SessionOptions()
        # thresholds are inputs with a default, which it would otherwise warn of
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        names = [name for name in manifest["files"] if name.endswith(".onnx")]
        sessions = [onnxruntime.InferenceSession(folder / name, options, providers=list(providers)) for name in names]
        return cls(folder, AutoConfig.from_pretrained(folder), manifest, sessions)

    @property
    def device(self) -> torch.device:
        """Where tensors are taken from and given back."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the pixels that the model takes."""
        return torch.float16 if "float16" in self.sessions[0].get_inputs()[0].type else torch.float32

    def can_generate(self) -> bool:
        """What a pipeline asks."""
        return False

    def set_exit_policy(self, policy: ExitPolicy | dict[str, Any] | str, **parameters: Any) -> None:
        """Replace the policy. A single file keeps its kind of policy and its exits, and takes new numbers.

        Raises:
            ValueError: Of a single file: another policy than it holds, or an exit that was left out of it.
        """
        if isinstance(policy, str):
            policy = {"name": policy, **parameters}
        built = build_policy(policy, len(self.depths) - 1)
        if self.layout == "single":
            held = self.manifest["policy"]["name"]
            if built.name != held:
                raise ValueError(
                    f"exit_policy: this file decides by {held!r}, not by {built.name!r}; export it again, or with the "
                    "layout 'segments'"
                )
            missing = sorted(set(exits_that_run(built, len(self.depths))) - set(self.manifest["exits"]))
            if missing:
                raise ValueError(
                    f"exit_policy: exit {missing[0]} was switched off when this file was exported and is not in it; "
                    f"its exits: {self.manifest['exits']}"
                )
        self.exit_policy = built

    def segments(self) -> list[Segment]:
        """The highway as a list of segments, each an ONNX Runtime session; of the layout `segments` alone."""
        if self.layout != "segments":
            raise ValueError(f"layout {self.layout!r} has no segments; export with layout='segments'")
        return [
            Segment(depth, (partial(_advance, session),), lambda state: state["logits"])
            for depth, session in zip(self.depths, self.sessions, strict=True)
        ]

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        early_exit: bool = True,
        min_depth: int | None = None,
        max_depth: int | None = None,
        return_dict: bool | None = None,
    ) -> HighwayOutput | tuple:
        """Answer images, as the PyTorch model in `eval()` mode does.

        Args:
            pixel_values (`Tensor`): `[B, num_channels, H, W]`, from the image processor.
            labels (`Tensor`, *optional*): `[B]`, for a loss.
            early_exit (`bool`, *optional*, defaults to `True`): Otherwise all exits run; not of a single file.
            min_depth (`int`, *optional*), max_depth (`int`, *optional*): As of the model; not of a single file.
            return_dict (`bool`, *optional*): `False` gives a tuple.

        Raises:
            ValueError: A misshapen batch, or something that the layout cannot do.
        """
        wanted = [self.sessions[0].get_inputs()[0].shape[dim] for dim in (1, 2, 3)]
        if pixel_values.dim() != 4 or list(pixel_values.shape[1:]) != wanted or not len(pixel_values):
            raise ValueError(
                f"pixel_values: shape {tuple(pixel_values.shape)} must be (batch, {', '.join(map(str, wanted))}), "
                "with at least one image"
            )
        pixel_values = pixel_values.detach().cpu().to(self.dtype)
        bounds = {"min_depth": min_depth, "max_depth": max_depth}
        if self.layout == "single":
            if not early_exit or min_depth is not None or max_depth is not None:
                raise ValueError("a single file always leaves early, at any depth; export with layout='segments'")
            answers, exit_logits = self._run_single(pixel_values), None
        else:
            answers, exit_logits = self._run_exits(pixel_values, early_exit, bounds)
        output = HighwayOutput(
            loss=None if labels is None else task_loss(answers.logits, labels, self.config.problem_type),
            **vars(answers),
            exit_logits=None if early_exit or exit_logits is None else tuple(exit_logits),
        )
        return output.to_tuple() if return_dict is False else output

    def _run_single(self, pixel_values: Tensor) -> Answers:
        feeds = {"pixel_values": pixel_values.numpy(), **parameter_inputs(self.exit_policy, len(self.depths))}
        known = {entry.name for entry in self.sessions[0].get_overridable_initializers()} | {"pixel_values"}
        names = ["logits", "exit_index", "exit_layer", "exit_score"]
        found = self.sessions[0].run(names, {name: value for name, value in feeds.items() if name in known})
        return Answers(*map(torch.from_numpy, found))

    def _run_exits(
        self, pixel_values: Tensor, early_exit: bool, bounds: dict[str, int | None]
    ) -> tuple[Answers, Sequence[Tensor] | None]:
        state = State({"pixel_values": pixel_values})
        if self.layout == "segments" and early_exit:
            return run_early(self.segments(), state, self.exit_policy, **bounds), None
        if self.layout == "segments":
            exit_logits = run_all(self.segments(), state)
        else:
            stacked = self.sessions[0].run(["exit_logits"], {"pixel_values": pixel_values.numpy()})[0]
            exit_logits = list(torch.from_numpy(stacked))
        policy = self.exit_policy if early_exit else build_policy("never", len(self.depths) - 1)
        return replay(exit_logits, self.depths, policy, **bounds), exit_logits


def _advance(session: Any, state: State) -> State:
    """The state behind a segment, with the logits of its exit."""
    feeds = {entry.name: state[entry.name].contiguous().numpy() for entry in session.get_inputs()}
    found = session.run(None, feeds)
    names = [entry.name.removesuffix("_out") for entry in session.get_outputs()]
    return State(dict(zip(names, map(torch.from_numpy, found), strict=True)))


def read_export(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder, its files checked."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, layout = manifest["files"], manifest["layout"]
    except FileNotFoundError as error:
        raise OSError(f"{folder}: no {MANIFEST} there, not an exported highway") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is not what `lgvit export` writes ({error})") from error
    if layout not in LAYOUTS:
        raise ValueError(f"{folder / MANIFEST}: layout {layout!r} is none of {', '.join(LAYOUTS)}")
    for name, digest in files.items():
        if Path(name).name != name:
            raise ValueError(f"{folder / MANIFEST}: {name!r} is not a file of that folder")
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise ValueError(f"{folder / name} is missing or not the file that was exported; export it again")
    return manifest


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
