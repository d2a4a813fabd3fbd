/* usage: run_model LIBRARY MODEL ROWS COLUMNS < x, skip, scale > y  (raw float32)
   Runs a model through onnxruntime's C API with the custom-ops library registered. */
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>

static const OrtApi* api;

static void check(OrtStatus* status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", api->GetErrorMessage(status));
  exit(1);
}

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  int64_t rows = atoll(argv[3]), columns = atoll(argv[4]);
  api = OrtGetApiBase()->GetApi(17);
  OrtEnv* env;
  OrtSessionOptions* options;
  OrtSession* session;
  OrtMemoryInfo* memory;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "capi", &env));
  check(api->CreateSessionOptions(&options));
  check(api->RegisterCustomOpsLibrary_V2(options, argv[1]));
  check(api->CreateSession(env, argv[2], options, &session));
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  const char *names[] = {"x", "skip", "scale"}, *wanted[] = {"y"};
  int64_t shapes[3][2] = {{rows, columns}, {rows, columns}, {columns, 0}};
  size_t ranks[] = {2, 2, 1};
  OrtValue *inputs[3], *output = NULL;
  for (int i = 0; i < 3; ++i) {
    size_t count = (size_t)(i < 2 ? rows * columns : columns);
    float* data = malloc(count * sizeof *data);
    if (fread(data, sizeof *data, count, stdin) != count) return 2;
    check(api->CreateTensorWithDataAsOrtValue(memory, data, count * sizeof *data, shapes[i],
                                              ranks[i], ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                              &inputs[i]));
  }
  check(api->Run(session, NULL, names, (const OrtValue* const*)inputs, 3, wanted, 1, &output));
  float* y;
  check(api->GetTensorMutableData(output, (void**)&y));
  fwrite(y, sizeof *y, (size_t)(rows * columns), stdout);
  api->ReleaseSession(session);
  return 0;
}
