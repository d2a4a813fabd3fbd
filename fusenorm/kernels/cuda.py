"""CUDA kernels: for every fused op the TIR functions that launch them, as one CUDA source.

A built library exports, per op and dtype, the functions `symbols(spec, "cuda")` names:
`fusenorm_cuda_OPTYPE` and, for ops with two outputs, `fusenorm_cuda_OPTYPE__nosum`, which leaves
the second out. They are called as tvm-ffi functions (`tvm_ffi.load_module`):

    arguments   the inputs, the outputs, then the attributes as floats, in the order of the
                declaration: (x, skip, scale, y, s, epsilon)
    tensors     DLPack tensors on one CUDA device, of the declared dtypes (bf16 as bfloat16):
                rows [rows, D], packed [rows, 2D], vectors [D]; rows lie at any stride, their
                elements side by side; any alignment, any D, any number of rows, none included
    outputs     made by the caller, no input overlaps them
    stream      TVMFFIEnvGetStream of tvm_ffi, where the process has it loaded
    errors      wrong types, shapes and devices raise before anything runs

A call only launches: it neither waits nor allocates, so it can be captured in a CUDA graph.
"""
