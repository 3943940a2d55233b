"""Early exits for Vision Transformers, as an extension of Hugging Face transformers.

Importing this package registers its model types (`vit_highway`, `dinov2_highway`, `avit`, ...) with transformers' Auto
classes and does nothing else; every public name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import auto

if TYPE_CHECKING:
    from .configuration_avit import AViTConfig
    from .configuration_sequence import (
        BeitHighwayConfig,
        CLIPHighwayConfig,
        DeiTHighwayConfig,
        Dinov2HighwayConfig,
        Dinov2WithRegistersHighwayConfig,
        Dinov3ViTHighwayConfig,
        IJepaHighwayConfig,
        SiglipHighwayConfig,
        ViTHighwayConfig,
        ViTMSNHighwayConfig,
    )
    from .configuration_swin import SwinHighwayConfig
    from .configuration_wrapper import HighwayWrapperConfig
    from .data.datasets import load_images, load_unlabelled
    from .data.processing import ProcessedImages, make_processor
    from .engine import run_all, run_early
    from .evaluation.benchmark import benchmark
    from .evaluation.calibration import calibrate
    from .evaluation.calibration_report import Calibration
    from .evaluation.cost_table import CostTable
    from .evaluation.drift import DriftMonitor, load_baseline
    from .evaluation.ensemble_fitting import fit_ensemble
    from .evaluation.evaluate_metric import HighwayMetric
    from .evaluation.exit_table import ExitTable, collect
    from .evaluation.gate_fitting import fit_gate
    from .evaluation.report import evaluate
    from .exit_settings import Exit
    from .export.onnx_export import export_onnx
    from .heads import HEADS, register_head
    from .hub.loading import AutoHighway
    from .modeling_avit import AViT, AViTForImageClassification, AViTOutput
    from .modeling_beit import BeitHighway, BeitHighwayForImageClassification
    from .modeling_clip import CLIPHighway, CLIPHighwayForImageClassification
    from .modeling_deit import DeiTHighway, DeiTHighwayForImageClassification
    from .modeling_dinov2 import Dinov2Highway, Dinov2HighwayForImageClassification
    from .modeling_dinov2_with_registers import (
        Dinov2WithRegistersHighway,
        Dinov2WithRegistersHighwayForImageClassification,
    )
    from .modeling_dinov3_vit import Dinov3ViTHighway, Dinov3ViTHighwayForImageClassification
    from .modeling_highway import HighwayOutput
    from .modeling_ijepa import IJepaHighway, IJepaHighwayForImageClassification
    from .modeling_siglip import SiglipHighway, SiglipHighwayForImageClassification
    from .modeling_swin import SwinHighway, SwinHighwayForImageClassification
    from .modeling_vit import ViTHighway, ViTHighwayForImageClassification
    from .modeling_vit_msn import ViTMSNHighway, ViTMSNHighwayForImageClassification
    from .policies import POLICIES, ExitPolicy, build_policy, register_policy
    from .runtimes.onnxruntime import ORTHighway
    from .runtimes.openvino import OVHighway
    from .segments import Segment, State, Tokens
    from .serving.device.remote import RemoteHighway
    from .serving.open_part import open_part
    from .serving.predictor import Predictor
    from .token_halting import token_macs
    from .training.arguments import HighwayTrainingArguments
    from .training.avit_trainer import AViTTrainer
    from .training.distill_exits import grow
    from .training.recipe import train_recipe
    from .training.shorten import shorten
    from .training.trainer import DistillationTrainer, HighwayTrainer
    from .wrapper import HighwayWrapper

__version__ = "0.1.0"

_HOMES = {
    "configuration_sequence": (
        "ViTHighwayConfig",
        "DeiTHighwayConfig",
        "BeitHighwayConfig",
        "CLIPHighwayConfig",
        "Dinov2HighwayConfig",
        "Dinov2WithRegistersHighwayConfig",
        "Dinov3ViTHighwayConfig",
        "SiglipHighwayConfig",
        "ViTMSNHighwayConfig",
        "IJepaHighwayConfig",
    ),
    "configuration_swin": ("SwinHighwayConfig",),
    "configuration_avit": ("AViTConfig",),
    "configuration_wrapper": ("HighwayWrapperConfig",),
    "data.datasets": ("load_images", "load_unlabelled"),
    "engine": ("run_all", "run_early"),
    "evaluation.benchmark": ("benchmark",),
    "evaluation.calibration": ("calibrate",),
    "evaluation.calibration_report": ("Calibration",),
    "evaluation.cost_table": ("CostTable",),
    "evaluation.drift": ("DriftMonitor", "load_baseline"),
    "evaluation.evaluate_metric": ("HighwayMetric",),
    "evaluation.ensemble_fitting": ("fit_ensemble",),
    "evaluation.gate_fitting": ("fit_gate",),
    "evaluation.report": ("evaluate",),
    "evaluation.exit_table": ("ExitTable", "collect"),
    "exit_settings": ("Exit",),
    "export.onnx_export": ("export_onnx",),
    "runtimes.onnxruntime": ("ORTHighway",),
    "runtimes.openvino": ("OVHighway",),
    "training.distill_exits": ("grow",),
    "training.shorten": ("shorten",),
    "token_halting": ("token_macs",),
    "hub.loading": ("AutoHighway",),
    "heads": ("HEADS", "register_head"),
    "modeling_avit": ("AViT", "AViTForImageClassification", "AViTOutput"),
    "modeling_vit": ("ViTHighway", "ViTHighwayForImageClassification"),
    "modeling_deit": ("DeiTHighway", "DeiTHighwayForImageClassification"),
    "modeling_beit": ("BeitHighway", "BeitHighwayForImageClassification"),
    "modeling_clip": ("CLIPHighway", "CLIPHighwayForImageClassification"),
    "modeling_dinov2": ("Dinov2Highway", "Dinov2HighwayForImageClassification"),
    "modeling_dinov2_with_registers": (
        "Dinov2WithRegistersHighway",
        "Dinov2WithRegistersHighwayForImageClassification",
    ),
    "modeling_dinov3_vit": ("Dinov3ViTHighway", "Dinov3ViTHighwayForImageClassification"),
    "modeling_vit_msn": ("ViTMSNHighway", "ViTMSNHighwayForImageClassification"),
    "modeling_ijepa": ("IJepaHighway", "IJepaHighwayForImageClassification"),
    "modeling_siglip": ("SiglipHighway", "SiglipHighwayForImageClassification"),
    "modeling_swin": ("SwinHighway", "SwinHighwayForImageClassification"),
    "modeling_highway": ("HighwayOutput",),
    "policies": ("POLICIES", "ExitPolicy", "build_policy", "register_policy"),
    "data.processing": ("ProcessedImages", "make_processor"),
    "segments": ("Segment", "State", "Tokens"),
    "training.recipe": ("train_recipe",),
    "serving.device.remote": ("RemoteHighway",),
    "serving.open_part": ("open_part",),
    "serving.predictor": ("Predictor",),
    "training.arguments": ("HighwayTrainingArguments",),
    "training.avit_trainer": ("AViTTrainer",),
    "training.trainer": ("HighwayTrainer", "DistillationTrainer"),
    "wrapper": ("HighwayWrapper",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = list(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


auto.register()
