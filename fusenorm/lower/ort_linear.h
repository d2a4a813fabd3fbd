/* Linear ops: x [..., K], then for each map a weight in panels [P, K, PANEL] and vectors [N], and
   for a single map perhaps a residual [..., N]; an output y [..., N] for each map. N is P·PANEL, or
   of a ragged op the length of its vectors, and the last panel holds what is left.

   The rows of x are laid out in tiles first. A task is then a block of tiles times a range of
   panels of one map. Blocks are as high as lets their part of x stay in the caches of a core while
   the panels pass by: each block reads all of the weight. */

/* Multiply-adds: up to LINEAR_ALONE threads cost more than they save, more are dealt out in tasks of
   LINEAR_TASK or a panel. Fewer rows than BOUND_ROWS take no less time: weights must come from
   memory. */
enum {
  PANEL = 32,
  BLOCK_BYTES = 1 << 23,
  LINEAR_ALONE = 1 << 21,
  LINEAR_TASK = 1 << 17,
  LAYOUT_TASK = 1 << 15,
  BOUND_ROWS = 8
};

typedef struct {
  const State* state;
  const char* input[MAX_INPUTS];
  char* output[MAX_OUTPUTS];
  char* tiles; /* x as the kernel reads it: f32 */
  int64_t rows, inner;
  int64_t columns[MAX_OUTPUTS], panels[MAX_OUTPUTS]; /* of each y; none if it is not wanted */
  int64_t height, taller, count; /* rows of a tile, tiles of two rows more, tiles */
  int64_t layout_block, row_block, panel_block, panel_blocks; /* the first two of tiles */
  int alone; /* on one thread */
  atomic_int failed;
} LinearJob;

static const Slot TILES = {"tiles", 1, 4, ROW}, WIDE = {"wide", 1, 4, ROW};

/* A kernel on `n` tensors, `count` numbers and the attributes [first, last). */
static void linear_call(LinearJob* job, Kernel kernel, Tensor* tensors, int n,
                        const int64_t* numbers, int count, int first, int last) {
  Argument arguments[MAX_INPUTS + 2 + 6 + MAX_ATTRIBUTES], result = {0, 0, {0}};
  int made = 0;
  for (int i = 0; i < n; ++i)
    arguments[made++] = (Argument){ARGUMENT_TENSOR, 0, {.pointer = &tensors[i]}};
  for (int i = 0; i < count; ++i)
    arguments[made++] = (Argument){ARGUMENT_INT, 0, {.integer = numbers[i]}};
  for (int i = first; i < last; ++i)
    arguments[made++] = (Argument){ARGUMENT_FLOAT, 0, {.real = job->state->attribute[i]}};
  if (kernel(NULL, arguments, made, &result) != 0) job->failed = 1;
}

static int64_t upto(int64_t end, int64_t most) { return end < most ? end : most; }
static int64_t shares(int64_t whole, int64_t share) { return (whole + share - 1) / share; }

/* A block of tiles. */
static void layout_task(void* data, size_t index) {
  LinearJob* job = data;
  int64_t shape[2] = {job->rows, job->inner}, size = (job->rows + 1) * job->inner;
  int64_t tile = (int64_t)index * job->layout_block;
  int64_t numbers[4] = {job->height, job->taller, tile,
                        upto(tile + job->layout_block, job->count)};
  const Op* op = job->state->op;
  Tensor tensors[2];
  set_tensor(&tensors[0], shape, 2, job->input[0], &op->input[0]);
  set_tensor(&tensors[1], &size, 1, job->tiles, &TILES);
  linear_call(job, op->other, tensors, 2, numbers, 4, op->attributes - op->norm, op->attributes);
}

/* Inputs of a map. */
static int linear_reads(const Op* op) { return (op->inputs - 1) / op->outputs; }

static void linear_task(void* data, size_t index) {
  LinearJob* job = data;
  const Op* op = job->state->op;
  int64_t tile = (int64_t)index / job->panel_blocks * job->row_block;
  int64_t block = (int64_t)index % job->panel_blocks;
  int map = 0, reads = linear_reads(op);
  for (int64_t own; block >= (own = shares(job->panels[map], job->panel_block)); ++map)
    block -= own;
  int64_t panel = block * job->panel_block;
  int64_t numbers[6] = {job->height, job->taller,
                        tile, upto(tile + job->row_block, job->count),
                        panel, upto(panel + job->panel_block, job->panels[map])};
  int64_t size = (job->rows + 1) * job->inner;
  int64_t panels[3] = {job->panels[map] * op->parts, job->inner, PANEL};
  int64_t result[2] = {job->rows, job->columns[map]};
  Tensor tensors[MAX_INPUTS + 2];
  set_tensor(&tensors[0], &size, 1, job->tiles, &TILES);
  for (int i = 1; i <= reads; ++i) {
    int at = map * reads + i;
    switch (op->input[at].layout) {
      case PANELS: set_tensor(&tensors[i], panels, 3, job->input[at], &op->input[at]); break;
      case ROW: set_tensor(&tensors[i], result, 2, job->input[at], &op->input[at]); break;
      default: set_tensor(&tensors[i], &result[1], 1, job->input[at], &op->input[at]);
    }
  }
  set_tensor(&tensors[reads + 1], result, 2, job->output[map], &op->output[map]);
  int made = reads + 2;
  char* wide = NULL;
  if (op->input[1].bytes == 2) { /* room for the columns of several tiles in f32 */
    int64_t columns = job->count > 1 ? job->inner * PANEL * op->parts : 0;
    wide = take_scratch((size_t)columns * 4);
    if (wide == NULL) {
      job->failed = 1;
      return;
    }
    set_tensor(&tensors[made++], &columns, 1, wide, &WIDE);
  }
  linear_call(job, op->kernel, tensors, made, numbers, 6, 0, op->attributes - op->norm);
  give_scratch(wide);
}

static int64_t linear_panel_blocks(const LinearJob* job) {
  int64_t blocks = 0;
  for (int map = 0; map < job->state->op->outputs; ++map)
    blocks += shares(job->panels[map], job->panel_block);
  return blocks;
}

/* Tiles of even heights, as few and as alike as can be: a flat one waits for its panels. */
static void linear_tiles(LinearJob* job) {
  int64_t pairs = shares(job->rows, 2);
  job->count = shares(job->rows, job->state->op->tile);
  job->height = job->rows == 1 ? 1 : pairs / job->count * 2;
  job->taller = job->rows == 1 ? 0 : pairs % job->count;
}

/* Row blocks first; then panels, until tasks are too small to share out. */
static int64_t linear_tasks(LinearJob* job) {
  linear_tiles(job);
  int64_t high = BLOCK_BYTES / (4 * (job->inner + 1) * job->height);
  int64_t blocks = high > 1 ? shares(job->count, high) : job->count;
  job->row_block = shares(job->count, blocks);
  blocks = shares(job->count, job->row_block);
  double rows = (double)(job->row_block * job->height);
  if (rows < BOUND_ROWS) rows = BOUND_ROWS;
  double work = rows * (double)job->inner * PANEL * job->state->op->parts;
  job->panel_block = 1 + (int64_t)(LINEAR_TASK / (work + 1));
  int64_t most = MAX_TASKS / blocks, panels = 0;
  if (most < 1) most = 1;
  for (int map = 0; map < job->state->op->outputs; ++map) panels += job->panels[map];
  if (linear_panel_blocks(job) > most) job->panel_block = shares(panels, most);
  job->alone = work * (double)(panels * blocks) <= LINEAR_ALONE;
  job->panel_blocks = linear_panel_blocks(job);
  return blocks * job->panel_blocks;
}

static OrtStatus* linear_share(OrtKernelContext* context, void (*task)(void*, size_t),
                               int64_t tasks, LinearJob* job) {
  if (tasks > 1 && !job->alone) return ParallelFor(context, task, (size_t)tasks, 0, job);
  for (int64_t index = 0; index < tasks; ++index) task(job, (size_t)index);
  return NULL;
}

/* One f32 row is a tile as it lies, unless it is normalised or y takes its place; else the tiles
   get memory of their own, in `made`. */
static OrtStatus* linear_layout(LinearJob* job, OrtKernelContext* context, char** made) {
  job->tiles = (char*)job->input[0];
  const Op* op = job->state->op;
  int kept = job->output[0] != job->input[0]; /* not where x is the residual too */
  if (job->rows == 1 && op->input[0].bytes == 4 && !op->norm && kept) return NULL;
  *made = job->tiles = take_scratch((size_t)((job->rows + 1) * job->inner) * 4);
  if (*made == NULL) return CreateStatus(ORT_FAIL, "fusenorm: out of memory");
  job->layout_block = 1 + LAYOUT_TASK / (job->inner * job->height + 1);
  int64_t tasks = shares(job->count, job->layout_block);
  return linear_share(context, layout_task, tasks, job);
}

/* The sizes of a map, from the shapes of what it reads; `dims` are those of x. */
static OrtStatus* linear_map(LinearJob* job, const OrtValue** values, int map, const int64_t* dims,
                             size_t rank) {
  const State* state = job->state;
  const Op* op = state->op;
  int64_t shape[MAX_RANK];
  size_t other;
  for (int i = 1 + map * linear_reads(op); i <= (map + 1) * linear_reads(op); ++i) {
    const Slot* slot = &op->input[i];
    TRY(shape_of(values[i], shape, &other));
    if (slot->layout == PANELS) {
      if (other != 3 || shape[1] != job->inner || shape[2] != PANEL || shape[0] % op->parts)
        return fail_slot(state, slot, "is not made of panels as high as the last axis of x");
      job->panels[map] = shape[0] / op->parts;
      job->columns[map] = job->panels[map] * PANEL;
      if (op->ragged) { /* the bias is behind the weight */
        TRY(shape_of(values[i + 1], shape, &other));
        job->columns[map] = other ? shape[other - 1] : 0;
        if (shares(job->columns[map], PANEL) != job->panels[map])
          return fail_slot(state, slot, "does not have as many panels as its bias has numbers");
      }
    } else if (slot->layout == ROW) {
      int fits = other == rank && shape[rank - 1] == job->columns[map];
      for (size_t axis = 0; fits && axis + 1 < rank; ++axis) fits = shape[axis] == dims[axis];
      if (!fits)
        return fail_slot(state, slot, "does not have the shape of y");
    } else {
      int64_t size = 1;
      for (size_t axis = 0; axis < other; ++axis) size *= shape[axis];
      if (other == 0 || other > rank || size != job->columns[map] || shape[other - 1] != size)
        return fail_slot(state, slot, "is not a vector as long as the weight has columns");
    }
  }
  return NULL;
}

/* Memory for the y of a map. */
static OrtStatus* linear_output(LinearJob* job, OrtKernelContext* context, int map, int64_t* dims,
                                size_t rank) {
  OrtValue* y = NULL;
  void* data = NULL;
  dims[rank - 1] = job->columns[map];
  TRY(GetOutput(context, map, dims, rank, &y));
  if (y == NULL && map == 0) return fail(job->state, "its first output is not used: name it");
  if (y == NULL) {
    job->panels[map] = 0;
    return NULL;
  }
  TRY(GetTensorMutableData(y, &data));
  job->output[map] = data;
  return NULL;
}

static OrtStatus* linear_compute(const State* state, OrtKernelContext* context) {
  const Op* op = state->op;
  LinearJob job = {.state = state};
  int64_t dims[MAX_RANK];
  const OrtValue* values[MAX_INPUTS];
  size_t rank = 0;
  for (int i = 0; i < op->inputs; ++i) {
    void* data = NULL;
    TRY(GetInput(context, i, &values[i]));
    if (values[i] == NULL) return fail_slot(state, &op->input[i], "is missing");
    TRY(GetTensorMutableData(values[i], &data));
    job.input[i] = data;
  }
  TRY(shape_of(values[0], dims, &rank));
  if (rank == 0) return fail_slot(state, &op->input[0], "is a scalar: it needs a last axis");
  job.inner = dims[rank - 1];
  job.rows = 1;
  for (size_t axis = 0; axis + 1 < rank; ++axis) job.rows *= dims[axis];
  for (int map = 0; map < op->outputs; ++map) {
    TRY(linear_map(&job, values, map, dims, rank));
    TRY(linear_output(&job, context, map, dims, rank));
  }
  if (job.rows == 0) return NULL;
  int64_t tasks = linear_tasks(&job);
  if (tasks == 0) return NULL;
  char* made = NULL;
  OrtStatus* status = linear_layout(&job, context, &made);
  if (status == NULL) status = linear_share(context, linear_task, tasks, &job);
  give_scratch(made);
  return status != NULL ? status : job.failed ? refused(state) : NULL;
}

static OrtStatus* linear_infer(const Op* op, OrtShapeInferContext* context) {
  Shape x, weight;
  Names fresh;
  OrtTensorInfo* info = NULL;
  TRY(GetInputShape(context, 0, &info));
  TRY(read_shape(info, &x));
  if (x.rank == 0) return NULL;
  if (op->input[op->inputs - 1].layout == ROW) { /* residual, which has the shape of y */
    Shape residual;
    TRY(GetInputShape(context, op->inputs - 1, &info));
    TRY(read_shape(info, &residual));
    if (residual.rank == x.rank) x = residual;
  }
  for (int map = 0; map < op->outputs; ++map) {
    TRY(GetInputShape(context, 1 + map * linear_reads(op), &info));
    TRY(read_shape(info, &weight));
    int known = weight.rank == 3 && weight.size[0] >= 0;
    x.size[x.rank - 1] = known ? weight.size[0] / op->parts * PANEL : -1;
    if (op->ragged) {
      TRY(GetInputShape(context, 2, &info)); /* the bias */
      TRY(read_shape(info, &weight));
      x.size[x.rank - 1] = weight.rank ? weight.size[weight.rank - 1] : -1;
    }
    x.symbol[x.rank - 1] = "";
    name_unknown(&x, fresh);
    TRY(write_output(context, op, map, &x));
  }
  return NULL;
}
