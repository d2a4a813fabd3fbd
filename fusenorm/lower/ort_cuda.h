/* Ops under the CUDA provider: the rows of one call on the provider's stream. Included by
   ort_shim.c. */

extern int cudaGetDevice(int* device); /* of the CUDA runtime, linked in */

static OrtStatus* cuda_compute(const State* state, OrtKernelContext* context) {
  void* stream = NULL;
  int device = 0;
  TRY(GetGPUComputeStream(context, &stream));
  if (cudaGetDevice(&device) != 0) return fail(state, "there is no current CUDA device");
  fusenorm_use_stream(stream);
  OrtStatus* status = rows_compute(state, context, device);
  fusenorm_forget_stream();
  return status;
}
