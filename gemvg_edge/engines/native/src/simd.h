// Sixteen lanes of 32 bits as one value, whatever registers the processor has, and the few operations that compilers
// cannot derive from plain vector arithmetic. Included once per instruction set, within its namespace (engine.cpp).
#pragma once

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

static inline f32x16 all(float x) { return x - f32x16{}; }
static inline i32x16 all(int32_t x) { return x - i32x16{}; }

template <class V>
static inline V load(const void* at) {
    V v;
    __builtin_memcpy(&v, at, sizeof v);
    return v;
}
template <class V>
static inline void store(void* at, V v) {
    __builtin_memcpy(at, &v, sizeof v);
}

#if defined(__AVX512VNNI__)
constexpr int TILE_ROWS = 12;  // of accumulators: 12 x 2 registers of 32
// acc += dot products of four unsigned bytes of b with the four signed bytes of a.
static inline i32x16 dot4(i32x16 acc, uint32_t a, i32x16 b) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)b, _mm512_set1_epi32((int)a));
}
static inline f32x16 from_half(const uint16_t* at) {
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at));
}
static inline void to_half(uint16_t* at, f32x16 v) {
    _mm256_storeu_si256((__m256i*)at, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
static inline f32x16 to_float(i32x16 v) { return (f32x16)_mm512_cvtepi32_ps((__m512i)v); }
static inline i32x16 nearest(f32x16 v) { return (i32x16)_mm512_cvtps_epi32((__m512)v); }
static inline f32x16 larger(f32x16 a, f32x16 b) { return (f32x16)_mm512_max_ps((__m512)a, (__m512)b); }
static inline void to_bytes(int8_t* at, i32x16 v) {
    _mm_storeu_si128((__m128i*)at, _mm512_cvtsepi32_epi8((__m512i)v));
}
#elif defined(__AVX2__)
#define HALF_REGISTERS  // of 32 bytes; GCC keeps a value of 64 in memory, and each product would wait for it
constexpr int TILE_ROWS = 3;
union Halves {
    i32x16 whole;
    f32x16 floats;
    __m256i part[2];
    __m256 fpart[2];
};
static inline __m256i half_dot4(__m256i acc, __m256i x, __m256i b) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, b, x);
#else  // the products of whole bytes would overflow 16 bits in pairs, those of half bytes do not
    const __m256i low = _mm256_and_si256(b, _mm256_set1_epi8(15));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(15));
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i lows = _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones);
    const __m256i highs = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), ones);
    return _mm256_add_epi32(acc, _mm256_add_epi32(lows, _mm256_slli_epi32(highs, 4)));
#endif
}
// The same for b of 4 bits, whose products in pairs fit 16.
static inline __m256i small_dot4(__m256i acc, __m256i x, __m256i b) {
#if defined(__AVXVNNI__)
    return half_dot4(acc, x, b);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(b, x), _mm256_set1_epi16(1)));
#endif
}
static inline i32x16 dot4(i32x16 acc, uint32_t a, i32x16 b) {
    Halves c{acc}, w{b};
    for (int i = 0; i < 2; i++) c.part[i] = half_dot4(c.part[i], _mm256_set1_epi32((int)a), w.part[i]);
    return c.whole;
}
static inline f32x16 from_half(const uint16_t* at) {
    Halves v;
    for (int i = 0; i < 2; i++) v.fpart[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at + i));
    return v.floats;
}
static inline void to_half(uint16_t* at, f32x16 f) {
    Halves v;
    v.floats = f;
    for (int i = 0; i < 2; i++) _mm_storeu_si128((__m128i*)at + i, _mm256_cvtps_ph(v.fpart[i], 0));
}
static inline f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
static inline i32x16 nearest(f32x16 f) {
    Halves v;
    v.floats = f;
    for (int i = 0; i < 2; i++) v.part[i] = _mm256_cvtps_epi32(v.fpart[i]);
    return v.whole;
}
static inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }
static inline void to_bytes(int8_t* at, i32x16 v) {
    for (int i = 0; i < 16; i++) at[i] = (int8_t)(v[i] > 127 ? 127 : v[i] < -128 ? -128 : v[i]);
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int TILE_ROWS = 3;
union Quarters {
    i32x16 whole;
    f32x16 floats;
    int32x4_t part[4];
    float32x4_t fpart[4];
};
static inline i32x16 dot4(i32x16 acc, uint32_t a, i32x16 b) {
    Quarters c{acc}, w{b};
    const int8x16_t x = vreinterpretq_s8_u32(vdupq_n_u32(a));
    for (int i = 0; i < 4; i++) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        c.part[i] = vusdotq_s32(c.part[i], vreinterpretq_u8_s32(w.part[i]), x);
#else  // signed bytes only: b - 128, and the 128 given back
        const int8x16_t signed_b = veorq_s8(vreinterpretq_s8_s32(w.part[i]), vdupq_n_s8(-128));
        c.part[i] = vdotq_s32(c.part[i], signed_b, x);
        c.part[i] = vdotq_s32(vdotq_s32(c.part[i], vdupq_n_s8(64), x), vdupq_n_s8(64), x);
#endif
    }
    return c.whole;
}
static inline f32x16 from_half(const uint16_t* at) {
    Quarters v;
    for (int i = 0; i < 4; i++) v.fpart[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at + 4 * i)));
    return v.floats;
}
static inline void to_half(uint16_t* at, f32x16 f) {
    Quarters v;
    v.floats = f;
    for (int i = 0; i < 4; i++) vst1_u16(at + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.fpart[i])));
}
static inline f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
static inline i32x16 nearest(f32x16 f) {
    Quarters v;
    v.floats = f;
    for (int i = 0; i < 4; i++) v.part[i] = vcvtnq_s32_f32(v.fpart[i]);
    return v.whole;
}
static inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }
static inline void to_bytes(int8_t* at, i32x16 v) {
    for (int i = 0; i < 16; i++) at[i] = (int8_t)(v[i] > 127 ? 127 : v[i] < -128 ? -128 : v[i]);
}
#else
#error "compile with -mavx2 -mfma -mf16c, or more, or for ARMv8.2 with dotprod"
#endif

static inline f32x16 smaller(f32x16 a, f32x16 b) { return -larger(-a, -b); }
static inline f32x16 absolute(f32x16 v) { return (f32x16)((u32x16)v & 0x7fffffffu); }

static inline f32x16 square_root(f32x16 v) {
    for (int i = 0; i < 16; i++) v[i] = __builtin_sqrtf(v[i]);
    return v;
}

static inline float sum(f32x16 v) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += v[i];
    return total;
}
static inline float largest(f32x16 v) {
    float most = v[0];
    for (int i = 1; i < 16; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// e^x, relative error below 3e-7; 0 below -87.
static inline f32x16 exponential(f32x16 x) {
    x = smaller(larger(x, all(-87.0f)), all(88.0f));
    const f32x16 n = to_float(nearest(x * 1.44269504f));
    const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (f32x16)((i32x16)p + (nearest(n) << 23));
}

constexpr float LOG2_E = 1.44269504f;

// 2^x, relative error below 4e-6: for weights of a softmax and activations. Of -1e30 it is 0, or too little to count.
static inline f32x16 power_of_two(f32x16 x) {
#if defined(__AVX512F__)
    const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = larger(x, all(-126.0f));
    const f32x16 n = to_float(nearest(x));
#endif
    const f32x16 r = x - n;
    f32x16 p = r * 0.00956051021f + 0.0559170392f;  // a fit of least relative error over -0.5 to 0.5
    p = p * r + 0.240249811f;
    p = p * r + 0.693121968f;
    p = p * r + 0.999999191f;
#if defined(__AVX512F__)
    return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return (f32x16)((i32x16)p + (nearest(n) << 23));
#endif
}

// A division takes as long as all else of an activation together.
static inline f32x16 reciprocal(f32x16 x) {
#if defined(__AVX512F__)
    const f32x16 y = (f32x16)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}
static inline f32x16 sigmoid(f32x16 x) {
    return reciprocal(1.0f + power_of_two(smaller(x * -LOG2_E, all(126.0f))));
}

// x / 2 (1 + erf(x / sqrt 2)), erf by Abramowitz and Stegun 7.1.26: error below 2e-7.
static inline f32x16 gelu(f32x16 x) {
    const f32x16 z = absolute(x) * 0.70710678f;
    const f32x16 t = 1.0f / (1.0f + 0.3275911f * z);
    f32x16 p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const f32x16 erf = 1.0f - p * t * exponential(-z * z);
    const f32x16 half = 0.5f * absolute(x) * erf;
    return 0.5f * x + half;
}

static inline uint32_t bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// What a tile multiplies: a step takes 4 bytes of a row of A and 64 bytes of B, for 16 outputs.
struct Int8 {
    using Sums = i32x16;
    static constexpr int DEPTH = 4;  // products a step and output
    static Sums mac(Sums acc, uint32_t a, i32x16 b) { return dot4(acc, a, b); }
#if defined(HALF_REGISTERS)
    using Half = __m256i;
    static Half all(const char* a) { return (Half)_mm256_broadcast_ss((const float*)a); }
    static Half load(const char* b) { return _mm256_loadu_si256((const __m256i*)b); }
    static Half mac(Half acc, Half a, Half b) { return half_dot4(acc, a, b); }
#endif
};
struct Float32 {
    using Sums = f32x16;
    static constexpr int DEPTH = 1;
    static Sums mac(Sums acc, uint32_t a, i32x16 b) {
        float x;
        __builtin_memcpy(&x, &a, 4);
        return acc + x * (f32x16)b;
    }
#if defined(HALF_REGISTERS)
    using Half = __m256;
    static Half all(const char* a) { return _mm256_broadcast_ss((const float*)a); }
    static Half load(const char* b) { return _mm256_loadu_ps((const float*)b); }
    static Half mac(Half acc, Half a, Half b) { return _mm256_fmadd_ps(a, b, acc); }
#endif
    static uint32_t word(const float* from, int) {
        uint32_t bits;
        __builtin_memcpy(&bits, from, 4);
        return bits;
    }
    // Two vectors of numbers that lie side by side.
    static void words(uint32_t* to, f32x16 low, f32x16 high) { store(to, low), store(to + 16, high); }
};
#if defined(__AVX512BF16__)
struct Bfloat16 {
    using Sums = f32x16;
    static constexpr int DEPTH = 2;
    static Sums mac(Sums acc, uint32_t a, i32x16 b) {
        return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)_mm512_set1_epi32((int)a));
    }
    // Two numbers, `apart` floats from each other, as a step wants them.
    static uint32_t word(const float* from, int apart) { return bf16(from[0]) | bf16(from[apart]) << 16; }
    static void words(uint32_t* to, f32x16 low, f32x16 high) {
        store(to, _mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
};
using Attended = Bfloat16;  // what attention multiplies
#else
using Attended = Float32;
#endif
