"""`ORTHighway`: an exported highway in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..serving.device.session import open_session
from .exported import ExportedHighway


class ORTHighway(ExportedHighway):
    """A folder that `export_onnx` wrote, in ONNX Runtime; needs no Optimum. See `ExportedHighway`.

    Example:

        >>> model = ORTHighway.from_pretrained("onnx/", threads=1)  # doctest: +SKIP
        >>> model(pixel_values).exit_layer  # doctest: +SKIP
    """

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> ORTHighway:
        """Open an exported folder; its files must be those that were verified when it was written.

        Args:
            folder (`str` or `Path`): What `export_onnx` or `lgvit export` wrote.
            threads (`int`, *optional*): Of one operator; by default as many as PyTorch uses.
            providers (`Sequence[str]`, *optional*): ONNX Runtime's execution providers.

        Raises:
            ImportError: onnxruntime is not installed.
            OSError: There is no exported highway.
            ValueError: A file is not what the manifest says, or `config.json` is of another highway, or asks for a
                policy that a single file does not hold.
        """
        return cls._opened(folder, "onnxruntime", threads, partial(open_session, providers=providers))
