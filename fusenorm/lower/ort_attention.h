/* Attention ops: q, k, v of rank 4, perhaps a mask that broadcasts to the scores, perhaps tables of
   rotary positions that broadcast to the heads.

   A unit is one head of k and v with the heads of q that share it; a task is a range of units, or
   a range of one unit's rows, counted through its heads. Axes of size 1 broadcast by a stride of
   0, as MatMul and Add have it. */

enum { ROW_TILE = 12, SPLIT_ROWS = 64, ATTENTION_TASK = 1 << 20 };
enum { BATCH, HEAD, POSITION, COLUMN, AXES };
enum { Q, K, V, MASK, COS, SIN, Y, TENSORS };

typedef struct {
  const State* state;
  char* data[TENSORS];
  int64_t size[TENSORS][AXES], stride[TENSORS][AXES]; /* in the order of the enum, elements */
  int64_t units_per_batch, copies;                    /* heads of k and v; of q for each */
  int64_t turning;                                    /* numbers of a row the tables are for */
  int64_t units, unit_block, rows, row_block, row_blocks;
  int failed;
} AttentionJob;

/* The tensor an input is: the mask may be left out, the tables too. */
static int attention_tensor(const Op* op, int input) {
  return input >= MASK && op->input[MASK].layout != SCORES ? input + 1 : input;
}

static size_t attention_scratch(const AttentionJob* job) {
  int64_t inner = job->size[Q][COLUMN], steps = (inner + 63) / 64 * 64;
  return (size_t)((KEY_BLOCK + 16) * inner + KEY_BLOCK * job->size[V][COLUMN] + 528 +
                  ROW_TILE * (steps + KEY_BLOCK) + 2 * job->row_block);
}

static int attention_unit(const AttentionJob* job, int64_t unit, int64_t begin, int64_t end,
                          char* scratch) {
  const Op* op = job->state->op;
  int64_t batch = unit / job->units_per_batch, head = unit % job->units_per_batch;
  int64_t any = INT64_MAX / 64;
  Tensor tensors[TENSORS + 1];
  Argument arguments[TENSORS + 1 + 17 + MAX_ATTRIBUTES];
  int n = 0;
  for (int which = 0; which < TENSORS; ++which) {
    if (job->data[which] == NULL) continue;
    const int64_t* stride = job->stride[which];
    int64_t first = which == K || which == V ? head : head * job->copies; /* tables have one */
    char* data = job->data[which] + 4 * (batch * stride[BATCH] + first * stride[HEAD]);
    set_tensor(&tensors[n++], &any, 1, data, &op->input[0]);
  }
  set_tensor(&tensors[n++], &any, 1, scratch, &op->input[0]);
  for (int i = 0; i < n; ++i)
    arguments[i] = (Argument){ARGUMENT_TENSOR, 0, {.pointer = &tensors[i]}};
  const int64_t numbers[17] = {
      job->size[Y][POSITION],    job->size[K][POSITION],      job->size[Q][COLUMN],
      job->size[V][COLUMN],      begin,                       end,
      job->stride[Q][HEAD],      job->stride[Q][POSITION],    job->stride[K][POSITION],
      job->stride[V][POSITION],  job->stride[Y][HEAD],        job->stride[Y][POSITION],
      job->stride[MASK][HEAD],   job->stride[MASK][POSITION], job->stride[MASK][COLUMN],
      job->turning,              job->stride[COS][POSITION]};
  for (int i = 0; i < 17; ++i)
    arguments[n++] = (Argument){ARGUMENT_INT, 0, {.integer = numbers[i]}};
  return call_kernel(job->state, op->kernel, arguments, n);
}

static void attention_task(void* data, size_t index) {
  AttentionJob* job = data;
  int64_t unit = (int64_t)index / job->row_blocks * job->unit_block;
  int64_t last = unit + job->unit_block;
  int64_t begin = (int64_t)index % job->row_blocks * job->row_block;
  int64_t end = begin + job->row_block;
  if (last > job->units) last = job->units;
  if (end > job->rows) end = job->rows;
  char* scratch = take_scratch(4 * attention_scratch(job));
  if (scratch == NULL) job->failed = 1;
  for (; unit < last && scratch != NULL; ++unit)
    if (attention_unit(job, unit, begin, end, scratch) != 0) job->failed = 1;
  give_scratch(scratch);
}

/* Several small units to a task; a large one in parts, which each lay out its keys anew, where
   there are fewer units than the CPUs ask for. */
static int64_t attention_tasks(AttentionJob* job) {
  double work = (double)job->rows * (double)job->size[K][POSITION] *
                (double)(job->size[Q][COLUMN] + job->size[V][COLUMN]);
  job->row_block = job->rows, job->row_blocks = 1;
  job->unit_block = 1 + (int64_t)(ATTENTION_TASK / (work + 1));
  int64_t least = (job->units + MAX_TASKS - 1) / MAX_TASKS;
  if (job->unit_block < least) job->unit_block = least;
  int64_t parts = most_tasks / job->units, most = job->rows / SPLIT_ROWS;
  if (parts > most) parts = most;
  if (job->unit_block == 1 && parts > 1) {
    job->row_block = ((job->rows + parts - 1) / parts + ROW_TILE - 1) / ROW_TILE * ROW_TILE;
    job->row_blocks = (job->rows + job->row_block - 1) / job->row_block;
  }
  return (job->units + job->unit_block - 1) / job->unit_block * job->row_blocks;
}

/* Which of a tensor's dimensions an axis is; below 0: it has none. */
static int attention_place(Layout layout, int axis, size_t rank) {
  int place = axis + (int)rank - AXES;
  if (layout == SEQUENCE && (axis == HEAD || axis == POSITION)) return 3 - axis;
  if (layout == CACHE && axis == HEAD) return -1;
  return layout == CACHE && axis == BATCH ? place + 1 : place;
}

/* Sizes and strides of a tensor by axis; missing axes have size 1. */
static void attention_axes(AttentionJob* job, int which, Layout layout, const int64_t* dims,
                           size_t rank) {
  for (int axis = 0; axis < AXES; ++axis) {
    int place = attention_place(layout, axis, rank);
    int64_t size = place < 0 ? 1 : dims[place], stride = 1;
    for (int inner = (int)rank; place >= 0 && --inner > place;) stride *= dims[inner];
    job->size[which][axis] = size;
    job->stride[which][axis] = size == 1 ? 0 : stride;
  }
}

static int joins(int64_t* size, int64_t other) {
  if (*size == 1) *size = other;
  return other == 1 || other == *size;
}

/* The sizes of y, and whether the inputs fit each other. */
static OrtStatus* attention_plan(AttentionJob* job) {
  const State* state = job->state;
  const Op* op = state->op;
  int64_t(*size)[AXES] = job->size;
  const int64_t one[AXES] = {1, 1, 1, 1};
  const int64_t* mask = job->data[MASK] != NULL ? size[MASK] : one;
  memcpy(size[Y], size[Q], sizeof size[Y]);
  size[Y][COLUMN] = size[V][COLUMN];
  for (int i = 1; i < op->inputs; ++i)
    if (!joins(&size[Y][BATCH], size[attention_tensor(op, i)][BATCH]))
      return fail_slot(state, &op->input[i], "has another batch than q");
  if (job->data[COS] != NULL) {
    const Slot* table = &op->input[op->inputs - 2];
    int64_t rows = size[COS][POSITION], inner = size[Q][COLUMN];
    job->turning = size[COS][COLUMN] * (table->layout == CACHE ? 2 : 1);
    if (memcmp(size[COS], size[SIN], sizeof size[COS]) != 0)
      return fail_slot(state, table, "has another shape than sin");
    if (size[COS][HEAD] != 1 || job->turning % 2 || job->turning > inner ||
        (!(op->turns & PARTIAL) && job->turning != inner))
      return fail_slot(state, table, "does not fit the last axis of q");
    if (!joins(&size[Y][POSITION], rows) ||
        (op->turns & TURNS_K && !joins(&size[K][POSITION], rows)))
      return fail_slot(state, table, "has other rows than q or k");
  }
  if (op->parts > 1) { /* grouped */
    if (size[K][HEAD] == 0 || size[Q][HEAD] % size[K][HEAD] || size[V][HEAD] != size[K][HEAD])
      return fail_slot(state, &op->input[K], "has heads that q's and v's do not fit");
  } else if (!joins(&size[Y][HEAD], size[K][HEAD]) || !joins(&size[Y][HEAD], size[V][HEAD])) {
    return fail_slot(state, &op->input[K], "has other heads than q or v");
  }
  if (size[K][COLUMN] != size[Q][COLUMN])
    return fail_slot(state, &op->input[K], "has another last axis than q");
  if (!joins(&size[Y][HEAD], mask[HEAD]) || !joins(&size[Y][POSITION], mask[POSITION]) ||
      !joins(&size[K][POSITION], mask[COLUMN]))
    return fail_slot(state, &op->input[MASK], "does not broadcast to the scores");
  if (size[V][POSITION] != size[K][POSITION])
    return fail_slot(state, &op->input[V], "has other rows than k");
  return NULL;
}

static OrtStatus* attention_compute(const State* state, OrtKernelContext* context) {
  const Op* op = state->op;
  AttentionJob job = {.state = state};
  int64_t dims[MAX_RANK];
  size_t rank;
  for (int i = 0; i < op->inputs; ++i) {
    const Slot* slot = &op->input[i];
    int which = attention_tensor(op, i);
    const OrtValue* value = NULL;
    TRY(GetInput(context, i, &value));
    if (value == NULL) return fail_slot(state, slot, "is missing");
    TRY(shape_of(value, dims, &rank));
    if (rank > AXES || (i <= V && rank != AXES))
      return fail_slot(state, slot, "does not have four axes");
    if (slot->layout == CACHE && rank == AXES)
      return fail_slot(state, slot, "has more than three axes");
    attention_axes(&job, which, slot->layout, dims, rank);
    void* data = NULL;
    TRY(GetTensorMutableData(value, &data));
    job.data[which] = data;
  }
  TRY(attention_plan(&job));
  const int64_t* size = job.size[Y];
  int sequence = op->output[0].layout == SEQUENCE;
  const int64_t shape[AXES] = {size[BATCH], size[sequence ? POSITION : HEAD],
                               size[sequence ? HEAD : POSITION], size[COLUMN]};
  OrtValue* y = NULL;
  TRY(GetOutput(context, 0, shape, AXES, &y));
  if (y == NULL) return fail(state, "its output is not used: name it");
  void* data = NULL;
  TRY(GetTensorMutableData(y, &data));
  attention_axes(&job, Y, op->output[0].layout, shape, AXES);
  int64_t elements = shape[0] * shape[1] * shape[2] * shape[3];
  if (elements == 0) return NULL;
  if (job.size[K][POSITION] == 0) {
    memset(data, 0, (size_t)elements * 4);
    return NULL;
  }
  job.data[Y] = data;
  job.units_per_batch = op->parts > 1 ? job.size[K][HEAD] : job.size[Y][HEAD];
  job.copies = job.size[Y][HEAD] / job.units_per_batch;
  job.units = job.size[Y][BATCH] * job.units_per_batch;
  job.rows = job.copies * job.size[Y][POSITION];
  int64_t tasks = attention_tasks(&job);
  if (tasks > 1) {
    TRY(ParallelFor(context, attention_task, (size_t)tasks, 0, &job));
  } else {
    attention_task(&job, 0);
  }
  return job.failed ? refused(state) : NULL;
}

static OrtStatus* attention_infer(const Op* op, OrtShapeInferContext* context) {
  Shape shapes[MAX_INPUTS], result = {.rank = AXES};
  for (int i = 0; i < op->inputs; ++i) {
    OrtTensorInfo* info = NULL;
    TRY(GetInputShape(context, i, &info));
    TRY(read_shape(info, &shapes[i]));
    if (shapes[i].rank == 0 || shapes[i].rank > AXES) return NULL;
    if (i <= V && shapes[i].rank != AXES) return NULL;
  }
  for (int axis = 0; axis < AXES; ++axis) result.size[axis] = 1, result.symbol[axis] = "";
  for (int i = 0; i < op->inputs; ++i) {
    for (int axis = BATCH; axis <= POSITION; ++axis) {
      if (axis == HEAD && op->parts > 1 && (i == K || i == V)) continue;
      if (axis == POSITION && (i == K || i == V)) continue;
      int from = attention_place(op->input[i].layout, axis, shapes[i].rank);
      int to = attention_place(op->output[0].layout, axis, AXES);
      if (from >= 0)
        merge(&result.size[to], &result.symbol[to], shapes[i].size[from], shapes[i].symbol[from]);
    }
  }
  result.size[3] = shapes[V].size[3], result.symbol[3] = shapes[V].symbol[3];
  return write_shape(context, op, &result);
}
