/* Attention in float32, on x86 processors with AVX-512 or AVX2. Of the matrix products' own rate, torch's reaches a half.

   Some queries at a time, as many as two vectors hold, look at all keys of the cell. Scores lie key by key, so that a
   query's are in one place of all vectors, and its softmax needs no sum across a vector. */

#ifdef __AVX512F__
enum { LANES = 16, KEY_ROWS = 12, QUERY_ROWS = 8 };  /* numbers of a vector; rows of a product in 32 registers */
typedef __m512 Vector;
#define OF_VECTOR(name) _mm512_##name
#define BITS _mm512_castps_si512
#define NUMBERS _mm512_castsi512_ps
#else
enum { LANES = 8, KEY_ROWS = 4, QUERY_ROWS = 4 };  /* in 16 registers */
typedef __m256 Vector;
#define OF_VECTOR(name) _mm256_##name
#define BITS _mm256_castps_si256
#define NUMBERS _mm256_castsi256_ps
#endif
#define LOAD OF_VECTOR(loadu_ps)
#define STORE OF_VECTOR(storeu_ps)
#define ALL OF_VECTOR(set1_ps)
#define ADD OF_VECTOR(add_ps)
#define SUBTRACT OF_VECTOR(sub_ps)
#define MULTIPLY OF_VECTOR(mul_ps)
#define MULTIPLY_ADD OF_VECTOR(fmadd_ps)
#define LARGER OF_VECTOR(max_ps)
#define UNROLLED _Pragma("GCC unroll 16")
#define INLINED static inline __attribute__((always_inline))

/* Queries at a time; how many times as many look at NEAR_KEYS keys, which stay in the second cache (half a megabyte with
   all else), before the next keys are read; and keys whose weights are made and used while they are in the first. */
enum { QUERIES = 2 * LANES, GROUP = 8, NEAR_KEYS = 512, SOME_KEYS = 128 };

/* 2^t for t <= 0, exact to two units of the last digit. Results are never denormal, which would cost hundreds of cycles
   each; NaN stays. */
INLINED Vector power_of_two(Vector t) {
  const Vector shift = ALL(12582912.0f);   /* 1.5 * 2^23: numbers beside it are whole, in their lowest bits */
  t = LARGER(ALL(-126.0f), t);             /* of two operands, the second is returned where one is NaN */
  const Vector shifted = ADD(t, shift), rest = SUBTRACT(t, SUBTRACT(shifted, shift));
  Vector sum = ALL(1.5252734e-5f);         /* the Taylor series of 2^rest, ln(2)^k / k!, |rest| <= 0.5 */
  sum = MULTIPLY_ADD(sum, rest, ALL(1.5403530e-4f));
  sum = MULTIPLY_ADD(sum, rest, ALL(1.3333558e-3f));
  sum = MULTIPLY_ADD(sum, rest, ALL(9.6181291e-3f));
  sum = MULTIPLY_ADD(sum, rest, ALL(5.5504109e-2f));
  sum = MULTIPLY_ADD(sum, rest, ALL(2.4022651e-1f));
  sum = MULTIPLY_ADD(sum, rest, ALL(6.9314718e-1f));
  sum = MULTIPLY_ADD(sum, rest, ALL(1.0f));
  const Vector power =  /* 2^whole: the whole number becomes the exponent, whose zero is 127 */
      NUMBERS(OF_VECTOR(add_epi32)(OF_VECTOR(slli_epi32)(BITS(shifted), 23), OF_VECTOR(set1_epi32)(127 << 23)));
  return MULTIPLY(sum, power);
}

/* Turn a square of numbers, a vector a row. */
INLINED void turn(Vector r[LANES]) {
  Vector t[LANES];
  UNROLLED for (int i = 0; i < LANES; i += 2) {
    t[i] = OF_VECTOR(unpacklo_ps)(r[i], r[i + 1]);
    t[i + 1] = OF_VECTOR(unpackhi_ps)(r[i], r[i + 1]);
  }
  UNROLLED for (int i = 0; i < LANES; i += 4) {
    r[i] = OF_VECTOR(shuffle_ps)(t[i], t[i + 2], 0x44);
    r[i + 1] = OF_VECTOR(shuffle_ps)(t[i], t[i + 2], 0xee);
    r[i + 2] = OF_VECTOR(shuffle_ps)(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = OF_VECTOR(shuffle_ps)(t[i + 1], t[i + 3], 0xee);
  }
#ifdef __AVX512F__
  UNROLLED for (int i = 0; i < LANES; i += 8)
    UNROLLED for (int e = 0; e < 4; e++) {
      t[i + e] = _mm512_shuffle_f32x4(r[i + e], r[i + e + 4], 0x88);
      t[i + e + 4] = _mm512_shuffle_f32x4(r[i + e], r[i + e + 4], 0xdd);
    }
  UNROLLED for (int e = 0; e < 8; e++) {
    r[e] = _mm512_shuffle_f32x4(t[e], t[e + 8], 0x88);
    r[e + 8] = _mm512_shuffle_f32x4(t[e], t[e + 8], 0xdd);
  }
#else
  UNROLLED for (int e = 0; e < 4; e++) {
    t[e] = _mm256_permute2f128_ps(r[e], r[e + 4], 0x20);
    t[e + 4] = _mm256_permute2f128_ps(r[e], r[e + 4], 0x31);
  }
  UNROLLED for (int e = 0; e < LANES; e++) r[e] = t[e];
#endif
}

INLINED Vector load_or_zero(const float *place, int64_t f) { return place == NULL ? ALL(0.0f) : LOAD(place + f); }

/* Add the bias, scale, and write queries feature by feature; those from `inside` on are 0. */
static void turn_queries(const float *queries, const float *bias, int64_t row, int64_t inside, int64_t width,
                         float factor, float *turned) {
  for (int64_t i = 0; i < QUERIES; i += LANES)
    for (int64_t f = 0; f < width; f += LANES) {
      const Vector added = load_or_zero(bias, f);
      Vector lines[LANES];
      UNROLLED for (int r = 0; r < LANES; r++)
        lines[r] = i + r < inside ? MULTIPLY(ADD(LOAD(queries + (i + r) * row + f), added), ALL(factor)) : ALL(0.0f);
      turn(lines);
      UNROLLED for (int r = 0; r < LANES; r++) STORE(turned + (f + r) * QUERIES + i, lines[r]);
    }
}

/* Multiply `rows` of numbers, `left_row` apart and each `left_step` from the next, with two columns of vectors. */
INLINED void multiply(const int rows, const float *left, int64_t left_row, int64_t left_step, const float *right,
                      int64_t right_row, int64_t steps, Vector sums[][2]) {
  UNROLLED for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = ALL(0.0f);
  for (int64_t step = 0; step < steps; step++) {
    const Vector first = LOAD(right + step * right_row), second = LOAD(right + step * right_row + LANES);
    UNROLLED for (int r = 0; r < rows; r++) {
      const Vector number = ALL(left[r * left_row + step * left_step]);
      sums[r][0] = MULTIPLY_ADD(number, first, sums[r][0]);
      sums[r][1] = MULTIPLY_ADD(number, second, sums[r][1]);
    }
  }
}

/* Write the scores of some keys, and keep the largest of each query. */
INLINED void score(const int rows, const float *keys, int64_t width, const float *queries, float *scores, Vector *most) {
  Vector sums[KEY_ROWS][2];
  multiply(rows, keys, width, 1, queries, QUERIES, width, sums);
  UNROLLED for (int r = 0; r < rows; r++)
    UNROLLED for (int half = 0; half < 2; half++) {
      STORE(scores + r * QUERIES + half * LANES, sums[r][half]);
      most[half] = LARGER(most[half], sums[r][half]);
    }
}

static void score_all(const float *keys, int64_t num_keys, int64_t width, const float *queries, float *scores,
                      Vector *most) {
  int64_t j = 0;
  for (; j + KEY_ROWS <= num_keys; j += KEY_ROWS)
    score(KEY_ROWS, keys + j * width, width, queries, scores + j * QUERIES, most);
  if (j < num_keys && num_keys >= KEY_ROWS) {  /* the last ones, some of them again: to the same numbers */
    j = num_keys - KEY_ROWS;
    score(KEY_ROWS, keys + j * width, width, queries, scores + j * QUERIES, most);
    return;
  }
  for (; j < num_keys; j++) score(1, keys + j * width, width, queries, scores + j * QUERIES, most);
}

/* Turn the scores of some keys into weights, whose sums are added to `sums`, and add their values to `result`. */
static void weigh(float *scores, const float *values, int64_t num_keys, int64_t num_queries, int64_t width,
                  const Vector *most, Vector *sums, float *result) {
  for (int64_t j = 0; j < num_keys; j++)
    UNROLLED for (int half = 0; half < 2; half++) {
      float *place = scores + j * QUERIES + half * LANES;
      const Vector weights = power_of_two(SUBTRACT(LOAD(place), most[half]));
      sums[half] = ADD(sums[half], weights);
      STORE(place, weights);
    }
  for (int64_t f = 0; f < width; f += 2 * LANES)
    for (int64_t i = 0; i < num_queries; i += QUERY_ROWS) {
      Vector seen[QUERY_ROWS][2];
      multiply(QUERY_ROWS, scores + i, 1, QUERIES, values + f, width, num_keys, seen);
      UNROLLED for (int r = 0; r < QUERY_ROWS; r++)
        UNROLLED for (int half = 0; half < 2; half++) {
          float *place = result + (i + r) * width + f + half * LANES;
          STORE(place, ADD(LOAD(place), seen[r][half]));
        }
    }
}

/* What some queries have seen so far: the largest score, the sum of the weights, and the weighted sum of the values. */
typedef struct {
  Vector most[2], sums[2];
  float *result;  /* (QUERIES, width) */
} Seen;

/* Bring what has been seen to another largest score, one number for each query. */
static void rescale(Seen *seen, const Vector *most, int64_t num_queries, int64_t width, float *factors) {
  for (int half = 0; half < 2; half++) {
    const Vector factor = power_of_two(SUBTRACT(seen->most[half], most[half]));
    seen->sums[half] = MULTIPLY(seen->sums[half], factor);
    STORE(factors + half * LANES, factor);
  }
  for (int64_t i = 0; i < num_queries; i++)
    for (int64_t f = 0; f < width; f += LANES)
      STORE(seen->result + i * width + f, MULTIPLY(LOAD(seen->result + i * width + f), ALL(factors[i])));
}

static void attend_head(const Work *w, int64_t cell, int64_t head, char *room) {
  const int64_t width = w->width, start = w->bounds[cell], num_keys = w->bounds[cell + 1] - start;
  const int64_t row = (w->heads + 2 * w->key_heads) * width, of_keys = head / (w->heads / w->key_heads);
  const int64_t size = QUERIES * width, out_row = w->heads * width;
  const float *query = w->qkv + start * row + head * width;
  const float *key = w->qkv + start * row + (w->heads + of_keys) * width, *value = key + w->key_heads * width;
  float *scores = (float *)room, *factors = scores + NEAR_KEYS * QUERIES, *queries = factors + QUERIES;
  float *results = queries + GROUP * size, *keys = results + GROUP * size, *values = keys + num_keys * width;
  const float factor = w->scaling * 1.44269504f;  /* softmax to base 2 */
  /* The keys' bias adds the same to all scores of a query, which softmax takes away; the values' adds itself. */
  const float *of_query = w->bias == NULL ? NULL : w->bias + head * width;
  const float *of_value = w->bias == NULL ? NULL : w->bias + (w->heads + w->key_heads + of_keys) * width;
  Seen seen[GROUP];

  for (int64_t j = 0; j < num_keys; j++) {  /* beside each other: in the batch, a whole token lies between two keys */
    memcpy(keys + j * width, key + j * row, (size_t)width * sizeof(float));
    memcpy(values + j * width, value + j * row, (size_t)width * sizeof(float));
  }
  for (int64_t i0 = 0; i0 < num_keys; i0 += GROUP * QUERIES) {
    for (int64_t b = 0; b < GROUP && i0 + b * QUERIES < num_keys; b++) {
      const int64_t first = i0 + b * QUERIES;
      turn_queries(query + first * row, of_query, row, num_keys - first, width, factor, queries + b * size);
      seen[b].most[0] = seen[b].most[1] = ALL(-__builtin_inff());
      seen[b].sums[0] = seen[b].sums[1] = ALL(0.0f);
      seen[b].result = memset(results + b * size, 0, (size_t)size * sizeof(float));
    }
    for (int64_t j0 = 0; j0 < num_keys; j0 += NEAR_KEYS) {
      const int64_t near = num_keys - j0 < NEAR_KEYS ? num_keys - j0 : NEAR_KEYS;
      for (int64_t b = 0; b < GROUP && i0 + b * QUERIES < num_keys; b++) {
        const int64_t left = num_keys - i0 - b * QUERIES, inside = left < QUERIES ? left : QUERIES;
        Vector most[2] = {seen[b].most[0], seen[b].most[1]};
        score_all(keys + j0 * width, near, width, queries + b * size, scores, most);
        if (j0 > 0 && memcmp(most, seen[b].most, sizeof most) != 0) rescale(&seen[b], most, inside, width, factors);
        memcpy(seen[b].most, most, sizeof most);
        for (int64_t j = 0; j < near; j += SOME_KEYS)
          weigh(scores + j * QUERIES, values + (j0 + j) * width, near - j < SOME_KEYS ? near - j : SOME_KEYS, inside,
                width, most, seen[b].sums, seen[b].result);
      }
    }
    for (int64_t b = 0; b < GROUP && i0 + b * QUERIES < num_keys; b++) {
      STORE(factors, seen[b].sums[0]);
      STORE(factors + LANES, seen[b].sums[1]);
      for (int64_t i = 0; i < QUERIES && i0 + b * QUERIES + i < num_keys; i++) {
        float *out = w->out + (start + i0 + b * QUERIES + i) * out_row + head * width;
        for (int64_t f = 0; f < width; f += LANES)
          STORE(out + f, MULTIPLY_ADD(LOAD(seen[b].result + i * width + f), ALL(1.0f / factors[i]), load_or_zero(of_value, f)));
      }
    }
  }
}

static size_t room_bytes(int64_t longest, int64_t width) {
  return (size_t)(NEAR_KEYS * QUERIES + QUERIES + 2 * (GROUP * QUERIES + longest) * width) * sizeof(float);
}

static int may_compute(void) { return 0; }
static void begin_thread(void) {}
static void end_thread(void) {}
