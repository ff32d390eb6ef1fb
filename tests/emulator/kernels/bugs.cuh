// The deliberate bugs: -DBUG=<name> compiles one of them in, each is an `if` on kBug where it acts.
#pragma once

enum class Bug {
  None,

  // softmax.cuh
  CausalOffByOne,  // a query sees one key too many

  // forward_sm80.cu
  MissingBarrierAfterFirstWait,  // other threads' cp.async of Q and K is not waited for
  MissingBarrierAtLoopEnd,       // the next loads overwrite tiles that slower warps still read
  LaxWaitGroup,                  // V is read while its cp.async group may be pending
  DroppedSwizzle,                // ldmatrix of K ignores the XOR that the loads apply
  WrongRow,                      // ldmatrix of K reads 8 rows past the tile, inside shared memory

  // forward_sm90.cu
  MissingBarrierAfterInit,    // mbarriers are used before every thread can see their init
  MissingFullWait,            // scores are computed without waiting for K
  MissingEmptyWaitK,          // the producer refills a K stage that is still read
  MissingEmptyWaitV,          // the same for V
  EarlyReleaseV,              // V is released while P V is in flight
  EarlyReleaseK,              // K is released while Q Kᵀ is in flight: benign, V's stage guards it
  ExpectTooFewBytes,          // the full barrier of K expects 16 bytes less than arrive
  ExpectTooManyBytes,         // and 16 bytes more
  WrongParity,                // the wait for K takes the opposite phase
  WrongArrivalCount,          // the empty barriers of K expect one consumer, there are two
  DoubleArrival,              // every consumer arrives twice at the first empty barrier
  MissingScoresWait,          // scores are read while their wgmma is in flight
  ProbsOverwrittenInFlight,   // P registers are rewritten while P V reads them
  OutputRescaledInFlight,     // O registers are rescaled while P V writes them
  MissingWgmmaFence,          // P V starts without wgmma.fence after O and P were written
  WrongStrideOffset,          // SBO of K's descriptor is half of what it is
  SwappedOffsets,             // LBO and SBO of V's descriptor are exchanged; matters from D = 128
  MisalignedStorage,          // tiles start 512 bytes too late for the 128-byte swizzle
  OutputOverKeys,             // O is staged where the other consumer may still read K
  MissingProxyFence,          // the TMA store may not see what stmatrix wrote
  ProxyFenceInOneThread,      // only the storing thread fences
  MissingBarrierBeforeStore,  // the TMA store does not wait for the other warps' stmatrix
  MissingStoreWait,           // the block exits while the TMA store reads shared memory
  SharedNamedBarrier,         // both consumers use one named barrier

  // ptx.cuh
  SwappedPack,            // the two halves of a packed register are exchanged
  SwappedLdmatrix,        // two destination registers of ldmatrix are exchanged
  SwappedMbarrierInit,    // address and count of mbarrier.init are exchanged
  SwappedTmaCoordinates,  // row and column of TMA loads are exchanged

  // programs.cu
  SharedMemoryRace,      // block_sum: plain shared-memory accesses of several warps, no barrier
  DivergentShuffle,      // half a warp shuffles under the full mask
  BarrierCountMismatch,  // two halves of the block give one barrier different counts
  GlobalOutOfBounds,     // one thread loads one element past the array
  LocalOutOfBounds,      // one thread writes past its local array
};

#ifndef BUG
#define BUG None
#endif
constexpr Bug kBug = Bug::BUG;
