// One parallel loop for every CPU kernel.
#pragma once
#include <cstdint>

namespace k25::cpu {

using TaskFunction = void (*)(const void* task, int64_t index);

// Runs function(task, i) for i in [0, num_tasks) on up to num_threads threads, indices handed out in rising order.
// Which thread runs which index is not fixed, so a result must not depend on it. The first exception is rethrown here.
void run_tasks(int64_t num_tasks, int num_threads, TaskFunction function, const void* task);

template <class Task>
void parallel_for(int64_t num_tasks, int num_threads, const Task& task) {
  run_tasks(num_tasks, num_threads, [](const void* t, int64_t i) { (*static_cast<const Task*>(t))(i); }, &task);
}

// The same over [0, count) in ranges of at least `grain`: task(begin, end).
template <class Task>
void parallel_ranges(int64_t count, int64_t grain, int num_threads, const Task& task) {
  const int64_t wanted = int64_t(num_threads) * 4;
  const int64_t even = (count + wanted - 1) / wanted;
  const int64_t size = even > grain ? even : grain;
  parallel_for((count + size - 1) / size, num_threads, [&](int64_t i) {
    const int64_t end = (i + 1) * size;
    task(i * size, end < count ? end : count);
  });
}

// "openmp" when an OpenMP runtime is loaded in the process (torch's own: sharing it keeps two teams from spinning
// against each other on the same cores), else "threads".
const char* thread_runtime();

// Scratch of the calling thread, 64-byte aligned, at least `bytes` long; a slot's buffer is kept for the next call.
enum class Scratch : int { a_pack = 0, b_pack = 1, partial = 2, pointers = 3, lines = 4 };
void* thread_scratch(Scratch slot, int64_t bytes);

}  // namespace k25::cpu
