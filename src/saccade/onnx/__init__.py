"""ONNX: encoders of ours written for any runtime, files of others read, and int8 that keeps the neighbours."""

from __future__ import annotations

from saccade.onnx.int8 import quantise as quantise
from saccade.onnx.writing import check as check
from saccade.onnx.writing import write as write
