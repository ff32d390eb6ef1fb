// After a backward pass: dq = scale dq_acc, in 16 bits. One block per (query tile, head of Rows,
// batch entry) with the threads of the main kernel, so that each reads the accumulators that it
// would own there; the tile goes through shared memory (2 kBlockQ D bytes) to whole rows.
#include "backward.cuh"

typedef SmemTile<kBlockQ, kHeadDim> QTile;
#ifdef SMEM_BYTES
static_assert(QTile::kBytes == SMEM_BYTES, "shared memory differs from the plan's");
#endif

extern "C" __global__ void __launch_bounds__(kThreads)
    flash_bwd_post(const __grid_constant__ BackwardParams p) {
  extern __shared__ __align__(128) u8 smem[];
  const QTile dq_smem{shared_address(smem)};
  const Rows rows(p.problem);
  const Work work = row_tile(p.problem, rows, kBlockQ, blockIdx.x);
  if (!work.exists()) return;
  const Mask mask(p.problem, work.batch);

  QueryGrid::Acc dq;
  load_dq(dq, p.dq_acc, workspace_tile(p.problem, work.batch, work.head, work.tile));
  to_smem<QueryGrid>(dq_smem, dq, p.problem.scale);
  __syncthreads();

  const int first_row = work.tile * kBlockQ;
  u16* target = mask.queries(p.dq, rows.head_q(work.head));
  store_tile<kThreads>(
      dq_smem, [&](int row) { return rows.pointer(target, p.dq, first_row + row); },
      mask.rows.count - first_row, p.problem.head_dim);
}
