// Optimal Brain Surgeon over the blocks of bands: each thread takes one band after another.

#include "kernels.h"

#include <memory>
#include <new>
#include <utility>

namespace {

// The scratch buffers of one thread.
template <class T> class Scratch {
  public:
    explicit Scratch(const SweepSizes& sizes) : ids(new int64_t[sizes.indices]) {
        for (int i = 0; i < BUFFER_COUNT; i++) {
            buffers[i].reset((T*)::operator new(sizes.numbers[i] * sizeof(T), ALIGNMENT));
            advise_large_pages(buffers[i].get(), sizes.numbers[i] * sizeof(T));
        }
    }
    SweepScratch<T> pointers() const {
        SweepScratch<T> scratch;
        for (int i = 0; i < BUFFER_COUNT; i++) scratch.buffers[i] = buffers[i].get();
        scratch.ids = ids.get();
        return scratch;
    }

  private:
    static constexpr std::align_val_t ALIGNMENT{64};
    struct Delete {
        void operator()(T* memory) const { ::operator delete(memory, ALIGNMENT); }
    };
    std::unique_ptr<T, Delete> buffers[BUFFER_COUNT];
    std::unique_ptr<int64_t[]> ids;
};

// Sorts the blocks that were not removed by their scores.
template <class T> void sort_rest(const Band<T>& band, int64_t removed, int64_t blocks) {
    std::vector<std::pair<T, int64_t>> rest;
    for (int64_t i = removed; i < blocks; i++) rest.emplace_back(band.errors[i], band.order[i]);
    std::sort(rest.begin(), rest.end());
    for (int64_t i = removed; i < blocks; i++) band.errors[i] = rest[i - removed].first, band.order[i] = rest[i - removed].second;
}

template <class T>
int64_t sweep_bands(const Sweep<T>& sweep, const BandShape& shape, int64_t bands, const T* weights, const T* inverses, const int64_t* group,
                    T* errors, int64_t* order, int64_t threads) {
    threads = std::max<int64_t>(1, std::min(threads, bands));
    std::vector<Scratch<T>> scratch;
    scratch.reserve(threads);
    try {
        for (int64_t t = 0; t < threads; t++) scratch.emplace_back(sweep.sizes(shape));
    } catch (const std::bad_alloc&) {
        if (scratch.empty()) throw;
        threads = (int64_t)scratch.size();  // as many as there is memory for
    }
    std::atomic<int64_t> next(0), failed(0);
    const int64_t blocks = shape.blocks(), k = shape.k;
    parallel(threads, threads, [&](int64_t, int64_t, int64_t thread) {
        const SweepScratch<T> buffers = scratch[thread].pointers();
        for (int64_t i; !*shape.interrupted && (i = next++) < bands;) {
            const Band<T> band = {weights + i * k * shape.m, inverses + group[i] * k * k, errors + i * blocks, order + i * blocks};
            const bool definite = sweep.run(shape, band, buffers);
            if (*shape.interrupted) return;
            if (definite) sort_rest(band, std::min(shape.stop, blocks), blocks);
            else failed = i + 1;
        }
    });
    return *shape.interrupted ? -3 : (int64_t)failed;
}

}  // namespace

// weights [bands][k][m], inverses [groups][k][k], group [bands] -> errors and order [bands][k / n]. Returns 0, or the number of a band,
// counted from 1, whose inverse lost positive definiteness, -1 for an instruction set that is not there, -2 if memory ran out, or -3 if
// another thread has set `interrupted`.
EXPORT int64_t obs_sweep(const void* weights, const void* inverses, const int64_t* group, int32_t is_double, int64_t bands, int64_t k,
                         int64_t m, int64_t n, int64_t stop, void* errors, int64_t* order, int64_t threads, int32_t isa,
                         const std::atomic<int32_t>* interrupted) {
    const Kernels* kernels = kernels_of(isa);
    if (!kernels) return -1;
    const BandShape shape = {k, m, n, stop, interrupted};
    try {
        if (is_double)
            return sweep_bands(kernels->sweep_f64, shape, bands, (const double*)weights, (const double*)inverses, group, (double*)errors,
                               order, threads);
        return sweep_bands(kernels->sweep_f32, shape, bands, (const float*)weights, (const float*)inverses, group, (float*)errors, order,
                           threads);
    } catch (const std::bad_alloc&) {
        return -2;
    }
}
