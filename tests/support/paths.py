"""Where things are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
DATA = ROOT / "tests" / "data"
GOLDEN_CUT = DATA / "vllm_w4a8_dense_cut.safetensors"
"""Part of vLLM's golden vectors, small enough to be kept here."""
SHARED = ROOT.parent / "shared"
"""Golden vectors and real checkpoints, in a directory beside the repository. It may be absent."""
