"""A weight matrix → as the W4A8 kernel takes it, with the least error in its outputs that was found."""

from dataclasses import dataclass

import torch

from convert_w4a8 import devices
from convert_w4a8.codebooks.curvature import Curvature, curvature
from convert_w4a8.codebooks.method import Method, Tables
from convert_w4a8.codebooks.start import Start, choose_start
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.fp8 import CODE_MAX, E4M3
from convert_w4a8.linear import GROUP_SIZE, Packing, W4A8Linear
from convert_w4a8.quantization.codes import SCALE_CANDIDATES
from convert_w4a8.quantization.error import sqnr_db
from convert_w4a8.threads import side_by_side

_ROWS = 128
"""Output channels that are worked at a time on a CPU: what they give does not depend on the number of threads."""
_INNER = 2
"""Rounds of descent on a group before the next."""
_LLOYD = 8
"""Rounds of Lloyd's algorithm before entries are rounded; it ends by itself where nothing moves."""


@dataclass(frozen=True)
class MatrixStats:
    """What quantization did to a matrix.

    signal, noise: what a token's outputs have of the target's energy, and of the difference from them, Σ_n w·H·wᵀ.
    weight_signal, weight_noise: the same of the weights themselves.
    damping: what was added to the second moment's diagonal.
    """

    signal: float
    noise: float
    weight_signal: float
    weight_noise: float
    damping: float

    @property
    def relative_error(self) -> float:
        """Noise over signal in the outputs."""
        return self.noise / self.signal if self.signal else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal over noise in the outputs, in dB."""
        return sqnr_db(self.signal, self.noise)


Moment = Curvature | torch.Tensor | None
"""What is known of a layer's inputs: H = E[x xᵀ] [K, K], factored or not; their energies [K]; or nothing."""


def quantize_matrix(
    weight: torch.Tensor,
    moment: Moment,
    method: Method,
    target: torch.Tensor | None = None,
    *,
    stock: bool = False,
) -> tuple[W4A8Linear, MatrixStats]:
    """Choose codes, tables and channel scales for a matrix; on the device that it is on.

    weight: bfloat16, float16 or float32 [N, K], K a multiple of 128. target: what to approximate instead, float32
    [N, K]. stock: the FP8 step is left to vLLM's load-time path, so `source_scale` is set, as `to_w4a8` does.
    The same bytes on any number of threads. Raises ValueError where a number is not finite, where shapes do not fit,
    where the method needs a second moment that there is not, and for free tables with `stock`.
    """
    goal = weight if target is None else target
    ready = _check(goal, moment, method, stock)
    n, k = goal.shape
    start = choose_start(goal, _importance(ready, k, goal.device), method, stock=stock)
    work = _Work(goal, ready, method, start)
    rows = _ROWS if goal.device.type == "cpu" else n
    parts = [slice(row, min(n, row + rows)) for row in range(0, n, rows)]
    side_by_side(work.do, parts)
    return work.result()


def _check(goal: torch.Tensor, moment: Moment, method: Method, stock: bool) -> Curvature | torch.Tensor | None:
    """Return what is known of the inputs as it is needed."""
    n, k = goal.shape
    if k % GROUP_SIZE:
        raise ValueError(f"K = {k} is not a multiple of {GROUP_SIZE}")
    if stock and method.tables is Tables.FREE:
        raise ValueError("stock vLLM cannot load tables that are not multiples of a scale")
    if not all(bool(torch.isfinite(part.sum(dtype=torch.float64))) for part in goal.split(_ROWS)):
        bad = n * k - int(torch.isfinite(goal).sum())
        raise ValueError(f"{bad} of {n * k} weights are not finite")
    size = None if moment is None else len(moment.importance if isinstance(moment, Curvature) else moment)
    if size is not None and size != k:
        raise ValueError(f"the statistics are of {size} inputs, the matrix has {k}")
    is_full = isinstance(moment, Curvature) or (moment is not None and moment.dim() == 2)
    if not is_full and (method.feedback or method.sweeps):
        raise ValueError("error feedback and descent need the second moment of the inputs")
    if isinstance(moment, torch.Tensor):
        if method.feedback or method.sweeps:
            return curvature(moment, method.damping)
        energies = (moment.diagonal() if is_full else moment).double()
        if not bool(torch.isfinite(energies).all()) or bool((energies < 0).any()):
            raise ValueError("the energies of the inputs are not finite, or negative")
        return energies
    return moment


_FLOOR = 1e-3
"""Inputs that were hardly ever seen count so much of the mean: they may be seen later."""


def _importance(ready: Curvature | torch.Tensor | None, k: int, device: torch.device) -> torch.Tensor:
    """Return what a squared error in each column counts, float64 [K], with a mean of 1."""
    if ready is None:
        return torch.ones(k, dtype=torch.float64, device=device)
    shares = ready.importance if isinstance(ready, Curvature) else ready
    mean = float(shares.cpu().mean())
    if not mean > 0:
        return torch.ones(k, dtype=torch.float64, device=device)
    return (shares / mean).clamp(min=_FLOOR).to(device)


class _Work:
    """A matrix on its way: what every block of output channels reads, and where it writes."""

    def __init__(self, goal: torch.Tensor, ready: Curvature | torch.Tensor | None, method: Method, start: Start) -> None:
        n, k = goal.shape
        device = goal.device
        self._goal, self._method, self._start = goal, method, start
        self._moment = ready if isinstance(ready, Curvature) else None
        self._energies = ready if isinstance(ready, torch.Tensor) else torch.ones(k, device=device).double()
        self._importance = _importance(ready, k, device).view(-1, GROUP_SIZE)
        self._kernels = devices.codebooks(device)
        self._codes = torch.empty(n, k, dtype=torch.uint8, device=device)
        self._entries = torch.empty(k // GROUP_SIZE, n, CODE_MAX, dtype=torch.float32, device=device)
        self._sums = torch.zeros(4, n, dtype=torch.float64, device=device)

    def do(self, rows: slice) -> None:
        """Quantize some output channels."""
        channel = self._start.channel_scale[rows]
        goal = self._goal[rows].float() / channel[:, None]
        errors = torch.empty_like(goal)
        method, moment = self._method, self._moment
        if method.feedback and moment is not None:
            self._feed_back(rows, goal, errors, moment)
        else:
            self._nearest(rows, goal, errors)
        if moment is not None:
            for _ in range(method.sweeps):
                self._descend(rows, goal, errors, moment)
        unit = channel.double().square()
        for i, part in enumerate((goal, errors)):
            self._sums[i, rows] = self._energy(part) * unit
            self._sums[2 + i, rows] = part.square().sum(1, dtype=torch.float64) * unit

    def _tables(self, values: torch.Tensor, importance: torch.Tensor, rows: slice, g: slice, codes: torch.Tensor) -> torch.Tensor:
        """Choose tables for groups of these values [R, 128], in the order [n, groups]; and their nearest codes."""
        if self._method.tables is Tables.FREE:
            entries = self._kernels.fit(values, importance, _LLOYD)
            self._kernels.refine(values, importance, entries, codes, self._method.passes)
            return entries
        scales = torch.empty(len(values), device=values.device)
        shares = importance.float().repeat(len(values) // len(importance), 1)
        kept = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        devices.codes(values.device).fit_symmetric(values, shares, kept, SCALE_CANDIDATES, codes, scales)
        limits = self._start.limits(rows, g)
        return self._kernels.fit_scale(values, importance, scales, limits, codes)

    def _nearest(self, rows: slice, goal: torch.Tensor, errors: torch.Tensor) -> None:
        n, k = goal.shape
        values = goal.view(-1, GROUP_SIZE)
        codes = torch.empty_like(values, dtype=torch.uint8)
        entries = self._tables(values, self._importance, rows, slice(0, k // GROUP_SIZE), codes)
        self._codes[rows] = codes.view(n, k)
        self._entries[:, rows] = entries.view(n, -1, CODE_MAX).transpose(0, 1).float()
        torch.sub(_values(entries, codes).view(n, k), goal, out=errors)

    def _feed_back(self, rows: slice, goal: torch.Tensor, errors: torch.Tensor, moment: Curvature) -> None:
        n, k = goal.shape
        for g in range(k // GROUP_SIZE):
            s = slice(g * GROUP_SIZE, (g + 1) * GROUP_SIZE)
            part = goal[:, s].contiguous()
            start = part - errors[:, : s.start] @ moment.factor[: s.start, s]
            codes, error = torch.empty(n, GROUP_SIZE, dtype=torch.uint8, device=goal.device), torch.empty_like(part)
            entries = self._tables(start, self._importance[g : g + 1], rows, slice(g, g + 1), codes)
            self._kernels.feedback(part, start, moment.factor[s, s].double().contiguous(), entries, codes, error)
            errors[:, s], self._codes[rows, s], self._entries[g, rows] = error, codes, entries.float()

    def _descend(self, rows: slice, goal: torch.Tensor, errors: torch.Tensor, moment: Curvature) -> None:
        n, k = goal.shape
        free = self._method.tables is Tables.FREE
        for g in range(k // GROUP_SIZE):
            s = slice(g * GROUP_SIZE, (g + 1) * GROUP_SIZE)
            gradient = errors @ moment.moment[:, s]
            gradient.add_(errors[:, s], alpha=moment.damping)
            block = moment.moment[s, s].double()
            block.diagonal().add_(moment.damping)
            entries, codes = self._entries[g, rows].double(), self._codes[rows, s].contiguous()
            error = torch.empty(n, GROUP_SIZE, device=goal.device)
            self._kernels.descend(
                goal[:, s].contiguous(), gradient, block.contiguous(), entries, codes, error, _INNER, free
            )
            errors[:, s], self._codes[rows, s], self._entries[g, rows] = error, codes, entries.float()

    def _energy(self, part: torch.Tensor) -> torch.Tensor:
        """Return w·H·wᵀ of rows w, float64 [n]."""
        if self._moment is None:
            return (part.double().square() * self._energies).sum(1)
        total = torch.zeros(len(part), dtype=torch.float64, device=part.device)
        for s in (slice(start, start + GROUP_SIZE) for start in range(0, part.shape[1], GROUP_SIZE)):
            # |w·R|² − damping·|w|²: half the work of w·H.
            product = part[:, : s.stop] @ self._moment.factor[: s.stop, s]
            total += (product.double().square() * self._moment.importance[s]).sum(1)
        return total - part.double().square().sum(1) * self._moment.damping

    def result(self) -> tuple[W4A8Linear, MatrixStats]:
        """Return the finished matrix."""
        signal, noise, weight_signal, weight_noise = (float(total) for total in self._sums.cpu().sum(1))
        scale = source = None
        entries: torch.Tensor | None = self._entries.to(E4M3)
        if self._method.tables is Tables.SCALE:
            scale, entries = (self._entries[..., 0] / -CODE_MAX).to(E4M3), None
            source = self._start.source_scale(scale)
        layer = W4A8Linear(
            pack_codes(self._codes), Packing.PACK_QUANTIZED, scale, entries, self._start.channel_scale, source
        )
        damping = 0.0 if self._moment is None else self._moment.damping
        return layer, MatrixStats(signal, max(noise, 0.0), weight_signal, weight_noise, damping)


def _values(entries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return what codes [R, 128] mean under entries [R, 8], float32."""
    by_code = torch.cat((entries, torch.zeros_like(entries[:, :1]), -entries[:, 1:].flip(1)), dim=1).float()
    return by_code.gather(1, codes.long())
