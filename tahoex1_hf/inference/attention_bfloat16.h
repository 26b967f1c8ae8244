/* Attention in bfloat16, on x86 processors with matrix tiles (AMX) and AVX-512. Scores and softmax are float32. No
   bias is added: it is part of the product before. */

enum { ROWS = 64, TILE = 16 };  /* queries at a time; rows of a tile, of 64 bytes each */

/* 2^t for t <= 0, with an error of 6e-5 at most, a thirtieth of a rounding to bfloat16. Results are never denormal, which
   would cost hundreds of cycles each; NaN stays. */
static inline __m512 power_of_two(__m512 t) {
  t = _mm512_max_ps(_mm512_set1_ps(-126.0f), t); /* of two operands, the second is returned where one is NaN */
  __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 rest = _mm512_sub_ps(t, whole);
  __m512 sum = _mm512_set1_ps(0.00961813f); /* the Taylor series of 2^rest, ln(2)^k / k!, |rest| <= 0.5 */
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.05550411f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.24022651f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.69314718f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

static inline __m512i row_or_zero(const uint16_t *row, int inside) {
  return inside ? _mm512_loadu_si512(row) : _mm512_setzero_si512();
}

/* Turn 16 keys of 32 features into a tile: each row holds a pair of features of all 16 keys. */
static void turn_keys(const uint16_t *keys, int64_t stride, int64_t left, uint32_t *tile) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = row_or_zero(keys + i * stride, i < left);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int e = 0; e < 4; e++) {
      t[i + e] = _mm512_shuffle_i32x4(r[i + e], r[i + e + 4], 0x88);
      t[i + e + 4] = _mm512_shuffle_i32x4(r[i + e], r[i + e + 4], 0xdd);
    }
  for (int e = 0; e < 8; e++) {
    r[e] = _mm512_shuffle_i32x4(t[e], t[e + 8], 0x88);
    r[e + 8] = _mm512_shuffle_i32x4(t[e], t[e + 8], 0xdd);
  }
  for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 16 * i, r[i]);
}

/* Write 32 features of two values, pair by pair, into a row of each of two tiles. */
static inline void pair_values(__m512i one, __m512i two, uint16_t *left, uint16_t *right) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                                        22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  _mm512_store_si512(left, _mm512_permutex2var_epi16(one, low, two));
  _mm512_store_si512(right, _mm512_permutex2var_epi16(one, high, two));
}

/* Softmax of a row of scores, to bfloat16 in tiles of 32 keys; return the sum, by which the output is divided. */
static float softmax_row(const float *scores, int64_t keys, __m512 factor, uint16_t *weights) {
  __m512 m0 = _mm512_set1_ps(-__builtin_inff()), m1 = m0;
  const int64_t whole = keys / 32 * 32;
  const int left = (int)(keys - whole);
  const __mmask16 first = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1);
  const __mmask16 second = (__mmask16)(left > 16 ? (1u << (left - 16)) - 1 : 0);
  for (int64_t j = 0; j < whole; j += 32) {
    m0 = _mm512_max_ps(m0, _mm512_loadu_ps(scores + j));
    m1 = _mm512_max_ps(m1, _mm512_loadu_ps(scores + j + 16));
  }
  m0 = _mm512_mask_max_ps(m0, first, m0, _mm512_loadu_ps(scores + whole));
  m1 = _mm512_mask_max_ps(m1, second, m1, _mm512_loadu_ps(scores + whole + 16));
  const __m512 top = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(m0, m1))), factor);
  __m512 s0 = _mm512_setzero_ps(), s1 = s0;
  for (int64_t j = 0; j < whole; j += 32) {
    __m512 a = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), factor, top));
    __m512 b = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j + 16), factor, top));
    s0 = _mm512_add_ps(s0, a);
    s1 = _mm512_add_ps(s1, b);
    _mm512_store_si512(weights + j * TILE, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  if (left) {
    __m512 a = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + whole), factor, top));
    __m512 b = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + whole + 16), factor, top));
    a = _mm512_maskz_mov_ps(first, a);
    b = _mm512_maskz_mov_ps(second, b);
    s0 = _mm512_add_ps(s0, a);
    s1 = _mm512_add_ps(s1, b);
    _mm512_store_si512(weights + whole * TILE, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(s0, s1));
}

/* Multiply two rows of tiles by two columns of tiles, `steps` tiles long, into 32 x 32 numbers of float32. */
static inline void multiply(const uint16_t *upper, const uint16_t *lower, int64_t left_stride, int64_t left_step,
                            const uint16_t *left, const uint16_t *right, int64_t right_step, int64_t steps,
                            float *result, int64_t stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++) {
    _tile_loadd(4, upper + step * left_step, left_stride);
    _tile_loadd(6, left + step * right_step, 64);
    _tile_loadd(7, right + step * right_step, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + step * left_step, left_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, result, stride * 4);
  _tile_stored(1, result + TILE, stride * 4);
  _tile_stored(2, result + TILE * stride, stride * 4);
  _tile_stored(3, result + TILE * stride + TILE, stride * 4);
}

static void attend_head(const Work *w, int64_t cell, int64_t head, char *room) {
  const int64_t width = w->width, start = w->bounds[cell], keys = w->bounds[cell + 1] - start;
  const int64_t padded = (keys + 31) / 32 * 32, row = (w->heads + 2 * w->key_heads) * width;
  const int64_t numbers = TILE * 32; /* bfloat16 numbers of a tile */
  const int64_t stride = padded + TILE; /* so that rows do not lie whole pages apart, where they share cache lines */
  const int64_t of_keys = head / (w->heads / w->key_heads);
  const uint16_t *query = w->qkv + start * row + head * width;
  const uint16_t *key = w->qkv + start * row + (w->heads + of_keys) * width, *value = key + w->key_heads * width;
  uint16_t *turned = (uint16_t *)room, *paired = turned + padded * width, *queries = paired + padded * width;
  uint16_t *weights = queries + ROWS * width;
  float *sums = (float *)(weights + ROWS * padded), *scores = sums + ROWS;
  float *result = scores; /* the weighted values take the place of the scores, which are no longer needed */
  const __m512 factor = _mm512_set1_ps(w->scaling * 1.44269504f); /* softmax to base 2 */

  for (int64_t j = 0; j < padded; j += TILE)
    for (int64_t f = 0; f < width; f += 32)
      turn_keys(key + j * row + f, row, keys - j, (uint32_t *)(turned + j * width + f * TILE));
  for (int64_t j = 0; j < padded; j += 2)
    for (int64_t f = 0; f < width; f += 32) {
      uint16_t *tile = paired + j / 32 * 32 * width + f / TILE * numbers + j % 32 / 2 * 32;
      pair_values(row_or_zero(value + j * row + f, j < keys), row_or_zero(value + (j + 1) * row + f, j + 1 < keys), tile,
                  tile + numbers);
    }
  for (int64_t i0 = 0; i0 < keys; i0 += ROWS) {
    const int64_t rows = keys - i0 < ROWS ? keys - i0 : ROWS, filled = (rows + 31) / 32 * 32;
    for (int64_t i = 0; i < filled; i++)
      for (int64_t f = 0; f < width; f += 32)
        _mm512_store_si512(queries + i * width + f, row_or_zero(query + (i0 + i) * row + f, i < rows));
    for (int64_t j = 0; j < padded; j += 32)
      for (int64_t i = 0; i < filled; i += 32)
        multiply(queries + i * width, queries + (i + TILE) * width, width * 2, 32, turned + j * width,
                 turned + (j + TILE) * width, numbers, width / 32, scores + i * stride + j, stride);
    for (int64_t i = 0; i < filled; i++) {
      uint16_t *line = weights + i / TILE * TILE * padded + i % TILE * 32;
      sums[i] = softmax_row(scores + i * stride, keys, factor, line);
    }
    for (int64_t i = 0; i < filled; i += 32)
      for (int64_t f = 0; f < width; f += 32)
        multiply(weights + i * padded, weights + (i + TILE) * padded, 64, numbers, paired + f / TILE * numbers,
                 paired + (f / TILE + 1) * numbers, 32 * width, padded / 32, result + i * width + f, width);
    for (int64_t i = 0; i < rows; i++) {
      const __m512 by = _mm512_set1_ps(1.0f / sums[i]);
      uint16_t *out = w->out + (start + i0 + i) * w->heads * width + head * width;
      for (int64_t f = 0; f < width; f += 32)
        _mm512_storeu_si512(out + f, (__m512i)_mm512_cvtne2ps_pbh(
            _mm512_mul_ps(_mm512_loadu_ps(result + i * width + f + TILE), by),
            _mm512_mul_ps(_mm512_loadu_ps(result + i * width + f), by)));
    }
  }
}

/* Bytes that a thread needs for a cell. */
static size_t room_bytes(int64_t longest, int64_t width) {
  const int64_t padded = (longest + 31) / 32 * 32;
  const int64_t scores = padded + TILE > width ? padded + TILE : width;
  return (size_t)(2 * padded * width * 2 + ROWS * width * 2 + ROWS * padded * 2 + ROWS * 4 + ROWS * scores * 4 + 128);
}

/* Ask the system for leave to use the tiles; return 0 if it gives it. */
static int may_compute(void) { return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tiles */); }

static void begin_thread(void) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } __attribute__((packed)) tiles;
  memset(&tiles, 0, sizeof tiles);
  tiles.palette = 1;
  for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = TILE;
  _tile_loadconfig(&tiles);
}

static void end_thread(void) { _tile_release(); }
