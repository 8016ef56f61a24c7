#include "common/threads.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace k25::cpu {
namespace {

// One call of run_tasks: every member of the team takes indices until none is left.
class Job {
 public:
  Job(int64_t num_tasks, TaskFunction function, const void* task)
      : num_tasks_(num_tasks), function_(function), task_(task) {}

  void work() noexcept {
    for (int64_t i = next_.fetch_add(1); i < num_tasks_; i = next_.fetch_add(1)) {
      try {
        function_(task_, i);
      } catch (...) {
        next_.store(num_tasks_);
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
  }

  void rethrow() {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t num_tasks_;
  const TaskFunction function_;
  const void* const task_;
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Threads of our own, for processes without an OpenMP runtime. One job at a time; a second caller runs alone.
class Pool {
 public:
  void run(Job& job, int num_threads) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return job.work();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (int(threads_.size()) < num_threads - 1) {
        threads_.emplace_back([this, index = int(threads_.size())] { loop(index); });
      }
      job_ = &job;
      helpers_ = num_threads - 1;
      busy_ = helpers_;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  void loop(int index) {
    int64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stop_ || (generation_ != seen && index < helpers_); });
      if (stop_) return;
      seen = generation_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int helpers_ = 0, busy_ = 0;
  int64_t generation_ = 0;
  bool stop_ = false;
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The entry point that GCC's OpenMP calls for "#pragma omp parallel"; LLVM's and Intel's runtimes export it too.
GompParallel find_openmp() {
#if defined(K25_OWN_THREADS)
  return nullptr;
#else
  static std::atomic<GompParallel> found{nullptr};  // asked again until it is there: torch may be loaded after us
  GompParallel entry = found.load(std::memory_order_relaxed);
  if (!entry) {
    entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(entry, std::memory_order_relaxed);
  }
  return entry;
#endif
}

// After fork() the pool's threads are gone: a child starts its own.
Pool& pool() {
  static std::mutex mutex;
  static std::unique_ptr<Pool> current;
  static pid_t owner = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (owner != getpid()) {
    current.release();  // NOLINT: joining threads that do not exist here would hang
    current = std::make_unique<Pool>();
    owner = getpid();
  }
  return *current;
}

class ScratchBuffers {
 public:
  void* get(int slot, int64_t bytes) {
    Buffer& buffer = buffers_[slot];
    if (buffer.bytes < bytes) {
      std::free(buffer.data);
      buffer.bytes = 0;
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      buffer.data = std::aligned_alloc(4096, size_t(rounded));
      if (!buffer.data) throw std::bad_alloc();
      buffer.bytes = rounded;
    }
    return buffer.data;
  }

  ~ScratchBuffers() {
    for (Buffer& buffer : buffers_) std::free(buffer.data);
  }

 private:
  struct Buffer {
    void* data = nullptr;
    int64_t bytes = 0;
  };
  Buffer buffers_[5];
};

}  // namespace

void run_tasks(int64_t num_tasks, int num_threads, TaskFunction function, const void* task) {
  if (num_tasks <= 0) return;
  const int team = int(num_tasks < num_threads ? num_tasks : num_threads);
  Job job(num_tasks, function, task);
  if (team <= 1) {
    job.work();
  } else if (const GompParallel openmp = find_openmp()) {
    openmp([](void* j) { static_cast<Job*>(j)->work(); }, &job, unsigned(team), 0);
  } else {
    pool().run(job, team);
  }
  job.rethrow();
}

const char* thread_runtime() { return find_openmp() ? "openmp" : "threads"; }

void* thread_scratch(Scratch slot, int64_t bytes) {
  static thread_local ScratchBuffers buffers;
  return buffers.get(int(slot), bytes);
}

}  // namespace k25::cpu
