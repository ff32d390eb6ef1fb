"""The CUDA sources, installed as cuflash.kernels_cu; NVRTC compiles them at first use."""
