/* The onnxruntime side of an ops library: OrtCustomOp for every op of the generated table.

   The declarations below are the part of onnxruntime's C ABI that is used: OrtApi is an
   append-only table of functions, addressed here by slot; API version 17 (onnxruntime 1.17). */

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- onnxruntime ---- */

enum { ORT_API = 17, ORT_API_IN_PLACE = 18, ORT_API_SHAPE_REFERENCE = 24 };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { REQUIRED = 0, OPTIONAL = 1 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtTensorInfo OrtTensorInfo; /* OrtTensorTypeAndShapeInfo */
typedef const void* const* OrtApi;

typedef struct {
  OrtApi (*GetApi)(uint32_t version);
  const char* (*GetVersionString)(void);
} OrtApiBase;

typedef struct OrtCustomOp {
  uint32_t version;
  void* CreateKernel;
  const char* (*GetName)(const struct OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const struct OrtCustomOp*);
  int (*GetInputType)(const struct OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const struct OrtCustomOp*);
  int (*GetOutputType)(const struct OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const struct OrtCustomOp*);
  void* KernelCompute;
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const struct OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const struct OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const struct OrtCustomOp*, size_t);
  int (*Variadic[4])(const struct OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const struct OrtCustomOp*, OrtApi, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShape)(const struct OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const struct OrtCustomOp*);
  int (*GetEndVersion)(const struct OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs); /* from API version 18 on */
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  void* Aliases[2];
} OrtCustomOp;

#define SLOT(number, result, ...) ((result(*)(__VA_ARGS__))api[number])
#define CreateStatus SLOT(0, OrtStatus*, int, const char*)
#define CreateCustomOpDomain SLOT(26, OrtStatus*, const char*, OrtCustomOpDomain**)
#define CustomOpDomain_Add SLOT(27, OrtStatus*, OrtCustomOpDomain*, const OrtCustomOp*)
#define AddCustomOpDomain SLOT(28, OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*)
#define GetTensorMutableData SLOT(51, OrtStatus*, const OrtValue*, void**)
#define CreateTensorInfo SLOT(57, OrtStatus*, OrtTensorInfo**)
#define SetTensorElementType SLOT(58, OrtStatus*, OrtTensorInfo*, int)
#define SetDimensions SLOT(59, OrtStatus*, OrtTensorInfo*, const int64_t*, size_t)
#define GetDimensionsCount SLOT(61, OrtStatus*, const OrtTensorInfo*, size_t*)
#define GetDimensions SLOT(62, OrtStatus*, const OrtTensorInfo*, int64_t*, size_t)
#define GetSymbolicDimensions SLOT(63, OrtStatus*, const OrtTensorInfo*, const char**, size_t)
#define GetTensorInfo SLOT(65, OrtStatus*, const OrtValue*, OrtTensorInfo**)
#define GetAttributeFloat SLOT(85, OrtStatus*, const OrtKernelInfo*, const char*, float*)
#define GetAttributeInt SLOT(86, OrtStatus*, const OrtKernelInfo*, const char*, int64_t*)
#define GetInput SLOT(90, OrtStatus*, const OrtKernelContext*, size_t, const OrtValue**)
#define GetOutput \
  SLOT(91, OrtStatus*, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)
#define ReleaseStatus SLOT(93, void, OrtStatus*)
#define ReleaseTensorInfo SLOT(99, void, OrtTensorInfo*)
#define ReleaseCustomOpDomain SLOT(101, void, OrtCustomOpDomain*)
#define GetGPUComputeStream SLOT(193, OrtStatus*, const OrtKernelContext*, void**)
#define GetNodeName SLOT(244, OrtStatus*, const OrtKernelInfo*, char*, size_t*)
#define GetConstantInput \
  SLOT(249, OrtStatus*, const OrtKernelInfo*, size_t, int*, const OrtValue**)
#define GetInputShape \
  SLOT(268, OrtStatus*, const OrtShapeInferContext*, size_t, OrtTensorInfo**)
#define SetOutputShape \
  SLOT(270, OrtStatus*, OrtShapeInferContext*, size_t, const OrtTensorInfo*)
#define SetSymbolicDimensions SLOT(271, OrtStatus*, OrtTensorInfo*, const char**, size_t)
#define ParallelFor \
  SLOT(274, OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)
#define GetShapeReference \
  SLOT(414, OrtStatus*, const OrtValue*, int*, const int64_t**, size_t*)

/* ---- kernels: DLPack tensors through the tvm-ffi calling convention ---- */

typedef struct {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} Tensor;

typedef struct {
  int32_t type;
  uint32_t padding;
  union {
    int64_t integer;
    double real;
    void* pointer;
  } value;
} Argument;

enum { ARGUMENT_INT = 1, ARGUMENT_FLOAT = 3, ARGUMENT_TENSOR = 7 };
typedef enum { CPU = 1, CUDA = 2 } Device; /* as DLPack numbers them */

typedef int (*Kernel)(void* self, const Argument* arguments, int32_t count, Argument* result);

/* ---- the table, generated by fusenorm.lower ---- */

enum { MAX_INPUTS = 8, MAX_OUTPUTS = 3, MAX_ATTRIBUTES = 4, MAX_RANK = 16 };
typedef enum { ROW, VECTOR, PACKED, PANELS, HEADS, SEQUENCE, SCORES, TABLE, CACHE } Layout;
typedef enum { ROWS, FLAT, LINEAR, ATTENTION } Kind; /* FLAT: elementwise throughout */
enum { TURNS_Q = 1, TURNS_K = 2, PARTIAL = 4 }; /* ATTENTION: rotary positions */

typedef struct {
  const char* name;
  int type; /* ONNXTensorElementDataType */
  int bytes;
  Layout layout;
} Slot;

typedef struct {
  const char* op_type;
  Kernel kernel;  /* every output */
  Kernel other;   /* the second output not wanted; LINEAR: lays out x in tiles */
  Device device;
  Kind kind;
  int parts; /* panels of a weight per panel of its y; 2 for grouped heads */
  int tile;  /* LINEAR: rows taken at a time */
  int norm;  /* LINEAR: how many attributes, the last ones, are for laying out rows; 0: no norm */
  int ragged; /* LINEAR: as many columns as the bias has, the last panel not full */
  int turns;
  int inputs, outputs, attributes;
  Slot input[MAX_INPUTS], output[MAX_OUTPUTS];
  const char* attribute[MAX_ATTRIBUTES];
} Op;

/* OPS[], OP_COUNT, KNOWN_ATTRIBUTES[], LEVEL, X86_LEVEL, LANES, HAS_CUDA */
#include "fusenorm_table.h"

#if HAS_CUDA
#include "tvm_ffi_shim.h"
#endif
#ifndef CUDA_PROVIDER
#define CUDA_PROVIDER "CUDAExecutionProvider"
#endif

#if X86_LEVEL >= 3
#include <cpuid.h>

/* Whether this CPU, and the system's saving of its registers, falls short of the level. */
static int level_missing(void) {
  enum { FMA = 1 << 12, MOVBE = 1 << 22, OSXSAVE = 1 << 27, AVX = 1 << 28, F16C = 1 << 29 };
  enum { BMI1 = 1 << 3, AVX2 = 1 << 5, BMI2 = 1 << 8 };
  const unsigned basic = FMA | MOVBE | OSXSAVE | AVX | F16C;
  const unsigned wide = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31; /* F DQ CD BW VL */
  const unsigned extended = BMI1 | AVX2 | BMI2 | (X86_LEVEL >= 4 ? wide : 0u);
  const unsigned states = X86_LEVEL >= 4 ? 0xe6 : 0x6;
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & basic) != basic) return 1;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & extended) != extended) return 1;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & states) != states;
}
#else
static int level_missing(void) { return 0; }
#endif

/* ---- state ---- */

typedef struct {
  OrtCustomOp base; /* first: onnxruntime passes its address back */
  const Op* op;
} CustomOp;

typedef struct {
  const char* data; /* of a constant vector, else NULL */
  int64_t length;
  size_t rank;
} Constant;

typedef struct {
  const Op* op;
  float attribute[MAX_ATTRIBUTES];
  Constant constant[MAX_INPUTS];
  char name[128];
} State;

static CustomOp CUSTOM_OPS[OP_COUNT];
static OrtApi api;
static int version; /* of the API, at most what is used of it */
static uint64_t loaded_at; /* sets this load's names apart from those saved in a model */

/* An onnxruntime failure returned as it is; a value is released with `cleanup` first. */
#define TRY(call)                      \
  do {                                 \
    OrtStatus* status_ = (call);       \
    if (status_ != NULL) return status_; \
  } while (0)

static OrtStatus* fail(const State* state, const char* what) {
  char text[512];
  snprintf(text, sizeof text, "fusenorm:%s (node '%s'): %s", state->op->op_type, state->name, what);
  return CreateStatus(ORT_INVALID_ARGUMENT, text);
}

static OrtStatus* fail_slot(const State* state, const Slot* slot, const char* what) {
  char text[256];
  snprintf(text, sizeof text, "input '%s' %s", slot->name, what);
  return fail(state, text);
}

static OrtStatus* shape_of(const OrtValue* value, int64_t* dims, size_t* rank) {
  if (version >= ORT_API_SHAPE_REFERENCE) {
    int type;
    const int64_t* shape = NULL;
    TRY(GetShapeReference(value, &type, &shape, rank));
    if (*rank > MAX_RANK) return CreateStatus(ORT_INVALID_ARGUMENT, "fusenorm: rank above 16");
    if (*rank) memcpy(dims, shape, *rank * sizeof *dims);
    return NULL;
  }
  OrtTensorInfo* info = NULL;
  TRY(GetTensorInfo(value, &info));
  OrtStatus* status = GetDimensionsCount(info, rank);
  if (status == NULL && *rank > MAX_RANK)
    status = CreateStatus(ORT_INVALID_ARGUMENT, "fusenorm: rank above 16");
  if (status == NULL) status = GetDimensions(info, dims, *rank);
  ReleaseTensorInfo(info);
  return status;
}

/* ---- one call ---- */

typedef struct {
  const State* state;
  int outputs;                      /* written: 1 or 2 */
  const char* input[MAX_INPUTS];
  char* output[MAX_OUTPUTS];
  int64_t rows, columns;
  int64_t run;                      /* rows that are consecutive in every input */
  size_t outer;                     /* axes above a run */
  int64_t extent[MAX_RANK];         /* their sizes */
  int64_t step[MAX_INPUTS][MAX_RANK]; /* rows of an input per step along them */
  int64_t block;                    /* rows per parallel task */
  int32_t gpu;                      /* number of the device, where it is one */
  atomic_int failed;
} Job;

static void set_tensor(Tensor* tensor, int64_t* shape, size_t rank, const void* data,
                       const Slot* slot) {
  memset(tensor, 0, sizeof *tensor);
  tensor->data = (void*)data;
  tensor->device_type = CPU;
  tensor->ndim = (int32_t)rank;
  tensor->code = slot->bytes == 4 || slot->type == 10 ? 2 : 4; /* float, bfloat */
  tensor->bits = (uint8_t)(8 * slot->bytes);
  tensor->lanes = 1;
  tensor->shape = shape;
}

/* The kernel on `count` arguments and the op's attributes; nonzero if it refuses them. */
static int call_kernel(const State* state, Kernel kernel, Argument* arguments, int count) {
  for (int i = 0; i < state->op->attributes; ++i)
    arguments[count++] = (Argument){ARGUMENT_FLOAT, 0, {.real = state->attribute[i]}};
  Argument result = {0, 0, {0}};
  return kernel(NULL, arguments, count, &result);
}

static OrtStatus* refused(const State* state) {
#if HAS_CUDA
  if (state->op->device == CUDA) return fail(state, fusenorm_last_error());
#endif
  (void)state;
  return CreateStatus(ORT_FAIL, "fusenorm: a kernel refused its arguments");
}

/* Rows [first, first + count) of the outputs, inside one run. */
static int run_rows(const Job* job, int64_t first, int64_t count) {
  const Op* op = job->state->op;
  int64_t run = job->outer ? first / job->run : 0, columns = job->columns;
  int64_t inside = first - run * job->run;
  int64_t origin[MAX_INPUTS];
  for (int i = 0; i < op->inputs; ++i) origin[i] = inside;
  for (size_t axis = job->outer; axis-- > 0;) {
    int64_t at = run % job->extent[axis];
    run /= job->extent[axis];
    for (int i = 0; i < op->inputs; ++i) origin[i] += at * job->step[i][axis];
  }
  Tensor tensors[MAX_INPUTS + MAX_OUTPUTS];
  int64_t shapes[MAX_INPUTS + MAX_OUTPUTS][2];
  Argument arguments[MAX_INPUTS + MAX_OUTPUTS + 2 + MAX_ATTRIBUTES];
  int n = 0;
  for (; n < op->inputs + job->outputs; ++n) {
    const Slot* slot = n < op->inputs ? &op->input[n] : &op->output[n - op->inputs];
    int64_t width = slot->layout == PACKED ? 2 * columns : columns;
    int64_t row = n < op->inputs ? origin[n] : first;
    const char* data = n < op->inputs ? job->input[n] : job->output[n - op->inputs];
    if (slot->layout == VECTOR) {
      shapes[n][0] = columns;
    } else {
      data += row * width * slot->bytes;
      shapes[n][0] = count, shapes[n][1] = width;
    }
    set_tensor(&tensors[n], shapes[n], slot->layout == VECTOR ? 1 : 2, data, slot);
    tensors[n].device_type = op->device;
    tensors[n].device_id = job->gpu;
    arguments[n] = (Argument){ARGUMENT_TENSOR, 0, {.pointer = &tensors[n]}};
  }
  if (op->device == CPU) {
    arguments[n++] = (Argument){ARGUMENT_INT, 0, {.integer = 0}};
    arguments[n++] = (Argument){ARGUMENT_INT, 0, {.integer = count}};
  }
  Kernel kernel = job->outputs == op->outputs ? op->kernel : op->other;
  return call_kernel(job->state, kernel, arguments, n);
}

static void run_block(void* data, size_t index) {
  Job* job = data;
  int64_t first = (int64_t)index * job->block, end = first + job->block;
  if (end > job->rows) end = job->rows;
  while (first < end) {
    int64_t left = job->outer ? job->run - first % job->run : end - first;
    int64_t count = left < end - first ? left : end - first;
    if (run_rows(job, first, count) != 0) job->failed = 1;
    first += count;
  }
}

/* Broadcast shapes of the row inputs over their leading axes; fills dims, rows, columns, runs. */
static OrtStatus* plan(Job* job, int64_t shape[][MAX_RANK], const size_t* ranks, int64_t* dims,
                       size_t* rank) {
  const State* state = job->state;
  const Op* op = state->op;
  *rank = 0;
  for (int i = 0; i < op->inputs; ++i)
    if (op->input[i].layout != VECTOR && ranks[i] > *rank) *rank = ranks[i];
  job->columns = 1;
  size_t leading = *rank ? *rank - 1 : 0;
  for (size_t axis = 0; axis < leading; ++axis) dims[axis] = 1;
  int first = 1;
  for (int i = 0; i < op->inputs; ++i) {
    const Slot* slot = &op->input[i];
    if (slot->layout == VECTOR) continue;
    if (ranks[i] == 0 && !(op->kind == FLAT && *rank == 0))
      return fail_slot(state, slot, "is a scalar: it needs a last axis");
    int64_t width = ranks[i] ? shape[i][ranks[i] - 1] : 1;
    if (slot->layout == PACKED) {
      if (width % 2) return fail_slot(state, slot, "has an odd last axis: it holds two halves");
      width /= 2;
    }
    if (first) job->columns = width, first = 0;
    if (width != job->columns) return fail_slot(state, slot, "has another last axis");
    for (size_t axis = 0; axis + 1 < ranks[i]; ++axis) {
      int64_t size = shape[i][axis], *out = &dims[axis + *rank - ranks[i]];
      if (*out == 1) *out = size;
      else if (size != 1 && size != *out)
        return fail_slot(state, slot, "cannot broadcast to the other inputs' leading axes");
    }
  }
  for (int i = 0; i < op->inputs; ++i) {
    const Slot* slot = &op->input[i];
    if (slot->layout != VECTOR || job->input[i] != NULL) continue;
    int64_t size = 1;
    for (size_t axis = 0; axis < ranks[i]; ++axis) size *= shape[i][axis];
    if (ranks[i] == 0 || ranks[i] > *rank || size != job->columns ||
        shape[i][ranks[i] - 1] != job->columns)
      return fail_slot(state, slot, "is not a vector as long as the last axis");
  }
  if (*rank) dims[leading] = job->columns;
  job->rows = 1;
  for (size_t axis = 0; axis < leading; ++axis) job->rows *= dims[axis];

  /* Runs: the trailing leading axes that no input broadcasts over. */
  size_t outer = leading;
  job->run = 1;
  while (outer > 0) {
    size_t axis = outer - 1;
    int same = 1;
    for (int i = 0; i < op->inputs; ++i) {
      if (op->input[i].layout == VECTOR) continue;
      size_t missing = *rank - ranks[i];
      int64_t size = axis < missing ? 1 : shape[i][axis - missing];
      if (size != dims[axis]) same = 0;
    }
    if (!same) break;
    job->run *= dims[axis];
    outer = axis;
  }
  job->outer = outer;
  for (size_t axis = 0; axis < outer; ++axis) job->extent[axis] = dims[axis];
  for (int i = 0; i < op->inputs && outer > 0; ++i) {
    if (op->input[i].layout == VECTOR) {
      for (size_t axis = 0; axis < outer; ++axis) job->step[i][axis] = 0;
      continue;
    }
    size_t missing = *rank - ranks[i];
    int64_t stride = job->run;
    for (size_t axis = outer; axis-- > 0;) {
      int64_t size = axis < missing ? 1 : shape[i][axis - missing];
      job->step[i][axis] = size == 1 ? 0 : stride;
      stride *= size;
    }
  }
  return NULL;
}

/* Elements below which a thread costs more than it saves, and elements of one task. */
enum { PARALLEL_ELEMENTS = 32768, TASK_ELEMENTS = 16384, MAX_TASKS = 64, TASKS_PER_CPU = 4 };

/* Tasks for the CPUs there are to end together; set when the library is loaded. */
static int64_t most_tasks = MAX_TASKS;

static OrtStatus* rows_compute(const State* state, OrtKernelContext* context, int32_t gpu) {
  const Op* op = state->op;
  int64_t shape[MAX_INPUTS][MAX_RANK], dims[MAX_RANK];
  size_t ranks[MAX_INPUTS], rank;
  const OrtValue* values[MAX_INPUTS];
  Job job;
  job.state = state;
  job.failed = 0;
  job.gpu = gpu;
  for (int i = 0; i < op->inputs; ++i) {
    job.input[i] = state->constant[i].data;
    if (job.input[i] != NULL) continue;
    TRY(GetInput(context, i, &values[i]));
    if (values[i] == NULL) return fail_slot(state, &op->input[i], "is missing");
    TRY(shape_of(values[i], shape[i], &ranks[i]));
  }
  TRY(plan(&job, shape, ranks, dims, &rank));
  for (int i = 0; i < op->inputs; ++i) {
    if (job.input[i] != NULL) {
      if (state->constant[i].length != job.columns || state->constant[i].rank > rank)
        return fail_slot(state, &op->input[i], "is not a vector as long as the last axis");
      continue;
    }
    void* data = NULL;
    TRY(GetTensorMutableData(values[i], &data));
    job.input[i] = data;
  }
  job.outputs = 0;
  for (int i = 0; i < op->outputs; ++i) {
    OrtValue* value = NULL;
    TRY(GetOutput(context, i, dims, rank, &value));
    if (value == NULL) {
      if (i == 0) return fail(state, "its first output is not used: name it");
      break;
    }
    void* data = NULL;
    TRY(GetTensorMutableData(value, &data));
    job.output[job.outputs++] = data;
  }
  if (job.rows == 0 || job.columns == 0) return NULL;
  if (op->kind == FLAT && job.run == job.rows) { /* no row structure: share elements out, not rows */
    job.run = job.rows *= job.columns;
    job.columns = 1;
  }
  int64_t tasks = 1;
  job.block = job.rows;
  if (op->device == CPU && job.rows * job.columns >= PARALLEL_ELEMENTS) {
    tasks = job.rows * job.columns / TASK_ELEMENTS;
    if (tasks > MAX_TASKS) tasks = MAX_TASKS;
    if (tasks > job.rows) tasks = job.rows;
    job.block = (job.rows + tasks - 1) / tasks;
    if (job.columns == 1) job.block = (job.block + 63) / 64 * 64; /* elements: whole cache lines */
    tasks = (job.rows + job.block - 1) / job.block;
  }
  if (tasks > 1) {
    TRY(ParallelFor(context, run_block, (size_t)tasks, 0, &job));
  } else {
    run_block(&job, 0);
  }
  return job.failed ? refused(state) : NULL;
}

/* ---- creation ---- */

static int has_float(const OrtKernelInfo* info, const char* name, float* value) {
  OrtStatus* status = GetAttributeFloat(info, name, value);
  if (status != NULL) ReleaseStatus(status);
  return status == NULL;
}

static int has_int(const OrtKernelInfo* info, const char* name) {
  int64_t value;
  OrtStatus* status = GetAttributeInt(info, name, &value);
  if (status != NULL) ReleaseStatus(status);
  return status == NULL;
}

/* The API cannot list attributes: refuse those that other ops know by these names. */
static const char* stray_attribute(const Op* op, const OrtKernelInfo* info) {
  float value;
  for (size_t k = 0; k < sizeof KNOWN_ATTRIBUTES / sizeof *KNOWN_ATTRIBUTES; ++k) {
    int declared = 0;
    for (int i = 0; i < op->attributes; ++i)
      declared |= strcmp(op->attribute[i], KNOWN_ATTRIBUTES[k]) == 0;
    if (declared) continue;
    if (has_float(info, KNOWN_ATTRIBUTES[k], &value) || has_int(info, KNOWN_ATTRIBUTES[k]))
      return KNOWN_ATTRIBUTES[k];
  }
  return NULL;
}

/* Vectors that are constant need no look at their shape in every call. A GPU's copy of them is
   known only then. */
static OrtStatus* constants(State* state, const OrtKernelInfo* info) {
  if (state->op->device != CPU) return NULL;
  for (int i = 0; i < state->op->inputs; ++i) {
    const Slot* slot = &state->op->input[i];
    if (slot->layout != VECTOR) continue;
    int constant = 0;
    const OrtValue* value = NULL;
    TRY(GetConstantInput(info, i, &constant, &value));
    if (!constant || value == NULL) continue;
    int64_t dims[MAX_RANK], size = 1;
    size_t rank;
    TRY(shape_of(value, dims, &rank));
    for (size_t axis = 0; axis < rank; ++axis) size *= dims[axis];
    if (rank == 0 || dims[rank - 1] != size)
      return fail_slot(state, slot, "is not a vector");
    void* data = NULL;
    TRY(GetTensorMutableData(value, &data));
    state->constant[i] = (Constant){data, size, rank};
  }
  return NULL;
}

static OrtStatus* initialise(State* state, const OrtKernelInfo* info) {
  const Op* op = state->op;
  size_t size = sizeof state->name;
  OrtStatus* status = GetNodeName(info, state->name, &size);
  if (status != NULL) {
    ReleaseStatus(status);
    snprintf(state->name, sizeof state->name, "?");
  }
  char text[256];
  if (level_missing()) {
    snprintf(text, sizeof text, "this CPU lacks %s: register a library for its level", LEVEL);
    return fail(state, text);
  }
  for (int i = 0; i < op->attributes; ++i) {
    if (!has_float(info, op->attribute[i], &state->attribute[i])) {
      snprintf(text, sizeof text, "needs the float attribute '%s'", op->attribute[i]);
      return fail(state, text);
    }
  }
  const char* stray = stray_attribute(op, info);
  if (stray != NULL) {
    snprintf(text, sizeof text, "does not take the attribute '%s'", stray);
    return fail(state, text);
  }
  return constants(state, info);
}

static OrtStatus* create(const OrtCustomOp* self, OrtApi unused, const OrtKernelInfo* info,
                         void** kernel) {
  (void)unused;
  State* state = calloc(1, sizeof *state);
  if (state == NULL) return CreateStatus(ORT_FAIL, "fusenorm: out of memory");
  state->op = ((const CustomOp*)self)->op;
  OrtStatus* status = initialise(state, info);
  if (status != NULL) {
    free(state);
    state = NULL;
  }
  *kernel = state;
  return status;
}

/* ---- shape inference ---- */

typedef struct {
  size_t rank;
  int64_t size[MAX_RANK]; /* negative: unknown */
  const char* symbol[MAX_RANK];
} Shape;

/* Rank 0 stands for an unknown shape: onnxruntime does not tell them apart. */
static OrtStatus* read_shape(OrtTensorInfo* info, Shape* shape) {
  TRY(GetDimensionsCount(info, &shape->rank));
  if (shape->rank == 0 || shape->rank > MAX_RANK) {
    shape->rank = 0;
    return NULL;
  }
  TRY(GetDimensions(info, shape->size, shape->rank));
  return GetSymbolicDimensions(info, shape->symbol, shape->rank);
}

static void merge(int64_t* size, const char** symbol, int64_t other, const char* name) {
  if (*size == 1) {
    *size = other, *symbol = name;
  } else if (other == 1 || (*size >= 0 && other < 0)) {
    return;
  } else if (other >= 0) {
    *size = other, *symbol = "";
  } else if (strcmp(*symbol, name) != 0) {
    *symbol = "";
  }
}

typedef char Names[MAX_RANK][64];

/* Sizes that are unknown get a fresh symbol, kept in `fresh`, where they have none: onnxruntime
   would take the -1 for a size. */
static void name_unknown(Shape* shape, Names fresh) {
  static atomic_uint serial;
  for (size_t axis = 0; axis < shape->rank; ++axis) {
    if (shape->size[axis] >= 0) {
      shape->symbol[axis] = "";
    } else if (shape->symbol[axis][0] == 0) {
      snprintf(fresh[axis], sizeof fresh[axis], "fusenorm:%llx:%llx:%u",
               (unsigned long long)(uintptr_t)&serial, (unsigned long long)loaded_at,
               atomic_fetch_add(&serial, 1u));
      shape->symbol[axis] = fresh[axis];
    }
  }
}

static OrtStatus* write_output(OrtShapeInferContext* context, const Op* op, int i, Shape* shape) {
  OrtTensorInfo* info = NULL;
  TRY(CreateTensorInfo(&info));
  OrtStatus* status = SetTensorElementType(info, op->output[i].type);
  if (status == NULL) status = SetDimensions(info, shape->size, shape->rank);
  if (status == NULL) status = SetSymbolicDimensions(info, shape->symbol, shape->rank);
  if (status == NULL) status = SetOutputShape(context, i, info);
  ReleaseTensorInfo(info);
  if (status != NULL && i > 0) { /* the node leaves this output out */
    ReleaseStatus(status);
    status = NULL;
  }
  return status;
}

/* Every output has this shape. */
static OrtStatus* write_shape(OrtShapeInferContext* context, const Op* op, Shape* shape) {
  Names fresh;
  name_unknown(shape, fresh);
  for (int i = 0; i < op->outputs; ++i) TRY(write_output(context, op, i, shape));
  return NULL;
}

static OrtStatus* rows_infer(const Op* op, OrtShapeInferContext* context) {
  OrtTensorInfo* infos[MAX_INPUTS] = {NULL};
  Shape shapes[MAX_INPUTS], result = {0};
  for (int i = 0; i < op->inputs; ++i) {
    if (op->input[i].layout == VECTOR) continue;
    TRY(GetInputShape(context, i, &infos[i])); /* owned by the context */
    TRY(read_shape(infos[i], &shapes[i]));
    if (shapes[i].rank == 0) return NULL;
    if (shapes[i].rank > result.rank) result.rank = shapes[i].rank;
  }
  for (size_t axis = 0; axis < result.rank; ++axis) result.size[axis] = 1, result.symbol[axis] = "";
  for (int i = 0; i < op->inputs; ++i) {
    if (op->input[i].layout == VECTOR) continue;
    size_t missing = result.rank - shapes[i].rank, last = shapes[i].rank - 1;
    if (op->input[i].layout == PACKED) {
      if (shapes[i].size[last] >= 0) shapes[i].size[last] /= 2;
      shapes[i].symbol[last] = "";
    }
    for (size_t axis = 0; axis < shapes[i].rank; ++axis)
      merge(&result.size[axis + missing], &result.symbol[axis + missing], shapes[i].size[axis],
            shapes[i].symbol[axis]);
  }
  return write_shape(context, op, &result);
}

/* ---- kinds of ops ---- */

#include "ort_scratch.h"
#include "ort_linear.h"
#include "ort_attention.h"
#if HAS_CUDA
#include "ort_cuda.h"
#endif

static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const State* state = kernel;
#if HAS_CUDA
  if (state->op->device == CUDA) return cuda_compute(state, context);
#endif
  switch (state->op->kind) {
    case LINEAR: return linear_compute(state, context);
    case ATTENTION: return attention_compute(state, context);
    default: return rows_compute(state, context, 0);
  }
}

static OrtStatus* infer_shape(const OrtCustomOp* self, OrtShapeInferContext* context) {
  const Op* op = ((const CustomOp*)self)->op;
  switch (op->kind) {
    case LINEAR: return linear_infer(op, context);
    case ATTENTION: return attention_infer(op, context);
    default: return rows_infer(op, context);
  }
}

/* ---- the op table as onnxruntime sees it ---- */

static const Op* op_of(const OrtCustomOp* self) { return ((const CustomOp*)self)->op; }
static const char* get_name(const OrtCustomOp* self) { return op_of(self)->op_type; }
static const char* get_provider(const OrtCustomOp* self) {
  return op_of(self)->device == CUDA ? CUDA_PROVIDER : NULL; /* NULL: the CPU's */
}
static int get_input_type(const OrtCustomOp* self, size_t i) { return op_of(self)->input[i].type; }
static int get_output_type(const OrtCustomOp* self, size_t i) { return op_of(self)->output[i].type; }
static size_t get_input_count(const OrtCustomOp* self) { return (size_t)op_of(self)->inputs; }
static size_t get_output_count(const OrtCustomOp* self) { return (size_t)op_of(self)->outputs; }
static int get_input_kind(const OrtCustomOp* self, size_t i) { return (void)self, (void)i, REQUIRED; }
static int get_output_kind(const OrtCustomOp* self, size_t i) {
  return (void)self, i == 0 ? REQUIRED : OPTIONAL;
}
static int get_memory(const OrtCustomOp* self, size_t i) { return (void)self, (void)i, 0; }
static int zero(const OrtCustomOp* self) { return (void)self, 0; }
static int start_version(const OrtCustomOp* self) { return (void)self, 1; }
static int end_version(const OrtCustomOp* self) { return (void)self, 0x7fffffff; }
static void destroy(void* kernel) { free(kernel); }

/* An output of rows may lie where an input of rows of the same shape lay: a kernel reads each
   element for the last time before it writes there. How many inputs and outputs have rows is known
   only outside: onnxruntime does not say which op it asks for. */
static size_t in_place_1_1(int** inputs, int** outputs) {
  static int input[] = {0}, output[] = {0};
  *inputs = input, *outputs = output;
  return 1;
}
static size_t in_place_2_1(int** inputs, int** outputs) {
  static int input[] = {0, 1}, output[] = {0, 0};
  *inputs = input, *outputs = output;
  return 2;
}
static size_t in_place_2_2(int** inputs, int** outputs) {
  static int input[] = {1, 0, 0, 1}, output[] = {0, 0, 1, 1};
  *inputs = input, *outputs = output;
  return 4;
}
static size_t in_place_third(int** inputs, int** outputs) {
  static int input[] = {2}, output[] = {0};
  *inputs = input, *outputs = output;
  return 1;
}
static size_t in_place_fourth(int** inputs, int** outputs) {
  static int input[] = {3}, output[] = {0};
  *inputs = input, *outputs = output;
  return 1;
}
static void keep_in_place(int* inputs, int* outputs) { (void)inputs, (void)outputs; }

static size_t (*in_place(const Op* op))(int**, int**) {
  if (op->kind == LINEAR && op->input[op->inputs - 1].layout == ROW) /* residual */
    return op->inputs == 3 ? in_place_third : in_place_fourth;
  if (op->device != CPU || (op->kind != ROWS && op->kind != FLAT)) return NULL;
  if (op->input[0].layout != ROW) return NULL;
  if (op->inputs < 2 || op->input[1].layout != ROW) return in_place_1_1;
  return op->outputs == 1 ? in_place_2_1 : in_place_2_2;
}

static OrtStatus* make_domain(OrtCustomOpDomain** domain) {
  TRY(CreateCustomOpDomain("fusenorm", domain));
  for (size_t i = 0; i < OP_COUNT; ++i) {
    CUSTOM_OPS[i] = (CustomOp){
        .base = {.version = version < ORT_API_IN_PLACE ? version : ORT_API_IN_PLACE,
                 .GetName = get_name,
                 .GetExecutionProviderType = get_provider,
                 .GetInputType = get_input_type,
                 .GetInputTypeCount = get_input_count,
                 .GetOutputType = get_output_type,
                 .GetOutputTypeCount = get_output_count,
                 .KernelDestroy = destroy,
                 .GetInputCharacteristic = get_input_kind,
                 .GetOutputCharacteristic = get_output_kind,
                 .GetInputMemoryType = get_memory,
                 .Variadic = {zero, zero, zero, zero},
                 .CreateKernelV2 = create,
                 .KernelComputeV2 = compute,
                 .InferOutputShape = infer_shape,
                 .GetStartVersion = start_version,
                 .GetEndVersion = end_version,
                 .GetMayInplace = in_place(&OPS[i]),
                 .ReleaseMayInplace = keep_in_place},
        .op = &OPS[i]};
    TRY(CustomOpDomain_Add(*domain, &CUSTOM_OPS[i].base));
  }
  return NULL;
}

/* onnxruntime's entry point, for register_custom_ops_library. */
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                    const OrtApiBase* base) {
  static OrtCustomOpDomain* shared;
  static atomic_flag lock = ATOMIC_FLAG_INIT;
  OrtStatus* status = NULL;
  while (atomic_flag_test_and_set(&lock)) continue;
  if (shared == NULL) {
    loaded_at = ((uint64_t)time(NULL) << 24) ^ (uint64_t)clock();
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    if (cpus > 0 && cpus < MAX_TASKS / TASKS_PER_CPU) most_tasks = TASKS_PER_CPU * cpus;
    /* Asking for a version that is not there makes onnxruntime print: look first. */
    const char* dot = strchr(base->GetVersionString(), '.');
    int minor = dot != NULL ? atoi(dot + 1) : ORT_API;
    version = minor >= ORT_API_SHAPE_REFERENCE ? ORT_API_SHAPE_REFERENCE
              : minor >= ORT_API_IN_PLACE      ? ORT_API_IN_PLACE
                                               : ORT_API;
    api = base->GetApi(version);
    if (api != NULL) status = make_domain(&shared);
  }
  atomic_flag_clear(&lock);
  if (api == NULL) {
    OrtApi first = base->GetApi(1);
    OrtStatus* (*create_status)(int, const char*) = (OrtStatus * (*)(int, const char*)) first[0];
    return create_status(ORT_FAIL, "the fusenorm library needs onnxruntime 1.17 or newer");
  }
  return status != NULL ? status : AddCustomOpDomain(options, shared);
}

/* For callers of the kernels alone: f32 in a vector, which the height of a LINEAR's tile follows. */
__attribute__((visibility("default"))) int __tvm_ffi_fusenorm_lanes(void* self,
                                                                    const Argument* arguments,
                                                                    int32_t count,
                                                                    Argument* result) {
  (void)self, (void)arguments, (void)count;
  *result = (Argument){ARGUMENT_INT, 0, {.integer = LANES}};
  return 0;
}
