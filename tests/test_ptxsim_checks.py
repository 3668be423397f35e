# ruff: noqa: E501  (PTX and CUDA in strings)
"""ptxsim: what it reports. Each check has a kernel that is wrong and, where it could cry wolf, one that is right."""

import numpy as np
import pytest
from ptxsim import Module, SimulationError, chips, options
from ptxsim.testing import aligned, kernel, run

STORE = "ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r1, 4, %d1; st.global.u32 [%d1], %r40;"


def fails(words, *args, **kwargs):
    with pytest.raises(SimulationError, match=words) as error:
        run(*args, **kwargs)
    return str(error.value)


# ---- bounds and alignment


@pytest.mark.parametrize("code", ["ld.global.u32 %r40, [%d1+128];", "st.global.u32 [%d1+128], %r0;", "st.global.u32 [%d1+-4], %r0;",
                                  "red.global.add.u32 [%d1+128], 1;", "ld.global.v4.u32 {%r40,%r41,%r42,%r43}, [%d1+128];",
                                  "ld.u32 %r40, [%d1+128];"])  # fmt: skip
def test_global_out_of_bounds(code):
    x = aligned(np.zeros(32, np.uint32)).copy()
    text = fails("outside every allocation", "ld.param.u64 %d1, [x];" + code, "u64 x", [x])
    assert "PTX line 9" in text
    assert "block (0,0,0)" in text
    run("ld.param.u64 %d1, [x]; st.global.u32 [%d1+124], %r0;", "u64 x", [x])


def test_one_lane_out_of_bounds_is_named():
    x = np.zeros(31, np.uint32)
    fails("by lane 31", "ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r0, 4, %d1; st.global.u32 [%d1], %r0;", "u64 x", [x])
    code = (
        "setp.lt.u32 %p1, %r0, 31; ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r0, 4, %d1; @%p1 st.global.u32 [%d1], %r0;"
    )
    run(code, "u64 x", [x])
    np.testing.assert_array_equal(x, np.arange(31))
    fails("null pointer", "ld.param.u64 %d1, [x]; ld.global.u32 %r40, [%d1];", "u64 x", [None])


def test_shared_and_local_out_of_bounds():
    fails("shared offset", ".shared .b32 s[32]; mov.u32 %r10, s; st.shared.u32 [%r10+128], %r0;", "", [])
    fails("shared offset", "mov.u32 %r10, 256; st.shared.u32 [%r10], %r0;", "", [], shared=256)
    fails(
        "shared offset",
        ".shared .align 16 .b8 s[256]; mov.u32 %r10, s; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1,%r2,%r3,%r4}, [%r10+256];",
        "",
        [],
    )
    fails("local offset", ".local .b32 l[4]; mov.u64 %d1, l; st.local.u32 [%d1+16], %r0;", "", [])


@pytest.mark.parametrize("code", ["ld.global.u32 %r40, [%d1+2];", "ld.global.v4.u32 {%r40,%r41,%r42,%r43}, [%d1+8];", "ld.global.b64 %d2, [%d1+4];",
                                  "st.shared.v2.u32 [4], {%r0, %r0};"])  # fmt: skip
def test_misaligned(code):
    fails(
        "misaligned",
        ".shared .align 16 .b8 s[64]; ld.param.u64 %d1, [x];" + code,
        "u64 x",
        [aligned(np.zeros(32, np.uint32))],
    )


def test_misaligned_cp_async():
    code = ".shared .align 16 .b8 s[512]; mov.u32 %r10, s; ld.param.u64 %d1, [x]; cp.async.cg.shared.global [%r10], [%d1+8], 16;"
    fails("misaligned", code, "u64 x", [aligned(np.zeros(32, np.uint32))])


# ---- shared memory: unwritten, not waited for, not synchronised


def test_unwritten_shared_memory_is_nan():
    out = np.zeros(32, np.float32)
    run(
        ".shared .f32 s[32]; ld.shared.f32 %f1, [s]; add.f32 %f1, %f1, 0f3F800000; mov.b32 %r40, %f1;" + STORE,
        "u64 out",
        [out],
    )
    assert np.isnan(out).all()


def test_cp_async_without_wait_is_nan():
    code = """.shared .align 16 .b8 s[512]; mov.u32 %r10, s; mad.lo.u32 %r10, %r0, 4, %r10; ld.param.u64 %d2, [x]; mad.wide.u32 %d2, %r0, 4, %d2;
    cp.async.ca.shared.global [%r10], [%d2], 4; cp.async.commit_group; {wait} ld.shared.u32 %r40, [%r10];"""
    x, out = np.ones(32, np.float32), np.zeros(32, np.float32)
    run(code.format(wait="") + STORE, "u64 out, u64 x", [out, x])
    assert np.isnan(out).all()
    for wait in ("cp.async.wait_group 0;", "cp.async.wait_all;"):
        run(code.format(wait=wait) + STORE, "u64 out, u64 x", [out, x])
        assert (out == 1).all()


REVERSE = ".shared .u32 s[256]; mov.u32 %r10, s; mad.lo.u32 %r11, %r0, 4, %r10; st.shared.u32 [%r11], %r0; {barrier}"
REVERSE += "sub.u32 %r12, 255, %r0; mad.lo.u32 %r11, %r12, 4, %r10; ld.shared.u32 %r40, [%r11];" + STORE


def test_removed_barrier_is_seen_under_some_seed():
    out, right = np.zeros(256, np.uint32), np.arange(256, dtype=np.uint32)[::-1]

    def results(barrier):
        for seed in range(6):
            run(REVERSE.format(barrier=barrier), "u64 out", [out], block=256, seed=seed, shared_races=False)
            yield (out == right).all()

    assert all(results("bar.sync 0;"))
    assert not all(results(""))


def test_removed_barrier_is_a_race_under_every_seed():
    out = np.zeros(256, np.uint32)
    for seed in range(6):
        fails(
            "RACE in a block: warp . (reads|writes)", REVERSE.format(barrier=""), "u64 out", [out], block=256, seed=seed
        )
    reuse = REVERSE.format(barrier="bar.sync 0;") + "{again} mad.lo.u32 %r11, %r0, 4, %r10; st.shared.u32 [%r11], %r0;"
    run(reuse.replace("{again}", "bar.sync 0;"), "u64 out", [out], block=256)
    for seed in range(4):
        fails("RACE in a block", reuse.replace("{again}", ""), "u64 out", [out], block=256, seed=seed)


def test_named_barriers_and_copies_order_shared_memory():
    out = np.zeros(64, np.uint32)
    code = """.shared .align 16 .u32 s[64]; mov.u32 %r10, s; mad.lo.u32 %r11, %r0, 4, %r10; setp.lt.u32 %p1, %r0, 32; @%p1 bra PRODUCE;
    bar.sync 1, 64; ld.shared.u32 %r40, [%r11+-128]; bra OUT; PRODUCE: mov.u32 %r40, 7; st.shared.u32 [%r11], %r40; bar.arrive 1, 64; OUT:"""
    for seed in range(4):
        run(code + STORE, "u64 out", [out], block=64, seed=seed)
        assert (out == 7).all()
    x = np.arange(64, dtype=np.uint32)
    code = """.shared .align 16 .u32 s[64]; mov.u32 %r10, s; mad.lo.u32 %r11, %r0, 4, %r10; ld.param.u64 %d2, [x]; mad.wide.u32 %d2, %r0, 4, %d2;
    cp.async.ca.shared.global [%r11], [%d2], 4; cp.async.wait_all; {barrier} sub.u32 %r12, 63, %r0; mad.lo.u32 %r11, %r12, 4, %r10; ld.shared.u32 %r40, [%r11];"""
    run(code.format(barrier="bar.sync 0;") + STORE, "u64 out, u64 x", [out, x], block=64)
    np.testing.assert_array_equal(out, x[::-1])
    fails("RACE in a block", code.format(barrier="") + STORE, "u64 out, u64 x", [out, x], block=64)


LANES = ".shared .align 16 .u32 s[32]; mov.u32 %r10, s; mad.lo.u32 %r11, %r0, 4, %r10; mov.u32 %r12, 31; sub.u32 %r12, %r12, %r0;"
LANES += " mad.lo.u32 %r12, %r12, 4, %r10; ld.param.u64 %d2, [x]; mad.wide.u32 %d2, %r0, 4, %d2;"


@pytest.mark.parametrize(
    "write", ["st.shared.u32 [%r11], %r0;", "cp.async.ca.shared.global [%r11], [%d2], 4; cp.async.wait_all;"]
)
def test_lanes_that_meet_without_a_warp_sync(write):
    """Lanes run side by side: results are right, and would be on most cards."""
    out, x = np.zeros(32, np.uint32), np.arange(32, dtype=np.uint32)
    code = LANES + write + " {sync} ld.shared.u32 %r40, [%r12];" + STORE
    for sync in ("bar.warp.sync -1;", "bar.sync 0;"):
        run(code.format(sync=sync), "u64 out, u64 x", [out, x])
        np.testing.assert_array_equal(out, x[::-1])
    # A shuffle makes lanes wait for each other; it orders no memory.
    for sync in ("", "shfl.sync.idx.b32 %r20, %r0, 0, 31, -1;"):
        fails("RACE in a warp: lane 0 reads .* lane 31 wrote", code.format(sync=sync), "u64 out, u64 x", [out, x])
    run(code.format(sync=""), "u64 out, u64 x", [out, x], shared_races=False)
    again = (
        LANES
        + write
        + " bar.warp.sync -1; ld.shared.u32 %r40, [%r12]; {sync}"
        + write.replace("wait_all", "commit_group")
    )
    run(again.format(sync="bar.warp.sync -1;"), "u64 out, u64 x", [out, x])
    fails("RACE in a warp: lane 0 writes .* lane 31 read", again.format(sync=""), "u64 out, u64 x", [out, x])


# ---- races between blocks


EXCHANGE = """ld.param.u64 %d1, [x]; ld.param.u64 %d2, [out]; setp.eq.u32 %p1, %r2, 1; @%p1 bra READ;
{write} bra DONE;
READ: {read} st.global.u32 [%d2], %r40;
DONE:"""
SPIN = "WAIT: ld.{how}.global.u32 %r11, [%d1]; setp.eq.u32 %p2, %r11, 0; @%p2 bra WAIT;"


def exchange(write, read, **launch_options):
    x, out = aligned(np.zeros(64, np.uint32)), np.zeros(1, np.uint32)
    run(EXCHANGE.format(write=write, read=read), "u64 out, u64 x", [out, x], grid=2, block=1, **launch_options)
    return int(out[0])


def test_relaxed_exchange_of_one_word_is_right():
    for seed in range(5):
        read = SPIN.format(how="relaxed.gpu") + "mov.u32 %r40, %r11;"
        assert exchange("st.relaxed.gpu.global.u32 [%d1], 7;", read, seed=seed) == 7
        assert (
            exchange("st.volatile.global.u32 [%d1], 7;", SPIN.format(how="volatile") + "mov.u32 %r40, %r11;", seed=seed)
            == 7
        )
        assert exchange("red.relaxed.gpu.global.add.u32 [%d1], 7;", read, seed=seed) == 7


@pytest.mark.parametrize(
    "write, how, words",
    [
        ("st.global.u32 [%d1], 7;", "relaxed.gpu", "the write was weak"),
        ("st.relaxed.cta.global.u32 [%d1], 7;", "relaxed.gpu", "the write was weak"),
        ("st.relaxed.gpu.global.u32 [%d1], 7;", "relaxed.cta", "this access is weak"),
        ("st.relaxed.gpu.global.u16 [%d1], 7;", "relaxed.gpu", "element sizes differ"),
    ],
)
def test_weak_exchange_is_a_race(write, how, words):
    write = write.replace("u16 [%d1], 7", "u16 [%d1], 7")
    with pytest.raises(SimulationError, match="RACE between blocks") as error:
        exchange(write, SPIN.format(how=how) + "mov.u32 %r40, %r11;")
    assert words in str(error.value)
    assert "block (1,0,0) reads" in str(error.value)
    assert "written by block (0,0,0)" in str(error.value)
    assert "at PTX line" in str(error.value)
    assert exchange(write, SPIN.format(how=how) + "mov.u32 %r40, %r11;", races=False) == 7


def test_weak_load_after_another_block_wrote_is_a_race():
    """The planted bug of the mailbox: a plain load instead of a relaxed one."""
    read = "mov.u32 %r9, 0; L: add.u32 %r9, %r9, 1; setp.lt.u32 %p2, %r9, 20000; @%p2 bra L; ld.global.u32 %r40, [%d1];"
    with pytest.raises(SimulationError, match="this access is weak"):
        exchange("st.relaxed.gpu.global.u32 [%d1], 7;", read, seed=1)
    with pytest.raises(SimulationError, match="non-coherent"):
        exchange("st.relaxed.gpu.global.u32 [%d1], 7;", read.replace("ld.global.u32", "ld.global.nc.u32"), seed=1)


DATA = "st.global.u32 [%d1+128], 42;"
CHAINS = {
    "release and acquire": (DATA + "st.release.gpu.global.u32 [%d1], 1;", SPIN.format(how="acquire.gpu"), True),
    "fences around relaxed": (DATA + "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%d1], 1;", SPIN.format(how="relaxed.gpu") + "fence.acq_rel.gpu;", True),
    "membar around volatile": (DATA + "membar.gl; st.volatile.global.u32 [%d1], 1;", SPIN.format(how="volatile") + "membar.gl;", True),
    "release by an atomic": (DATA + "red.release.gpu.global.add.u32 [%d1], 1;", SPIN.format(how="acquire.gpu"), True),
    "atomics after fences": (DATA + "fence.sc.gpu; atom.global.add.u32 %r9, [%d1], 1;", SPIN.format(how="relaxed.gpu") + "fence.sc.gpu;", True),
    "relaxed only": (DATA + "st.relaxed.gpu.global.u32 [%d1], 1;", SPIN.format(how="relaxed.gpu"), False),
    "release, relaxed": (DATA + "st.release.gpu.global.u32 [%d1], 1;", SPIN.format(how="relaxed.gpu"), False),
    "relaxed, acquire": (DATA + "st.relaxed.gpu.global.u32 [%d1], 1;", SPIN.format(how="acquire.gpu"), False),
    "fence at cta scope": (DATA + "fence.acq_rel.cta; st.relaxed.gpu.global.u32 [%d1], 1;", SPIN.format(how="relaxed.gpu") + "fence.acq_rel.gpu;", False),
    "write after the release": ("st.release.gpu.global.u32 [%d1], 1;" + DATA, SPIN.format(how="acquire.gpu"), False),
    "fence before the data": ("fence.acq_rel.gpu;" + DATA + "st.relaxed.gpu.global.u32 [%d1], 1;", SPIN.format(how="acquire.gpu"), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_release_acquire_chains(name):
    write, read, right = CHAINS[name]
    read += (
        "mov.u32 %r9, 0; L: add.u32 %r9, %r9, 1; setp.lt.u32 %p3, %r9, 5000; @%p3 bra L; ld.global.u32 %r40, [%d1+128];"
    )
    for seed in range(3):
        if right:
            assert exchange(write, read, seed=seed) == 42
        else:
            with pytest.raises(SimulationError, match="RACE"):
                exchange(write, read, seed=seed)


def test_chain_through_a_third_block():
    code = """ld.param.u64 %d1, [x]; ld.param.u64 %d2, [out]; setp.eq.u32 %p1, %r2, 1; @%p1 bra B1; setp.eq.u32 %p1, %r2, 2; @%p1 bra B2;
    st.global.u32 [%d1+128], 42; st.release.gpu.global.u32 [%d1], 1; bra DONE;
    B1: ld.acquire.gpu.global.u32 %r11, [%d1]; setp.eq.u32 %p2, %r11, 0; @%p2 bra B1; st.release.gpu.global.u32 [%d1+64], 1; bra DONE;
    B2: ld.acquire.gpu.global.u32 %r11, [%d1+64]; setp.eq.u32 %p2, %r11, 0; @%p2 bra B2; ld.global.u32 %r40, [%d1+128]; st.global.u32 [%d2], %r40;
    DONE:"""
    for seed in range(4):
        out = np.zeros(1, np.uint32)
        run(code, "u64 out, u64 x", [out, aligned(np.zeros(64, np.uint32))], grid=3, block=1, seed=seed)
        assert out[0] == 42


def test_blocks_that_write_the_same_word():
    x = np.zeros(64, np.uint32)
    fails("writes 4 bytes", "ld.param.u64 %d1, [x]; st.global.u32 [%d1], %r2;", "u64 x", [x], grid=2)
    run("ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r1, 4, %d1; st.global.u32 [%d1], %r2;", "u64 x", [x], grid=2)
    run("ld.param.u64 %d1, [x]; red.global.add.u32 [%d1], 1;", "u64 x", [x], grid=2)


def test_a_launch_forgets_the_writes_of_the_last_one():
    x = np.zeros(64, np.uint32)
    for grid in (2, 2):
        run("ld.param.u64 %d1, [x]; mad.wide.u32 %d1, %r1, 4, %d1; st.global.u32 [%d1], %r2;", "u64 x", [x], grid=grid)
        run("ld.param.u64 %d1, [x]; ld.global.u32 %r40, [%d1];", "u64 x", [x], grid=grid)


def test_race_through_cp_async():
    read = """.shared .align 16 .b8 s[64]; mov.u32 %r10, s; mov.u32 %r9, 0; L: add.u32 %r9, %r9, 1; setp.lt.u32 %p2, %r9, 20000; @%p2 bra L;
    cp.async.ca.shared.global [%r10], [%d1], 4; cp.async.wait_all; ld.shared.u32 %r40, [%r10];"""
    with pytest.raises(SimulationError, match="RACE"):
        exchange("st.relaxed.gpu.global.u32 [%d1], 7;", read, seed=1)


# ---- torn accesses


def test_torn_accesses_show_halves():
    """Block 0 writes pairs of equal 64-bit numbers; block 1 must at some time see two that differ, and only in torn mode."""
    code = """ld.param.u64 %d1, [x]; ld.param.u64 %d2, [out]; mov.u64 %d3, 0; mov.u32 %r40, 0; setp.eq.u32 %p1, %r2, 1; @%p1 bra READ;
    W: add.u64 %d3, %d3, 1; {{ .reg .b128 r; mov.b128 r, {{%d3, %d3}}; st.relaxed.gpu.global.b128 [%d1], r; }}
    setp.lt.u64 %p2, %d3, 200; @%p2 bra W; bra DONE;
    READ: add.u64 %d3, %d3, 1; {{ .reg .b128 r; ld.relaxed.gpu.global.b128 r, [%d1]; mov.b128 {{%d4, %d5}}, r; }}
    setp.ne.u64 %p3, %d4, %d5; @%p3 add.u32 %r40, %r40, 1; setp.lt.u64 %p2, %d3, 200; @%p2 bra READ; st.global.u32 [%d2], %r40; DONE:"""
    code = code.replace("{{", "{").replace("}}", "}")

    def mixed(torn, seed):
        out = np.zeros(1, np.uint32)
        run(
            code,
            "u64 out, u64 x",
            [out, aligned(np.zeros(2, np.uint64))],
            grid=2,
            block=1,
            target="sm_90",
            torn=torn,
            seed=seed,
        )
        return int(out[0])

    assert sum(mixed(True, seed) for seed in range(4)) > 0
    assert all(mixed(False, seed) == 0 for seed in range(4))


def test_a_warp_reads_its_own_torn_stores_whole():
    code = """ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r1, 16, %d1; mov.u32 %r10, 0;
    L: add.u32 %r10, %r10, 1; st.global.v4.u32 [%d1], {%r10, %r10, %r10, %r10}; ld.relaxed.gpu.global.v4.u32 {%r11,%r12,%r13,%r14}, [%d1];
    setp.ne.u32 %p1, %r11, %r14; setp.ne.or.u32 %p1, %r12, %r10, %p1; @%p1 trap; setp.lt.u32 %p2, %r10, 20; @%p2 bra L;"""
    out = aligned(np.zeros(4 * 128, np.uint32))
    for seed in range(3):
        run(code, "u64 out", [out], grid=2, block=64, torn=True, seed=seed)
        assert (out == 20).all()


# ---- hangs and traps


def test_deadlocks_are_reported():
    text = fails("DEADLOCK", "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1;" + "bar.sync 0;", "", [], block=64)
    assert "at a barrier" in text
    fails(
        "DEADLOCK|never arrive",
        "setp.lt.u32 %p1, %r0, 16; @%p1 bra L; bar.warp.sync -1; bra E; L: bar.sync 0; E:",
        "",
        [],
        block=32,
    )
    fails("predicated off", "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.idx.b32 %r9, %r0, 0, 31, -1;", "", [])


def test_livelock_is_reported():
    text = fails("LIVELOCK", "ld.param.u64 %d1, [x]; L: ld.relaxed.gpu.global.u32 %r9, [%d1]; setp.eq.u32 %p1, %r9, 0; @%p1 bra L;",
                 "u64 x", [np.zeros(1, np.uint32)], grid=2)  # fmt: skip
    assert "PTX line 9" in text
    fails("instruction limit", "L: bra L;", "", [], limit=100000)


def test_blocks_that_are_not_resident_cannot_be_waited_for():
    code = """ld.param.u64 %d1, [x]; red.global.add.u32 [%d1], 1; L: ld.relaxed.gpu.global.u32 %r9, [%d1]; setp.lt.u32 %p1, %r9, 8; @%p1 bra L;"""
    fails("LIVELOCK", code, "u64 x", [np.zeros(1, np.uint32)], grid=8, block=1, resident=4)
    run(code, "u64 x", [np.zeros(1, np.uint32)], grid=8, block=1, resident=8)


def test_trap():
    text = fails("trap", "setp.eq.u32 %p1, %r1, 40; @%p1 trap;", "", [], grid=2)
    assert "block (1,0,0), warp 0, lanes 00000100" in text


# ---- launch limits


def test_chip_table():
    table = chips()
    assert {"a100", "a10", "rtx3090", "l4", "rtx4090", "h100-sxm", "h100-pcie", "b200"} <= set(table)
    assert table["a100"]["sms"] == 108
    assert table["h100-sxm"]["sms"] == 132
    assert all(c["source"] and c["registers_per_sm"] == 65536 for c in table.values())
    with pytest.raises(ValueError, match="unknown chip"), options(chip="abacus"):
        pass


@pytest.mark.parametrize(
    "chip, threads, shared, fits",
    [
        ("a100", 1024, 0, 2 * 108),  # threads
        ("rtx4090", 1024, 0, 128),
        ("h100-sxm", 32, 0, 32 * 132),  # blocks
        ("a10", 32, 0, 16 * 72),
        ("a100", 256, 100_000, 108),  # shared memory: 100,096 + 1,024 of 167,936
        ("a100", 256, 80_000, 2 * 108),
        ("h100-pcie", 256, 200_000, 114),
    ],
)
def test_cooperative_grid_must_be_resident(chip, threads, shared, fits):
    module = Module(kernel("", ""))
    module.library.set_registers({"k": 0})
    launch = {"block": (threads,), "args": [], "shared": shared, "cooperative": True, "chip": chip}
    module._read_resources = lambda: None
    module.launch("k", (fits,), **launch)
    with pytest.raises(SimulationError, match=f"{chip} holds {fits}"):
        module.launch("k", (fits + 1,), **launch)


@pytest.mark.parametrize("registers, per_sm", [(32, 8), (64, 4), (65, 3), (128, 2), (129, 1), (255, 1)])
def test_registers_limit_residency(registers, per_sm):
    module = Module(kernel("", ""))
    module._read_resources = lambda: None
    module.library.set_registers({"k": registers})
    try:
        module.launch("k", (per_sm * 108,), (256,), [], cooperative=True, chip="a100")
        with pytest.raises(SimulationError, match=f"{registers} registers a thread"):
            module.launch("k", (per_sm * 108 + 1,), (256,), [], cooperative=True, chip="a100")
    finally:
        module.library.set_registers({"k": 0})


def test_launches_that_no_chip_takes():
    fails("blocks of 2048 threads", "", "", [], block=2048)
    fails("shared memory", "", "", [], shared=120_000, chip="rtx4090")
    run("", "", [], shared=120_000, chip="h100-sxm")
    fails("empty grid", "", "", [], grid=0)
    with pytest.raises(SimulationError, match="blocks of 64 threads, the limit is 32"):
        Module(kernel("").replace("k()\n{", "k()\n.maxntid 32, 1, 1\n{")).launch("k", (1,), (64,), [])
    with pytest.raises(TypeError, match="takes 1 parameters, got 0"):
        run("", "u64 x", [])


def test_options_are_restored():
    with options(seed=5):
        with pytest.raises(SimulationError):
            run("trap;", "", [], seed=9)
        assert __import__("ptxsim")._current["seed"] == 5
    with pytest.raises(ValueError, match="unknown option"):
        run("", "", [], speed=1)


def test_results_do_not_depend_on_the_seed_of_a_right_kernel():
    """And the random order is repeatable: the same seed gives the same counts."""
    code = """ld.param.u64 %d1, [x]; setp.eq.u32 %p1, %r2, 0; @%p1 bra SET; L: ld.acquire.gpu.global.u32 %r9, [%d1]; setp.eq.u32 %p2, %r9, 0; @%p2 bra L; bra E;
    SET: mov.u32 %r9, 0; K: add.u32 %r9, %r9, 1; setp.lt.u32 %p3, %r9, 3000; @%p3 bra K; st.release.gpu.global.u32 [%d1], 1; E:"""
    counts = [run(code, "u64 x", [np.zeros(1, np.uint32)], grid=8, seed=s)["warp_instr"] for s in (1, 1, 2, 3)]
    assert counts[0] == counts[1]
    assert len(set(counts)) > 1
