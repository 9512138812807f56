/* Products with packed sparse weights, and packing and unpacking them. docs/kernels.md describes the layout.
 *
 * No Python, no torch, no OpenMP: the caller hands in buffers, and the function that shares work among threads.
 * Every function with vector instructions carries its own target, and the path is chosen at run time.
 *
 * Bounds. Nothing outside the buffers is read whatever mask and row starts hold: a row whose start leaves less
 * room than its widest content (all columns kept, and one vector more) is read from `tail`, a padded copy of
 * the end of the values. A start outside the values is not followed, and the call reports it.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#define ARM 1
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum { BF16 = 0, FP16 = 1, FP32 = 2, INT8 = 3, INT4 = 4 };
enum { PORTABLE = 1, NEON = 2, AVX2 = 3, AVX512 = 4, AVX512BF16 = 5 };
enum { OK = 0, BAD_ROWS = 1, NO_PATH = 2 };
enum { COARSE = 8, FINE = 32 }; /* shares per thread */
enum { WORD = 64, GROUP = 128, PAD = 64, BLOCK = 192, MOST = 16, MATRICES = 8, STRETCHES = 64 };

typedef void (*range_function)(int64_t, int64_t, void *);
typedef int (*parallel_function)(int64_t, int64_t, int64_t, range_function, void *);

/* A packed matrix [R, C] as the caller hands it in (`library.py` has the same fields). Without `mask` and `rows`
 * (int8 and int4 only) every weight is kept, and all rows are as long. */
typedef struct {
  const uint8_t *values, *mask;
  const void *rows;      /* starts: of values, for int4 of bytes */
  const uint16_t *scale; /* bf16 [R, ceil(C / 128)], or NULL */
  int64_t size, R, C;    /* bytes of values; rows; columns */
  int32_t kind, wide;    /* of the values; whether `rows` is int64 */
} matrix;

typedef struct {
  matrix m;
  int64_t W, G, safe, from; /* mask words and groups of a row; rows starting behind `safe` are in the tail */
  int64_t width, count;     /* bytes of a value, and how many there are */
  const uint8_t *tail;
  const uint8_t *x; /* laid out for the kernel */
  void *y;          /* [n, R], float or bf16 */
  uint8_t *out;     /* expand: dense rows from `first` on; compress: values */
  const uint8_t *in;
  int64_t first, last, pitch; /* rows; of `out` from one to the next, in values */
  int32_t n, laid, to, path, bad; /* rows of x; as many as are laid out; kind of the output */
} job;

typedef void (*rows_function)(job *, int64_t, int64_t);
typedef struct {
  job *jobs;
  rows_function run;
  int64_t chunks[MATRICES + 1]; /* shares before those of each job, and all of them */
  int count, places, stretches;
  struct { int64_t taken, apart[7]; } next[STRETCHES];
} shared;

static parallel_function parallel_for = 0;
static __thread int place; /* of this thread among those that share work */

/* ---- small things ------------------------------------------------------------------------------------- */

INLINE uint64_t word_at(const uint8_t *p) {
  uint64_t m;
  memcpy(&m, p, 8);
  return m;
}

/* Asks for what is wanted soon: the processor alone looks less far ahead than memory is slow (1.2 to 1.6x). First
 * into the second cache, which takes more requests at once than the first. */
INLINE void ahead(const uint8_t *values, const uint8_t *mask) {
  __builtin_prefetch(values + 8192, 0, 2);
  __builtin_prefetch(values + 4096);
  if (mask) __builtin_prefetch(mask + 1024);
}

INLINE int width_of(int kind) { return kind == FP32 ? 4 : kind == INT8 || kind == INT4 ? 1 : 2; }

INLINE float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

INLINE float from_bf16(uint16_t b) { return as_float((uint32_t)b << 16); }

INLINE uint16_t to_bf16(float f) {
  uint32_t b;
  memcpy(&b, &f, 4);
  return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

INLINE float from_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
  if (e == 31) return as_float(sign | 0x7f800000u | m << 13);
  if (e) return as_float(sign | (e + 112) << 23 | m << 13);
  return (sign ? -1.0f : 1.0f) * (float)m * 5.9604644775390625e-8f;
}

INLINE float float_at(const void *x, int kind, int64_t i) {
  if (kind == FP32) {
    float f;
    memcpy(&f, (const uint8_t *)x + 4 * i, 4);
    return f;
  }
  uint16_t h;
  memcpy(&h, (const uint8_t *)x + 2 * i, 2);
  return kind == BF16 ? from_bf16(h) : from_half(h);
}

INLINE int64_t row_start(const matrix *m, int64_t r) {
  if (!m->rows) return r * (m->kind == INT4 ? m->C / WORD * 32 + (m->C % WORD + 1) / 2 : m->C);
  if (m->wide) {
    int64_t s;
    memcpy(&s, (const uint8_t *)m->rows + 8 * r, 8);
    return s;
  }
  int32_t s;
  memcpy(&s, (const uint8_t *)m->rows + 4 * r, 4);
  return s;
}

/* Word w of the mask of row r. */
INLINE uint64_t mask_of(const job *j, int64_t r, int64_t w) {
  if (j->m.mask) return word_at(j->m.mask + 8 * (r * j->W + w));
  return (w + 1) * WORD <= j->m.C ? ~0ull : (1ull << j->m.C % WORD) - 1;
}

/* The mask words of row r; NULL where there are none. */
INLINE const uint8_t *masks_of(const job *j, int64_t r) { return j->m.mask ? j->m.mask + 8 * r * j->W : 0; }

INLINE float scale_at(const job *j, int64_t r, int64_t g) {
  uint16_t b;
  memcpy(&b, (const uint8_t *)j->m.scale + 2 * (r * j->G + g), 2);
  return from_bf16(b);
}

/* Where the values of a row may be read, 64 W values and 64 bytes far; NULL for a start out of bounds. */
INLINE const uint8_t *row_values(job *j, int64_t r) {
  int64_t s = row_start(&j->m, r);
  if (s < 0 || s > j->count) {
    j->bad = 1;
    return 0;
  }
  s *= j->width;
  return s <= j->safe ? j->m.values + s : j->tail + (s - j->from);
}

/* The bytes behind a row's start that a kernel may read. */
static int64_t reach(const matrix *m) {
  int64_t W = (m->C + 63) / 64;
  return (m->kind == INT4 ? 32 : 64 * width_of(m->kind)) * W + PAD;
}

EXPORT int64_t llmprune_tail_bytes(const matrix *m) { return 2 * reach(m); }

/* Fills what is derived, and copies the end of the values to `tail` [llmprune_tail_bytes]. */
static int prepare(job *j, uint8_t *tail) {
  int64_t far = reach(&j->m), size = j->m.size;
  j->W = (j->m.C + 63) / 64;
  j->G = (j->m.C + 127) / 128;
  j->safe = size - far;
  j->from = size > far ? size - far : 0;
  j->tail = tail;
  j->width = width_of(j->m.kind), j->count = size / j->width;
  if (row_start(&j->m, 0) != 0 || row_start(&j->m, j->m.R) != j->count) return BAD_ROWS;
  if (size > 0) memcpy(tail, j->m.values + j->from, (size_t)(size - j->from));
  memset(tail + (size - j->from), 0, (size_t)far);
  return OK;
}

/* ---- sharing rows among threads ----------------------------------------------------------------------- */

static double cost(const job *j) {
  double values = (double)row_start(&j->m, j->last) - (double)row_start(&j->m, j->first);
  return values * width_of(j->m.kind) + (double)(j->last - j->first) * (double)j->W * 16;
}

/* Shares are runs of rows. Every thread has a stretch of them of its own, so that it reads on where it was, and
 * helps with the others' when it is through. */
static void take_shares(int64_t begin, int64_t end, void *context) {
  shared *s = (shared *)context;
  (void)begin, (void)end;
  place = __atomic_fetch_add(&s->places, 1, __ATOMIC_RELAXED);
  for (int turn = 0; turn < s->stretches; turn++) {
    int mine = (place + turn) % s->stretches;
    int64_t all = s->chunks[s->count], last = all * (mine + 1) / s->stretches;
    for (;;) {
      int64_t i = all * mine / s->stretches + __atomic_fetch_add(&s->next[mine].taken, 1, __ATOMIC_RELAXED);
      int k = 0;
      if (i >= last) break;
      while (i >= s->chunks[k + 1]) k++;
      job *j = s->jobs + k;
      int64_t shares = s->chunks[k + 1] - s->chunks[k], rows = j->last - j->first;
      i -= s->chunks[k];
      s->run(j, j->first + rows * i / shares, j->first + rows * (i + 1) / shares);
    }
  }
}

/* The rows of all jobs, whose outputs are of their own, in so many shares per thread. */
static int run_rows(job *jobs, int count, rows_function run, int threads, int shares) {
  shared s = {jobs, run, {0}, count, 0, threads < STRETCHES ? threads : STRETCHES, {{0}}};
  double all = 0;
  int bad = 0;
  if (!run) return NO_PATH;
  for (int k = 0; k < count; k++) all += cost(jobs + k);
  int parallel = parallel_for && threads > 1 && all > 65536;
  if (!parallel) s.stretches = 1;
  for (int k = 0; k < count; k++) {
    double share = parallel ? shares * threads * cost(jobs + k) / all : 0;
    s.chunks[k + 1] = s.chunks[k] + (share > 1 ? (int64_t)(share + 0.5) : 1);
  }
  if (parallel) parallel_for(0, threads, 1, take_shares, &s);
  take_shares(0, 1, &s); /* all of it, or what is left where the threads failed */
  for (int k = 0; k < count; k++) bad |= jobs[k].bad;
  return bad ? BAD_ROWS : OK;
}

INLINE void give(const job *j, int64_t c, int64_t r, float y) {
  if (j->to == BF16)
    ((uint16_t *)j->y)[c * j->m.R + r] = to_bf16(y);
  else
    ((float *)j->y)[c * j->m.R + r] = y;
}

/* ---- laying out x: blocks of 64 columns, one per row of x, one after another -------------------------- */

/* How many columns of a block of `most` from column `from` on there are in row c of x. */
INLINE int64_t present(const job *j, int c, int64_t from, int64_t most) {
  int64_t left = c < j->n ? j->m.C - from : 0;
  return left < most ? left : most;
}

/* `count` values as floats, then zeros up to `most`. */
INLINE void to_floats(const uint8_t *from, int kind, int64_t count, int64_t most, float *to) {
  if (kind == BF16)
    for (int64_t k = 0; k < count; k++) to[k] = float_at(from, BF16, k);
  else if (kind == FP16)
    for (int64_t k = 0; k < count; k++) to[k] = float_at(from, FP16, k);
  else
    memcpy(to, from, (size_t)(4 * count));
  for (int64_t k = count; k < most; k++) to[k] = 0.0f;
}

static void lay_floats(job *j, const uint8_t *x, int kind, float *to) {
  for (int64_t w = 0; w < j->W; w++)
    for (int c = 0; c < j->laid; c++, to += WORD)
      to_floats(x + width_of(kind) * (c * j->m.C + w * WORD), kind, present(j, c, w * WORD, WORD), WORD, to);
}

/* `laid` rows from row `first` on. */
static void lay_raw16(job *j, const uint8_t *x, int first, uint8_t *to) {
  for (int64_t w = 0; w < j->W; w++)
    for (int c = first; c < first + j->laid; c++, to += 2 * WORD) {
      int64_t count = present(j, c, w * WORD, WORD);
      if (count) memcpy(to, x + 2 * (c * j->m.C + w * WORD), (size_t)(2 * count));
      memset(to + 2 * count, 0, (size_t)(2 * (WORD - count)));
    }
}

/* ---- portable path ------------------------------------------------------------------------------------ */

/* One mask word to 64 floats, 0 where nothing is kept; the address behind its values. */
INLINE const uint8_t *decode_portable(int kind, const uint8_t *p, uint64_t m, float scale, float *v) {
  int k = 0;
  for (int i = 0; i < WORD; i++) v[i] = 0.0f;
  for (; m; m &= m - 1, k++) {
    int i = __builtin_ctzll(m);
    if (kind == INT8)
      v[i] = (float)(int8_t)p[k] * scale;
    else if (kind == INT4)
      v[i] = (float)((p[k / 2] >> (k % 2 * 4) & 15) - 8) * scale;
    else
      v[i] = float_at(p, kind, k);
  }
  return p + (kind == INT4 ? (k + 1) / 2 : k * width_of(kind));
}

INLINE void product_portable(job *j, int64_t r0, int64_t r1, int kind) {
  float v[WORD];
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t *p = row_values(j, r), *mask = masks_of(j, r);
    double sums[MOST] = {0};
    const float *x = (const float *)j->x;
    for (int64_t w = 0; p && w < j->W; w++) {
      ahead(p, mask ? mask + 8 * w : 0);
      p = decode_portable(kind, p, mask_of(j, r, w), kind >= INT8 ? scale_at(j, r, w / 2) : 1.0f, v);
      for (int c = 0; c < j->n; c++, x += WORD) {
        float s[8] = {0};
        for (int i = 0; i < WORD; i += 8)
          for (int k = 0; k < 8; k++) s[k] += v[i + k] * x[i + k];
        sums[c] += ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
      }
    }
    for (int c = 0; c < j->n; c++) give(j, c, r, (float)sums[c]);
  }
}

#define FIVE(name, attributes)                                                                       \
  attributes static void name##_bf16(job *j, int64_t a, int64_t b) { name(j, a, b, BF16); }          \
  attributes static void name##_fp16(job *j, int64_t a, int64_t b) { name(j, a, b, FP16); }          \
  attributes static void name##_fp32(job *j, int64_t a, int64_t b) { name(j, a, b, FP32); }          \
  attributes static void name##_int8(job *j, int64_t a, int64_t b) { name(j, a, b, INT8); }          \
  attributes static void name##_int4(job *j, int64_t a, int64_t b) { name(j, a, b, INT4); }          \
  static const rows_function name##_all[] = {name##_bf16, name##_fp16, name##_fp32, name##_int8, name##_int4};

FIVE(product_portable, )

/* ---- tables of the paths with 8 columns at a time: 8 mask bits -> where each column's value stands ---- */

static uint8_t table16[256][16] __attribute__((aligned(16)));
static uint8_t table8[256][8] __attribute__((aligned(16)));
static uint8_t table32[16][16] __attribute__((aligned(16)));

static void fill_tables(void) {
  memset(table16, 0x80, sizeof table16); /* out of range: gives 0 */
  memset(table8, 0x80, sizeof table8);
  memset(table32, 0x80, sizeof table32);
  for (int b = 0; b < 256; b++)
    for (int i = 0, k = 0; i < 8; i++)
      if (b >> i & 1) {
        table8[b][i] = (uint8_t)k;
        table16[b][2 * i] = (uint8_t)(2 * k), table16[b][2 * i + 1] = (uint8_t)(2 * k + 1);
        if (b < 16)
          for (int q = 0; q < 4; q++) table32[b][4 * i + q] = (uint8_t)(4 * k + q);
        k++;
      }
}

/* ---- AVX2 --------------------------------------------------------------------------------------------- */
#ifdef X86
#define T256 __attribute__((target("avx2,fma,f16c,popcnt,bmi")))

/* The nibbles of one word as signed bytes. */
T256 INLINE void nibbles256(const uint8_t *p, int8_t *to) {
  for (int h = 0; h < 2; h++) {
    __m128i v = _mm_loadu_si128((const __m128i *)(p + 16 * h)), low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    __m128i a = _mm_and_si128(v, low), b = _mm_and_si128(_mm_srli_epi16(v, 4), low);
    _mm_store_si128((__m128i *)(to + 32 * h), _mm_sub_epi8(_mm_unpacklo_epi8(a, b), eight));
    _mm_store_si128((__m128i *)(to + 32 * h + 16), _mm_sub_epi8(_mm_unpackhi_epi8(a, b), eight));
  }
}

T256 INLINE __m256 eight256(int kind, const uint8_t *p, unsigned b, __m256 scale) {
  if (kind == BF16 || kind == FP16) {
    __m128i t = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)p), _mm_load_si128((const __m128i *)table16[b]));
    if (kind == FP16) return _mm256_cvtph_ps(t);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(t), 16));
  }
  __m128i from = _mm_loadl_epi64((const __m128i *)table8[b]);
  if (kind == FP32) {
    __m256i index = _mm256_cvtepi8_epi32(from), none = _mm256_srai_epi32(index, 31);
    __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float *)p), index);
    return _mm256_andnot_ps(_mm256_castsi256_ps(none), v);
  }
  __m128i t = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)p), from);
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(t)), scale);
}

T256 INLINE const uint8_t *decode256(int kind, const uint8_t *p, uint64_t m, float scale, __m256 *v) {
  int8_t bytes[WORD + 8] __attribute__((aligned(32)));
  const uint8_t *from = p;
  __m256 s = _mm256_set1_ps(scale);
  if (kind == INT4) nibbles256(p, bytes), from = (const uint8_t *)bytes;
  UNROLL for (int k = 0; k < 8; k++) {
    unsigned b = (unsigned)(m >> (8 * k)) & 255;
    v[k] = eight256(kind, from, b, s);
    from += __builtin_popcount(b) * width_of(kind);
  }
  return kind == INT4 ? p + (__builtin_popcountll(m) + 1) / 2 : from;
}

T256 INLINE float sum256(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

T256 INLINE void product_avx2(job *j, int64_t r0, int64_t r1, int kind) {
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t *p = row_values(j, r), *mask = masks_of(j, r);
    const float *x = (const float *)j->x;
    __m256 sums[MOST][2], v[8];
    for (int c = 0; c < j->n; c++) sums[c][0] = sums[c][1] = _mm256_setzero_ps();
    for (int64_t w = 0; p && w < j->W; w++) {
      ahead(p, mask ? mask + 8 * w : 0);
      p = decode256(kind, p, mask_of(j, r, w), kind >= INT8 ? scale_at(j, r, w / 2) : 1.0f, v);
      for (int c = 0; c < j->n; c++, x += WORD) {
        __m256 a = sums[c][0], b = sums[c][1];
        UNROLL for (int k = 0; k < 8; k += 2) {
          a = _mm256_fmadd_ps(v[k], _mm256_loadu_ps(x + 8 * k), a);
          b = _mm256_fmadd_ps(v[k + 1], _mm256_loadu_ps(x + 8 * k + 8), b);
        }
        sums[c][0] = a, sums[c][1] = b;
      }
    }
    for (int c = 0; c < j->n; c++) give(j, c, r, sum256(_mm256_add_ps(sums[c][0], sums[c][1])));
  }
}

FIVE(product_avx2, T256)

/* ---- AVX-512 ------------------------------------------------------------------------------------------ */
#define T512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c,popcnt,bmi")))
#define T512BF                                                                                                  \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c,popcnt," \
                        "bmi,avx512bf16")))
/* Keeps a load apart from the expand behind it: the memory form of expand is three times slower on AMD. */
#define APART(v) __asm__("" : "+v"(v))

T512 INLINE __m512i load512(const void *p) {
  __m512i v = _mm512_loadu_si512(p);
  APART(v);
  return v;
}

/* Up to 64 nibbles as bytes 0..15. */
T512 INLINE __m512i nibbles512(const uint8_t *p) {
  __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_ternarylogic_epi32(v, _mm512_slli_epi16(v, 4), _mm512_set1_epi8(15), 0xA8); /* (a | b) & c */
}

T512 INLINE void floats512(__m512i bytes, __m512 scale, __m512 *v) {
  v[0] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, 0))), scale);
  v[1] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, 1))), scale);
  v[2] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, 2))), scale);
  v[3] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, 3))), scale);
}

/* One mask word to 4 x 16 floats; the address behind its values. */
T512 INLINE const uint8_t *decode512(int kind, const uint8_t *p, uint64_t m, float scale, __m512 *v) {
  if (kind == INT8) {
    floats512(_mm512_maskz_expand_epi8(m, load512(p)), _mm512_set1_ps(scale), v);
    return p + __builtin_popcountll(m);
  }
  if (kind == INT4) {
    __m512i q = _mm512_sub_epi8(nibbles512(p), _mm512_set1_epi8(8));
    floats512(_mm512_maskz_expand_epi8(m, q), _mm512_set1_ps(scale), v);
    return p + (__builtin_popcountll(m) + 1) / 2;
  }
  if (kind == FP32) {
    UNROLL for (int k = 0; k < 4; k++) {
      __mmask16 b = (__mmask16)(m >> (16 * k));
      v[k] = _mm512_castsi512_ps(_mm512_maskz_expand_epi32(b, load512(p)));
      p += 4 * __builtin_popcount(b);
    }
    return p;
  }
  UNROLL for (int h = 0; h < 2; h++) {
    uint32_t b = (uint32_t)(m >> (32 * h));
    __m512i e = _mm512_maskz_expand_epi16(b, load512(p));
    __m256i low = _mm512_castsi512_si256(e), high = _mm512_extracti64x4_epi64(e, 1);
    if (kind == FP16) {
      v[2 * h] = _mm512_cvtph_ps(low);
      v[2 * h + 1] = _mm512_cvtph_ps(high);
    } else {
      v[2 * h] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
      v[2 * h + 1] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    }
    p += 2 * __builtin_popcount(b);
  }
  return p;
}

T512 INLINE void product_avx512(job *j, int64_t r0, int64_t r1, int kind) {
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t *p = row_values(j, r), *mask = masks_of(j, r);
    const float *x = (const float *)j->x;
    __m512 sums[MOST][2], v[4];
    for (int c = 0; c < j->n; c++) sums[c][0] = sums[c][1] = _mm512_setzero_ps();
    for (int64_t w = 0; p && w < j->W; w++) {
      ahead(p, mask ? mask + 8 * w : 0);
      p = decode512(kind, p, mask_of(j, r, w), kind >= INT8 ? scale_at(j, r, w / 2) : 1.0f, v);
      for (int c = 0; c < j->n; c++, x += WORD) {
        __m512 a = _mm512_fmadd_ps(v[0], _mm512_loadu_ps(x), sums[c][0]);
        __m512 b = _mm512_fmadd_ps(v[1], _mm512_loadu_ps(x + 16), sums[c][1]);
        sums[c][0] = _mm512_fmadd_ps(v[2], _mm512_loadu_ps(x + 32), a);
        sums[c][1] = _mm512_fmadd_ps(v[3], _mm512_loadu_ps(x + 48), b);
      }
    }
    for (int c = 0; c < j->n; c++)
      give(j, c, r, _mm512_reduce_add_ps(_mm512_add_ps(sums[c][0], sums[c][1])));
  }
}

FIVE(product_avx512, T512)

/* bf16 values, bf16 x: 32 products per instruction, `rows` (1 or 2) from row r on at a time, so that x is loaded
 * once for both; n rows of x from `first` on. `n` and `rows` are constants wherever this is inlined.
 */
T512BF INLINE void rows_bf16(job *j, int64_t r, int64_t next, const int rows, const int n, int first,
                             const uint8_t *x) {
  const uint8_t *p[2] = {row_values(j, r), row_values(j, next)};
  const uint8_t *mask[2] = {j->m.mask + 8 * r * j->W, j->m.mask + 8 * next * j->W};
  __m512 a[2][8], b[2][8]; /* two sums of each hide the latency where there are few */
  if (!p[0] || !p[1]) return;
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int c = 0; c < n; c++) a[i][c] = b[i][c] = _mm512_setzero_ps();
  for (int64_t w = 0; w < j->W; w++, x += 2 * WORD * n) {
    __m512i v[2], u[2];
    UNROLL for (int i = 0; i < rows; i++) {
      uint64_t m = word_at(mask[i] + 8 * w);
      ahead(p[i], mask[i] + 8 * w);
      v[i] = _mm512_maskz_expand_epi16((uint32_t)m, load512(p[i]));
      p[i] += 2 * __builtin_popcount((uint32_t)m);
      u[i] = _mm512_maskz_expand_epi16((uint32_t)(m >> 32), load512(p[i]));
      p[i] += 2 * __builtin_popcount((uint32_t)(m >> 32));
    }
    UNROLL for (int c = 0; c < n; c++) {
      __m512i x0 = _mm512_loadu_si512(x + 128 * c), x1 = _mm512_loadu_si512(x + 128 * c + 64);
      UNROLL for (int i = 0; i < rows; i++) {
        a[i][c] = _mm512_dpbf16_ps(a[i][c], (__m512bh)v[i], (__m512bh)x0);
        if (n <= 4)
          b[i][c] = _mm512_dpbf16_ps(b[i][c], (__m512bh)u[i], (__m512bh)x1);
        else
          a[i][c] = _mm512_dpbf16_ps(a[i][c], (__m512bh)u[i], (__m512bh)x1);
      }
    }
  }
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int c = 0; c < n; c++)
    if (first + c < j->n) {
      __m512 sum = n <= 4 ? _mm512_add_ps(a[i][c], b[i][c]) : a[i][c];
      give(j, first + c, i ? next : r, _mm512_reduce_add_ps(sum));
    }
}

T512BF INLINE void product_bf16(job *j, int64_t r0, int64_t r1, const int n) {
  const int rows = n == 1 ? 1 : 2;
  for (int64_t r = r0; r < r1; r += rows)
    for (int first = 0; first < j->n; first += n)
      rows_bf16(j, r, r + 1 < r1 ? r + rows - 1 : r, rows, n, first, j->x + 2 * WORD * j->W * first);
}

/* ---- int8 and int4 values with x in bytes ----
 * Per 128 columns and row of x a block of 192 bytes: x as signed bytes, then 16 counts. Weights enter as
 * unsigned bytes u = q + offset, and a pruned column as u = offset, so that the sum of u x is the sum of q x
 * plus offset times the sum of all x of the group: the counts start the sum at minus that, exactly.
 */
T512 INLINE int offset_of(int kind) { return kind == INT4 ? 8 : 128; }

/* 128 columns of one row of x; its scale. NaN or infinite input gives a NaN scale, hence NaN in y. */
T512 INLINE float quantise(const float *x, int kind, uint8_t *to) {
  __m512i most = _mm512_setzero_si512();
  __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int k = 0; k < GROUP; k += 16)
    most = _mm512_max_epi32(most, _mm512_and_si512(magnitude, _mm512_loadu_si512(x + k)));
  uint32_t bits = (uint32_t)_mm512_reduce_max_epi32(most);
  float largest = as_float(bits);
  memset(to, 0, BLOCK);
  if (bits >= 0x7f800000u) return as_float(0x7fc00000u);
  if (largest < 1e-30f) return 0.0f;
  __m512 factor = _mm512_set1_ps(127.0f / largest);
  for (int k = 0; k < GROUP; k += 16) {
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), factor));
    _mm_storeu_si128((__m128i *)(to + k), _mm512_cvtepi32_epi8(q));
  }
  __m512i offset = _mm512_set1_epi8((char)offset_of(kind)), sums = _mm512_setzero_si512();
  sums = _mm512_dpbusd_epi32(sums, offset, _mm512_loadu_si512(to));
  sums = _mm512_dpbusd_epi32(sums, offset, _mm512_loadu_si512(to + 64));
  _mm512_storeu_si512(to + GROUP, _mm512_sub_epi32(_mm512_setzero_si512(), sums));
  return largest / 127.0f;
}

/* The blocks [G, n, 192], then the scales [ceil(G / 16), n, 16]. */
T512 static void lay_bytes(job *j, const uint8_t *x, int kind, int first, uint8_t *to) {
  float part[GROUP], *scales = (float *)(to + j->G * j->laid * BLOCK);
  memset(scales, 0, (size_t)((j->G + 15) / 16 * j->laid * 64));
  for (int64_t g = 0; g < j->G; g++)
    for (int c = 0; c < j->laid; c++, to += BLOCK) {
      int64_t count = present(j, first + c, g * GROUP, GROUP);
      to_floats(x + width_of(kind) * ((first + c) * j->m.C + g * GROUP), kind, count, GROUP, part);
      scales[(g / 16 * j->laid + c) * 16 + g % 16] = quantise(part, j->m.kind, to);
    }
}

/* One word as unsigned bytes, `offset` where nothing is kept. Where all is kept, what follows the last column is
 * read as well, and meets zeros of x. */
T512 INLINE __m512i bytes512(int kind, const int whole, const uint8_t *p, uint64_t m, __m512i offset) {
  __m512i v = kind == INT4 ? nibbles512(p) : _mm512_xor_si512(_mm512_loadu_si512(p), offset);
  if (whole) return v;
  APART(v);
  return _mm512_mask_expand_epi8(offset, m, v);
}

/* The bytes that a word's values take. */
INLINE int64_t bytes_of(int kind, const int whole, uint64_t m) {
  if (whole) return kind == INT4 ? WORD / 2 : WORD;
  unsigned kept = (unsigned)__builtin_popcountll(m);
  return kind == INT4 ? (kept + 1) / 2 : kept;
}

/* The bytes of a panel of n rows of x, with the scales behind the blocks. */
INLINE int64_t panel_bytes(const job *j, int n) { return (j->G * BLOCK + (j->G + 15) / 16 * 64) * n; }

T512 INLINE void rows_bytes(job *j, int64_t r, int64_t next, int kind, const int whole, const int rows,
                            const int n, int first, const uint8_t *x) {
  const int64_t row[2] = {r, next};
  const uint8_t *p[2] = {row_values(j, r), row_values(j, next)};
  const uint8_t *mask[2] = {masks_of(j, r), masks_of(j, next)};
  const float *x_scales = (const float *)(x + j->G * n * BLOCK);
  const __m512i offset = _mm512_set1_epi8((char)offset_of(kind));
  float scales[2][16 * 8] __attribute__((aligned(64)));
  __m512 sums[2][8];
  if (!p[0] || !p[1]) return;
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int c = 0; c < n; c++) sums[i][c] = _mm512_setzero_ps();
  for (int64_t g0 = 0; g0 < j->G; g0 += 16, x_scales += 16 * n) {
    int64_t count = j->G - g0 < 16 ? j->G - g0 : 16, pairs = j->W - 2 * g0 >= 2 * count ? count : count - 1;
    UNROLL for (int i = 0; i < rows; i++) {
      const uint16_t *scale = j->m.scale + row[i] * j->G + g0;
      __builtin_prefetch(scale + 1024);
      if (!whole) UNROLL for (int k = 0; k < 4; k++) __builtin_prefetch(mask[i] + 1024 + 64 * k);
      __m256i raw = _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), scale);
      __m512 own = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
      UNROLL for (int c = 0; c < n; c++)
        _mm512_store_ps(scales[i] + 16 * c, _mm512_mul_ps(own, _mm512_loadu_ps(x_scales + 16 * c)));
    }
    for (int64_t g = 0; g < count; g++, x += BLOCK * n) {
      __m512i v[2], u[2];
      UNROLL for (int i = 0; i < rows; i++) {
        uint64_t m0 = 0, m1 = 0;
        if (!whole) {
          m0 = word_at(mask[i]);
          m1 = g < pairs ? word_at(mask[i] + 8) : 0; /* the last group may have one word, and none behind it */
          mask[i] += 16;
        }
        int64_t one = bytes_of(kind, whole, m0), both = one + bytes_of(kind, whole, m1);
        ahead(p[i], 0);
        if (whole && kind == INT8) ahead(p[i] + 64, 0);
        v[i] = bytes512(kind, whole, p[i], m0, offset);
        u[i] = bytes512(kind, whole, p[i] + one, m1, offset);
        p[i] += both;
      }
      UNROLL for (int c = 0; c < n; c++) {
        const uint8_t *block = x + BLOCK * c;
        __m512i x0 = _mm512_loadu_si512(block), x1 = _mm512_loadu_si512(block + 64);
        __m512i start = _mm512_loadu_si512(block + GROUP);
        UNROLL for (int i = 0; i < rows; i++) {
          __m512i s = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, v[i], x0), u[i], x1);
          sums[i][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), _mm512_set1_ps(scales[i][16 * c + g]), sums[i][c]);
        }
      }
    }
  }
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int c = 0; c < n; c++)
    if (first + c < j->n) give(j, first + c, row[i], _mm512_reduce_add_ps(sums[i][c]));
}

T512 INLINE void product_bytes(job *j, int64_t r0, int64_t r1, int kind, const int whole, const int n) {
  const int rows = n == 1 ? 1 : 2;
  for (int64_t r = r0; r < r1; r += rows)
    for (int first = 0, k = 0; first < j->n; first += n, k++)
      rows_bytes(j, r, r + 1 < r1 ? r + rows - 1 : r, kind, whole, rows, n, first, j->x + k * panel_bytes(j, n));
}

#define AT(n)                                                                                              \
  T512BF static void bf16_##n(job *j, int64_t a, int64_t b) { product_bf16(j, a, b, n); }                  \
  T512 static void int8_##n(job *j, int64_t a, int64_t b) { product_bytes(j, a, b, INT8, 0, n); }          \
  T512 static void int4_##n(job *j, int64_t a, int64_t b) { product_bytes(j, a, b, INT4, 0, n); }          \
  T512 static void full8_##n(job *j, int64_t a, int64_t b) { product_bytes(j, a, b, INT8, 1, n); }         \
  T512 static void full4_##n(job *j, int64_t a, int64_t b) { product_bytes(j, a, b, INT4, 1, n); }
AT(1) AT(2) AT(3) AT(4) AT(5) AT(6) AT(7) AT(8)
#define ALL(name) {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6, name##_7, name##_8}
static const rows_function bf16_all[] = ALL(bf16), int8_all[] = ALL(int8), int4_all[] = ALL(int4);
static const rows_function full8_all[] = ALL(full8), full4_all[] = ALL(full4);
#endif /* X86 */

/* ---- NEON --------------------------------------------------------------------------------------------- */
#ifdef ARM
/* 8 columns to two vectors of 4 floats. */
INLINE void eight_neon(int kind, const uint8_t *p, unsigned b, float scale, float32x4_t *v) {
  if (kind == FP32) {
    uint8x16_t first = vqtbl1q_u8(vld1q_u8(p), vld1q_u8(table32[b & 15]));
    uint8x16_t second = vqtbl1q_u8(vld1q_u8(p + 4 * __builtin_popcount(b & 15)), vld1q_u8(table32[b >> 4]));
    v[0] = vreinterpretq_f32_u8(first), v[1] = vreinterpretq_f32_u8(second);
  } else if (kind == INT8 || kind == INT4) {
    uint8x16_t eight = vcombine_u8(vld1_u8(p), vdup_n_u8(0));
    int16x8_t q = vmovl_s8(vreinterpret_s8_u8(vqtbl1_u8(eight, vld1_u8(table8[b]))));
    v[0] = vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(q))), scale);
    v[1] = vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(q))), scale);
  } else {
    uint16x8_t t = vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(table16[b])));
    if (kind == FP16) {
      v[0] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(t)));
      v[1] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(t)));
    } else {
      v[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(t), 16));
      v[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(t), 16));
    }
  }
}

INLINE const uint8_t *decode_neon(int kind, const uint8_t *p, uint64_t m, float scale, float32x4_t *v) {
  uint8_t bytes[WORD + 8];
  const uint8_t *from = p;
  if (kind == INT4) {
    for (int h = 0; h < 2; h++) {
      uint8x16_t raw = vld1q_u8(p + 16 * h), eight = vdupq_n_u8(8);
      uint8x16_t a = vsubq_u8(vandq_u8(raw, vdupq_n_u8(15)), eight), b = vsubq_u8(vshrq_n_u8(raw, 4), eight);
      vst1q_u8(bytes + 32 * h, vzip1q_u8(a, b));
      vst1q_u8(bytes + 32 * h + 16, vzip2q_u8(a, b));
    }
    memset(bytes + WORD, 0, 8);
    from = bytes;
  }
  UNROLL for (int k = 0; k < 8; k++) {
    unsigned b = (unsigned)(m >> (8 * k)) & 255;
    eight_neon(kind, from, b, scale, v + 2 * k);
    from += __builtin_popcount(b) * width_of(kind);
  }
  return kind == INT4 ? p + (__builtin_popcountll(m) + 1) / 2 : from;
}

INLINE void product_neon(job *j, int64_t r0, int64_t r1, int kind) {
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t *p = row_values(j, r), *mask = masks_of(j, r);
    const float *x = (const float *)j->x;
    float32x4_t sums[MOST][2], v[16];
    for (int c = 0; c < j->n; c++) sums[c][0] = sums[c][1] = vdupq_n_f32(0);
    for (int64_t w = 0; p && w < j->W; w++) {
      ahead(p, mask ? mask + 8 * w : 0);
      p = decode_neon(kind, p, mask_of(j, r, w), kind >= INT8 ? scale_at(j, r, w / 2) : 1.0f, v);
      for (int c = 0; c < j->n; c++, x += WORD) {
        float32x4_t a = sums[c][0], b = sums[c][1];
        UNROLL for (int k = 0; k < 16; k += 2) {
          a = vfmaq_f32(a, v[k], vld1q_f32(x + 4 * k));
          b = vfmaq_f32(b, v[k + 1], vld1q_f32(x + 4 * k + 4));
        }
        sums[c][0] = a, sums[c][1] = b;
      }
    }
    for (int c = 0; c < j->n; c++) give(j, c, r, vaddvq_f32(vaddq_f32(sums[c][0], sums[c][1])));
  }
}

FIVE(product_neon, )
#endif

/* ---- which path --------------------------------------------------------------------------------------- */

#ifdef X86
static void cpuid(uint32_t leaf, uint32_t part, uint32_t *r) { /* eax, ebx, ecx, edx */
  __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(part));
}

/* The best path of this processor. Not __builtin_cpu_supports, which some compilers' libraries answer with no. */
static int best_x86(void) {
  uint32_t r[4], low, high, most, first[4];
  cpuid(0, 0, r), most = r[0];
  cpuid(1, 0, first);
  const uint32_t base = 1u << 12 | 1u << 23 | 1u << 27 | 1u << 28 | 1u << 29; /* FMA POPCNT OSXSAVE AVX F16C */
  if (most < 7 || (first[2] & base) != base) return PORTABLE;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  cpuid(7, 0, r);
  const uint32_t b2 = 1u << 3 | 1u << 5;                                     /* BMI AVX2 */
  const uint32_t b5 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;             /* F DQ BW VL */
  const uint32_t c5 = 1u << 1 | 1u << 6 | 1u << 11;                          /* VBMI VBMI2 VNNI */
  if ((low & 0x6) != 0x6 || (r[1] & b2) != b2) return PORTABLE;              /* the system saves ymm */
  if ((low & 0xe6) != 0xe6 || (r[1] & b5) != b5 || (r[2] & c5) != c5) return AVX2; /* and zmm */
  if (r[0] < 1) return AVX512;
  cpuid(7, 1, r);
  return r[0] >> 5 & 1 ? AVX512BF16 : AVX512;
}
#endif

EXPORT int llmprune_has(int path) {
  if (path == PORTABLE) return 1;
#if defined(ARM)
  return path == NEON;
#elif defined(X86)
  static int best = 0; /* two threads may find it at once: the same */
  if (!best) best = best_x86();
  return path >= AVX2 && path <= best;
#else
  return 0;
#endif
}

EXPORT int llmprune_version(void) { return 2; }

/* To be called once, before anything else. `parallel` may be NULL: one thread. */
EXPORT void llmprune_setup(parallel_function parallel) {
  fill_tables();
  parallel_for = parallel;
}

/* ---- products ----------------------------------------------------------------------------------------- */

#ifdef X86
/* The kernels of AVX-512 for x of 2 bytes and of 1 byte; 0 where x is wanted as floats. */
static const rows_function *narrow(const job *j, int x_kind, int exact) {
  if (j->m.kind == BF16 && x_kind == BF16 && j->path == AVX512BF16) return bf16_all;
  if (exact || (j->path != AVX512 && j->path != AVX512BF16)) return 0;
  if (j->m.kind == INT8) return j->m.mask ? int8_all : full8_all;
  return j->m.kind != INT4 ? 0 : j->m.mask ? int4_all : full4_all;
}
#endif

static rows_function plain(const job *j) {
  switch (j->path) {
#ifdef X86
    case AVX512:
    case AVX512BF16: return product_avx512_all[j->m.kind];
    case AVX2: return product_avx2_all[j->m.kind];
#endif
#ifdef ARM
    case NEON: return product_neon_all[j->m.kind];
#endif
    case PORTABLE: return product_portable_all[j->m.kind];
  }
  return 0;
}


/* Bytes of x laid out: floats need more than bytes with their counts and scales. */
static int64_t laid_bytes(const matrix *m, int64_t n) {
  int64_t W = (m->C + 127) / 128 * 2, laid = n + 1; /* two panels have an even number of rows */
  return (W * WORD * 4 + (W + 32) * 32) * laid + 64;
}

static int64_t tail_room(const matrix *m) { return (llmprune_tail_bytes(m) + 63) / 64 * 64; }

/* Scratch that a product of n rows of x with so many matrices needs. */
EXPORT int64_t llmprune_scratch_bytes(const matrix *m, int count, int64_t n) {
  return tail_room(m) * count + laid_bytes(m, n) + 64;
}

/* Lays x out at `to` for what will run, and returns that. */
static rows_function lay(job *j, const uint8_t *x, int x_kind, int exact, uint8_t *to) {
  j->laid = j->n, j->x = to;
#ifdef X86
  const rows_function *all = narrow(j, x_kind, exact);
  if (all) {
    j->laid = j->n > 8 ? (j->n + 1) / 2 : j->n; /* more than 8 rows in two panels */
    for (int first = 0; first < j->n; first += j->laid)
      if (j->m.kind == BF16)
        lay_raw16(j, x, first, to + 2 * WORD * j->W * first);
      else
        lay_bytes(j, x, x_kind, first, to + first / j->laid * panel_bytes(j, j->laid));
    return all[j->laid - 1];
  }
#endif
  (void)exact;
  lay_floats(j, x, x_kind, (float *)to);
  return plain(j);
}

/* y [n, R] = x [n, C] W^T for n up to 16, of up to 8 matrices that are alike but for their rows: y[i] belongs
 * to m[i], and is of kind `to`, FP32 or BF16.
 */
EXPORT int llmprune_products(const matrix *m, int count, const uint8_t *x, int x_kind, int64_t n, int exact, int path,
                             int threads, uint8_t *scratch, void **y, int to) {
  job jobs[MATRICES];
  if (count < 1 || count > MATRICES || n < 1 || n > MOST || !llmprune_has(path)) return NO_PATH;
  if (to != FP32 && to != BF16) return NO_PATH;
  memset(jobs, 0, sizeof jobs);
  scratch += (64 - (uintptr_t)scratch % 64) % 64;
  for (int k = 0; k < count; k++) {
    job *j = jobs + k;
    if (m[k].kind != m->kind || m[k].C != m->C || !m[k].mask != !m->mask || (!m->mask && m->kind < INT8)) return NO_PATH;
    j->m = m[k], j->y = y[k], j->n = (int32_t)n, j->path = path, j->last = m[k].R, j->to = to;
    int bad = prepare(j, scratch + k * tail_room(m));
    if (bad) return bad;
  }
  rows_function run = lay(jobs, x, x_kind, exact, scratch + count * tail_room(m));
  for (int k = 1; k < count; k++) jobs[k].x = jobs->x, jobs[k].laid = jobs->laid;
  return run_rows(jobs, count, run, threads, FINE);
}

/* ---- packed rows -> dense rows ------------------------------------------------------------------------ */

/* Bits alone: no arithmetic, so that NaN payloads and -0.0 stay. */
INLINE void expand_raw(job *j, int64_t r0, int64_t r1, int width) {
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t *p = row_values(j, r), *mask = masks_of(j, r);
    uint8_t *out = j->out + (r - j->first) * j->pitch * width;
    if (!p) continue;
    memset(out, 0, (size_t)(j->m.C * width));
    for (int64_t w = 0; w < j->W; w++) {
      uint64_t m = word_at(mask + 8 * w);
      if (w == j->W - 1 && j->m.C % WORD) m &= (1ull << j->m.C % WORD) - 1;
      for (; m; m &= m - 1, p += width) memcpy(out + width * (w * WORD + __builtin_ctzll(m)), p, (size_t)width);
    }
  }
}
static void expand_raw1(job *j, int64_t a, int64_t b) { expand_raw(j, a, b, 1); }
static void expand_raw2(job *j, int64_t a, int64_t b) { expand_raw(j, a, b, 2); }
static void expand_raw4(job *j, int64_t a, int64_t b) { expand_raw(j, a, b, 4); }

/* Stores the floats of word w of a row that begins at `out`, as float32 or bf16, and none behind column C. */
INLINE void store_floats(const job *j, const float *v, uint8_t *out, int64_t w) {
  int64_t left = j->m.C - w * WORD, count = left < WORD ? left : WORD;
  uint16_t halves[WORD];
  if (j->to == BF16 && count == WORD) {
    for (int i = 0; i < WORD; i++) halves[i] = to_bf16(v[i]);
    memcpy(out + 2 * WORD * w, halves, 2 * WORD);
    return;
  }
  if (j->to == FP32) {
    memcpy(out + 4 * WORD * w, v, (size_t)(4 * count));
    return;
  }
  for (int i = 0; i < WORD; i++) halves[i] = to_bf16(v[i]);
  memcpy(out + 2 * WORD * w, halves, (size_t)(2 * count));
}

#ifdef X86
/* The same for AVX-512. No NaN comes here: scales are finite. */
T512 INLINE void store512(const job *j, const float *v, uint8_t *out, int64_t w) {
  int64_t left = j->m.C - w * WORD;
  UNROLL for (int k = 0; k < WORD; k += 16) {
    uint32_t there = left - k >= 16 ? 0xffff : left > k ? (1u << (left - k)) - 1 : 0;
    __m512i f = _mm512_load_si512(v + k);
    if (j->to == FP32) {
      _mm512_mask_storeu_epi32(out + 4 * (WORD * w + k), (__mmask16)there, f);
    } else {
      __m512i odd = _mm512_and_si512(_mm512_srli_epi32(f, 16), _mm512_set1_epi32(1));
      __m512i sum = _mm512_add_epi32(_mm512_add_epi32(f, _mm512_set1_epi32(0x7fff)), odd);
      __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
      _mm256_mask_storeu_epi16(out + 2 * (WORD * w + k), (__mmask16)there, half);
    }
  }
}
#endif

#define EXPAND_FLOATS(name, attributes, decode, vector, store)                                                       \
  attributes INLINE void name(job *j, int64_t r0, int64_t r1, int kind) {                                     \
    float v[WORD] __attribute__((aligned(64)));                                                               \
    for (int64_t r = r0; r < r1; r++) {                                                                       \
      const uint8_t *p = row_values(j, r), *mask = masks_of(j, r);                                  \
      uint8_t *out = j->out + (r - j->first) * j->pitch * width_of(j->to);                                    \
      for (int64_t w = 0; p && w < j->W; w++) {                                                               \
        ahead(p, mask ? mask + 8 * w : 0);                                                                    \
        p = decode(kind, p, mask_of(j, r, w), kind >= INT8 ? scale_at(j, r, w / 2) : 1.0f, (vector *)v);      \
        store(j, v, out, w);                                                                                  \
      }                                                                                                       \
    }                                                                                                         \
  }                                                                                                           \
  FIVE(name, attributes)

EXPAND_FLOATS(floats_portable, , decode_portable, float, store_floats)

#ifdef X86
EXPAND_FLOATS(floats_avx2, T256, decode256, __m256, store_floats)
EXPAND_FLOATS(floats_avx512, T512, decode512, __m512, store512)

T256 static void expand_avx2(job *j, int64_t r0, int64_t r1) {
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t *p = row_values(j, r), *mask = masks_of(j, r);
    uint8_t *out = j->out + (r - j->first) * j->pitch * 2;
    for (int64_t i = 0; p && i < j->m.C; i += 8, out += 16) {
      unsigned b = mask[i / 8];
      __m128i v = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)p), _mm_load_si128((const __m128i *)table16[b]));
      p += 2 * __builtin_popcount(b);
      if (j->m.C - i >= 8) {
        _mm_storeu_si128((__m128i *)out, v);
      } else {
        uint8_t last[16];
        _mm_storeu_si128((__m128i *)last, v);
        memcpy(out, last, (size_t)(2 * (j->m.C - i)));
      }
    }
  }
}

T512 INLINE void expand512(job *j, int64_t r0, int64_t r1, int width) {
  const int step = 64 / width; /* columns per vector */
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t *p = row_values(j, r), *mask = masks_of(j, r);
    uint8_t *out = j->out + (r - j->first) * j->pitch * width;
    for (int64_t i = 0; p && i < j->m.C; i += step, out += 64, mask += step / 8) {
      uint64_t b = 0;
      ahead(p, 0);
      __m512i v = load512(p);
      memcpy(&b, mask, (size_t)(step / 8));
      v = width == 1   ? _mm512_maskz_expand_epi8(b, v)
          : width == 2 ? _mm512_maskz_expand_epi16((uint32_t)b, v)
                       : _mm512_maskz_expand_epi32((uint16_t)b, v);
      p += width * __builtin_popcountll(b);
      if (j->m.C - i >= step)
        _mm512_storeu_si512(out, v);
      else
        _mm512_mask_storeu_epi8(out, (1ull << (j->m.C - i) * width) - 1, v);
    }
  }
}
T512 static void expand512_1(job *j, int64_t a, int64_t b) { expand512(j, a, b, 1); }
T512 static void expand512_2(job *j, int64_t a, int64_t b) { expand512(j, a, b, 2); }
T512 static void expand512_4(job *j, int64_t a, int64_t b) { expand512(j, a, b, 4); }
#endif
#ifdef ARM
EXPAND_FLOATS(floats_neon, , decode_neon, float32x4_t, store_floats)
#endif

static rows_function expander(const job *j, int raw) {
  int width = width_of(j->m.kind);
  switch (j->path) {
#ifdef X86
    case AVX512:
    case AVX512BF16:
      return !raw ? floats_avx512_all[j->m.kind] : width == 1 ? expand512_1 : width == 2 ? expand512_2 : expand512_4;
    case AVX2:
      if (!raw) return floats_avx2_all[j->m.kind];
      if (width == 2) return expand_avx2;
      break;
#endif
#ifdef ARM
    case NEON:
      if (!raw) return floats_neon_all[j->m.kind];
      break;
#endif
    default: break;
  }
  return !raw ? floats_portable_all[j->m.kind] : width == 1 ? expand_raw1 : width == 2 ? expand_raw2 : expand_raw4;
}

/* Rows `first` to `last` - 1 to dense ones [last - first, C], of kind `to`: that of the values, FP32 or BF16. */
EXPORT int llmprune_expand(const matrix *m, int64_t first, int64_t last, int to, int path, int threads,
                           uint8_t *tail, uint8_t *out) {
  job j;
  memset(&j, 0, sizeof j);
  j.m = *m, j.out = out, j.to = to, j.path = path, j.first = first, j.last = last, j.pitch = m->C;
  int raw = to == m->kind;
  if (!llmprune_has(path) || (!raw && to != FP32 && to != BF16) || (raw && (to == INT4 || !m->mask))) return NO_PATH;
  int bad = prepare(&j, tail);
  return bad ? bad : run_rows(&j, 1, expander(&j, raw), threads, COARSE);
}

/* ---- products with many rows of x, in tiles of AMX ------------------------------------------------------ */
#if defined(X86) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 12)
#define TILES 1
#define TAMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
enum { SIDE = 16, DEEP = 32, TILE_BYTES = 1024 }; /* rows of a tile; values of a row of one; bytes */
enum { CHUNK = 16, MOST_ROWS = 256 };             /* tiles that are added up at once; rows unpacked at once */

/* Whether there are tiles for bf16, and the system lets this process use them. */
EXPORT int llmprune_tiles(void) {
  static int known = -1; /* two threads may find it at once: the same */
  uint32_t r[4], low, high;
  if (known >= 0) return known;
  if (!llmprune_has(AVX512BF16)) return known = 0;
  cpuid(7, 0, r);
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((r[3] >> 22 & 1) == 0 || (r[3] >> 24 & 1) == 0 || (low & 0x60000) != 0x60000) return known = 0;
  int64_t answer = 158; /* arch_prctl(ARCH_REQ_XCOMP_PERM, tile data) */
  __asm__ volatile("syscall" : "+a"(answer) : "D"(0x1023l), "S"(18l) : "rcx", "r11", "memory");
  return known = answer == 0;
}

TAMX INLINE void transpose16(__m512i *v) {
  __m512i t[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    __m512i a = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), b = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    __m512i c = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd), d = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, b, 0x88), t[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88), t[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  UNROLL for (int i = 0; i < 16; i++) v[i] = t[i];
}

/* x, bf16 [n, C], as tiles: of 16 rows of x and 32 columns, pairs of columns by rows. */
TAMX static void lay_tiles(const job *j, const uint8_t *x, int64_t n, uint8_t *to) {
  __m512i v[16];
  for (int64_t c = 0; c < (n + 2 * SIDE - 1) / (2 * SIDE) * 2; c++)
    for (int64_t k = 0; k < j->m.C; k += DEEP, to += TILE_BYTES) {
      int64_t left = j->m.C - k;
      __mmask32 there = left >= DEEP ? ~0u : (1u << left) - 1;
      for (int64_t i = 0; i < SIDE; i++)
        v[i] = c * SIDE + i < n ? _mm512_maskz_loadu_epi16(there, x + 2 * ((c * SIDE + i) * j->m.C + k))
                                : _mm512_setzero_si512();
      transpose16(v);
      for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(to + 64 * i, v[i]);
    }
}

/* Sums of 16 outputs by 16 rows of x -> y [n, R], the outputs from r on of which `rows` are there. */
TAMX static void give_tile(const job *j, const float *sums, int64_t r, int64_t rows, int64_t c, int64_t n) {
  __m512i v[16];
  __mmask16 there = rows >= SIDE ? 0xffff : rows > 0 ? (__mmask16)((1u << rows) - 1) : 0;
  for (int i = 0; i < SIDE; i++) v[i] = _mm512_loadu_si512(sums + SIDE * i);
  transpose16(v);
  for (int64_t i = 0; i < SIDE && c + i < n; i++)
    _mm256_mask_storeu_epi16((uint16_t *)j->y + (c + i) * j->m.R + r, there,
                             (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(v[i])));
}

/* How many rows are unpacked at once: as many as leave room in the second cache. */
static int64_t tile_rows(const matrix *m) {
  int64_t rows = (1 << 20) / (2 * m->C) / (2 * SIDE) * (2 * SIDE);
  return rows < 2 * SIDE ? 2 * SIDE : rows > MOST_ROWS ? MOST_ROWS : rows;
}

static int64_t tile_pitch(const matrix *m) { return (m->C + DEEP - 1) / DEEP * DEEP + DEEP; }

/* `rows` unpacked rows from row r on, times 32 rows of x at a time, CHUNK tiles deep at a time: what is used of x
 * then stays in the first cache.
 */
TAMX static void multiply_tiles(const job *j, const uint8_t *w, int64_t r, int64_t rows, int64_t n) {
  const int64_t deep = (j->m.C + DEEP - 1) / DEEP, pitch = 2 * j->pitch;
  float sums[MOST_ROWS / (2 * SIDE)][4][SIDE * SIDE] __attribute__((aligned(64)));
  __asm__ volatile("" ::: "memory"); /* compilers do not know what tiles are loaded from */
  for (int64_t c = 0; c < n; c += 2 * SIDE)
    for (int64_t first = 0; first < deep; first += CHUNK)
      for (int64_t i = 0; i < rows; i += 2 * SIDE) {
        const uint8_t *a = w + i * pitch + first * 2 * DEEP, *b = j->x + (c / SIDE * deep + first) * TILE_BYTES;
        int64_t steps = deep - first < CHUNK ? deep - first : CHUNK;
        float(*s)[SIDE * SIDE] = sums[i / (2 * SIDE)];
        if (first == 0) {
          _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        } else {
          _tile_loadd(0, s[0], 64); _tile_loadd(1, s[1], 64); _tile_loadd(2, s[2], 64); _tile_loadd(3, s[3], 64);
        }
        for (int64_t k = 0; k < steps; k++, a += 2 * DEEP, b += TILE_BYTES) {
          _tile_loadd(4, a, pitch);
          _tile_loadd(6, b, 64);
          _tile_loadd(7, b + deep * TILE_BYTES, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(5, a + SIDE * pitch, pitch);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, s[0], 64); _tile_stored(1, s[1], 64); _tile_stored(2, s[2], 64); _tile_stored(3, s[3], 64);
        for (int t = 0; t < 4 && first + CHUNK >= deep; t++)
          give_tile(j, s[t], r + i + t / 2 * SIDE, rows - i - t / 2 * SIDE, c + t % 2 * SIDE, n);
      }
}

TAMX static void product_tiles(job *j, int64_t r0, int64_t r1) {
  const struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {
      1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  int64_t most = tile_rows(&j->m);
  uint8_t *w = j->out + place * most * j->pitch * 2;
  job part = *j;
  part.out = w, part.to = BF16;
  for (int64_t i = 0; i < most; i++) /* no expander writes behind the last column */
    memset(w + 2 * (i * j->pitch + j->m.C), 0, (size_t)(2 * (j->pitch - j->m.C)));
  _tile_loadconfig(&shape);
  for (int64_t r = r0; r < r1; r += most) {
    int64_t rows = r1 - r < most ? r1 - r : most;
    part.first = r;
    expander(j, j->m.kind == BF16)(&part, r, r + rows);
    /* The rows of the last tiles that are not there: finite, whatever they are. */
    for (int64_t i = rows; i % (2 * SIDE); i++) memset(w + 2 * i * j->pitch, 0, (size_t)(2 * j->m.C));
    multiply_tiles(j, w, r, rows, j->n);
  }
  j->bad |= part.bad;
  _tile_release();
}

/* Scratch of `llmprune_many`. */
EXPORT int64_t llmprune_many_bytes(const matrix *m, int64_t n, int threads) {
  int64_t tiles = (n + 2 * SIDE - 1) / (2 * SIDE) * 2 * ((m->C + DEEP - 1) / DEEP);
  return tail_room(m) + tiles * TILE_BYTES + (threads + 1) * tile_rows(m) * tile_pitch(m) * 2 + 64;
}

/* y [n, R] = x [n, C] W^T in bf16, where `llmprune_tiles`; W of bf16, int8 or int4. */
EXPORT int llmprune_many(const matrix *m, const uint8_t *x, int64_t n, int threads, uint8_t *scratch, void *y) {
  job j;
  memset(&j, 0, sizeof j);
  if (!llmprune_tiles() || n < 1 || n > 1 << 30 || m->kind == FP16 || m->kind == FP32) return NO_PATH;
  scratch += (64 - (uintptr_t)scratch % 64) % 64;
  j.m = *m, j.y = y, j.n = (int32_t)n, j.path = AVX512BF16, j.last = m->R, j.pitch = tile_pitch(m), j.to = BF16;
  int bad = prepare(&j, scratch);
  if (bad) return bad;
  uint8_t *tiles = scratch + tail_room(m);
  lay_tiles(&j, x, n, tiles);
  j.x = tiles;
  j.out = scratch + llmprune_many_bytes(m, n, threads) - 64 - (threads + 1) * tile_rows(m) * j.pitch * 2;
  return run_rows(&j, 1, product_tiles, threads, COARSE);
}
#else
EXPORT int llmprune_tiles(void) { return 0; }
EXPORT int64_t llmprune_many_bytes(const matrix *m, int64_t n, int threads) { return (void)m, (void)n, (void)threads, 0; }
EXPORT int llmprune_many(const matrix *m, const uint8_t *x, int64_t n, int threads, uint8_t *scratch, void *y) {
  return (void)m, (void)x, (void)n, (void)threads, (void)scratch, (void)y, NO_PATH;
}
#endif

/* ---- dense rows -> values ----------------------------------------------------------------------------- */

INLINE void compress_raw(job *j, int64_t r0, int64_t r1, int width) {
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t *mask = j->m.mask + 8 * r * j->W, *in = j->in + r * j->m.C * width;
    uint8_t *out = j->out + row_start(&j->m, r) * width;
    for (int64_t w = 0; w < j->W; w++, in += WORD * width)
      for (uint64_t m = word_at(mask + 8 * w); m; m &= m - 1, out += width)
        memcpy(out, in + width * __builtin_ctzll(m), (size_t)width);
  }
}
static void compress_raw1(job *j, int64_t a, int64_t b) { compress_raw(j, a, b, 1); }
static void compress_raw2(job *j, int64_t a, int64_t b) { compress_raw(j, a, b, 2); }
static void compress_raw4(job *j, int64_t a, int64_t b) { compress_raw(j, a, b, 4); }

#ifdef X86
T512 INLINE void compress512(job *j, int64_t r0, int64_t r1, int width) {
  const int step = 64 / width;
  const uint8_t *end = j->out + row_start(&j->m, r1) * width; /* behind it another thread writes */
  for (int64_t r = r0; r < r1; r++) {
    const uint8_t *mask = j->m.mask + 8 * r * j->W, *in = j->in + r * j->m.C * width;
    uint8_t *out = j->out + row_start(&j->m, r) * width;
    for (int64_t i = 0; i < j->m.C; i += step, in += 64, mask += step / 8) {
      uint64_t b = 0, there = ~0ull;
      if (j->m.C - i < step) there = (1ull << (j->m.C - i) * width) - 1;
      __m512i v = _mm512_maskz_loadu_epi8(there, in);
      memcpy(&b, mask, (size_t)(step / 8));
      v = width == 1   ? _mm512_maskz_compress_epi8(b, v)
          : width == 2 ? _mm512_maskz_compress_epi16((uint32_t)b, v)
                       : _mm512_maskz_compress_epi32((uint16_t)b, v);
      int bytes = width * __builtin_popcountll(b);
      if (end - out >= 64)
        _mm512_storeu_si512(out, v);
      else
        _mm512_mask_storeu_epi8(out, bytes == 64 ? ~0ull : (1ull << bytes) - 1, v);
      out += bytes;
    }
  }
}
T512 static void compress512_1(job *j, int64_t a, int64_t b) { compress512(j, a, b, 1); }
T512 static void compress512_2(job *j, int64_t a, int64_t b) { compress512(j, a, b, 2); }
T512 static void compress512_4(job *j, int64_t a, int64_t b) { compress512(j, a, b, 4); }
#endif

/* The kept values of dense rows [R, C], row r's from `rows[r]` on. The caller has made `rows` from the mask,
 * and seen that no bit stands behind column C. */
EXPORT int llmprune_compress(const matrix *m, const uint8_t *dense, int path, int threads, uint8_t *values) {
  job j;
  memset(&j, 0, sizeof j);
  j.m = *m, j.in = dense, j.out = values, j.path = path, j.last = m->R, j.W = (m->C + 63) / 64;
  int width = width_of(m->kind);
  if (!llmprune_has(path) || m->kind == INT4) return NO_PATH;
#ifdef X86
  if (path >= AVX512)
    return run_rows(&j, 1, width == 1 ? compress512_1 : width == 2 ? compress512_2 : compress512_4, threads, COARSE);
#endif
  return run_rows(&j, 1, width == 1 ? compress_raw1 : width == 2 ? compress_raw2 : compress_raw4, threads, COARSE);
}

/* Values as bytes q from `rows` on <-> nibbles q + 8 from `starts` (int64) on; both made from the mask. */
EXPORT void llmprune_nibbles(const matrix *m, const int64_t *starts, int8_t *bytes, uint8_t *nibbles, int pack) {
  int64_t W = (m->C + 63) / 64;
  for (int64_t r = 0; r < m->R; r++) {
    int8_t *b = bytes + row_start(m, r);
    uint8_t *p = nibbles + starts[r];
    for (int64_t w = 0; w < W; w++) {
      int kept = __builtin_popcountll(word_at(m->mask + 8 * (r * W + w))), k = 0;
      for (; k + 1 < kept; k += 2, p++) {
        if (pack)
          *p = (uint8_t)((b[k] + 8) & 15) | (uint8_t)((b[k + 1] + 8) << 4);
        else
          b[k] = (int8_t)((*p & 15) - 8), b[k + 1] = (int8_t)((*p >> 4) - 8);
      }
      if (k < kept) {
        if (pack)
          *p = (uint8_t)((b[k] + 8) & 15); /* the nibble left over is 0 */
        else
          b[k] = (int8_t)((*p & 15) - 8);
        p++;
      }
      b += kept;
    }
  }
}

/* ---- counting ----------------------------------------------------------------------------------------- */

INLINE int count_rows(const uint8_t *mask, int64_t R, int64_t C, int64_t *values, int64_t *bytes) {
  int64_t W = (C + 63) / 64;
  uint64_t behind = C % 64 ? ~0ull << (C % 64) : 0, bad = 0;
  for (int64_t r = 0; r < R; r++) {
    int64_t v = 0, b = 0;
    for (int64_t w = 0; w < W; w++, mask += 8) {
      int kept = __builtin_popcountll(word_at(mask));
      v += kept, b += (kept + 1) / 2;
    }
    bad |= word_at(mask - 8) & behind;
    values[r] = v, bytes[r] = b;
  }
  return bad != 0;
}
#ifdef X86
T256 static int count_rows_popcnt(const uint8_t *mask, int64_t R, int64_t C, int64_t *values, int64_t *bytes) {
  return count_rows(mask, R, C, values, bytes);
}
#endif

/* Kept values of each row, and bytes that they take as int4; whether a bit stands behind column C. */
EXPORT int llmprune_counts(const uint8_t *mask, int64_t R, int64_t C, int64_t *values, int64_t *bytes) {
#ifdef X86
  if (llmprune_has(AVX2)) return count_rows_popcnt(mask, R, C, values, bytes);
#endif
  return count_rows(mask, R, C, values, bytes);
}
