/* What the onnxruntime side of a library uses of its CUDA side. */

#pragma once

/* CUDA kernels this thread launches go to this stream, whatever tvm_ffi's is. */
void fusenorm_use_stream(void* stream);
void fusenorm_forget_stream(void);
/* Why this thread's last kernel refused its arguments. */
const char* fusenorm_last_error(void);
