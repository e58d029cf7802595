// What this machine can do at most: 8-bit dot products, float32 multiply-adds, sequential reads; one JSON line.
//
//   g++ -O3 -march=native -pthread peaks.cpp -o peaks && ./peaks THREADS
//
// The operands never leave the registers, so nothing but the units themselves limits the first two.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

constexpr int CHAINS = 12, REPEATS = 5;
constexpr size_t READ_BYTES = size_t(1) << 30;
// The compiler must believe that a register was changed, or it would fold the loop.
#if defined(__x86_64__)
#define OPAQUE(x) asm volatile("" : "+v"(x))
#else
#define OPAQUE(x) asm volatile("" : "+w"(x))
#endif

#if defined(__AVX512VNNI__)
using Ints = __m512i;
static const char *INT8 = "AVX512-VNNI";
static Ints ints(int x) { return _mm512_set1_epi8(x); }
static Ints dot(Ints c, Ints a, Ints b) { return _mm512_dpbusd_epi32(c, a, b); }
#elif defined(__AVXVNNI__)
using Ints = __m256i;
static const char *INT8 = "AVX-VNNI";
static Ints ints(int x) { return _mm256_set1_epi8(x); }
static Ints dot(Ints c, Ints a, Ints b) { return _mm256_dpbusd_avx_epi32(c, a, b); }
#elif defined(__AVX2__)
using Ints = __m256i;
static const char *INT8 = "AVX2 maddubs";
static Ints ints(int x) { return _mm256_set1_epi8(x); }
static Ints dot(Ints c, Ints a, Ints b) {
    return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
using Ints = int32x4_t;
static const char *INT8 = "NEON dot product";
static Ints ints(int x) { return vreinterpretq_s32_s8(vdupq_n_s8(x)); }
static Ints dot(Ints c, Ints a, Ints b) { return vdotq_s32(c, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
#else
#error "this processor has no 8-bit dot product that is known here"
#endif

#if defined(__AVX512F__)
using Floats = __m512;
static Floats floats(float x) { return _mm512_set1_ps(x); }
static Floats fma(Floats c, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
using Floats = __m256;
static Floats floats(float x) { return _mm256_set1_ps(x); }
static Floats fma(Floats c, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, c); }
#else
using Floats = float32x4_t;
static Floats floats(float x) { return vdupq_n_f32(x); }
static Floats fma(Floats c, Floats a, Floats b) { return vfmaq_f32(c, a, b); }
#endif

template <class Work> static double seconds(int threads, Work work) {
    auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> all;
    for (int k = 0; k < threads; k++) all.emplace_back(work, k);
    for (auto &one : all) one.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <class Run> static double median_rate(double amount, Run run) {
    std::vector<double> rates;
    for (int k = 0; k < REPEATS; k++) rates.push_back(amount / run());
    std::sort(rates.begin(), rates.end());
    return rates[REPEATS / 2];
}

int main(int count, char **words) {
    const int threads = count > 1 ? std::max(1, atoi(words[1])) : int(std::thread::hardware_concurrency());
    const long loops = 12000000;
    auto whole = [&](int) {
        Ints a = ints(1), b = ints(2), c[CHAINS];
        for (auto &x : c) x = ints(0);
        for (long i = 0; i < loops; i++) {
            OPAQUE(a);
            for (auto &x : c) x = dot(x, a, b);
        }
        for (auto &x : c) OPAQUE(x);
    };
    auto real = [&](int) {
        Floats a = floats(1), b = floats(2), c[CHAINS];
        for (auto &x : c) x = floats(0);
        for (long i = 0; i < loops; i++) {
            OPAQUE(a);
            for (auto &x : c) x = fma(x, a, b);
        }
        for (auto &x : c) OPAQUE(x);
    };
    const double products = 2.0 * threads * loops * CHAINS;
    double int8 = median_rate(products * sizeof(Ints), [&] { return seconds(threads, whole); });
    double float32 = median_rate(products * sizeof(Floats) / 4, [&] { return seconds(threads, real); });

    const size_t part = READ_BYTES / threads / 512 * 512;
    char *memory = static_cast<char *>(aligned_alloc(size_t(2) << 20, READ_BYTES));
    if (!memory) return 1;
    memset(memory, 1, READ_BYTES);
    auto read = [&](int k) {
        const uint64_t *at = reinterpret_cast<uint64_t *>(memory + k * part), *end = at + part / 8;
        uint64_t sums[32] = {};
        for (; at < end; at += 32)
            for (int j = 0; j < 32; j++) sums[j] += at[j];
        volatile uint64_t kept = 0;
        for (auto sum : sums) kept = kept + sum;
    };
    double bytes = median_rate(double(part) * threads, [&] { return seconds(threads, read); });
    printf("{\"int8_gops\": %.1f, \"float32_gflops\": %.1f, \"read_gbs\": %.2f, \"int8_by\": \"%s\"}\n", int8 / 1e9,
           float32 / 1e9, bytes / 1e9, INT8);
}
