// Ranks of one host exchange tensors through memory that all of them map.
//
//     rank 0: [ Slot | buffer 0 | buffer 1 ]   rank 1: [ Slot | buffer 0 | buffer 1 ]   ...
//
// Call n of each rank puts its part into its buffer n % 2, says so in its slot, waits until all others have said so of
// theirs, and reads them. Two buffers are enough: whoever is in call n + 1 knows that all have begun it, so that nobody
// reads what call n - 1 left, and nobody can begin call n + 2 before it has ended this one.
//
// Sums go in the order of the ranks, bfloat16 in float32 and rounded once, so that all ranks hold the same bits.
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { MAX_RANKS = 64, PIECE = 2048, YIELDS = 100, NAP_NS = 50000, NAPS_PER_LOOK = 256 };
enum { DONE, SILENT, OUT_OF_STEP, GONE };
enum { FLOAT32, BFLOAT16, BYTES };

typedef struct {
  uint64_t kind, bytes, offset;
} Call;

typedef struct {
  _Alignas(64) _Atomic uint64_t begun;  // calls whose part lies in the buffer
  _Alignas(64) Call calls[2];           // what they are, by buffer
} Slot;

// As plugins/cpu/shared_memory.py declares it.
typedef struct {
  char *segment;
  uint64_t capacity;  // bytes of a buffer, a multiple of 64
  uint64_t calls;     // so far
  int64_t timeout_ns;
  int32_t rank, ranks, spins;
  int32_t culprit;  // who failed the last call
  int32_t processes[MAX_RANKS];
} Group;

static uint64_t stride(const Group *group) { return sizeof(Slot) + 2 * group->capacity; }

static Slot *slot_of(const Group *group, int rank) { return (Slot *)(group->segment + (uint64_t)rank * stride(group)); }

static char *buffer_of(const Group *group, int rank, uint64_t call) {
  return (char *)(slot_of(group, rank) + 1) + (call & 1) * group->capacity;
}

static int64_t now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spins while an answer may come at once, then lets others run: there may be more ranks than cores.
static int wait_for(const Group *group, int rank, uint64_t call) {
  Slot *slot = slot_of(group, rank);
  for (int i = 0; i < group->spins; ++i) {
    if (atomic_load_explicit(&slot->begun, memory_order_acquire) >= call) return DONE;
    relax();
  }
  const int64_t deadline = now_ns() + group->timeout_ns;
  const struct timespec nap = {0, NAP_NS};
  for (int i = 0; atomic_load_explicit(&slot->begun, memory_order_acquire) < call; ++i) {
    if (i < YIELDS) {
      sched_yield();
    } else {
      nanosleep(&nap, NULL);
      if (now_ns() > deadline) return SILENT;
      if (i % NAPS_PER_LOOK == 0 && kill(group->processes[rank], 0) != 0 && errno == ESRCH) return GONE;
    }
  }
  return DONE;
}

// Begins a call with this rank's part, and waits for the others'. Fills `parts`, in the order of the ranks.
static int exchange(Group *group, Call call, const char *part, uint64_t bytes, const char **parts) {
  const uint64_t number = ++group->calls;
  Slot *mine = slot_of(group, group->rank);
  memcpy(buffer_of(group, group->rank, number), part, bytes);
  mine->calls[number & 1] = call;
  atomic_store_explicit(&mine->begun, number, memory_order_release);
  for (int rank = 0; rank < group->ranks; ++rank) {
    group->culprit = rank;
    const int ended = wait_for(group, rank, number);
    if (ended != DONE) return ended;
    if (memcmp(&slot_of(group, rank)->calls[number & 1], &call, sizeof(Call)) != 0) return OUT_OF_STEP;
    parts[rank] = buffer_of(group, rank, number);
  }
  return DONE;
}

static inline float widened(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// To the nearest, ties to even.
static inline uint16_t narrowed(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return value != value ? 0x7fc0 : (uint16_t)rounded;
}

static void sum_float32(const char **parts, int ranks, float *out, uint64_t count) {
  memcpy(out, parts[0], count * sizeof(float));
  for (int rank = 1; rank < ranks; ++rank) {
    const float *part = (const float *)parts[rank];
    for (uint64_t i = 0; i < count; ++i) out[i] += part[i];
  }
}

static void sum_bfloat16(const char **parts, int ranks, uint16_t *out, uint64_t count) {
  float total[PIECE];
  const uint16_t *first = (const uint16_t *)parts[0];
  for (uint64_t i = 0; i < count; ++i) total[i] = widened(first[i]);
  for (int rank = 1; rank < ranks; ++rank) {
    const uint16_t *part = (const uint16_t *)parts[rank];
    for (uint64_t i = 0; i < count; ++i) total[i] += widened(part[i]);
  }
  for (uint64_t i = 0; i < count; ++i) out[i] = narrowed(total[i]);
}

uint64_t chipset_segment_bytes(const Group *group) { return (uint64_t)group->ranks * stride(group); }

// out = the sum of all ranks' x, `count` numbers of `dtype`. Piece by piece, so that a total stays in the first cache.
int chipset_all_reduce(Group *group, int dtype, const char *x, char *out, uint64_t count) {
  const uint64_t size = dtype == FLOAT32 ? 4 : 2, total = count * size;
  const char *parts[MAX_RANKS];
  for (uint64_t start = 0; start < total; start += group->capacity) {
    const uint64_t bytes = total - start < group->capacity ? total - start : group->capacity;
    const Call call = {(uint64_t)dtype, total, start};
    const int ended = exchange(group, call, x + start, bytes, parts);
    if (ended != DONE) return ended;
    for (uint64_t done = 0; done < bytes; done += PIECE * size) {
      const uint64_t left = bytes - done, piece = (left < PIECE * size ? left : PIECE * size) / size;
      char *target = out + start + done;
      if (dtype == FLOAT32) {
        sum_float32(parts, group->ranks, (float *)target, piece);
      } else {
        sum_bfloat16(parts, group->ranks, (uint16_t *)target, piece);
      }
      for (int rank = 0; rank < group->ranks; ++rank) parts[rank] += piece * size;
    }
  }
  return DONE;
}

// out [rows, ranks, row_bytes] of each rank's x [rows, row_bytes].
int chipset_all_gather(Group *group, const char *x, char *out, uint64_t rows, uint64_t row_bytes) {
  const uint64_t total = rows * row_bytes, ranks = (uint64_t)group->ranks;
  const char *parts[MAX_RANKS];
  for (uint64_t start = 0; start < total; start += group->capacity) {
    const uint64_t bytes = total - start < group->capacity ? total - start : group->capacity;
    const Call call = {BYTES, total, start};
    const int ended = exchange(group, call, x + start, bytes, parts);
    if (ended != DONE) return ended;
    for (uint64_t rank = 0; rank < ranks; ++rank) {
      for (uint64_t done = 0; done < bytes;) {
        const uint64_t row = (start + done) / row_bytes, column = (start + done) % row_bytes;
        const uint64_t left = row_bytes - column, length = left < bytes - done ? left : bytes - done;
        memcpy(out + (row * ranks + rank) * row_bytes + column, parts[rank] + done, length);
        done += length;
      }
    }
  }
  return DONE;
}
