/* Linear ops: x [..., K], a weight in panels [P, K, PANEL], vectors [N]; y [..., N].

   The rows of x are laid out in tiles first. A task is then a block of tiles times a range of
   panels. Blocks are as high as lets their part of x stay in the caches of a core while the panels
   pass by: each block reads all of the weight. */

/* Fewer rows than BOUND_ROWS take no less time: weights must come from memory. */
enum { PANEL = 32, BLOCK_BYTES = 1 << 21, LINEAR_TASK = 1 << 20, LAYOUT_TASK = 1 << 15, BOUND_ROWS = 8 };

typedef struct {
  const State* state;
  const char* input[MAX_INPUTS];
  char* output;
  char* tiles; /* x as the kernel reads it: f32 */
  int64_t rows, inner, columns, panels; /* panels: of y */
  int64_t height;                       /* rows of a tile */
  int64_t layout_block, row_block, panel_block, panel_blocks;
  atomic_int failed;
} LinearJob;

static const Slot TILES = {"tiles", 1, 4, ROW};

/* Tensors, then numbers; how many arguments that makes. */
static int linear_arguments(Argument* arguments, Tensor* tensors, int n, const int64_t* numbers,
                            int count) {
  for (int i = 0; i < n; ++i)
    arguments[i] = (Argument){ARGUMENT_TENSOR, 0, {.pointer = &tensors[i]}};
  for (int i = 0; i < count; ++i)
    arguments[n + i] = (Argument){ARGUMENT_INT, 0, {.integer = numbers[i]}};
  return n + count;
}

static int64_t upto(int64_t end, int64_t most) { return end < most ? end : most; }

/* Tiles of a block of rows. */
static void layout_task(void* data, size_t index) {
  LinearJob* job = data;
  int64_t shape[2] = {job->rows, job->inner}, size = (job->rows + 1) * job->inner;
  int64_t row = (int64_t)index * job->layout_block;
  int64_t numbers[3] = {job->height, row, upto(row + job->layout_block, job->rows)};
  Tensor tensors[2];
  Argument arguments[5], result = {0, 0, {0}};
  set_tensor(&tensors[0], shape, 2, job->input[0], &job->state->op->input[0]);
  set_tensor(&tensors[1], &size, 1, job->tiles, &TILES);
  int count = linear_arguments(arguments, tensors, 2, numbers, 3);
  if (job->state->op->other(NULL, arguments, count, &result) != 0) job->failed = 1;
}

static void linear_task(void* data, size_t index) {
  LinearJob* job = data;
  const Op* op = job->state->op;
  int64_t row = (int64_t)index / job->panel_blocks * job->row_block;
  int64_t panel = (int64_t)index % job->panel_blocks * job->panel_block;
  int64_t numbers[5] = {job->height, row, upto(row + job->row_block, job->rows), panel,
                        upto(panel + job->panel_block, job->panels)};
  int64_t size = (job->rows + 1) * job->inner;
  int64_t panels[3] = {job->panels * op->parts, job->inner, PANEL};
  int64_t result[2] = {job->rows, job->columns};
  Tensor tensors[MAX_INPUTS + 1];
  Argument arguments[MAX_INPUTS + 1 + 5 + MAX_ATTRIBUTES];
  set_tensor(&tensors[0], &size, 1, job->tiles, &TILES);
  for (int i = 1; i < op->inputs; ++i) {
    int is_weight = op->input[i].layout == PANELS;
    set_tensor(&tensors[i], is_weight ? panels : &job->columns, is_weight ? 3 : 1, job->input[i],
               &op->input[i]);
  }
  set_tensor(&tensors[op->inputs], result, 2, job->output, &op->output[0]);
  int count = linear_arguments(arguments, tensors, op->inputs + 1, numbers, 5);
  if (call_kernel(job->state, op->kernel, arguments, count) != 0) job->failed = 1;
}

/* Tiles of the same even height. Row blocks first; then panels, until tasks are too small to share out. */
static int64_t linear_tasks(LinearJob* job) {
  int64_t tiles = (job->rows + job->state->op->tile - 1) / job->state->op->tile;
  job->height = (job->rows + tiles - 1) / tiles;
  if (job->height > 1) job->height += job->height % 2;
  tiles = (job->rows + job->height - 1) / job->height;
  int64_t high = BLOCK_BYTES / (4 * (job->inner + 1) * job->height);
  int64_t blocks = high > 1 ? (tiles + high - 1) / high : tiles;
  job->row_block = (tiles + blocks - 1) / blocks * job->height;
  blocks = (job->rows + job->row_block - 1) / job->row_block;
  double rows = (double)(job->row_block < BOUND_ROWS ? BOUND_ROWS : job->row_block);
  double work = rows * (double)job->inner * PANEL * job->state->op->parts;
  job->panel_block = 1 + (int64_t)(LINEAR_TASK / (work + 1));
  int64_t most = MAX_TASKS / blocks;
  if (most < 1) most = 1;
  if ((job->panels + job->panel_block - 1) / job->panel_block > most)
    job->panel_block = (job->panels + most - 1) / most;
  job->panel_blocks = (job->panels + job->panel_block - 1) / job->panel_block;
  return blocks * job->panel_blocks;
}

static OrtStatus* linear_share(OrtKernelContext* context, void (*task)(void*, size_t),
                               int64_t tasks, LinearJob* job) {
  if (tasks > 1) return ParallelFor(context, task, (size_t)tasks, 0, job);
  task(job, 0);
  return NULL;
}

/* One f32 row is a tile as it lies; else the tiles get memory of their own, in `made`. */
static OrtStatus* linear_layout(LinearJob* job, OrtKernelContext* context, void** made) {
  job->tiles = (char*)job->input[0];
  if (job->rows == 1 && job->state->op->input[0].bytes == 4) return NULL;
  *made = malloc((size_t)((job->rows + 1) * job->inner) * 4 + 64);
  if (*made == NULL) return CreateStatus(ORT_FAIL, "fusenorm: out of memory");
  job->tiles = (char*)*made + (64 - (uintptr_t)*made % 64) % 64;
  job->layout_block = (1 + LAYOUT_TASK / (job->inner * job->height + 1)) * job->height;
  int64_t tasks = (job->rows + job->layout_block - 1) / job->layout_block;
  return linear_share(context, layout_task, tasks, job);
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
  void* made = NULL;
  OrtStatus* status = linear_layout(&job, context, &made);
  if (status == NULL) status = linear_share(context, linear_task, tasks, &job);
  free(made);
  return status != NULL ? status : job.failed ? refused(state) : NULL;
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
