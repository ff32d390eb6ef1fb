// The gradient of the sinks: one block per query head.
//
//   dsink = - sum over batch entries and queries of exp(sink - lse) delta
//
// where delta = rowsum(dout ∘ out) - dlse. Each thread sums its queries in their order, then the
// block its threads in theirs, through a float of shared memory each.
#include "backward.cuh"
#include "softmax.cuh"

struct SinkGradientParams {
  Problem problem;
  RowStats stats;
  float* dsinks;  // (Hq,)
};
#ifdef SINK_PARAMS_BYTES
static_assert(sizeof(SinkGradientParams) == SINK_PARAMS_BYTES,
              "SinkGradientParams differs from the packed one");
#endif

DEVICE int queries(const Problem& p, int batch) {
  if (!kPacked) return p.seqlen_q;
  return p.packing.query_edges[batch + 1] - p.packing.query_edges[batch];
}

extern "C" __global__ void __launch_bounds__(kThreads)
    flash_bwd_sinks(const __grid_constant__ SinkGradientParams p) {
  __shared__ float sums[kThreads];
  const int head = blockIdx.x;
  const float sink_log2 = in_base_2(p.problem.sinks[head]);
  float sum = 0.f;
#pragma unroll 1
  for (int batch = 0; batch < p.problem.batch; batch++)
#pragma unroll 1
    for (int row = threadIdx.x; row < queries(p.problem, batch); row += kThreads) {
      const i64 index = p.stats.index(p.problem, batch, head, row);
      sum -= exp2_approx(sink_log2 - p.stats.lse_log2[index]) * p.stats.delta[index];
    }
  sums[threadIdx.x] = sum;
  __syncthreads();
#pragma unroll 1
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) p.dsinks[head] = sums[0];
}
