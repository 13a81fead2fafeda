"""Sums of parts of K that the blocks of a cluster send to each other, through shared memory."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_MEET = gl.constexpr("barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;")
"""Wait until all blocks of the cluster have their room."""
_SEND = gl.constexpr("""
{
.reg .b32 there, barrier;
mapa.shared::cluster.u32 there, $4, $12;
mapa.shared::cluster.u32 barrier, $16, $12;
st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {$8, $9, $10, $11}, [barrier];
mov.b32 $0, 0;
}
""")
"""Send four numbers to another block of the cluster."""
_RECEIVE = gl.constexpr("""
{
.reg .pred there;
WAIT:
mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [$1], 0;
@!there bra.uni WAIT;
mov.b32 $0, 0;
}
""")
"""Wait for what others send."""


@gluon.constexpr_function
def _opened(sent):
    """Return assembly that makes room for so many bytes, sets up a barrier that waits for them, and says so.

    What is behind it in shared memory stays at a multiple of 1024 bytes, as the tensor core's operand must be.
    """
    return f"""
{{
.shared .align 16 .b8 room[{(sent + 8 + 1023) // 1024 * 1024}];
.reg .pred first;
.reg .b32 thread, arrivals;
mov.u32 $0, room;
mov.u32 thread, %tid.x;
setp.eq.u32 first, thread, 0;
add.u32 arrivals, $0, {sent};
@first mbarrier.init.shared::cta.b64 [arrivals], 1;
@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [arrivals], $1;
fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.release.aligned;
}}
"""


@gluon.jit
def open_room(part, PARTS: gl.constexpr, SHARE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return the address of the room for what `add_in_cluster` is sent, once in a kernel, as early as possible.

    The room is beside all other shared memory, so that no block has to wait for what another one still reads.
    """
    SENT: gl.constexpr = 4 * PARTS * SHARE * BLOCK_N  # bytes
    expected = gl.where(part * SHARE < BLOCK_M, SENT, 0)
    return gl.inline_asm_elementwise(_opened(SENT), "=r,r", [expected], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def add_in_cluster(result, n, m, part, room, PARTS: gl.constexpr, SHARE: gl.constexpr):
    """Return the sums of all parts of K, in their order, of those tokens [BLOCK_N, SHARE] that are this block's.

    result: this part's sums [BLOCK_N, BLOCK_M], of which a thread has four side by side. Each block of the cluster
    sends them to the blocks that add them up. room: what `open_room` returned.
    """
    BLOCK_N: gl.constexpr = result.shape[0]
    PART: gl.constexpr = 4 * SHARE * BLOCK_N  # bytes
    arrivals = room + PARTS * PART
    gl.inline_asm_elementwise(_MEET, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(
        _SEND,
        "=r,=r,=r,=r,r,r,r,r,f,f,f,f,r,r,r,r,r,r,r,r",
        [room + part * PART + 4 * (m % SHARE * BLOCK_N + n), result, m // SHARE, arrivals],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )
    gl.inline_asm_elementwise(_RECEIVE, "=r,r", [arrivals], dtype=gl.int32, is_pure=False, pack=1)
    own = gl.arange(0, SHARE, gl.SliceLayout(0, result.type.layout))[None, :]
    sums_at = room + 4 * (own * BLOCK_N + n)
    parts = ()
    for other in gl.static_range(PARTS):
        parts += (
            gl.inline_asm_elementwise(
                "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];",
                "=f,=f,=f,=f,r,r,r,r",
                [sums_at + other * PART],
                dtype=gl.float32,
                is_pure=False,
                pack=4,
            ),
        )
    total = parts[0]  # type: ignore[misc]
    for other in gl.static_range(1, PARTS):
        total += parts[other]
    return total
