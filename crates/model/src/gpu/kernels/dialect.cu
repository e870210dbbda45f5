// The words that our kernels are written in, on a GPU. It comes before each of them; for the tests `on_host.c` says instead what they
// mean on a CPU. So the kernels are C and include nothing, and every thread of a block comes to every barrier.

#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(16) float name[]
#define THREAD ((int)threadIdx.x)
#define BLOCK_X ((int)blockIdx.x)
#define BLOCK_Y ((int)blockIdx.y)
#define BLOCK_Z ((int)blockIdx.z)
#define GRID_Z ((int)gridDim.z)
#define BARRIER() __syncthreads()
#define OF_LANE(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define ADD_SHARED(address, value) atomicAdd(address, value)
#define UNROLL _Pragma("unroll")
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

DEVICE unsigned bits_of(float value) { return __float_as_uint(value); }
DEVICE float of_bits(unsigned bits) { return __uint_as_float(bits); }

DEVICE float from_half(unsigned short bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

DEVICE unsigned short to_half(float value)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
