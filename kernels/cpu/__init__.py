"""The CPU kernels: C++ behind plain C functions, compiled by this machine's own compiler and called through ctypes.

They are batch-invariant: a row's result is bitwise the same whatever other rows are in the call, whatever the chunk and
the number of threads. simd.h and product.h say how.
"""
