"""The kernels, in Triton's language: untyped, since what looks like Python here is not run as such.

In capitals: what is known when a kernel is compiled. All of them are compiled without contraction of products and sums
(see `launch.Call`), so that the same expression gives the same bits in any kernel.
"""
