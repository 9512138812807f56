/* Random packed matrices through every function and path of packed.c, in buffers of exactly their size, against
 * plain loops in double. `kernels_asan.py` compiles it together with packed.c and runs it.
 */
#include <stdio.h>
#include <stdlib.h>

#include "packed.c"

static uint64_t state = 88172645463325252ull;
static uint64_t draw(uint64_t below) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state % below;
}
static float number(void) { return (float)draw(2000001) / 1e6f - 1.0f; }

static void *exactly(int64_t bytes) { return malloc((size_t)(bytes > 0 ? bytes : 0)); }

/* A number of a kind, at entry i: what it is worth. */
static double put(void *to, int kind, int64_t i) {
  uint8_t *p = (uint8_t *)to + width_of(kind) * i;
  float f = number();
  uint16_t h = to_bf16(f);
  if (kind == FP16) h = (uint16_t)(draw(2) << 15 | (1 + draw(20)) << 10 | draw(1024));
  if (kind == FP32) memcpy(p, &f, 4);
  if (kind == BF16 || kind == FP16) memcpy(p, &h, 2);
  if (kind >= INT8) *p = (uint8_t)((int)draw(kind == INT4 ? 16 : 256) - (kind == INT4 ? 8 : 128));
  return kind >= INT8 ? (int8_t)*p : float_at(to, kind, i);
}

typedef struct {
  matrix m;
  uint8_t *q;   /* values as bytes, for int4 */
  void *dense;  /* [R, C], of the kind of the values, int8 for int4 */
  double *real; /* what each entry is worth, 0 where it is not kept */
  int64_t *starts;
} sample;

/* Without mask and row starts, as a matrix that keeps everything may be. */
static void whole(sample *s) {
  free((void *)s->m.mask), free((void *)s->m.rows);
  s->m.mask = NULL, s->m.rows = NULL;
}

static sample make(int kind, int64_t R, int64_t C, uint64_t percent) {
  int64_t W = (C + 63) / 64, G = (C + 127) / 128, kept = 0;
  int as = kind == INT4 ? INT8 : kind;
  sample s;
  memset(&s, 0, sizeof s);
  uint8_t *mask = exactly(8 * R * W);
  uint16_t *scale = exactly(2 * R * G);
  int64_t *values = exactly(8 * R), *bytes = exactly(8 * R), *rows = exactly(8 * (R + 1));
  s.starts = exactly(8 * (R + 1)), s.dense = exactly(R * C * width_of(as)), s.real = exactly(8 * R * C);
  memset(mask, 0, (size_t)(8 * R * W));
  for (int64_t i = 0; i < R * G; i++) scale[i] = to_bf16(0.5f + (float)draw(1000) / 1000.0f);
  for (int64_t i = 0; i < R * C; i++) {
    int64_t r = i / C, c = i % C;
    double w = put(s.dense, kind, i);
    int keep = draw(100) < percent && !(percent < 100 && r % 4 == 3);
    if (keep) mask[8 * r * W + c / 8] |= (uint8_t)(1 << c % 8);
    s.real[i] = !keep ? 0 : kind >= INT8 ? w * from_bf16(scale[r * G + c / 128]) : w;
  }
  if (llmprune_counts(mask, R, C, values, bytes)) printf("counts: bits behind the columns\n"), exit(1);
  rows[0] = s.starts[0] = 0;
  for (int64_t r = 0; r < R; r++) rows[r + 1] = rows[r] + values[r], s.starts[r + 1] = s.starts[r] + bytes[r];
  kept = rows[R];
  s.q = exactly(kept * width_of(as));
  matrix m = {s.q, mask, rows, scale, kept * width_of(as), R, C, as, 1};
  for (int path = PORTABLE; path <= AVX512BF16; path++)
    if (llmprune_has(path) && llmprune_compress(&m, s.dense, path, 1, s.q)) printf("compress\n"), exit(1);
  if (kind == INT4) {
    uint8_t *nibbles = exactly(s.starts[R]);
    int8_t *back = exactly(kept);
    llmprune_nibbles(&m, s.starts, (int8_t *)s.q, nibbles, 1);
    llmprune_nibbles(&m, s.starts, back, nibbles, 0);
    if (kept && memcmp(back, s.q, (size_t)kept)) printf("nibbles\n"), exit(1);
    free(back), free(s.q);
    m.values = s.q = nibbles, m.size = s.starts[R], m.kind = INT4, m.rows = s.starts;
    free(rows);
  } else {
    free(s.starts);
  }
  if (kind < INT8) free(scale), m.scale = NULL;
  s.m = m;
  free(values), free(bytes);
  return s;
}

static void give_back(sample *s) {
  free((void *)s->m.values), free((void *)s->m.mask), free((void *)s->m.rows), free((void *)s->m.scale);
  free(s->dense), free(s->real);
}

static void products(const sample *s, int path, int x_kind, int64_t n, int exact) {
  int64_t R = s->m.R, C = s->m.C;
  uint8_t *x = exactly(n * C * width_of(x_kind)), *scratch = exactly(llmprune_scratch_bytes(&s->m, 2, n));
  double *real = exactly(8 * n * C);
  float *y = exactly(4 * n * R), *again = exactly(4 * n * R);
  uint16_t *half = exactly(2 * n * R);
  const matrix twice[] = {s->m, s->m};
  void *ys[] = {y, again}, *halves[] = {half};
  for (int64_t i = 0; i < n * C; i++) real[i] = put(x, x_kind, i);
  int bad = llmprune_products(twice, 2, x, x_kind, n, exact, path, 1, scratch, ys, FP32);
  bad |= llmprune_products(&s->m, 1, x, x_kind, n, exact, path, 1, scratch, halves, BF16);
  if (bad || memcmp(y, again, (size_t)(4 * n * R))) printf("product\n"), exit(1);
  for (int64_t i = 0; i < n * R; i++)
    if (half[i] != to_bf16(y[i])) printf("product in bf16\n"), exit(1);
  for (int64_t c = 0; c < n; c++)
    for (int64_t r = 0; r < R; r++) {
      double sum = 0, size = 0, weights = 0, largest = 0;
      for (int64_t i = 0; i < C; i++) {
        double w = s->real[r * C + i], v = real[c * C + i];
        sum += w * v, size += fabs(w * v), weights += fabs(w), largest = fmax(largest, fabs(v));
      }
      double most = 1e-5 * size + 1e-6 + (exact || s->m.kind < INT8 ? 0 : weights * largest / 250);
      if (!(fabs(sum - y[c * R + r]) <= most)) {
        printf("path %d, kind %d, x %d, n %d, %d x %d: %g, not %g\n", path, s->m.kind, x_kind, (int)n, (int)R,
               (int)C, y[c * R + r], sum);
        exit(1);
      }
    }
  free(x), free(scratch), free(real), free(y), free(again), free(half);
}

/* Many rows of x, in tiles: x and weights are rounded to bf16, and sums are float. */
static void manies(const sample *s) {
  int64_t R = s->m.R, C = s->m.C, n = 1 + (int64_t)draw(70);
  uint8_t *x = exactly(2 * n * C), *scratch = exactly(llmprune_many_bytes(&s->m, n, 1));
  double *real = exactly(8 * n * C);
  uint16_t *y = exactly(2 * n * R);
  for (int64_t i = 0; i < n * C; i++) real[i] = put(x, BF16, i);
  memset(scratch, 255, (size_t)llmprune_many_bytes(&s->m, n, 1)); /* not a number, unless it is written */
  if (llmprune_many(&s->m, x, n, 1, scratch, y)) printf("many\n"), exit(1);
  for (int64_t c = 0; c < n; c++)
    for (int64_t r = 0; r < R; r++) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < C; i++) sum += s->real[r * C + i] * real[c * C + i], size += fabs(s->real[r * C + i] * real[c * C + i]);
      double most = fabs(sum) / 200 + size * (s->m.kind < INT8 ? 1e-5 : 1.0 / 200) + 1e-6;
      if (!(fabs(sum - from_bf16(y[c * R + r])) <= most)) printf("many: %g, not %g\n", from_bf16(y[c * R + r]), sum), exit(1);
    }
  free(x), free(scratch), free(real), free(y);
}

static void expands(const sample *s, int path, int to) {
  int64_t first = draw((uint64_t)s->m.R), last = first + 1 + (int64_t)draw((uint64_t)(s->m.R - first)), C = s->m.C;
  int raw = to == s->m.kind;
  uint8_t *out = exactly((last - first) * C * width_of(to)), *tail = exactly(llmprune_tail_bytes(&s->m));
  if (llmprune_expand(&s->m, first, last, to, path, 1, tail, out)) printf("expand\n"), exit(1);
  for (int64_t i = first * C; i < last * C; i++) {
    int64_t at = i - first * C;
    double got = to == INT8 ? (int8_t)out[at] : float_at(out, to, at), wanted = s->real[i];
    if (raw && to == INT8) wanted = s->real[i] == 0 ? 0 : ((int8_t *)s->dense)[i];
    if (!(fabs(got - wanted) <= (to == BF16 && !raw ? fabs(wanted) / 256 : 1e-6 * fabs(wanted)))) {
      if (raw && to == INT8 && s->real[i] == 0 && ((int8_t *)s->dense)[i] == 0) continue;
      printf("expand: path %d, kind %d to %d: %g, not %g\n", path, s->m.kind, to, got, wanted), exit(1);
    }
  }
  free(out), free(tail);
}

int main(int count, char **arguments) {
  int cases = count > 1 ? atoi(arguments[1]) : 300, done = 0;
  const uint64_t percents[] = {0, 3, 30, 50, 100};
  llmprune_setup(NULL);
  for (int i = 0; i < cases; i++)
    for (int kind = BF16; kind <= INT4; kind++) {
      uint64_t percent = percents[draw(5)];
      sample s = make(kind, 1 + (int64_t)draw(9), 1 + (int64_t)draw(draw(8) ? 300 : 5000), percent);
      int masked = kind < INT8 || percent < 100 || draw(2);
      if (!masked) whole(&s);
      for (int path = PORTABLE; path <= AVX512BF16; path++) {
        if (!llmprune_has(path)) continue;
        products(&s, path, (int)draw(3), 1 + (int64_t)draw(16), (int)draw(2)), done++;
        products(&s, path, BF16, 1 + (int64_t)draw(16), 0), done++;
        expands(&s, path, FP32), expands(&s, path, BF16), done += 2;
        if (kind != INT4 && masked) expands(&s, path, kind), done++;
      }
      if (llmprune_tiles() && kind != FP16 && kind != FP32) manies(&s), done++;
      give_back(&s);
    }
  printf("%d calls, all as wanted\n", done);
  return 0;
}
