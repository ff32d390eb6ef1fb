// Small programs of one block of 128 threads, each right as it stands and wrong with its bug.
#include "ptx.cuh"

struct Params {
  const float* in;  // [128]
  float* out;       // [128]
};
static_assert(sizeof(Params) == 16, "the tests pack this struct");

// out[i] = sum of in, through plain shared-memory accesses
extern "C" __global__ void block_sum(const __grid_constant__ Params p) {
  __shared__ float warp_sums[4];
  float sum = p.in[threadIdx.x];
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) sum += shuffle_xor(sum, lane_mask);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  if (kBug != Bug::SharedMemoryRace) __syncthreads();
  p.out[threadIdx.x] = warp_sums[0] + warp_sums[1] + warp_sums[2] + warp_sums[3];
}

// out[i] = in[i] + in[i ^ 1] for the first half of each warp, in[i] for the second
extern "C" __global__ void half_warp_sum(const __grid_constant__ Params p) {
  const bool first_half = threadIdx.x % 32 < 16;
  float value = p.in[threadIdx.x];
  if (kBug == Bug::DivergentShuffle) {
    if (first_half) value += shuffle_xor(value, 1);
  } else {
    const float neighbour = shuffle_xor(value, 1);
    if (first_half) value += neighbour;
  }
  p.out[threadIdx.x] = value;
}

// out[i] = in[i] after a named barrier of the whole block
extern "C" __global__ void copy_after_barrier(const __grid_constant__ Params p) {
  const bool fewer = kBug == Bug::BarrierCountMismatch && threadIdx.x < 64;
  named_barrier_sync(1, fewer ? 64 : 128);
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

// out[i] = in[i]
extern "C" __global__ void copy(const __grid_constant__ Params p) {
  const int past_end = kBug == Bug::GlobalOutOfBounds && threadIdx.x == 127 ? 1 : 0;
  p.out[threadIdx.x] = p.in[threadIdx.x + past_end];
}

// out[i] = 7 in[i] + 1, by way of a local array
extern "C" __global__ void local_sum(const __grid_constant__ Params p) {
  float values[8];
  for (int i = 0; i < 8; i++) values[i] = p.in[threadIdx.x];
  const int index = kBug == Bug::LocalOutOfBounds && threadIdx.x == 77 ? 9 : threadIdx.x % 8;
  values[index] = 1.0f;
  float sum = 0.0f;
  for (int i = 0; i < 8; i++) sum += values[i];
  p.out[threadIdx.x] = sum;
}
