/* Attention within the cells of a batch: threads take heads of cells, which are computed in one of two ways.

   Each head of each cell is computed on its own, in an order that depends on neither the other cells nor the threads.
   `compiled_attention.py` compiles this file, with options that decide for bfloat16 or float32, and calls it. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef __AMX_BF16__
typedef uint16_t Number;  /* bfloat16 */
#else
typedef float Number;
#endif

typedef struct {
  const Number *qkv;      /* (tokens, (heads + 2 * key_heads) * width): queries, keys and values of a token */
  const Number *bias;     /* ((heads + 2 * key_heads) * width): what is still to be added to each token's; NULL for 0 */
  Number *out;            /* (tokens, heads * width) */
  const int64_t *bounds;  /* (cells + 1): where cells begin and end */
  int64_t heads, key_heads, width, longest;
  float scaling;
} Work;

/* Either has: `attend_head`, which computes a head of a cell in `room`; `room_bytes`, the bytes that a thread needs for
   the longest cell; `may_compute`, 0 if the system allows it; `begin_thread` and `end_thread`, around a thread's work. */
#ifdef __AMX_BF16__
#include "attention_bfloat16.h"
#else
#include "attention_float32.h"
#endif

typedef struct {
  const Work *work;
  int64_t next, end;  /* numbers of heads of cells: cell * heads + head; each thread takes the next one */
  int failed;
} Task;

static void attend_as_member(void *argument) {
  Task *task = argument;
  const Work *w = task->work;
  char *room = aligned_alloc(64, (room_bytes(w->longest, w->width) + 63) / 64 * 64);
  if (room == NULL) {
    __atomic_store_n(&task->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  begin_thread();
  for (;;) {
    const int64_t number = __atomic_fetch_add(&task->next, 1, __ATOMIC_RELAXED);
    if (number >= task->end) break;
    attend_head(w, number / w->heads, number % w->heads, room);
  }
  end_thread();
  free(room);
}

/* Return 0 if the program may be used. */
int tahoex1_may_compute(void) { return may_compute(); }

/* Attend, in `threads` threads of `parallel`: GOMP_parallel of the library that torch computes with, whose threads wait by
   spinning, and would be in the way of others. NULL for one thread. Return 0, or 1 if memory lacks. */
int tahoex1_attend(const Number *qkv, const Number *bias, Number *out, const int64_t *bounds, int64_t cells, int64_t heads,
                   int64_t key_heads, int64_t width, float scaling, int64_t threads,
                   void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
  Work work = {qkv, bias, out, bounds, heads, key_heads, width, 0, scaling};
  Task task = {&work, 0, cells * heads, 0};
  for (int64_t cell = 0; cell < cells; cell++)
    if (bounds[cell + 1] - bounds[cell] > work.longest) work.longest = bounds[cell + 1] - bounds[cell];
  if (parallel != NULL && threads > 1)
    parallel(attend_as_member, &task, (unsigned)threads, 0);
  else
    attend_as_member(&task);
  return task.failed;
}
