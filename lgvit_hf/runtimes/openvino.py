"""`OVHighway`: an exported highway in OpenVINO, on the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .exported import ExportedHighway
from .openvino_session import open_openvino


class OVHighway(ExportedHighway):
    """A folder that `export_onnx` wrote, in OpenVINO; same call and output as `ORTHighway`. See `ExportedHighway`.

    OpenVINO knows no inputs with a default: a single file of `thresholds="optional"` decides by the numbers in it.

    Example:

        >>> model = OVHighway.from_pretrained("onnx/", threads=1)  # doctest: +SKIP
        >>> model(pixel_values).exit_layer  # doctest: +SKIP
    """

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, threads: int | None = None, cache_dir: str | Path | None = None
    ) -> OVHighway:
        """Open an exported folder; its files must be those that were verified when it was written.

        Args:
            folder (`str` or `Path`): What `export_onnx` or `lgvit export` wrote.
            threads (`int`, *optional*): By default as many as PyTorch uses.
            cache_dir (`str` or `Path`, *optional*): Where OpenVINO keeps what it compiles, for a faster next start.

        Raises:
            ImportError: openvino is not installed.
            OSError: There is no exported highway.
            ValueError: A file is not what the manifest says, or `config.json` is of another highway, or asks for a
                policy or numbers that a single file does not take.
        """
        return cls._opened(folder, "openvino", threads, partial(open_openvino, cache_dir=cache_dir))
