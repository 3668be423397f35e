"""ptxsim: the virtual clock. Times are those of its table; a change of the table changes no test."""

import numpy as np
import ptxsim
import pytest
from ptxsim.testing import aligned, kernel, run

COST = ptxsim.latencies()
GHZ = COST["clock"]["issue"]


def cycles(body, parameters="u64 x", args=(None,), **options):
    """Cycles of a launch, and everything that the clock says of it."""
    run(body, parameters, list(args), clock=1, **options)
    found = ptxsim.default_library().clock()
    return found["ns"] * GHZ, found


def use(register):
    """A branch on a value: the warp waits for it."""
    return f"setp.gt.f32 %p9, {register}, 0f7F000000;\n@%p9 bra END;\nEND:\n"


def chain_of(count, chains=1):
    """``count`` mma that follow one another, in so many chains."""
    code = ""
    for i in range(count * chains):
        acc = ", ".join(f"%f{4 * (i % chains) + j}" for j in range(4))
        code += (
            f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{acc}}}, {{%r10, %r11, %r12, %r13}}, "
            f"{{%r14, %r15}}, {{{acc}}};\n"
        )
    return code


def test_dependent_mma_wait_for_each_other_and_others_for_the_unit():
    one, _ = cycles(chain_of(1) + use("%f0"))
    many, found = cycles(chain_of(25) + use("%f0"))
    assert many - one == 24 * COST["mma"]["latency"]
    assert found["mma_chain"] == 25
    wide, found = cycles(chain_of(25, chains=4) + use("%f12"))
    assert found["mma_chain"] == 25
    assert wide - many == pytest.approx(3 * COST["mma"]["issue"], abs=1)
    assert {reason for _, _, reason in found["waits"]} >= {"mma"}


def test_warps_share_the_units_of_their_multiprocessor():
    alone, _ = cycles("ex2.approx.f32 %f0, %f1;\n" * 16)
    together, _ = cycles("ex2.approx.f32 %f0, %f1;\n" * 16, block=32 * 8)
    assert together - alone == pytest.approx(16 * COST["special function"]["issue"], rel=0.1)


def test_a_value_is_waited_for_where_it_is_used():
    """The first touch of memory comes from HBM, the second from L2; work in between hides it."""
    x = aligned(np.zeros(64, np.float32))
    load = "ld.param.u64 %d1, [x];\nld.global.f32 %f20, [%d1];\nadd.f32 %f21, %f20, %f20;\n"
    first, found = cycles(load + use("%f21"), args=[x])
    (reason,) = {key[2] for key, ns in found["waits"].items() if ns * GHZ > 100}
    assert reason == "first touch of HBM"
    again = use("%f21").replace("END", "NEXT") + "ld.global.f32 %f3, [%d1+8];\nadd.f32 %f4, %f3, %f3;\n"
    twice, _ = cycles(load + again + use("%f4"), args=[x])
    assert COST["plain load"]["latency"] <= twice - first <= COST["plain load"]["latency"] + 60
    hidden, _ = cycles(load + chain_of(20) + use("%f0") + use("%f21").replace("END", "NEXT"), args=[x])
    assert hidden == pytest.approx(max(first, 20 * COST["mma"]["latency"]), abs=60)


PING = """
ld.param.u64 %d1, [x];
setp.eq.u32 %p1, %r2, 0;
@!%p1 bra WAIT;
st.relaxed.gpu.global.u32 [%d1], 1;
bra DONE;
WAIT:
ld.relaxed.gpu.global.u32 %r10, [%d1];
setp.eq.u32 %p2, %r10, 0;
@%p2 bra WAIT;
st.global.u32 [%d1+64], %r10;
DONE:
"""


@pytest.mark.parametrize("load_ns, store_ns", [(150, 200), (275, 275), (200, 900)])
def test_a_strong_store_is_seen_later(load_ns, store_ns):
    x = aligned(np.zeros(32, np.uint32))
    found = cycles(PING, args=[x], grid=2, block=1, load_ns=load_ns, store_ns=store_ns)[1]
    assert x[0] == x[16] == 1
    # A load that samples just before the store is seen, and the one after it.
    assert store_ns + load_ns / 2 <= found["ns"] <= store_ns + 2 * load_ns + 60
    assert found["most_rounds"] == 1, "reading the same again is no new round"


def test_rounds_are_loads_after_a_branch_on_a_load():
    x = aligned(np.zeros(64, np.uint32))
    load = "ld.relaxed.gpu.global.u32 %r{0}, [%d1+{0}0];\n"
    together = "ld.param.u64 %d1, [x];\n" + "".join(load.format(k) for k in (4, 8, 12))
    assert cycles(together, args=[x])[1]["most_rounds"] == 1
    look = "setp.ne.u32 %p1, %r4, 0;\n@%p1 bra DONE;\n"
    apart = "ld.param.u64 %d1, [x];\n" + load.format(4) + look + load.format(8) + load.format(12) + "DONE:\n"
    assert cycles(apart, args=[x])[1]["most_rounds"] == 2


def test_copies_are_waited_for_by_their_group():
    x = aligned(np.zeros(256, np.float32))
    copies = "ld.param.u64 %d1, [x];\n" + "".join(
        f"cp.async.cg.shared.global [buffer+{64 * k}], [%d1+{256 * k}], 16;\ncp.async.commit_group;\n" for k in range(2)
    )
    shared = ".shared .align 16 .b8 buffer[256];\n"
    none, _ = cycles(copies, args=[x], before=shared)
    one, found = cycles(copies + "cp.async.wait_group 1;\n", args=[x], before=shared)
    both, _ = cycles(copies + "cp.async.wait_group 0;\n", args=[x], before=shared)
    assert none < 50 < COST["first touch of HBM"]["latency"] <= one < both
    assert any(reason == "first touch of HBM" for _, _, reason in found["waits"])


def test_bytes_are_held_to_what_carries_them():
    """A kernel that reads from HBM takes at least bytes / bandwidth; conflicts in shared memory take a cycle each."""
    n = 132 * 1024 * 16
    x = aligned(np.zeros(n // 4, np.float32))
    body = (
        "ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r1, 16, %d1;\n"
        "ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%d1];\nadd.f32 %f4, %f0, %f1;\n"
    )
    took, _ = cycles(body, args=[x], grid=132, block=1024)
    bound = n / COST["HBM"]["issue"]
    assert bound + COST["first touch of HBM"]["latency"] <= took <= bound + COST["first touch of HBM"]["latency"] + 200
    shared = ".shared .align 16 .b8 buffer[4096];\n"
    read = "shl.b32 %r10, %r0, {}; mov.u32 %r11, buffer; add.u32 %r10, %r10, %r11;\n" + (
        "ld.shared.u32 %r12, [%r10];\n" * 8
    )
    apart, conflicting = (cycles(read.format(shift), before=shared)[0] for shift in (2, 7))
    assert conflicting - apart == 8 * 31


def test_the_block_barrier_takes_the_last_warp():
    slow = (
        "setp.lt.u32 %p1, %r0, 32;\n@!%p1 bra SKIP;\n"
        + chain_of(20)
        + "setp.gt.f32 %p2, %f0, 0f00000000;\n@%p2 bra SKIP;\nSKIP:\nbar.sync 0;\n"
    )
    took, found = cycles(slow, block=128)
    assert took >= 20 * COST["mma"]["latency"] + COST["barrier"]["latency"]
    waits = {warp: ns for (warp, _, reason), ns in found["waits"].items() if reason == "barrier"}
    assert waits[3] * GHZ > 18 * COST["mma"]["latency"] > waits[0] * GHZ


def test_a_launch_that_never_ends_is_found():
    x = aligned(np.zeros(32, np.uint32))
    module = ptxsim.Module(kernel("ld.param.u64 %d1, [x];\n" + PING.split("bra DONE;\n")[1], "u64 x"))
    with pytest.raises(ptxsim.SimulationError, match="LIVELOCK"):
        module.launch("k", (1,), (32,), [x], clock=1)
    with pytest.raises(ptxsim.SimulationError, match="no seed, nothing torn"):
        module.launch("k", (1,), (32,), [x], clock=1, seed=1)
    assert all(entry["source"] for entry in COST.values())
