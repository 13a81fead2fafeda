"""Codebooks and codes for a weight matrix that is not quantized yet, from what its inputs are like."""

from convert_w4a8.codebooks.integers import w4a16
from convert_w4a8.codebooks.matrix import MatrixStats, quantize_matrices, quantize_matrix
from convert_w4a8.codebooks.method import FAST, FULL, NO_DATA, Method, Tables
from convert_w4a8.codebooks.moments import Curvature, Moment, curvature, mixed_target
from convert_w4a8.codebooks.scaling import awq_exponent

__all__ = [
    "FAST",
    "FULL",
    "NO_DATA",
    "Curvature",
    "MatrixStats",
    "Method",
    "Moment",
    "Tables",
    "awq_exponent",
    "curvature",
    "mixed_target",
    "quantize_matrices",
    "quantize_matrix",
    "w4a16",
]
