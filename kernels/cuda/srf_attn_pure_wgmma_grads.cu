/* Pure SRF attention with warpgroup products, backward: the kernel of the gradients, of which
 * srf_attn_pure_wgmma_bwd.cu tells.
 *
 * A block walks backward over the chunks of a unit. Its first warpgroup owns queries: psi, dP,
 * delta, dq, u, and R (with features in the place of tokens). The second owns keys: kf, dk, dv,
 * and asks for tiles. What both need lies in tiles: psi, kf, R before a meeting, dP before a
 * second one, where the owners of queries only arrive. Warp w of either owns tokens 16 w .. and
 * features 16 w ...
 *
 * delta_t, -dO_t.o_t, is made of psi and of what dphi is without it, so that o is not read: o is
 * psi S + P V. Where the sums of queries had to know it, it comes from there.
 *
 * dq, dk, dv leave by the copy engine, 16 rows a warp, but in pieces of chunks: dv through R's
 * tile, dk through that of kf.
 *
 * The products in flight leave few registers: what is not a sum is made again when it is needed
 * (`opaque`), or lies in shared memory and is addressed by one register.
 *
 * A chunk where some psi would be above 2^66 is cut in two, and so on; M, S and z of a piece are
 * made from the chunk's by the owners of keys. So they are where S was left in the scale of M
 * before the chunk.
 *
 * Floor: q, k, v, do and S read, dq, dk, dv written: 16 b t h d bytes.
 */
#include "kernels/cuda/srf_attn_pure_wgmma_grads.h"

/* What the kernel is made for: heads in one segment; in several, of which delta is there; either,
 * without. */
enum kind { WHOLE, SUMMED, ANY };

template <enum kind KIND, bool DW>
static __global__
    __launch_bounds__(256, 2) void pure_grads_kernel(const __grid_constant__ struct bwd_params p,
                                                     const __grid_constant__ struct bwd_maps m)
{
#if HAVE_WGMMA
    using at = grad_smem;
    extern __shared__ char raw[];
    char *smem = raw + (-smem_addr(raw) & 1023u);
    uint32_t base = smem_addr(smem);
    const uint32_t bar = base + at::bar;
    const int role = __shfl_sync(0xffffffffu, (int)threadIdx.x >> 7, 0); /* 0: queries */
    int tid = threadIdx.x & 127;
    const int own_f = 16 * (tid >> 5) + (tid >> 2 & 7), own_pair = tid & 3;
    const int n_chunks = (p.t + CHUNK - 1) / CHUNK;
    const float to_log2 = SRF__LOG2E * p.scale;
    float *bias = (float *)(smem + at::bias), *half = (float *)(smem + at::half);
    float *all_marks = (float *)(smem + at::marks), *piece = all_marks + 2 * MARKS;
    if (threadIdx.x == 0) init_barriers(bar, 4);
    /* Where no unit waits for another they need no order, and with all chunks' S there only delta
     * and R are the work of this op's kernels. */
    const bool early = KIND == SUMMED && p.carried && p.head_units == p.n_seg;
    if (!early) chain_wait();
    /* Units come last first: the one that this one waits for has begun. */
    if (threadIdx.x == 0) {
        /* All segments but the last, then the units of the last ones, level by level. */
        unsigned i = early ? blockIdx.x : atomicAdd(p.tickets, 1u);
        const int n = p.n_seg - 1, heads = (int)(gridDim.x / p.head_units);
        const bool whole = i < (unsigned)(heads * n);
        if (!whole) i -= heads * n;
        const int s = whole ? (int)(i / heads) : n;
        const int order = whole ? s : p.head_units - 1 - (int)(i / heads);
        const struct place here = place_of(p, i % heads, s, 64);
        struct unit *unit = (struct unit *)(smem + at::unit);
        unit->in = here.in;
        unit->token = here.head_i * p.t;
        unit->chunk = here.head_i * n_chunks;
        unit->segment = here.head_i * p.n_seg + s;
        unit->order = here.head_i * p.head_units + order;
        unit->seq = (int)(here.head_i / p.h);
        unit->col = (int)(here.head_i % p.h) * 64;
        unit->is_first = whole || order == n;
        unit->is_last = whole || order == p.head_units - 1;
        unit->has_later = s < n;
        unit->c_first = s * p.seg_chunks + (order - s) * p.unit_chunks;
        const int end = unit->is_last ? (s + 1) * p.seg_chunks : unit->c_first + p.unit_chunks;
        unit->c_last = min(end, n_chunks) - 1;
        unit->edge = unit->c_last / p.walk_chunks * p.walk_chunks;
    }
    __syncthreads();
    const int c_last = UNIT_INT(c_last);
    const bool is_last = UNIT_INT(is_last) != 0;
    /* A chunk's tiles are asked for by a thread of each of four warps: a call of the copy engine
     * keeps a warp for as long as a product takes. */
    auto ask_q = [&](int c) {
        barrier_expect(base + at::bar, TILE);
        bulk_tile(base, &m.q, UNIT_INT(col), c * CHUNK, UNIT_INT(seq), base + at::bar);
    };
    auto ask_vs = [&](int c, int warp) {
        const uint32_t full = base + at::bar + 8;
        if (warp == 0) {
            barrier_expect(full, 2 * TILE);
            bulk_tile(base + at::v, &m.v, UNIT_INT(col), c * CHUNK, UNIT_INT(seq), full);
        } else if (warp == 1) {
            bulk_bytes(base + at::s, p.records + (UNIT_I64(chunk) + c) * RECORD, TILE, full);
        }
    };
    auto ask_delta = [&](int c, int s) {
        bulk_bytes(base + at::given + s * (CHUNK * 4), p.deltas + (UNIT_I64(chunk) + c) * CHUNK,
                   CHUNK * 4, base + at::bar + 16 + 8 * s);
    };
    /* K, dO, marks, to the s-th place. */
    auto ask_kd = [&](int c, int s, int warp, bool with_delta) {
        const uint32_t full = base + at::bar + 16 + 8 * s;
        if (warp == 0) {
            barrier_expect(full, 2 * TILE + (MARKS + (KIND == SUMMED ? CHUNK : 0)) * 4);
            bulk_tile(base + at::k + s * TILE, &m.k, UNIT_INT(col), c * CHUNK, UNIT_INT(seq), full);
        } else if (warp == 1) {
            bulk_tile(base + at::d_o + s * TILE, &m.d_o, UNIT_INT(col), c * CHUNK, UNIT_INT(seq),
                      full);
        } else if (warp == 2) {
            bulk_bytes(base + at::marks + s * MARKS * 4, marks_of(p.records, UNIT_I64(chunk) + c),
                       MARKS * 4, full);
        } else if (KIND == SUMMED && with_delta) {
            ask_delta(c, s);
        }
    };
    if (role == 0 && (tid & 31) == 0) {
        ask_kd(c_last, 0, tid >> 5, !early);
        if (tid == 64) ask_q(c_last);
        ask_vs(c_last, tid >> 5);
    }
    if (role == 1)
        load_features(p, p.n_sets == 1 ? 0 : UNIT_INT(col) / 64, base + at::w, bias, tid);
    if (early) {
        chain_wait();
        if (threadIdx.x == 0) ask_delta(c_last, 0);
    }
    __syncthreads();

    float r[8][4], u[2] = {0, 0}; /* of the queries' owners */
    clear(r);
    if (role == 0) {
        if (!is_last) {
            const int64_t order = UNIT_I64(order);
            await_flag(p.tickets + 1 + order, tid);
            load_r(r, u, p.r + order * 64 * 65, own_f, own_pair);
        } else if (KIND != WHOLE && UNIT_INT(has_later)) {
            const float *from = p.seg_r + UNIT_I64(segment) * 64 * 65;
            load_r(r, u, from, own_f, own_pair);
            meet(OWN, 128);
            discard_line(from + 32 * tid);
        }
    }

    int c = c_last, at_piece = UNIT_INT(c_first) < c_last ? FIRST_PIECE | MORE : FIRST_PIECE;
    bool here = c >= UNIT_INT(c_first);
    if (role == 0) {
        if (own_pair == 0) {
            float *to = (float *)(smem + at::u) + own_f;
            to[0] = u[0];
            to[8] = u[1];
        }
        meet(OWN, 128);
        int edge = UNIT_INT(edge);
        auto ended_at = [&](int lo) -> const float * {
            if (KIND == WHOLE || lo > 0 || c != edge || c == 0) return NULL;
            return marks_of(p.records, UNIT_I64(chunk) + c - 1);
        };
        float back[2] = {1, 1};
        /* Whoever reads psi of the piece before is done with it; u with that piece. */
        auto close_piece = [&](int f0, int warp, int lane) {
            meet(PSI_FREE, 256);
            const int before = ~at_piece & ODD;
            const uint32_t own = base + at::u + f0 * 4, now = before >> 8;
            float with[2] = {load_float(own + now), load_float(own + now + 32)};
            add_deltas(with, base + at::psi, base + at::delta + (before >> 7), warp, lane);
            if ((lane & 3) == 0) {
                store_float(own + 256 - now, with[0] * back[0]);
                store_float(own + 256 - now + 32, with[1] * back[1]);
            }
        };
        while (here) {
            opaque(tid);
            opaque(at_piece);
            const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
            const int hi = piece_end(at_piece), size = piece_size(at_piece), lo = hi - size;
            const int f0 = 16 * warp + g, row = f0, s = stage_of(at_piece);
            const int end = min(hi, p.t - c * CHUNK);
            const int64_t t0 = (int64_t)c * CHUNK;
            const uint32_t psi_tile = base + at::psi;
            const bool in0 = row >= lo && row < end, in1 = row + 8 >= lo && row + 8 < end;
            const float *stat = p.stat + UNIT_I64(token) + t0 + row;
            const float lse[2] = {in0 ? stat[0] : INFINITY, in1 ? stat[8] : INFINITY};
            uint32_t marks = base + at::marks + s * (MARKS * 4);
            barrier_wait(base + at::bar + 16 + 8 * s, stage_parity(at_piece));
            const bool cold = size < CHUNK || load_shared(marks + MARK_STAY * 4) != 0;
            if (cold) {
                meet(ALL_A, 256);
                meet(ALL_A, 256);
                marks = base + at::marks + 2 * (MARKS * 4);
            }
            const uint32_t shifts = base + at::shift + warp * (64 * 4);
            put_shifts<false>(shifts, marks, base + at::bias, lane);
            float a[8][4];
            uint32_t x[4][4];
            if (at_piece & OPEN) close_piece(f0, warp, lane);
            at_piece &= ~OPEN;
            barrier_wait(base + at::bar, s);
            begin_scores(a, base, base + at::w);
            {
                uint32_t y[4][4];
                pack_rows(y, r);
                put_rows(base + at::r, y, warp, lane);
            }
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            float most;
            for (bool clamped = false;; clamped = true) {
                most = -INFINITY;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float2 shift = load_float2(shifts + (8 * j + 2 * pair) * 4);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        a[j][i] = fmaf(a[j][i], to_log2, i & 1 ? shift.y : shift.x) - lse[i >> 1];
                        most = max_nan(most, a[j][i]);
                        a[j][i] = exp2_psi(a[j][i]);
                    }
                }
                /* Only where some exponent is huge may the forward have clamped what it is of. */
                const bool fine =
                    fabsf(most) < SRF__X_LIMIT || (lse[0] == INFINITY && lse[1] == INFINITY);
                if (!UNLIKELY(__any_sync(0xffffffffu, !fine)) || clamped) break;
                token_products<64>(a, base, base + at::w, p.limit, warp, 0, forget(lane));
            }
            pack_rows(x, a);
            put_rows(psi_tile, x, warp, lane);
            async_fence();
            if (KIND == SUMMED) {
                const uint32_t given = base + at::given + s * (CHUNK * 4) + row * 4;
                const float delta[2] = {in0 ? load_float(given) : 0.0f,
                                        in1 ? load_float(given + 32) : 0.0f};
                if (pair == 0) put_deltas(base + at::delta + ((at_piece & ODD) >> 7), delta, row);
            }
            /* dP needs nothing of the owners of keys, who are waited for. */
            barrier_wait(base + at::bar + 8, s);
            begin_scores(a, base + at::d_o + s * TILE, base + at::v);
            const bool cut = meet_or(ALL_A, 256, most > -SRF__MIN_DEN_LOG2 && size > 1);
            if (cut) {
                warpgroup_wait<0>();
                wgmma_hold(&a[0][0]);
                at_piece = half_of_piece(at_piece);
                continue;
            }

            /* Where only the owners of keys meet, who then have all read R: the race checker loses
             * count of meetings of some threads. */
            meet_arrive(R_FREE, 256);
            /* What follows from these is made again rather than kept. */
            float dphi[8][4];
            {
                opaque(tid);
                opaque(at_piece);
                const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
                const int row = 16 * warp + g, s = stage_of(at_piece);
                const uint32_t do_tile = base + at::d_o + s * TILE;
                const uint32_t deltas = base + at::delta + ((at_piece & ODD) >> 7);
                if (at_piece & MORE)
                    prefetch_stat(p, UNIT_I64(token), (int64_t)(c - 1) * CHUNK, tid);
                /* dphi of a, dP, which it packs into x. */
                auto begin_dphi = [&]() {
                    pack_rows(x, a);
                    keep_side<true>(x, lower_mask(g, pair), forget(warp));
                    warpgroup_fence();
                    tile_scores(&dphi[0][0], do_tile, base + at::s);
                    warpgroup_commit();
                    mix_rows(&dphi[0][0], x, base + at::kf, true);
                    warpgroup_commit();
                };
                warpgroup_wait<0>();
                wgmma_hold(&a[0][0]);
                float delta[2];
                if (KIND == SUMMED) {
                    delta[0] = load_float(deltas + 256 + row * 4);
                    delta[1] = load_float(deltas + 288 + row * 4);
                } else {
                    /* -dO.o is -psi dphi, of dphi without it; dP again, since there is no room. */
                    begin_dphi();
                    warpgroup_wait<0>();
                    wgmma_hold(&dphi[0][0]);
                    begin_scores(a, do_tile, base + at::v);
                    delta[0] = delta[1] = 0.0f;
#pragma unroll
                    for (int kk = 0; kk < 4; kk++) {
                        uint32_t y[4];
                        load_a<64>(y, base + at::psi + warp * 2048, kk, lane);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float2 by = unpack_bf16(y[i]);
                            const float *d = &dphi[2 * kk + (i >> 1)][2 * (i & 1)];
                            delta[i & 1] -= by.x * d[0] + by.y * d[1];
                        }
                    }
                    delta[0] = quad_sum(delta[0]);
                    delta[1] = quad_sum(delta[1]);
                    if (pair == 0) put_deltas(deltas, delta, row);
                    warpgroup_wait<0>();
                    wgmma_hold(&a[0][0]);
                }
#pragma unroll
                for (int j = 0; j < 8; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) a[j][i] += delta[i >> 1];
                begin_dphi();
                put_rows(base + at::dp, x, warp, lane);
                warpgroup_wait<1>();
                async_fence();
            }
            meet_arrive(ALL_B, 256);
            opaque(tid);
            opaque(c);
            opaque(at_piece);
            {
                const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
                const int hi = piece_end(at_piece), size = piece_size(at_piece), lo = hi - size;
                const int f0 = 16 * warp + g, row = f0;
                const int s = stage_of(at_piece), end = min(hi, p.t - c * CHUNK);
                const int64_t t0 = (int64_t)c * CHUNK;
                const uint32_t do_tile = base + at::d_o + s * TILE, psi_tile = base + at::psi;
                const uint32_t marks = base + at::marks + (cold ? 2 : s) * (MARKS * 4);
                const uint32_t deltas = base + at::delta + ((at_piece & ODD) >> 7);
                warpgroup_wait<0>();
                wgmma_hold(&dphi[0][0]);
                meet_arrive(KF_FREE, 256);
                own_rows(x, psi_tile, warp, lane);
                __syncwarp();
                const float delta[2] = {load_float(deltas + 256 + row * 4),
                                        load_float(deltas + 288 + row * 4)};
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float2 zj = load_float2(marks + (MARK_Z + 8 * j + 2 * pair) * 4);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        uint32_t *to = &x[j >> 1][(j & 1) * 2 + i];
                        float2 by = unpack_bf16(*to);
                        *to = pack_bf16(by.x * fmaf(delta[i], zj.x, dphi[j][2 * i]),
                                        by.y * fmaf(delta[i], zj.y, dphi[j][2 * i + 1]));
                    }
                }
                if (DW) {
                    warp_sent(lane);
                    put_rows(base + at::out, x, warp, lane);
                    meet(OWN, 128);
                    add_dw<64>(p.dw + UNIT_I64(order) * (2 * 64 * 64), base + at::out, base,
                               p.limit, warp, lane, (at_piece & BEGUN) == 0);
                    async_fence();
                    meet(OWN, 128);
                    if (tid == 0 && lo == 0 && (at_piece & MORE)) ask_q(c - 1);
                }
                warpgroup_fence();
                mix_rows(&a[0][0], x, base + at::w, false);
                warpgroup_commit();
                add_queries(r, psi_tile, do_tile);
                warpgroup_wait<1>();
                wgmma_hold(&a[0][0]);
                scale_rows(a, p.scale, p.scale);
                warp_sent(lane);
                if (size == CHUNK)
                    send_chunk(&m.dq, UNIT_INT(col), c * CHUNK + 16 * warp, UNIT_INT(seq), a,
                               base + at::out, forget(warp), forget(lane));
                else
                    store_chunk(p.dq + UNIT_I64(in) + t0 * p.ld, p.ld, a, base + at::out,
                                forget(warp), lo, end, forget(lane));
                const float *ended = ended_at(lo);
                back[0] = mark_back(marks, f0, ended);
                back[1] = mark_back(marks, f0 + 8, ended);
                warpgroup_wait<0>();
                wgmma_hold(&r[0][0]);
                if (__any_sync(0xffffffffu, back[0] != 1.0f || back[1] != 1.0f))
                    scale_rows(r, back[0], back[1]);
                if (lo > 0) {
                    at_piece = next_piece(at_piece, lo);
                } else {
                    if (c == edge) edge -= p.walk_chunks;
                    c--;
                    here = (at_piece & MORE) != 0;
                    at_piece = next_chunk(at_piece, c > UNIT_INT(c_first));
                }
                at_piece |= OPEN;
            }
        }
        if (at_piece & OPEN) close_piece(own_f, tid >> 5, tid & 31);
        if ((tid & 31) == 0) bulk_done();
        if (!UNIT_INT(is_first)) {
            const int64_t order = UNIT_I64(order);
            const float *end_u = (const float *)(smem + at::u) + ((at_piece & ODD) >> 10) + own_f;
            __syncwarp();
            u[0] = end_u[0];
            u[1] = end_u[8];
            store_r(p.r + (order - 1) * 64 * 65, r, u, own_f, own_pair);
            raise_flag(p.tickets + order, tid);
        }
    } else {
        while (here) {
            opaque(tid);
            opaque(at_piece);
            const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
            const int hi = piece_end(at_piece), size = piece_size(at_piece), lo = hi - size;
            const int f0 = 16 * warp + g, row = f0, s = stage_of(at_piece);
            const int n = min(CHUNK, p.t - c * CHUNK), end = min(hi, n);
            const uint32_t k_tile = base + at::k + s * TILE;
            const uint32_t kf_tile = base + at::kf;
            const float *marks = all_marks + s * MARKS;
            barrier_wait(base + at::bar + 16 + 8 * s, stage_parity(at_piece));
            const bool cold = size < CHUNK || ((const uint32_t *)marks)[MARK_STAY] != 0;
            if (cold) {
                /* M, S, z for the piece. */
                struct pure_state<64> st;
                struct pure_keys keys;
                float top[2];
                const char *from = p.records + (UNIT_I64(chunk) + c) * RECORD;
                const bool stay = ((const char *)(marks + MARK_STAY))[warp] != 0;
                meet(ALL_A, 256);
                barrier_wait(base + at::bar + 8, s);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float *mark = marks + f0 + 8 * i;
                    const float by = stay || mark[MARK_BEFORE] == SRF__UNSET
                                         ? 1.0f
                                         : exp2_fast(mark[MARK_AFTER] - mark[MARK_BEFORE]);
                    st.top[i] = mark[MARK_BEFORE];
                    top[i] = mark[MARK_AFTER];
                    st.z[i] = mark[MARK_Z] * by;
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        float2 x = unpack_bf16(
                            *(const uint32_t *)(from + tile_at<64>(f0 + 8 * i, j) + 4 * pair));
                        st.s[j][2 * i] = x.x * by;
                        st.s[j][2 * i + 1] = x.y * by;
                    }
                }
                if (hi < CHUNK) {
                    diagonal_norms(k_tile, half, key_scales_of(p.scale, p.limit), 0, end, warp,
                                   lane);
                    meet(OWN_TOO, 128);
                    key_features<64>(&keys, &st, base + at::w, k_tile, half, bias, to_log2, f0,
                                     warp, lane);
                    top[0] = keys.top[0];
                    top[1] = keys.top[1];
                    meet(OWN_TOO, 128);
                }
                if (lo > 0) {
                    diagonal_norms(k_tile, half, key_scales_of(p.scale, p.limit), 0, min(lo, n),
                                   warp, lane);
                    meet(OWN_TOO, 128);
                    key_features<64>(&keys, &st, base + at::w, k_tile, half, bias, to_log2, f0,
                                     warp, lane);
                    pure_state_add<64>(&st, &keys, base + at::v, lane);
                    meet(OWN_TOO, 128);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float by = exp2_fast(st.top[i] - top[i]);
                    const uint32_t to = base + at::s + tile_at<64>(f0 + 8 * i, 0) + 4 * pair;
                    float *mark = piece + f0 + 8 * i;
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        store_shared(tile_on<64>(to, j),
                                     pack_bf16(st.s[j][2 * i] * by, st.s[j][2 * i + 1] * by));
                    if (pair == 0) {
                        mark[MARK_Z] = st.z[i] * by;
                        mark[MARK_BEFORE] = st.top[i];
                        mark[MARK_AFTER] = top[i];
                    }
                }
                async_fence();
                meet(ALL_A, 256);
                marks = piece;
            }
            float a[8][4], dv[8][4], norm[2];
            uint32_t x[4][4], kf[4][4];
            own_keys(x, norm, k_tile, key_scales_of(p.scale, p.limit), warp, lane);
            warpgroup_fence();
            row_scores(&a[0][0], x, base + at::w);
            warpgroup_commit();
            const uint32_t shifts = base + at::shift + (4 + warp) * (64 * 4);
            put_shifts<true>(shifts, base + at::marks + (cold ? 2 : s) * (MARKS * 4),
                             base + at::bias, lane);
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (row + 8 * i < lo || row + 8 * i >= end) norm[i] = INFINITY;
            warpgroup_wait<0>();
            wgmma_hold(&a[0][0]);
            /* Keys outside the piece have weight 0. |y|^2 / 2 first: where it is huge, a has no
             * bits left beside it. */
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 shift = load_float2(shifts + (8 * j + 2 * pair) * 4);
#pragma unroll
                for (int i = 0; i < 2; i++)
                    kf[j >> 1][(j & 1) * 2 + i] =
                        pack_bf16(exp2_fast(fmaf(a[j][2 * i], to_log2, -norm[i]) + shift.x),
                                  exp2_fast(fmaf(a[j][2 * i + 1], to_log2, -norm[i]) + shift.y));
            }
            warp_sent(lane);
            put_rows(kf_tile, kf, warp, lane);
            async_fence();
            const bool cut = meet_or(ALL_A, 256, false);
            if (cut) {
                at_piece = half_of_piece(at_piece);
                continue;
            }
            /* What follows from these is made again rather than kept. */
            opaque(tid);
            opaque(c);
            opaque(at_piece);
            {
                const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, pair = lane & 3;
                const int hi = piece_end(at_piece), size = piece_size(at_piece), lo = hi - size;
                const int s = stage_of(at_piece), end = min(hi, p.t - c * CHUNK);
                const int64_t t0 = (int64_t)c * CHUNK;
                const uint32_t k_tile = base + at::k + s * TILE;
                const uint32_t do_tile = base + at::d_o + s * TILE;
                const uint32_t psi_tile = base + at::psi, kf_tile = base + at::kf;

                warpgroup_fence();
                row_scores(&a[0][0], kf, psi_tile);
                warpgroup_commit();
                mix_rows(&dv[0][0], kf, base + at::r, false);
                warpgroup_commit();
                if (lane == 0 && (at_piece & MORE)) {
                    if (!(at_piece & ASKED)) ask_kd(c - 1, s ^ 1, warp, true);
                    if (!DW && warp == 3 && lo == 0) ask_q(c - 1);
                }
                at_piece |= ASKED;
                barrier_wait(base + at::bar + 8, s);
                warpgroup_wait<1>();
                wgmma_hold(&a[0][0]);
                pack_rows(x, a);
                keep_side<false>(x, upper_mask(g, pair), forget(warp));
                float dkf[8][4];
                warpgroup_fence();
                tile_scores(&dkf[0][0], base + at::v, base + at::r);
                warpgroup_commit();
                mix_rows(&dv[0][0], x, do_tile, true);
                warpgroup_commit();
                warpgroup_wait<0>();
                wgmma_hold(&dv[0][0]);
                wgmma_hold(&dkf[0][0]);
                /* R was last read here. */
                meet(R_FREE, 256);
                if (size == CHUNK)
                    send_chunk(&m.dv, UNIT_INT(col), c * CHUNK + 16 * warp, UNIT_INT(seq), dv,
                               base + at::r, forget(warp), forget(lane));
                else
                    store_chunk(p.dv + UNIT_I64(in) + t0 * p.ld, p.ld, dv, base + at::r,
                                forget(warp), lo, end, forget(lane));
                meet(ALL_B, 256);
                warpgroup_fence();
#pragma unroll
                for (int kk = 0; kk < 4; kk++)
                    wgmma_64_tiles<true, true>(&dkf[0][0], tile_by(base + at::dp, 128 * kk),
                                               tile_by(psi_tile, 128 * kk), true);
                warpgroup_commit();
                if (lane == 0 && lo == 0 && (at_piece & MORE)) ask_vs(c - 1, warp);
                warpgroup_wait<0>();
                wgmma_hold(&dkf[0][0]);
                warp_sent(lane);
                meet_arrive(PSI_FREE, 256);
                own_rows(kf, kf_tile, warp, lane);
                /* The sum of the rounded values: w_i - y of one feature may be small. */
                float ones[4];
                const uint32_t one = lane < 4 ? 0x3f803f80u : 0;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float2 uj = load_float2(base + at::u + ((at_piece & ODD) >> 8) +
                                            (8 * j + 2 * pair) * 4);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        uint32_t *to = &kf[j >> 1][(j & 1) * 2 + i];
                        float2 by = unpack_bf16(*to);
                        *to = pack_bf16(by.x * (dkf[j][2 * i] + uj.x),
                                        by.y * (dkf[j][2 * i + 1] + uj.y));
                    }
                    if (j & 1) mma_add(ones, kf[j >> 1], one, one, j > 1);
                }
                warpgroup_fence();
                mix_rows(&a[0][0], kf, base + at::w, false);
                warpgroup_commit();
                const float sum[2] = {p.scale * __shfl_sync(0xffffffffu, ones[0], lane & ~3),
                                      p.scale * __shfl_sync(0xffffffffu, ones[2], lane & ~3)};
                meet(KF_FREE, 256);
                if (DW) {
                    warpgroup_wait<0>();
                    wgmma_hold(&a[0][0]);
                    put_rows(kf_tile, kf, warp, lane);
                    meet(OWN_TOO, 128);
                    add_dw<64>(p.dw + (UNIT_I64(order) * 2 + 1) * (64 * 64), kf_tile, k_tile,
                               p.limit, warp, lane, (at_piece & BEGUN) == 0);
                    meet(OWN_TOO, 128);
                }
                warpgroup_wait<0>();
                wgmma_hold(&a[0][0]);
                own_rows(x, k_tile, warp, lane);
#pragma unroll
                for (int kk = 0; kk < 4; kk++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float2 y = unpack_bf16(x[kk][i]);
                        float *to = &a[2 * kk + (i >> 1)][2 * (i & 1)];
                        to[0] = p.scale * (to[0] - sum[i & 1] * y.x);
                        to[1] = p.scale * (to[1] - sum[i & 1] * y.y);
                    }
                if (size == CHUNK)
                    send_chunk(&m.dk, UNIT_INT(col), c * CHUNK + 16 * warp, UNIT_INT(seq), a,
                               forget(kf_tile), forget(warp), forget(lane));
                else
                    store_chunk(p.dk + UNIT_I64(in) + t0 * p.ld, p.ld, a, forget(kf_tile),
                                forget(warp), lo, end, forget(lane));
            }
            const int left = piece_end(at_piece) - piece_size(at_piece);
            if (left > 0) {
                at_piece = next_piece(at_piece, left);
            } else {
                c--;
                here = (at_piece & MORE) != 0;
                at_piece = next_chunk(at_piece, c > UNIT_INT(c_first));
            }
        }
        if ((tid & 31) == 0) bulk_done();
    }
#endif
}

srf_status srf__pure_wgmma_grads(struct srf_ctx *ctx, const struct bwd_params *p,
                                 const struct bwd_maps *m, int64_t heads)
{
    kernel *f = p->dw           ? pure_grads_kernel<ANY, true>
                : p->n_seg == 1 ? pure_grads_kernel<WHOLE, false>
                                : pure_grads_kernel<SUMMED, false>;
    return launch(ctx, f, heads * p->head_units, 256, grad_smem::bytes, p, m);
}
