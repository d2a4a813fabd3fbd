/* Linear ops: x [..., K], a weight in panels [P, K, PANEL], vectors [N]; y [..., N].

   A task is a block of rows times a range of panels. Blocks of rows are as high as lets their part
   of x stay in the second-level cache while the panels pass by. */

enum { PANEL = 32, BLOCK_BYTES = 1 << 19, BLOCK_ROWS = 24, LINEAR_TASK = 1 << 20 };

typedef struct {
  const State* state;
  const char* input[MAX_INPUTS];
  char* output;
  int64_t rows, inner, columns, panels; /* panels: of y */
  int64_t row_block, panel_block, panel_blocks;
  int failed;
} LinearJob;

static void linear_task(void* data, size_t index) {
  LinearJob* job = data;
  const Op* op = job->state->op;
  int64_t row = (int64_t)index / job->panel_blocks * job->row_block;
  int64_t panel = (int64_t)index % job->panel_blocks * job->panel_block;
  int64_t bounds[4] = {row, row + job->row_block, panel, panel + job->panel_block};
  if (bounds[1] > job->rows) bounds[1] = job->rows;
  if (bounds[3] > job->panels) bounds[3] = job->panels;
  int64_t shapes[MAX_INPUTS + 1][3];
  Tensor tensors[MAX_INPUTS + 1];
  Argument arguments[MAX_INPUTS + 1 + 4 + MAX_ATTRIBUTES];
  int n = 0;
  for (; n <= op->inputs; ++n) {
    const Slot* slot = n < op->inputs ? &op->input[n] : &op->output[0];
    int64_t* shape = shapes[n];
    size_t rank = 2;
    if (slot->layout == PANELS) {
      shape[0] = job->panels * op->parts, shape[1] = job->inner, shape[2] = PANEL, rank = 3;
    } else if (slot->layout == VECTOR) {
      shape[0] = job->columns, rank = 1;
    } else {
      shape[0] = job->rows, shape[1] = n < op->inputs ? job->inner : job->columns;
    }
    set_tensor(&tensors[n], shape, rank, n < op->inputs ? job->input[n] : job->output, slot);
    arguments[n] = (Argument){ARGUMENT_TENSOR, 0, {.pointer = &tensors[n]}};
  }
  for (int i = 0; i < 4; ++i) arguments[n++] = (Argument){ARGUMENT_INT, 0, {.integer = bounds[i]}};
  if (call_kernel(job->state, op->kernel, arguments, n) != 0) job->failed = 1;
}

/* Row blocks first; then panels, until the tasks are too small to share out. */
static int64_t linear_tasks(LinearJob* job) {
  int64_t high = BLOCK_BYTES / (4 * (job->inner + 1)) / BLOCK_ROWS * BLOCK_ROWS;
  if (high < BLOCK_ROWS) high = BLOCK_ROWS;
  int64_t blocks = (job->rows + high - 1) / high;
  job->row_block = ((job->rows + blocks - 1) / blocks + 7) / 8 * 8;
  blocks = (job->rows + job->row_block - 1) / job->row_block;
  double work = (double)job->row_block * (double)job->inner * PANEL * job->state->op->parts;
  job->panel_block = 1 + (int64_t)(LINEAR_TASK / (work + 1));
  int64_t most = MAX_TASKS / blocks;
  if (most < 1) most = 1;
  if ((job->panels + job->panel_block - 1) / job->panel_block > most)
    job->panel_block = (job->panels + most - 1) / most;
  job->panel_blocks = (job->panels + job->panel_block - 1) / job->panel_block;
  return blocks * job->panel_blocks;
}

static OrtStatus* linear_compute(const State* state, OrtKernelContext* context) {
  const Op* op = state->op;
  LinearJob job = {.state = state};
  int64_t dims[MAX_RANK], shape[MAX_RANK];
  size_t rank = 0, other;
  for (int i = 0; i < op->inputs; ++i) {
    const Slot* slot = &op->input[i];
    const OrtValue* value = NULL;
    TRY(GetInput(context, i, &value));
    if (value == NULL) return fail_slot(state, slot, "is missing");
    void* data = NULL;
    TRY(GetTensorMutableData(value, &data));
    job.input[i] = data;
    if (slot->layout == ROW) {
      TRY(shape_of(value, dims, &rank));
      if (rank == 0) return fail_slot(state, slot, "is a scalar: it needs a last axis");
      job.inner = dims[rank - 1];
      continue;
    }
    TRY(shape_of(value, shape, &other));
    if (slot->layout == PANELS) {
      if (other != 3 || shape[1] != job.inner || shape[2] != PANEL || shape[0] % op->parts)
        return fail_slot(state, slot, "is not made of panels as high as the last axis of x");
      job.panels = shape[0] / op->parts;
      job.columns = job.panels * PANEL;
    } else {
      int64_t size = 1;
      for (size_t axis = 0; axis < other; ++axis) size *= shape[axis];
      if (other == 0 || other > rank || size != job.columns || shape[other - 1] != size)
        return fail_slot(state, slot, "is not a vector as long as the weight has columns");
    }
  }
  job.rows = 1;
  for (size_t axis = 0; axis + 1 < rank; ++axis) job.rows *= dims[axis];
  dims[rank - 1] = job.columns;
  OrtValue* y = NULL;
  TRY(GetOutput(context, 0, dims, rank, &y));
  if (y == NULL) return fail(state, "its output is not used: name it");
  void* data = NULL;
  TRY(GetTensorMutableData(y, &data));
  job.output = data;
  if (job.rows == 0 || job.columns == 0) return NULL;
  int64_t tasks = linear_tasks(&job);
  if (tasks > 1) {
    TRY(ParallelFor(context, linear_task, (size_t)tasks, 0, &job));
  } else {
    linear_task(&job, 0);
  }
  return job.failed ? refused() : NULL;
}

static OrtStatus* linear_infer(const Op* op, OrtShapeInferContext* context) {
  Shape x, weight;
  OrtTensorInfo* info = NULL;
  TRY(GetInputShape(context, 0, &info));
  TRY(read_shape(info, &x));
  TRY(GetInputShape(context, 1, &info));
  TRY(read_shape(info, &weight));
  if (x.rank == 0 || weight.rank != 3) return NULL;
  int known = weight.size[0] >= 0;
  x.size[x.rank - 1] = known ? weight.size[0] / op->parts * PANEL : -1;
  x.symbol[x.rank - 1] = "";
  return write_shape(context, op, &x);
}
