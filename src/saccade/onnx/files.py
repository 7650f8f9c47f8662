"""ONNX files: opened without trusting them, and run by onnxruntime's own operators."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from saccade.errors import SaccadeError

FORMAT, MODEL = "saccade-onnx-1", "model.onnx"


def needed(*libraries: str) -> None:
    """Raises `SaccadeError` that names the extra where a library is not installed."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise SaccadeError(f"ONNX needs {' and '.join(missing)}", hint="pip install 'saccade[onnx]'")


def session(path: Path) -> Any:
    """An onnxruntime session on the CPU, with as many threads as torch has."""
    needed("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
