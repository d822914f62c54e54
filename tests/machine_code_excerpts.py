"""Machine code as the compilers' tools print it, small enough to count by hand."""


def sass(*lines, registers="REG:40 STACK:0 SHARED:0 LOCAL:0"):
    """The lines as cuobjdump prints them: the nth at address 16 n, `@n` a jump to the nth."""
    text = f" Function kernel:\n  {registers}\n\tcode for sm_90a\n\t\tFunction : kernel\n"
    for index, line in enumerate(lines):
        body, _, target = line.partition("@@")
        line = f"{body}{16 * int(target):#x}" if target else line
        predicate, line = line.split(" ", 1) if line.startswith("@") else ("", line)
        text += (
            f"        /*{16 * index:04x}*/  {predicate:>10} {line} ;  /* 0x00000a00ff017b82 */\n"
        )
        text += f"{'':60}/* 0x000e620000000800 */\n"
    return text


# a tile of 32 x 16 by one warp; the loop over its features turns twice
NESTED = sass(
    "S2R R0, SR_TID.X",
    # 1: a turn for a tile
    "UIADD3 UR4, UR4, 0x10, URZ",
    # 2: a turn for a chunk of features
    "LDS.128 R8, [R4]",
    "@!P1 LDGSTS.E.BYPASS.128 [R25+0x4000], desc[UR44][R16.64]",
    "HMMA.16816.F32.BF16 R12, R8, R10, R12",
    "@!P0 BRA @@2",
    "@P2 BRA @@16",
    # 7: what the out-of-line block comes back to
    "MUFU.EX2 R5, R6",
    "FMUL R6, R6, R7",
    "@!PT LDS RZ, [RZ]",
    "FSEL R6, R6, -INF , P4",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR14], R8",
    "@!P6 BRA @@11",
    "@!P5 BRA @@1",
    "STG.E desc[UR4][R2.64], R6",
    "EXIT",
    # 16: masks, out of line
    "ISETP.NE.AND P4, PT, R5, UR4, PT",
    "MUFU.RCP R9, R9",
    "BRA @@7",
)
TILE = {"BLOCK_M": 32, "BLOCK_N": 16, "D": 64, "BLOCK_D": 32}


AMDGCN = """
\t.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
kernel:                                 ; @kernel
.Lfunc_begin0:
\ts_load_dword s85, s[0:1], 0x40
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
.Ltmp1:
\t.loc\t1 99 25                         ; ntxent_triton.py:99:25
\ts_and_saveexec_b64 s[6:7], vcc
\ts_cbranch_execz .LBB0_3
; %bb.2:
\tglobal_load_dwordx4 v[8:11], v[8:9], off
.LBB0_3:                                ;   in Loop: Header=BB0_1 Depth=1
\tds_read2_b64 v[36:39], v4 offset1:16
\tv_mfma_f32_32x32x8_f16 v[0:15], v[36:37], v[38:39], v[0:15]
\tv_exp_f32_e32 v0, v0
\tv_mul_f32_e32 v3, v80, v3
\ts_cbranch_scc1 .LBB0_1
; %bb.4:
\tglobal_store_dword v[0:1], v2, off
\ts_endpgm
.Lfunc_end0:
    .agpr_count:     0
    .private_segment_fixed_size: SCRATCH
    .sgpr_spill_count: 0
    .vgpr_count:     128
    .vgpr_spill_count: SPILLED
"""
