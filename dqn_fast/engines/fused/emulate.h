// device.h on a CPU: the text of a kernel runs as it is, to find what is wrong with it.
//
// Every thread of a block, or of all blocks of a cluster, is a fiber, which runs until it must wait
// for others. Shuffles, ballots and products of a warp are computed by the last lane that comes. A
// kernel `name` becomes
//
//     int64_t emulate_name(const Arguments* g, int64_t blocks, int64_t shared_bytes)
//
// which runs one block or cluster after the other; one call at a time in a process. It returns 0,
// or 1 if threads wait at different places for each other, or `blocks` are not whole clusters;
// emulation_error() says where, or why.
//
// Shared memory begins as NaN. The address sanitizer knows where each block's ends. To the thread
// sanitizer all threads of all blocks run at once, ordered by barriers alone: those of a warp, of a
// block, of a cluster. Environment variables:
//     EMULATE_ORDER  which of the threads that can run goes on: 0, the first; less, the last; more,
//                    a random one, by this seed
//     EMULATE_SKIP   line whose BARRIER(), CLUSTER_BARRIER() or warp_barrier() does nothing, to
//                    test the tests
//
// It does not show speed, nor how a GPU rounds the sums of mma_tf32, fast_sqrt and fast_divide, nor
// stale lines of a GPU's caches: whatever a thread has written, the next one reads.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_THREAD__)
#define EMULATE_TSAN
#elif defined(__SANITIZE_ADDRESS__)
#define EMULATE_ASAN
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EMULATE_TSAN
#elif __has_feature(address_sanitizer)
#define EMULATE_ASAN
#endif
#endif

// The machine below the threads, which the thread sanitizer must not look at. It is not inlined at
// the many places of a kernel, so that compilers are quick; reading a number is.
#ifdef EMULATE_TSAN
extern "C" {
void __tsan_acquire(void* token);
void __tsan_release(void* token);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags); // flag 1: without an order of the two
}
#define UNSEEN __attribute__((no_sanitize_thread, noinline))
#define UNSEEN_INLINE UNSEEN
#define IF_TSAN(statement) statement
#else
#define UNSEEN __attribute__((noinline))
#define UNSEEN_INLINE inline
#define IF_TSAN(statement)
#endif
#ifdef EMULATE_ASAN
extern "C" {
void __asan_poison_memory_region(const volatile void* start, size_t size);
void __asan_unpoison_memory_region(const volatile void* start, size_t size);
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
}
#define IF_ASAN(statement) statement
#else
#define IF_ASAN(statement)
#endif

// Keeps the registers that a called function must keep, and the stack pointer in *save; goes on
// where the other fiber did so.
#if defined(__x86_64__) && defined(__ELF__)
#define EMULATE_FRAME 8 // words of a fiber that has not begun
#define EMULATE_FRAME_ENTRY 6
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, . - emulation_switch
)");
#elif defined(__aarch64__) && defined(__ELF__)
#define EMULATE_FRAME 20
#define EMULATE_FRAME_ENTRY 11
asm(R"(
.text
.type emulation_switch, %function
emulation_switch:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
.size emulation_switch, . - emulation_switch
)");
#else
#include <ucontext.h>
#endif
#ifdef EMULATE_FRAME
extern "C" __attribute__((visibility("hidden"))) void emulation_switch(void** save, void* load);
#endif

struct alignas(16) float4 {
  float x, y, z, w;
};

namespace {

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

namespace emulation {

constexpr int MAX_THREADS = 1024, MAX_BLOCKS = 16; // of a block, of a cluster
#if defined(EMULATE_TSAN) || defined(EMULATE_ASAN) || !defined(__OPTIMIZE__)
constexpr size_t STACK = 256 << 10; // bytes, of which a thread touches a few pages
#else
constexpr size_t STACK = 64 << 10;
#endif

// What a thread waits at: kinds of waiting, times a source line.
enum Kind { AT_BARRIER, AT_CLUSTER, AT_WARP_BARRIER, AT_SHUFFLE, AT_BALLOT, AT_PRODUCT, KINDS };
constexpr int RUNS = 0, ENDED = -1; // instead of such a place

// Whether blocks of different clusters have memory and stacks apart, as those of a cluster do: the
// thread sanitizer takes what one cluster does after another for what they do at once.
#ifdef EMULATE_TSAN
constexpr bool APART = true;
#else
constexpr bool APART = false;
#endif

// Threads that wait for each other: a warp, a block or a cluster.
struct Group {
  int first, threads; // numbers of its fibers
  int arrived, place; // the place of those that have come
  bool mixed; // they have not come to the same place
#ifdef EMULATE_TSAN
  // Two in turn: with one, a thread that runs late would also be ordered after what others did
  // after this barrier, until the next one.
  char* tokens;
  int turn;
#endif
  void begin(int first_fiber, int count, [[maybe_unused]] char* own_tokens) {
    first = first_fiber;
    threads = count;
    arrived = 0;
    mixed = false;
    IF_TSAN(tokens = own_tokens);
  }
};

struct Warp : Group {
  uint64_t value[32];
  int mask[32];
  float* d[32];
  const uint32_t *a[32], *b[32];
};

struct Block : Group {
  int number, rank; // in the grid, in its cluster
  char* memory;
};

struct Fiber {
#ifdef EMULATE_FRAME
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  int place;
#ifdef EMULATE_TSAN
  void* tsan;
  char* token;
#endif
#ifdef EMULATE_ASAN
  void* fake_stack;
  const void* bottom;
  size_t size;
#endif
};

struct Machine {
  int fiber; // the running one, and its place:
  int thread;
  Block* block;
  int threads, blocks; // of a block, of the grid
  int num_ready;
  int64_t seed;
  uint64_t random;
  int skipped_line;
  void (*kernel)(const void*);
  const void* arguments;
  // Of the cluster that runs. Its fibers are numbered block by block; then comes their caller, as a
  // block of its own.
  Group cluster;
  Block members[MAX_BLOCKS + 1];
  Warp warps[MAX_BLOCKS * MAX_THREADS / 32];
  Fiber fibers[MAX_BLOCKS * MAX_THREADS + 1];
  short ready[MAX_BLOCKS * MAX_THREADS]; // the last one goes on first
  char* stacks; // of `num_stacks` threads
  int64_t num_stacks;
  char error[1024];
#ifdef EMULATE_TSAN
  char start, end;
#endif
};
Machine here;

inline size_t stack_stride() { return STACK + sysconf(_SC_PAGESIZE); }

inline void unmap_stacks() { munmap(here.stacks, here.num_stacks * stack_stride()); }

// One stack per thread, each above a page that nobody may touch. Returns whether the system gives
// them.
inline bool map_stacks(int64_t count) {
  const size_t stride = stack_stride(), page = stride - STACK;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  void* const mapped = mmap(nullptr, count * stride, PROT_NONE, flags, -1, 0);
  if (mapped == MAP_FAILED)
    return false;
  here.stacks = (char*)mapped;
  here.num_stacks = count;
  for (int64_t i = 0; i < count; ++i)
    if (mprotect(here.stacks + i * stride + page, STACK, PROT_READ | PROT_WRITE)) {
      unmap_stacks();
      return false;
    }
  return true;
}

UNSEEN_INLINE int choose() {
  if (here.num_ready == 0)
    return here.cluster.threads;
  const int last = --here.num_ready;
  const int chosen = here.ready[last];
  if (here.seed <= 0)
    return chosen;
  here.random = here.random * 6364136223846793005u + 1442695040888963407u;
  const int i = (here.random >> 33) * (last + 1) >> 31;
  const int other = here.ready[i];
  here.ready[i] = (short)chosen;
  return other;
}

// Runs another thread, until one chooses this one.
UNSEEN_INLINE void leave() {
  const int next = choose();
  if (next == here.fiber)
    return;
  Fiber& mine = here.fibers[here.fiber];
  Fiber& other = here.fibers[next];
  here.fiber = next;
  here.thread = next - here.block->first;
  if (here.thread < 0 || here.thread >= here.threads) { // another block's
    here.block = &here.members[next / here.threads];
    here.thread = next % here.threads;
  }
  IF_TSAN(__tsan_switch_to_fiber(other.tsan, 1));
  IF_ASAN(__sanitizer_start_switch_fiber(
      mine.place == ENDED ? nullptr : &mine.fake_stack, other.bottom, other.size));
#ifdef EMULATE_FRAME
  emulation_switch(&mine.stack_pointer, other.stack_pointer);
#else
  swapcontext(&mine.context, &other.context);
#endif
  asm volatile("" : : : "memory");
  IF_ASAN(__sanitizer_finish_switch_fiber(mine.fake_stack, nullptr, nullptr));
}

UNSEEN_INLINE void make_ready(const Group& group) {
  for (int i = 0; i < group.threads; ++i) {
    const int fiber = group.first + (here.seed < 0 ? i : group.threads - 1 - i);
    here.fibers[fiber].place = RUNS;
    here.ready[here.num_ready++] = (short)fiber;
  }
}

// Returns whether the whole group is here; then `release` it. In any case `leave`.
UNSEEN_INLINE bool arrive(Group& group, int place) {
  Fiber& fiber = here.fibers[here.fiber];
  fiber.place = place;
  IF_TSAN(fiber.token = &group.tokens[group.turn & 1]);
  IF_TSAN(__tsan_release(fiber.token));
  if (group.arrived++ == 0)
    group.place = place;
  group.mixed |= group.place != place;
  return group.arrived == group.threads && !group.mixed;
}

UNSEEN_INLINE void release(Group& group) {
  group.arrived = 0;
  IF_TSAN(++group.turn);
  make_ready(group);
}

UNSEEN_INLINE void wait() {
  leave();
  IF_TSAN(__tsan_acquire(here.fibers[here.fiber].token));
}

UNSEEN_INLINE void meet(Group& group, Kind kind, int line) {
  if (line == here.skipped_line)
    return;
  if (arrive(group, line * KINDS + kind))
    release(group);
  wait();
}

UNSEEN_INLINE Warp& warp() { return here.warps[here.fiber / 32]; }

UNSEEN void barrier(int line) { meet(*here.block, AT_BARRIER, line); }
UNSEEN void cluster_barrier(int line) { meet(here.cluster, AT_CLUSTER, line); }
UNSEEN void warp_barrier(int line) { meet(warp(), AT_WARP_BARRIER, line); }

UNSEEN uint64_t shuffle(uint64_t x, int mask, int line) {
  Warp& w = warp();
  const int lane = here.thread % 32;
  w.value[lane] = x;
  w.mask[lane] = mask;
  if (arrive(w, line * KINDS + AT_SHUFFLE)) {
    uint64_t given[32];
    for (int i = 0; i < 32; ++i)
      given[i] = w.value[i];
    for (int i = 0; i < 32; ++i)
      w.value[i] = given[(i ^ w.mask[i]) % 32];
    release(w);
  }
  wait();
  return w.value[lane];
}

// d += a b of matrices, from and to the fragments of the lanes; see device.h.
UNSEEN void multiply(Warp& w) {
  typedef float Row __attribute__((vector_size(32), may_alias));
  alignas(32) float d[16][8], a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      a[group + i % 2 * 8][t + i / 2 * 4] = float_of(w.a[lane][i] & ~0x1fffu);
    for (int i = 0; i < 2; ++i) {
      b[t + i * 4][group] = float_of(w.b[lane][i] & ~0x1fffu);
      __builtin_memcpy(&d[group + i * 8][2 * t], w.d[lane] + 2 * i, 8);
    }
  }
  for (int row = 0; row < 16; ++row) {
    Row sum = *(Row*)d[row];
    for (int k = 0; k < 8; ++k)
      sum += a[row][k] * *(Row*)b[k];
    *(Row*)d[row] = sum;
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i)
      __builtin_memcpy(w.d[lane] + 2 * i, &d[lane / 4 + i * 8][lane % 4 * 2], 8);
}

UNSEEN void begin() {
  Fiber& fiber = here.fibers[here.fiber];
#ifdef EMULATE_ASAN
  Fiber& caller = here.fibers[here.cluster.threads];
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (caller.bottom == nullptr)
    caller.bottom = bottom, caller.size = size;
#endif
  IF_TSAN(__tsan_acquire(&here.start));
  here.kernel(here.arguments);
  fiber.place = ENDED;
  IF_TSAN(__tsan_release(&here.end));
  leave();
  abort();
}

inline void prepare(int number) {
  Fiber& fiber = here.fibers[number];
  fiber.place = RUNS;
  const int64_t stack = number + int64_t(APART ? here.members[0].number : 0) * here.threads;
  char* const bottom = here.stacks + (stack + 1) * stack_stride() - STACK;
  IF_ASAN(__asan_unpoison_memory_region(bottom, STACK));
  IF_ASAN(fiber.bottom = bottom);
  IF_ASAN(fiber.size = STACK);
  IF_TSAN(fiber.tsan = __tsan_create_fiber(0));
#ifdef EMULATE_FRAME
  // Neighbours use different lines of the first two caches.
  const size_t used = STACK - (number + number / 32) % 8 * 512;
  void** const frame = (void**)(bottom + used) - EMULATE_FRAME;
  memset(frame, 0, EMULATE_FRAME * sizeof(void*));
  frame[EMULATE_FRAME_ENTRY] = (void*)&begin;
  fiber.stack_pointer = frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = bottom;
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, begin, 0);
#endif
}

// Writes where the threads are that cannot go on.
inline void report(int num_members) {
  const char* const kinds[] = {
      "BARRIER()", "CLUSTER_BARRIER()", "warp_barrier()", "shuffle_xor", "ballot", "mma_tf32"};
  size_t size = 0;
  auto add = [&size](const char* format, auto... values) {
    if (size < sizeof here.error)
      size += snprintf(here.error + size, sizeof here.error - size, format, values...);
  };
  for (int rank = 0; rank < num_members; ++rank) {
    add("%sblock %d:", rank ? "; " : "", here.members[rank].number);
    const Fiber* const fibers = here.fibers + here.members[rank].first;
    for (int first = 0, next; first < here.threads; first = next) {
      const int place = fibers[first].place;
      for (next = first; next < here.threads && fibers[next].place == place;)
        ++next;
      add("%s %d", first ? "," : " threads", first);
      if (next - first > 1)
        add(" to %d", next - 1);
      if (place == ENDED)
        add("%s", " ended");
      else
        add(" wait at %s of line %d", kinds[place % KINDS], place / KINDS);
    }
  }
}

// Returns whether all threads of `here.members` came to their end.
inline bool run_cluster(int num_members) {
  const int count = here.cluster.threads;
  Fiber& caller = here.fibers[count];
  here.fiber = count;
  here.block = &here.members[num_members];
  here.block->first = count;
  here.num_ready = 0;
  for (int i = 0; i < count; ++i)
    prepare(i);
  IF_ASAN(caller.bottom = nullptr);
  IF_TSAN(caller.tsan = __tsan_get_current_fiber());
  IF_TSAN(__tsan_release(&here.start));
  caller.place = RUNS;
  make_ready(here.cluster);
  leave();
  int ended = 0;
  for (int i = 0; i < count; ++i) {
    ended += here.fibers[i].place == ENDED;
    IF_TSAN(__tsan_destroy_fiber(here.fibers[i].tsan));
  }
  return ended == count;
}

inline int64_t number_of(const char* variable) {
  const char* const text = getenv(variable);
  return text ? atoll(text) : 0;
}

inline int64_t run(
    void (*kernel)(const void*), const void* arguments, int threads, int num_members,
    int64_t blocks, int64_t shared_bytes) {
  here.kernel = kernel;
  here.arguments = arguments;
  here.threads = threads;
  here.blocks = (int)blocks;
  here.seed = number_of("EMULATE_ORDER");
  here.random = here.seed;
  here.skipped_line = (int)number_of("EMULATE_SKIP");
  if (blocks % num_members) {
    snprintf(
        here.error, sizeof here.error, "%d blocks are not whole clusters of %d blocks", here.blocks,
        num_members);
    return 1;
  }
  // Behind a block's shared memory lie tokens, or what the address sanitizer lets nobody touch.
  constexpr int64_t BEHIND = 128;
  static_assert(2 * (2 + MAX_THREADS / 32) <= BEHIND, "tokens of a cluster, a block and its warps");
  const int64_t stride = (shared_bytes + 127) / 128 * 128 + BEHIND;
  const int64_t apart = APART ? blocks : num_members;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, apart * stride) || !map_stacks(apart * threads)) {
    snprintf(here.error, sizeof here.error, "no memory for the stacks of %d threads", threads);
    free(memory);
    return 1;
  }
  bool ended = true;
  for (int first = 0; ended && first < blocks; first += num_members) {
    for (int rank = 0; rank < num_members; ++rank) {
      Block& block = here.members[rank];
      block.number = first + rank;
      block.rank = rank;
      block.memory = (char*)memory + (APART ? block.number : rank) * stride;
      memset(block.memory, 0xff, shared_bytes);
      IF_ASAN(__asan_poison_memory_region(block.memory + shared_bytes, stride - shared_bytes));
      char* tokens = block.memory + stride - BEHIND;
      if (rank == 0)
        here.cluster.begin(0, num_members * threads, tokens);
      block.begin(rank * threads, threads, tokens += 2);
      for (int i = block.first; i < block.first + threads; i += 32)
        here.warps[i / 32].begin(i, 32, tokens += 2);
    }
    ended = run_cluster(num_members);
    if (!ended)
      report(num_members);
  }
  IF_TSAN(__tsan_acquire(&here.end));
  free(memory);
  unmap_stacks(); // two mappings each, of 65530 that a process may have, for each library
  return !ended;
}

} // namespace emulation

#define DEVICE inline
#define UNROLL
#define UNROLL_BY(n)
#define BARRIER() emulation::barrier(__LINE__)
#define CLUSTER_BARRIER() emulation::cluster_barrier(__LINE__)
#define KERNEL(name, Arguments, THREADS) CLUSTER_KERNEL(name, Arguments, THREADS, 1)
#define CLUSTER_KERNEL(name, Arguments, THREADS, BLOCKS)                                           \
  static_assert((THREADS) % 32 == 0 && (THREADS) <= emulation::MAX_THREADS, "whole warps");        \
  static_assert((BLOCKS) <= emulation::MAX_BLOCKS, "a cluster's blocks");                          \
  static void name(const Arguments& g);                                                            \
  extern "C" int64_t emulate_##name(const Arguments* g, int64_t blocks, int64_t shared_bytes) {    \
    return emulation::run(                                                                         \
        [](const void* arguments) { name(*(const Arguments*)arguments); }, g, THREADS, BLOCKS,     \
        blocks, shared_bytes);                                                                     \
  }                                                                                                \
  static void name([[maybe_unused]] const Arguments& g)

UNSEEN_INLINE int thread_id() { return emulation::here.thread; }
UNSEEN_INLINE int fresh_thread_id() { return emulation::here.thread; }
UNSEEN_INLINE int block_id() { return emulation::here.block->number; }
UNSEEN_INLINE int num_blocks() { return emulation::here.blocks; }
UNSEEN_INLINE int cluster_rank() { return emulation::here.block->rank; }
UNSEEN_INLINE char* shared_memory() { return emulation::here.block->memory; }

inline void warp_barrier(int line = __builtin_LINE()) { emulation::warp_barrier(line); }

inline float shuffle_xor(float x, int mask, int line = __builtin_LINE()) {
  return float_of((uint32_t)emulation::shuffle(bits_of(x), mask, line));
}
inline int32_t shuffle_xor(int32_t x, int mask, int line = __builtin_LINE()) {
  return (int32_t)emulation::shuffle((uint64_t)x, mask, line);
}
inline int64_t shuffle_xor(int64_t x, int mask, int line = __builtin_LINE()) {
  return (int64_t)emulation::shuffle((uint64_t)x, mask, line);
}

UNSEEN uint32_t ballot(bool x, int line = __builtin_LINE()) {
  emulation::Warp& warp = emulation::warp();
  const int lane = emulation::here.thread % 32;
  warp.value[lane] = x;
  if (arrive(warp, line * emulation::KINDS + emulation::AT_BALLOT)) {
    uint64_t all = 0;
    for (int i = 0; i < 32; ++i)
      all |= warp.value[i] << i;
    for (int i = 0; i < 32; ++i)
      warp.value[i] = all;
    release(warp);
  }
  emulation::wait();
  return (uint32_t)warp.value[lane];
}

inline uint32_t round_tf32(float x) { return bits_of(x) + 0x1000u; }

UNSEEN void mma_tf32(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  emulation::Warp& warp = emulation::warp();
  const int lane = emulation::here.thread % 32;
  warp.d[lane] = d;
  warp.a[lane] = a;
  warp.b[lane] = b;
  if (arrive(warp, line * emulation::KINDS + emulation::AT_PRODUCT)) {
    multiply(warp);
    release(warp);
  }
  emulation::wait();
}

// With numbers below 1.2e-38 as 0.
inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0 * x : x; }
inline float fast_sqrt(float x) { return flushed(__builtin_sqrtf(flushed(x))); }
inline float fast_divide(float a, float b) { return a * flushed(1 / flushed(b)); }

inline float4 load_l2(const float4* p) { return *p; }
inline float4 load_l2(const float* p) { return *(const float4*)p; }
inline void store_l2(float4* p, float4 x) { *p = x; }
inline void store_l2(float* p, float4 x) { *(float4*)p = x; }

// Each look at the clock takes a cycle, so that what is counted can be told.
inline int64_t cycles() {
  static int64_t looks = 0;
  return ++looks;
}

} // namespace

extern "C" __attribute__((used)) inline const char* emulation_error() {
  return emulation::here.error;
}
