"""The op table on GPUs: kernels in Triton, products by cuBLAS. Nothing outside this package imports triton.

`device` holds the kernels; the modules beside it choose their tiles and launch them; `ops.GpuOps` is the table,
`backend.GpuBackend` the backend. Each launch is a `launch.Call`, which can be run, also on the CPU in Triton's
interpreter, or compiled ahead of time for a GPU that is not there (`aot`).
"""
