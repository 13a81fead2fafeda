"""What each operation of `kernels/` has to offer, whatever it runs on; `devices` says which file of it does."""

from typing import Protocol

import torch

from convert_w4a8.linear import Packing


class Repack(Protocol):
    """Codes from one packing into another."""

    def reorder(self, packed: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Encode and reorder the codes of an [N, K] layer into the kernel's order, int32 [K/32, 4·N]."""

    def restore(self, reordered: torch.Tensor) -> torch.Tensor:
        """Invert `reorder`: int32 [N, K/8], as compressed-tensors packs codes."""

    def to_pack_quantized(self, packed: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Return the codes of another packing as compressed-tensors packs them, int32 [N, K/8]."""


class Codes(Protocol):
    """New codes, scales and table entries for groups of values; `quantization/groups.py` describes these."""

    def gather(
        self, packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return values, counts, importances and letters of groups of 128.

        packed: int32 [n, K/8]. zeros: uint8 [n, K/128]. scales: float32 [n, K/128]. importance: float32 [K].
        """

    def add_energies(
        self, packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, energies: torch.Tensor
    ) -> None:
        """Add the squares of the weights of groups of 128 to `energies`, float64 [K]; arguments as for `gather`."""

    def fit_symmetric(
        self,
        values: torch.Tensor,
        importance: torch.Tensor,
        kept: torch.Tensor,
        candidates: list[float],
        codes: torch.Tensor,
        scales: torch.Tensor,
    ) -> None:
        """Choose symmetric codes uint8 [R, V] and scales float32 [R] for the groups that are not kept, in place."""

    def refit(
        self,
        values: torch.Tensor,
        counts: torch.Tensor,
        importance: torch.Tensor,
        kept: torch.Tensor,
        channel_scale: torch.Tensor,
        codes: torch.Tensor,
        tables: torch.Tensor,
        rounds: int,
    ) -> tuple[float, float]:
        """Fit codes uint8 [R, V] and tables float8_e4m3fn [R, 8] of the groups that are not kept, in place.

        Returns the energy of the values, and that of their difference from what they became, of all groups.
        """

    def spell(self, letters: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the codes uint8 [R, 16] of the letters uint8 [R, 128], eight a word: int32 [R, 16]."""


class Tables(Protocol):
    """FP8 lookup tables."""

    def expand_tables(self, group_scale: torch.Tensor) -> torch.Tensor:
        """Expand group scales float8_e4m3fn [G, N] to tables float8_e4m3fn [G, N, 8]."""


class Gemm(Protocol):
    """Products with a layer in the LUT layout."""

    def gemm(
        self,
        tokens: torch.Tensor,
        token_scale: torch.Tensor,
        packed: torch.Tensor,
        tables: torch.Tensor,
        channel_scale: torch.Tensor,
    ) -> torch.Tensor:
        """Multiply FP8 activations by a layer; bfloat16 [M, N].

        tokens: float8_e4m3fn [M, K]. token_scale: float32 [M, 1]. packed: int32 [K/32, 4·N]; N a multiple of 16, K of
        128. tables: float8_e4m3fn [K/128, N, 8]. channel_scale: float32 [N].

        output[m, n] = token_scale[m] · channel_scale[n] · Σ_k tokens[m, k] · weight[n, k], summed in float32.
        """


class Codebooks(Protocol):
    """Codebooks and codes for R groups of 128 weights; `kernels/codebooks/reference.py` has the formulas.

    Values are in units of the channel scale, float32 [R, 128]; row r has the importances in row r % C of float64
    [C, 128], and the factor or moment r % C of float64 [C, 128, 128]. Entries are float64 [R, 8], codes uint8 [R, 128].
    """

    def fit(self, values: torch.Tensor, importance: torch.Tensor, rounds: int) -> torch.Tensor:
        """Return the entries, not rounded, with the least weighted squared error."""

    def refine(
        self, values: torch.Tensor, importance: torch.Tensor, entries: torch.Tensor, codes: torch.Tensor, passes: int
    ) -> None:
        """Round entries to E4M3 and improve them, in place, and choose the nearest codes."""

    def fit_scale(
        self,
        values: torch.Tensor,
        importance: torch.Tensor,
        scales: torch.Tensor,
        limits: torch.Tensor,
        codes: torch.Tensor,
    ) -> torch.Tensor:
        """Return the entries of the best FP8 scales near `scales`, float32 [R]; choose the nearest codes.

        limits: the least and the largest byte that a scale may have without its sign, uint8 [R, 2].
        """

    def feedback(
        self,
        goal: torch.Tensor,
        start: torch.Tensor,
        factor: torch.Tensor,
        entries: torch.Tensor,
        codes: torch.Tensor,
        errors: torch.Tensor,
    ) -> None:
        """Choose codes one column after the other, each column's error made up for by those after it.

        goal: what to approximate. start: `goal` with the errors of earlier groups made up for. factor: float64
        [C, 128, 128]. errors: what the codes mean less `goal`, float32 [R, 128], filled.
        """

    def descend(
        self,
        goal: torch.Tensor,
        gradient: torch.Tensor,
        moment: torch.Tensor,
        entries: torch.Tensor,
        codes: torch.Tensor,
        errors: torch.Tensor,
        rounds: int,
        free: bool,
    ) -> None:
        """Improve codes, and entries if they are `free`, in place, one at a time, under the second moment.

        gradient: half that of the objective, float32 [R, 128]. moment: float64 [C, 128, 128]. errors: filled as above.
        """


class Activations(Protocol):
    """Quantization of activations per token, alone or with what comes before; see `kernels/activations/reference.py`.

    All return tokens float8_e4m3fn [terms·M, K] and scales float32 [M, 1].
    """

    def quantize(self, x: torch.Tensor, terms: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize bfloat16 [M, K]."""

    def silu_quantize(self, gate_up: torch.Tensor, terms: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize silu(gate) · up of bfloat16 [M, 2·K]."""

    def norm_quantize(
        self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize the RMS norm of bfloat16 [M, K]; weight: bfloat16 [K]."""

    def add_norm_quantize(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize the RMS norm of x + residual; the third result is that sum, bfloat16 [M, K]."""


class Training(Protocol):
    """What training a layer computes beside matrix products; `kernels/training/reference.py` describes these."""

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize bfloat16 [M, K] by token: float8_e4m3fn, the same in bfloat16, scales float32 [M, 1]."""

    def widen(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return numbers of float8_e4m3fn in bfloat16."""

    def scale_outputs(self, sums: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor) -> torch.Tensor:
        """Return bf16(s·(C·sums)), bfloat16 [M, N], of float32 [M, N]; scales float32 [M, 1] and [N]."""

    def scale_gradients(
        self, gradient: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bf16(gradient·C) and bf16(gradient·s) of bfloat16 [M, N]."""

    def look_up(self, entries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return entries float32 [N, G, 8] by codes uint8 [N, K]: bfloat16 [N, K]."""

    def choose(
        self, weights: torch.Tensor, factor: torch.Tensor, entries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes uint8 [N, K] of the values nearest to weights·factor, and these, bfloat16 [N, K]."""

    def sum_by_entry(self, gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the gradient of entries, float32 [N, G, 8], from that of weights, float32 [N, K]."""

    def divergence(
        self, student: torch.Tensor, teacher: torch.Tensor, *, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return KL(teacher ‖ student) of each token, float32 [T], of logits [T, V], and its gradient."""

    def adam(
        self,
        value: torch.Tensor,
        gradient: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        rounded: torch.Tensor | None,
        numbers: torch.Tensor,
    ) -> None:
        """Take a step of Adam, in place."""

    def pull(
        self,
        entries: torch.Tensor,
        start: torch.Tensor,
        step: torch.Tensor,
        known: torch.Tensor,
        second: torch.Tensor,
        part: float,
    ) -> None:
        """Draw entries a part known·part/√second of the way to what they are rounded to, in place."""


class Blocks(Protocol):
    """What blocks compute between their linear layers; `kernels/blocks/reference.py` describes these."""

    def normalize(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `LlamaRMSNorm` does of bfloat16 [M, H], and what x was multiplied by, float32 [M, 1]."""

    def normalize_gradients(
        self, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return its gradients by x, bfloat16 [M, H], and by the weight, float32 [H]."""

    def gate(self, gates: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return silu(gates)·up, bfloat16 [M, H]."""

    def gate_gradients(
        self, gradient: torch.Tensor, gates: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return its gradients by gates and up."""

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
        """Rotate bfloat16 [B, heads, T, D] by angles [B or 1, T, D], or carry a gradient back."""
