"""`ExportedHighway`: an exported highway in any runtime, with the call and the answers of the PyTorch model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from ..configuration import HighwayConfig
from ..engine import Answers, run_all, run_early
from ..evaluation.costs import Costs, Exported
from ..files import add_files
from ..hub.loading import answer_depths
from ..losses import check_labels, task_loss
from ..modeling_highway import HighwayOutput, PolicyHolder, all_exits_output
from ..policies import ExitPolicy, Numbers, build_policy, number_at
from ..segments import Segment, State
from ..serving.device.loop import ANSWERS
from ..serving.device.session import run_segment
from .manifest import MANIFEST, PARAMETERS, Manifest, exits_that_run

OUTPUTS = {
    "single": {*ANSWERS},
    "segments": {"logits"},
    "all_exits": {"logits", "exit_logits"},
}


_Opened = TypeVar("_Opened", bound="ExportedHighway")


class Session(Protocol):
    """One ONNX file, open in a runtime: what is used of `onnxruntime.InferenceSession`."""

    def get_inputs(self) -> list[Any]:
        """Inputs that must be given: `name`, `type` and `shape`."""

    def get_overridable_initializers(self) -> list[Any]:
        """Inputs that may be given."""

    def get_outputs(self) -> list[Any]:
        """Outputs, likewise."""

    def run(self, names: Sequence[str] | None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """These outputs, or all."""


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
            length = 1 if name == "patience" else max(1, num_exits - 1)
            inputs[called] = _spread(getattr(policy, name), length, 0.0)
    return inputs


def _spread(value: Numbers, length: int, default: float) -> np.ndarray:
    return np.array([number_at(value, index, default) for index in range(length)], dtype=np.float32)


class ExportedHighway(PolicyHolder, nn.Module):
    """A folder that `export_onnx` wrote, of any layout, in a runtime.

    It is called and calibrated as the PyTorch model is, and takes its policy from `config.json` as that does. A single
    file keeps its kind of policy and its exits, and takes new numbers, if they are inputs; the other layouts take any.
    Of the layout `segments` each session is a segment, so that the same loop drops exited samples; a head is in one
    file with the blocks before it and is run with them, whether its exit is evaluated or not.

    Args:
        folder (`Path`): What was exported.
        config (`HighwayConfig`): Of the highway.
        manifest (`Manifest`): What `export_onnx` says of its files.
        sessions (`list[Session]`): One, or one per segment.
        exported (`Exported`): What evaluation asks of it.
    """

    # kinds of `thresholds` whose numbers the runtime cannot change
    FIXED: ClassVar[tuple[str, ...]] = ("fixed",)
    main_input_name = "pixel_values"
    # where tensors are taken from and given back
    device = torch.device("cpu")
    # of the pixels that the files take, whatever their precision; those of another are converted
    dtype = torch.float32

    def __init__(
        self, folder: Path, config: HighwayConfig, manifest: Manifest, sessions: list[Session], exported: Exported
    ):
        super().__init__()
        self.folder, self.config, self.manifest = folder, config, manifest
        self.sessions, self.exported = sessions, exported
        self.layout, self.depths = manifest.layout, manifest.depths
        self._checked_policy(config.exit_policy)  # refused when the files are opened, not at the first batch
        self.eval()

    @classmethod
    def _opened(
        cls: type[_Opened], folder: str | Path, runtime: str, threads: int | None, open_file: Callable[..., Session]
    ) -> _Opened:
        """Open a folder whose files `open_file(file, threads)` opens."""
        folder = Path(folder)
        manifest = Manifest.load(folder)
        config = _config_of(folder, manifest)
        threads = torch.get_num_threads() if threads is None else threads
        sessions = _open_sessions(folder, manifest, lambda file: open_file(file, threads))
        heads = manifest.macs["heads"]
        held = {*manifest.exits, len(heads) - 1}
        exported = Exported(
            layout=manifest.layout,
            precision=manifest.precision,
            # heads that are in the files are run whether the policy evaluates their exits or not
            macs=Costs(
                manifest.macs["backbone_costs"],
                [macs if index in held else 0.0 for index, macs in enumerate(heads)],
                fused=True,
            ),
            digest=hashlib.sha256(json.dumps(manifest.files).encode()).hexdigest(),
            file_bytes=sum((folder / name).stat().st_size for name in manifest.files),
            runtime=f"{runtime} {import_module(runtime).__version__}",
            threads=threads,
        )
        return cls(folder, config, manifest, sessions, exported)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the exported files again, beside a `config.json` with the policy that is now in force.

        `infer.py` is left out: it decides by the thresholds inside its file.
        """
        with add_files(folder) as new:
            for name in (*self.manifest.files, MANIFEST):
                shutil.copyfile(self.folder / name, new / name)
            self.config.save_pretrained(new)

    def can_generate(self) -> bool:
        """What a pipeline asks."""
        return False

    def _checked_policy(self, policy: Any) -> ExitPolicy:
        built = super()._checked_policy(policy)
        if self.layout != "single":
            return built
        if self.config.exit_ensemble != self.manifest.ensemble:
            raise ValueError(
                f"exit_ensemble: this file answers with {self.manifest.ensemble}, not with "
                f"{self.config.exit_ensemble}; export it again, or with the layout 'segments' ({self.folder})"
            )
        held = self.manifest.policy["name"]
        if self.manifest.thresholds in self.FIXED and built.to_dict() != self._exported_policy():
            raise ValueError(
                f"exit_policy: {self.exported.runtime.split()[0]} takes no new numbers for this file: its thresholds "
                f"are {self.manifest.thresholds!r}; export it with thresholds='input' (--thresholds) ({self.folder})"
            )
        if built.name != held:
            raise ValueError(
                f"exit_policy: this file decides by {held!r}, not by {built.name!r}; export it again, or with the "
                f"layout 'segments' ({self.folder})"
            )
        if built.differs_by_exit:
            numbers = ("threshold", "temperature")
            ours, theirs = (
                {name: value for name, value in settings.items() if name not in numbers}
                for settings in (built.to_dict(), self._exported_policy())
            )
            if ours != theirs:
                wrong = next(name for name in ours if ours[name] != theirs.get(name))
                raise ValueError(
                    f"exit_policy: {wrong} of {held!r} is in this file, which takes new thresholds and temperatures "
                    f"only; export it again ({self.folder})"
                )
        evaluated = exits_that_run(built, len(self.depths))
        if self.manifest.ensemble is not None and evaluated != self.manifest.exits:
            raise ValueError(
                f"exit_policy: exits {evaluated} would be evaluated, and this file has the ensemble of exits "
                f"{self.manifest.exits}; export it again, or with the layout 'segments' ({self.folder})"
            )
        missing = sorted(set(evaluated) - set(self.manifest.exits))
        if missing:
            raise ValueError(
                f"exit_policy: exit {missing[0]} was skipped when this file was exported and is not in it; "
                f"its exits: {self.manifest.exits} ({self.folder})"
            )
        return built

    def _exported_policy(self) -> dict[str, Any]:
        return build_policy(self.manifest.policy, len(self.depths) - 1).to_dict()

    def segments(self) -> list[Segment]:
        """The highway as a list of segments.

        Of the layout `segments`, each is a session. Of `all_exits`, the first runs everything, and each
        only gives its logits: the same answers, nothing saved.

        Raises:
            ValueError: Of a single file, which decides inside.
        """
        if self.layout == "single":
            raise ValueError(
                "layout 'single' has no segments: it decides inside its file, and does not say what every exit "
                f"answers; export with layout='segments' for that ({self.folder})"
            )
        if self.layout == "segments":
            return [
                Segment(depth, (partial(_advance, session),), itemgetter("logits"))
                for depth, session in zip(self.depths, self.sessions, strict=True)
            ]
        run = (partial(_run_all_exits, self.sessions[0]),)
        return [
            Segment(depth, () if index else run, itemgetter(str(index))) for index, depth in enumerate(self.depths)
        ]

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        early_exit: bool | None = None,
        min_depth: int | None = None,
        max_depth: int | None = None,
        return_dict: bool | None = None,
    ) -> HighwayOutput | tuple:
        """Answer images, as the PyTorch model does in `eval()` mode; there are no `exit_features`.

        Args:
            pixel_values (`Tensor`): `[B, num_channels, H, W]`, from the image processor; any floating dtype.
            labels (`Tensor`, *optional*): `[B]`, for a loss.
            early_exit (`bool`, *optional*, defaults to `True`): Otherwise all exits run; not of a single file.
            min_depth (`int`, *optional*), max_depth (`int`, *optional*):
                See the PyTorch model; not of a single file.
            return_dict (`bool`, *optional*): `False` gives a tuple.

        Raises:
            ValueError: No, an empty or a misshapen batch; a label out of range; something that the layout cannot do.
        """
        pixels = self._checked_batch(pixel_values, labels).detach().to(self.device, self.dtype)
        state, early = State({"pixel_values": pixels.contiguous()}), early_exit is None or early_exit
        bounded = (min_depth, max_depth) != (None, None)
        if self.layout == "single" and (bounded or not early):
            raise ValueError("a single file always exits early, at any depth; export with layout='segments'")
        if bounded and not early:
            raise ValueError("min_depth and max_depth bound early exit; they mean nothing when all exits run")
        labels = None if labels is None else labels.to(self.device)
        if early:
            if self.layout == "single":
                answers = self._run_single(state)
            else:
                segments = self.segments()
                answers = run_early(segments, state, self.answering_policy, min_depth=min_depth, max_depth=max_depth)
            loss = None if labels is None else task_loss(answers.logits, labels, self.config.problem_type)
            output = HighwayOutput(loss=loss, **vars(answers))
        else:
            output = all_exits_output(run_all(self.segments(), state), self.depths[-1], labels, self.config)
        keep_dict = self.config.return_dict if return_dict is None else return_dict
        return output if keep_dict else output.to_tuple()

    def _run_single(self, state: State) -> Answers:
        session, inputs = self.sessions[0], parameter_inputs(self.exit_policy, len(self.depths))
        # what this kind of policy has no use for is no input
        known = {entry.name for entry in (*session.get_inputs(), *session.get_overridable_initializers())}
        feeds = {"pixel_values": state["pixel_values"].numpy()}
        feeds |= {name: numbers for name, numbers in inputs.items() if name in known}
        return Answers(*map(torch.from_numpy, session.run(ANSWERS, feeds)))

    def _checked_batch(self, pixel_values: Tensor | None, labels: Tensor | None) -> Tensor:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        wanted = self.sessions[0].get_inputs()[0].shape[1:]
        if pixel_values.dim() != 4 or list(pixel_values.shape[1:]) != wanted or not len(pixel_values):
            raise ValueError(
                f"pixel_values: shape {tuple(pixel_values.shape)} must be (batch, {', '.join(map(str, wanted))}), "
                "with at least one image"
            )
        if labels is not None:
            check_labels(labels, self.config.num_labels)
        return pixel_values


def _open_sessions(folder: Path, manifest: Manifest, open_file: Callable[[Path], Session]) -> list[Session]:
    """Open the files of an exported folder, in the order in which they run, and check that they fit together.

    Raises:
        ValueError: A file does not open, or does not take what it is given or give what its layout promises.
    """
    sessions: list[Session] = []
    given = {"pixel_values", *(manifest.inputs if manifest.thresholds == "input" else ())}
    for name in manifest.files:
        file = folder / name
        session = open_file(file)
        needed = {entry.name for entry in session.get_inputs()}
        found = {entry.name for entry in session.get_outputs()}
        missing = sorted((needed - given) | (OUTPUTS[manifest.layout] - found))
        if not needed or missing:
            raise ValueError(f"{file} is no {manifest.layout!r} highway: {missing or 'an input'} is missing")
        if not sessions and not _takes_images(session):
            raise ValueError(f"{file}: pixel_values is not (batch, channels, height, width)")
        sessions.append(session)
        given = {entry.removesuffix("_out") for entry in found}
    return sessions


def _takes_images(session: Any) -> bool:
    entry = session.get_inputs()[0]
    sizes = list(entry.shape)[1:]
    return entry.type.startswith("tensor(float") and len(sizes) == 3 and all(isinstance(size, int) for size in sizes)


def _config_of(folder: Path, manifest: Manifest) -> HighwayConfig:
    """The config beside a manifest; it must be of the highway that was exported."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, HighwayConfig):
        raise ValueError(f"{folder / 'config.json'}: model type {config.model_type!r} is no highway")
    depths = answer_depths(config)
    if depths != manifest.depths:
        raise ValueError(
            f"{folder / 'config.json'} is of a highway that answers at depths {depths}, the files beside it at "
            f"{manifest.depths}; export it again"
        )
    return config


def _advance(session: Any, state: State) -> State:
    """The state after a segment, with the logits of its exit."""
    feeds = {name: tensor.contiguous().numpy() for name, tensor in state.tensors.items()}
    return State({name: torch.from_numpy(array) for name, array in run_segment(session, feeds).items()})


def _run_all_exits(session: Any, state: State) -> State:
    """The logits of each exit, by its index."""
    (stacked,) = session.run(["exit_logits"], {"pixel_values": state["pixel_values"].numpy()})
    return State({str(index): logits for index, logits in enumerate(torch.from_numpy(stacked))})
