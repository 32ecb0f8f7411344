// cuBLAS's products by the fastest of the kernels that it offers. Its first guess is up to a fifth slower: so a size that
// steps are padded to is measured once, each time with a second cache that has nothing of it, and what was found is kept.
//
// cuBLASLt is the one that torch has loaded; its few functions are declared here, since toolkits come without its header.

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

namespace {

constexpr int kCompute32F = 68, kReal32F = 0, kReal16BF = 14;  // of cublasComputeType_t and cudaDataType
constexpr int kTransposesA = 3, kMostWorkspace = 1;           // attributes of a product and of what is preferred
constexpr int kOffered = 6, kRepeats = 4;
constexpr size_t kWorkspace = 32 << 20, kScratch = 64 << 20;  // the latter is more than the second cache holds
constexpr float kGain = 0.97f;                                // what another kernel than the first must be faster by

struct Algorithm {
  uint64_t data[8];
};

struct Offer {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

struct Plan {
  void *weight, *x, *out;  // layouts
  Algorithm algorithm;
};

struct Library {
  int (*create)(void**);
  int (*describe)(void**, int, int);
  int (*set)(void*, int, const void*, size_t);
  int (*lay_out)(void**, int, uint64_t, uint64_t, int64_t);
  int (*prefer)(void**);
  int (*set_preference)(void*, int, const void*, size_t);
  int (*offer)(void*, void*, void*, void*, void*, void*, void*, int, Offer*, int*);
  int (*multiply)(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                  void*, void*, const Algorithm*, void*, size_t, cudaStream_t);
  void *handle = nullptr, *product = nullptr, *preference = nullptr, *scratch = nullptr;
  bool is_there = false;

  Library() {
    void* library = nullptr;
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
      if (library == nullptr) library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    }
    const int transposes = 1;
    is_there = library != nullptr && find(library, "cublasLtCreate", create) &&
               find(library, "cublasLtMatmulDescCreate", describe) &&
               find(library, "cublasLtMatmulDescSetAttribute", set) &&
               find(library, "cublasLtMatrixLayoutCreate", lay_out) &&
               find(library, "cublasLtMatmulPreferenceCreate", prefer) &&
               find(library, "cublasLtMatmulPreferenceSetAttribute", set_preference) &&
               find(library, "cublasLtMatmulAlgoGetHeuristic", offer) && find(library, "cublasLtMatmul", multiply) &&
               !create(&handle) && !describe(&product, kCompute32F, kReal32F) &&
               !set(product, kTransposesA, &transposes, sizeof(transposes)) && !prefer(&preference) &&
               !set_preference(preference, kMostWorkspace, &kWorkspace, sizeof(kWorkspace)) &&
               !cudaMalloc(&scratch, kScratch);
  }

  template <class Function>
  static bool find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
  }

  int run(const Plan& plan, const Algorithm& algorithm, const void* x, const void* weight, void* out,
          cudaStream_t stream) const {
    const float one = 1.0f, zero = 0.0f;
    return multiply(handle, product, &one, weight, plan.weight, x, plan.x, &zero, out, plan.out, out, plan.out, &algorithm,
                    scratch, kWorkspace, stream);
  }

  // The least milliseconds of some runs.
  float time(const Plan& plan, const Algorithm& algorithm, const void* x, const void* weight, void* out,
             cudaStream_t stream, cudaEvent_t begin, cudaEvent_t end) const {
    float least = 1e30f, took = 0.0f;
    for (int i = 0; i < kRepeats; ++i) {
      cudaMemsetAsync(scratch, 0, kScratch, stream);
      cudaEventRecord(begin, stream);
      if (run(plan, algorithm, x, weight, out, stream)) return 1e30f;
      cudaEventRecord(end, stream);
      if (cudaEventSynchronize(end) || cudaEventElapsedTime(&took, begin, end)) return 1e30f;
      least = std::min(least, took);
    }
    return least;
  }
};

}  // namespace

// out [rows, columns] = x [rows, depth] weight [columns, depth]^T in bfloat16, if this size was measured, which
// `measures` does first. Returns 0, or what else: a size that is not known, or an error of CUDA's or cuBLAS's.
extern "C" int octavo_multiply(const void* x, const void* weight, void* out, int rows, int columns, int depth,
                               int measures, void* on) {
  static const Library library;
  static std::map<std::tuple<int, int, int>, Plan> plans;
  static std::mutex lock;
  const std::lock_guard<std::mutex> guard(lock);
  const auto stream = static_cast<cudaStream_t>(on);
  const std::tuple<int, int, int> size(rows, columns, depth);
  const auto known = plans.find(size);
  if (known != plans.end()) return library.run(known->second, known->second.algorithm, x, weight, out, stream);
  if (!measures || !library.is_there) return -1;
  Plan plan;
  Offer offers[kOffered];
  int count = 0;
  if (library.lay_out(&plan.weight, kReal16BF, depth, columns, depth) ||
      library.lay_out(&plan.x, kReal16BF, depth, rows, depth) ||
      library.lay_out(&plan.out, kReal16BF, columns, rows, columns) ||
      library.offer(library.handle, library.product, plan.weight, plan.x, plan.out, plan.out, library.preference,
                    kOffered, offers, &count) || count == 0) {
    return -1;
  }
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  float best = 1e30f;
  for (int i = 0; i < count; ++i) {
    const float took = library.time(plan, offers[i].algorithm, x, weight, out, stream, begin, end);
    if (took < best * (i > 0 ? kGain : 1.0f)) best = took, plan.algorithm = offers[i].algorithm;
  }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  if (best > 1e29f) return -1;
  plans.emplace(size, plan);
  return 0;
}
