/* Memory kernels work in, kept from one call to the next: what was used last is in the caches
   still. Blocks of up to KEPT_BYTES wait in KEPT places. */

enum { KEPT = 16, KEPT_BYTES = 1 << 20, LINE = 64 };

/* In the line in front of a block. */
typedef struct {
  void* memory;
  size_t bytes;
} Head;

static _Atomic(char*) kept[KEPT];

static Head* head(char* block) { return (Head*)(void*)(block - LINE); }

/* `bytes` on a cache line; NULL where there is no memory. */
static char* take_scratch(size_t bytes) {
  for (int i = 0; i < KEPT && bytes <= KEPT_BYTES; ++i) {
    char* block = atomic_exchange(&kept[i], NULL);
    if (block == NULL) continue;
    if (head(block)->bytes >= bytes) return block;
    free(head(block)->memory);
  }
  char* memory = malloc(bytes + 2 * LINE);
  if (memory == NULL) return NULL;
  char* block = memory + 2 * LINE - (uintptr_t)memory % LINE;
  *head(block) = (Head){memory, bytes};
  return block;
}

static void give_scratch(char* block) {
  if (block == NULL) return;
  for (int i = 0; i < KEPT && head(block)->bytes <= KEPT_BYTES; ++i) {
    char* none = NULL;
    if (atomic_compare_exchange_strong(&kept[i], &none, block)) return;
  }
  free(head(block)->memory);
}

/* When the library is unloaded. */
__attribute__((destructor)) static void free_scratch(void) {
  for (int i = 0; i < KEPT; ++i) {
    char* block = atomic_exchange(&kept[i], NULL);
    if (block != NULL) free(head(block)->memory);
  }
}
