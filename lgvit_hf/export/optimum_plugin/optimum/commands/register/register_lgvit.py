"""Read by `optimum-cli` whatever the command: those that open models learn of highways, the others pay nothing."""

import sys

REGISTER_COMMANDS = []

if sys.argv[1:2] in (["export"], ["onnxruntime"]):
    import lgvit_hf  # noqa: F401
