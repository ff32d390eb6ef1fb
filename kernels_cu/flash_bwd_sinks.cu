// The gradient of the sinks: one block per query head.
//
//   dsink = - sum over batch entries and queries of exp(sink - lse) delta
//
// where delta = rowsum(dout ∘ out) - dlse. Each thread sums its queries in their order, then the
// block its threads in theirs, through a float of shared memory each.
#include "backward.cuh"
#include "softmax.cuh"

static_assert((kThreads & (kThreads - 1)) == 0, "halves of the threads add up to all of them");

struct SinkGradientParams {
  Problem problem;
  const float* row_max;  // (B, Hq, Sq)
  const float* row_sum;  // likewise, or null: 1
  RowDeltas deltas;
  float* dsinks;  // (Hq,)
};
#ifdef SINK_PARAMS_BYTES
static_assert(sizeof(SinkGradientParams) == SINK_PARAMS_BYTES,
              "SinkGradientParams differs from the packed one");
#endif

extern "C" __global__ void __launch_bounds__(kThreads)
    flash_bwd_sinks(const __grid_constant__ SinkGradientParams p) {
  __shared__ float sums[kThreads];
  const int head = blockIdx.x;
  const float sink = sink_of(p.problem, head);
  float sum = 0.f;
#pragma unroll 1
  for (int batch = 0; batch < p.problem.batch; batch++) {
    const Mask mask(p.problem, batch);
#pragma unroll 1
    for (int row = threadIdx.x; row < mask.q_len; row += kThreads) {
      const RowStats stats(p.row_max, p.row_sum, mask.stats(head) + row);
      sum -= stats.probability(sink) * p.deltas.delta[p.deltas.index(p.problem, batch, head, row)];
    }
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
