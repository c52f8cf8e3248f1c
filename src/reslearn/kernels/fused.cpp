// Kernels for training with channels_last tensors on a CPU: batch normalization, addition and ReLU as one operation, forward
// and backward; and the gradient of the weights of a 3x3 convolution, on processors with bf16 multiplication.
//
// A tensor is a matrix of rows x channels. Channels are processed 64 at a time so that the compiler keeps the sums in
// registers. With fewer channels, a row of 64 columns holds several pixels ("fold"), whose sums are added at the end. Rows are
// processed in chunks of fixed size and the sums of the chunks are added in order, so results do not depend on the number of
// threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr long WIDE = 64, CHUNK = 128;  // columns and rows per step: they fit into the L1 cache

struct bf16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void store(float value, float& to) { to = value; }
inline void store(float value, bf16& to) {  // rounds to nearest even; NaN and infinity are preserved
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded >> 16);
}

// Calls body(chunk, first row, end row, first column) for every chunk and block of WIDE columns.
template <class Body>
void for_chunks(long rows, long columns, int threads, Body body) {
    const long chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long chunk = 0; chunk < chunks; chunk++)
        for (long column = 0; column < columns; column += WIDE)
            body(chunk, chunk * CHUNK, std::min(rows, (chunk + 1) * CHUNK), column);
}

// Adds up the folds of each channel and stores the sum in every fold.
void add_folds(std::vector<double>& columns, long channels) {
    for (long k = channels; k < long(columns.size()); k++) columns[k % channels] += columns[k];
    for (long k = channels; k < long(columns.size()); k++) columns[k] = columns[k % channels];
}

template <class T>
void forward(const T* x, const T* residual, const float* gamma, const float* beta, float* running_mean, float* running_var,
             double momentum, double eps, T* y, float* mean, float* invstd, long rows, long channels, int threads) {
    const long fold = channels < WIDE ? WIDE / channels : 1, columns = channels * fold, chunks = (rows + CHUNK - 1) / CHUNK;
    std::vector<float> sums(chunks * columns), squares(chunks * columns);  // per chunk: mean and squared deviations
    for_chunks(rows, columns, threads, [&](long chunk, long from, long to, long column) {
        float total[WIDE] = {}, square[WIDE] = {}, center[WIDE];
        for (long row = from; row < to; row++)
#pragma omp simd
            for (long k = 0; k < WIDE; k++) total[k] += load(x[row * columns + column + k]);
#pragma omp simd
        for (long k = 0; k < WIDE; k++) center[k] = total[k] / float(to - from);
        for (long row = from; row < to; row++)
#pragma omp simd
            for (long k = 0; k < WIDE; k++) {
                const float d = load(x[row * columns + column + k]) - center[k];
                square[k] += d * d;
            }
        std::memcpy(&sums[chunk * columns + column], center, sizeof center);
        std::memcpy(&squares[chunk * columns + column], square, sizeof square);
    });
    // Chan, Golub and LeVeque, 1979: the squared deviations of all rows are the sum of those within the chunks and those of the
    // chunks' means from the overall mean.
    const double count = double(rows) * fold;
    const auto size = [=](long chunk) { return double(std::min(rows, (chunk + 1) * CHUNK) - chunk * CHUNK); };
    std::vector<double> whole(columns), spread(columns);
    for (long chunk = 0; chunk < chunks; chunk++)
        for (long k = 0; k < columns; k++) whole[k] += size(chunk) * sums[chunk * columns + k];
    add_folds(whole, channels);
    for (double& m : whole) m /= count;
    for (long chunk = 0; chunk < chunks; chunk++)
        for (long k = 0; k < columns; k++) {
            const double d = sums[chunk * columns + k] - whole[k];
            spread[k] += squares[chunk * columns + k] + size(chunk) * d * d;
        }
    add_folds(spread, channels);
    std::vector<float> scale(columns), shift(columns);
    for (long c = 0; c < channels; c++) {
        mean[c] = float(whole[c]);
        invstd[c] = float(1 / std::sqrt(spread[c] / count + eps));
        running_mean[c] = float((1 - momentum) * running_mean[c] + momentum * whole[c]);
        running_var[c] = float((1 - momentum) * running_var[c] + momentum * spread[c] / (count - 1));
    }
    for (long k = 0; k < columns; k++) {
        const long c = k % channels;
        scale[k] = gamma[c] * invstd[c];
        shift[k] = beta[c] - mean[c] * gamma[c] * invstd[c];
    }
    for_chunks(rows, columns, threads, [&](long, long from, long to, long column) {
        for (long row = from; row < to; row++) {
            const long at = row * columns + column;
#pragma omp simd
            for (long k = 0; k < WIDE; k++) {
                float value = load(x[at + k]) * scale[column + k] + shift[column + k];
                if (residual) value += load(residual[at + k]);
                store(value > 0 || value != value ? value : 0.0f, y[at + k]);  // NaN is preserved, as in PyTorch
            }
        }
    });
}

// y: the output, for ReLU's mask; null without a residual, when the mask is computed from x.
// twin_grad: a second gradient of y, added to the first; may be null, and must be without a residual.
// relu_grad: output, the gradient of ReLU's input, which is also the residual's gradient; null without a residual.
template <bool RESIDUAL, class T>
void backward(const T* grad, const T* twin_grad, const T* x, const T* y, const float* gamma, const float* beta, const float* mean,
              const float* invstd, T* x_grad, T* relu_grad, float* gamma_grad, float* beta_grad, long rows, long channels,
              int threads) {
    const long fold = channels < WIDE ? WIDE / channels : 1, columns = channels * fold, chunks = (rows + CHUNK - 1) / CHUNK;
    std::vector<float> center(columns), scale(columns), shift(columns), sums(chunks * columns), products(chunks * columns);
    for (long k = 0; k < columns; k++) {
        const long c = k % channels;
        center[k] = mean[c];
        scale[k] = gamma[c] * invstd[c];
        shift[k] = beta[c] - mean[c] * gamma[c] * invstd[c];
    }
    // The gradient of ReLU's input: that of the output where the output is positive, else 0. With a residual, it is stored in
    // relu_grad by the first pass.
    const float *a = scale.data(), *b = shift.data();
    const auto masked = [=](long at, long column, long k) {
        if constexpr (RESIDUAL) return load(relu_grad[at + k]);
        const float g = load(grad[at + k]), out = load(x[at + k]) * a[column + k] + b[column + k];
        return out > 0 ? g : 0.0f;
    };
    for_chunks(rows, columns, threads, [&](long chunk, long from, long to, long column) {
        if constexpr (RESIDUAL)  // the chunk is still in the L1 cache when it is summed
            for (long row = from; row < to; row++) {
                const long at = row * columns + column;
                if (twin_grad) {
#pragma omp simd
                    for (long k = 0; k < WIDE; k++) {
                        const float g = load(grad[at + k]) + load(twin_grad[at + k]);
                        store(load(y[at + k]) > 0 ? g : 0.0f, relu_grad[at + k]);
                    }
                } else {
#pragma omp simd
                    for (long k = 0; k < WIDE; k++) {
                        const float g = load(grad[at + k]);
                        store(load(y[at + k]) > 0 ? g : 0.0f, relu_grad[at + k]);
                    }
                }
            }
        float total[WIDE] = {}, product[WIDE] = {};
        for (long row = from; row < to; row++) {
            const long at = row * columns + column;
#pragma omp simd
            for (long k = 0; k < WIDE; k++) {
                const float g = masked(at, column, k);
                total[k] += g;
                product[k] += g * (load(x[at + k]) - center[column + k]);
            }
        }
        std::memcpy(&sums[chunk * columns + column], total, sizeof total);
        std::memcpy(&products[chunk * columns + column], product, sizeof product);
    });
    std::vector<double> total(columns), product(columns);
    for (long chunk = 0; chunk < chunks; chunk++)
        for (long k = 0; k < columns; k++) {
            total[k] += sums[chunk * columns + k];
            product[k] += products[chunk * columns + k];
        }
    add_folds(total, channels);
    add_folds(product, channels);
    std::vector<float> by_grad(columns), by_x(columns), constant(columns);
    const double count = double(rows) * fold;
    for (long k = 0; k < columns; k++) {
        const long c = k % channels;
        const double slope = double(gamma[c]) * invstd[c], curve = -slope * invstd[c] * invstd[c] * product[k] / count;
        by_grad[k] = float(slope);
        by_x[k] = float(curve);
        constant[k] = float(-slope * total[k] / count - curve * mean[c]);
    }
    for (long c = 0; c < channels; c++) {
        beta_grad[c] = float(total[c]);
        gamma_grad[c] = float(product[c] * invstd[c]);
    }
    for_chunks(rows, columns, threads, [&](long, long from, long to, long column) {
        for (long row = from; row < to; row++) {
            const long at = row * columns + column;
#pragma omp simd
            for (long k = 0; k < WIDE; k++) {
                const float g = masked(at, column, k);
                store(by_grad[column + k] * g + by_x[column + k] * load(x[at + k]) + constant[column + k], x_grad[at + k]);
            }
        }
    });
}

#ifdef __AVX512BF16__

constexpr long LANES = 16, CHUNKS = 8;  // output channels per vector; chunks of the batch, whose sums are added in order

// Interleaves 16 channels of pixels a and b (null: zeros) as the operand pairs of the bf16 dot-product instruction.
inline __m512i paired(const bf16* a, const bf16* b) {
    const auto widened = [](const bf16* from) {
        return from ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))) : _mm512_setzero_si512();
    };
    return _mm512_or_si512(widened(a), _mm512_slli_epi32(widened(b), 16));
}

// The gradient of the weights of a 3x3 convolution with stride 1 and padding 1. x: (images, height, width, inputs); grad:
// (images, height, width, outputs); weights: (outputs, 3, 3, inputs). Width is even; inputs and outputs are multiples of 16.
//
// One instruction multiplies a pair of neighboring pixels. Pairs of grad start at even columns; pairs of x at every column from
// -1, because each column of the kernel shifts x. The sums for nine kernel positions, two inputs and 16 outputs stay in
// registers.
void weight_gradient(const bf16* x, const bf16* grad, float* weights, long images, long height, long width, long inputs,
                     long outputs, int threads) {
    const long chunk_images = (images + CHUNKS - 1) / CHUNKS, blocks = outputs / LANES, size = outputs * inputs * 9;
    std::vector<float> sums(CHUNKS * size);  // (chunk, block, input, kernel row, kernel column, output within the block)
#pragma omp parallel num_threads(threads)
    {
        const long row_x = (width + 1) * inputs, row_g = width / 2 * outputs;
        std::vector<uint32_t> xs(height * row_x), gs((height + 2) * row_g);  // a row of zeros above and below grad
#pragma omp for schedule(static)
        for (long chunk = 0; chunk < CHUNKS; chunk++)
            for (long image = chunk * chunk_images; image < std::min(images, (chunk + 1) * chunk_images); image++) {
                for (long row = 0; row < height; row++) {
                    const bf16* from = x + (image * height + row) * width * inputs;
                    for (long start = 0; start <= width; start++)  // the pair of columns start - 1 and start
                        for (long c = 0; c < inputs; c += LANES)
                            _mm512_storeu_si512(&xs[row * row_x + start * inputs + c],
                                                paired(start ? from + (start - 1) * inputs + c : nullptr,
                                                       start < width ? from + start * inputs + c : nullptr));
                    const bf16* grad_row = grad + (image * height + row) * width * outputs;
                    for (long pair = 0; pair < width / 2; pair++)
                        for (long c = 0; c < outputs; c += LANES)
                            _mm512_storeu_si512(&gs[(row + 1) * row_g + pair * outputs + c],
                                                paired(grad_row + 2 * pair * outputs + c,
                                                       grad_row + (2 * pair + 1) * outputs + c));
                }
                for (long block = 0; block < blocks; block++)
                    for (long c = 0; c < inputs; c += 2) {
                        float* to = &sums[chunk * size + (block * inputs + c) * 9 * LANES];
                        __m512 total[2][3][3];
                        for (int i = 0; i < 18; i++) (&total[0][0][0])[i] = _mm512_loadu_ps(to + i * LANES);
                        for (long row = 0; row < height; row++)
                            for (long pair = 0; pair < width / 2; pair++) {
                                __m512bh g[3];  // grad one row below, the same row, one row above: kernel rows 0, 1, 2
                                for (int k = 0; k < 3; k++)
                                    g[k] = (__m512bh)_mm512_loadu_si512(&gs[(row + 2 - k) * row_g + pair * outputs + block * LANES]);
#pragma GCC unroll 3
                                for (int column = 0; column < 3; column++)
#pragma GCC unroll 2
                                    for (int i = 0; i < 2; i++) {
                                        const auto pixels = (__m512bh)_mm512_set1_epi32(
                                            int(xs[row * row_x + (2 * pair + column) * inputs + c + i]));
#pragma GCC unroll 3
                                        for (int k = 0; k < 3; k++)
                                            total[i][k][column] = _mm512_dpbf16_ps(total[i][k][column], g[k], pixels);
                                    }
                            }
                        for (int i = 0; i < 18; i++) _mm512_storeu_ps(to + i * LANES, (&total[0][0][0])[i]);
                    }
            }
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long at = 0; at < size / LANES; at++) {  // (block, input, position)
        __m512 whole = _mm512_loadu_ps(&sums[at * LANES]);
        for (long chunk = 1; chunk < CHUNKS; chunk++) whole = _mm512_add_ps(whole, _mm512_loadu_ps(&sums[chunk * size + at * LANES]));
        const long position = at % 9, c = at / 9 % inputs, block = at / 9 / inputs;
        float out[LANES];
        _mm512_storeu_ps(out, whole);
        for (long lane = 0; lane < LANES; lane++) weights[((block * LANES + lane) * 9 + position) * inputs + c] = out[lane];
    }
}

#endif

}  // namespace

#ifdef __AVX512BF16__
extern "C" void weight_gradient_bf16(const bf16* x, const bf16* grad, float* weights, long images, long height, long width,
                                     long inputs, long outputs, int threads) {
    weight_gradient(x, grad, weights, images, height, width, inputs, outputs, threads);
}
#endif

#define EXPORT(NAME, T)                                                                                                        \
    extern "C" void forward_##NAME(const T* x, const T* residual, const float* gamma, const float* beta, float* running_mean,  \
                                   float* running_var, double momentum, double eps, T* y, float* mean, float* invstd,          \
                                   long rows, long channels, int threads) {                                                    \
        forward(x, residual, gamma, beta, running_mean, running_var, momentum, eps, y, mean, invstd, rows, channels, threads); \
    }                                                                                                                          \
    extern "C" void backward_##NAME(const T* grad, const T* twin_grad, const T* x, const T* y, const float* gamma,             \
                                    const float* beta, const float* mean, const float* invstd, T* x_grad, T* relu_grad,        \
                                    float* gamma_grad, float* beta_grad, long rows, long channels, int threads) {              \
        (relu_grad ? backward<true, T> : backward<false, T>)(grad, twin_grad, x, y, gamma, beta, mean, invstd, x_grad,         \
                                                             relu_grad, gamma_grad, beta_grad, rows, channels, threads);       \
    }
EXPORT(fp32, float)
EXPORT(bf16, bf16)
