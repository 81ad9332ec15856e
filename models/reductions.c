/* One pass over a batch of feature maps for everything that their statistics need.

   torch's and numpy's own reductions read the values once each, and many of them slowly: together
   they take three to ten times as long. `reductions.py` calls this through ctypes, and does without
   it where it was not built. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Values side by side that are reduced together, in the processor's vector registers. */
#define LANES 16
/* Rows whose sums stay in float32; beyond them they are added in float64. */
#define BLOCK 64
/* The square of a smaller value is not exact to float32's last places. */
#define SMALL 1e-15f
/* Numbers of an image: mean, standard deviation, minimum, maximum, L2 norm, share of zeros, dead
   channels, and the quantiles. */
#define NUMBERS (7 + QUANTILES)
#define QUANTILES 5

/* One version for every x86 processor, one for those of the last ten years. */
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
/* So that the functions below are compiled for each of them, and for each type of values. */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  double *sums;   /* of each channel */
  float *maxima;  /* of each channel */
  double squares; /* and of the whole image: the sum of squares, */
  float low;      /* the minimum, */
  int64_t zeros;  /* and how many values are 0 */
} Totals;

/* The value at a place of an array of bfloat16 (`half`), the upper halves of float32, or of float32. */
INLINE float value_at(const void *values, int64_t place, int half) {
  if (!half) return ((const float *)values)[place];
  union {
    uint32_t bits;
    float value;
  } wide = {(uint32_t)((const uint16_t *)values)[place] << 16};
  return wide.value;
}

INLINE void add(Totals *totals, int64_t channel, double sum, double square, float high, float low,
                int64_t zeros) {
  totals->sums[channel] += sum;
  totals->squares += square;
  totals->zeros += zeros;
  if (high > totals->maxima[channel]) totals->maxima[channel] = high;
  if (low < totals->low) totals->low = low;
}

/* Reduces LANES values of each of some rows that are `width` values apart. `channel` is the first
   lane's; after the last channel comes the first again. */
INLINE void add_lanes(Totals *totals, const void *values, int64_t first, int64_t rows, int64_t width,
                      int64_t channel, int64_t channels, int half) {
  float sum[LANES] = {0}, squares[LANES] = {0}, high[LANES], low[LANES];
  int32_t zeros[LANES] = {0};
  for (int lane = 0; lane < LANES; lane++) high[lane] = low[lane] = value_at(values, first + lane, half);
  for (int64_t row = 0; row < rows; row++) {
    /* The next block: the processor itself does not foresee such strides. */
    __builtin_prefetch((const char *)values + (first + (row + rows) * width) * (half ? 2 : 4), 0, 2);
    for (int lane = 0; lane < LANES; lane++) {
      float value = value_at(values, first + row * width + lane, half);
      sum[lane] += value;
      squares[lane] += value * value;
      high[lane] = value > high[lane] ? value : high[lane];
      low[lane] = value < low[lane] ? value : low[lane];
      zeros[lane] += value == 0;
    }
  }
  for (int lane = 0; lane < LANES; lane++) {
    add(totals, channel, sum[lane], squares[lane], high[lane], low[lane], zeros[lane]);
    if (++channel == channels) channel = 0;
  }
}

/* Reduces values (positions, channels). */
INLINE void add_image(Totals *totals, const void *values, int64_t start, int64_t positions,
                      int64_t channels, int half) {
  /* Neighbouring positions make one row of a whole number of lanes. */
  int64_t fold = 1;
  while (channels * fold % LANES) fold *= 2;
  int64_t width = channels * fold, rows = positions / fold;
  for (int64_t row = 0; row < rows; row += BLOCK) {
    int64_t count = rows - row < BLOCK ? rows - row : BLOCK;
    for (int64_t lane = 0; lane < width; lane += LANES)
      add_lanes(totals, values, start + row * width + lane, count, width, lane % channels, channels, half);
  }
  for (int64_t place = rows * width; place < positions * channels; place++) {
    float value = value_at(values, start + place, half);
    add(totals, place % channels, value, (double)value * value, value, value, value == 0);
  }
}

/* Sorts by radix, in ascending order; `spare` is room for as many. The lower half of `half` is 0. */
INLINE void sort(uint32_t *keys, uint32_t *spare, int64_t count, int half) {
  for (int shift = half ? 16 : 0; shift < 32; shift += 8) {
    int64_t starts[256] = {0};
    for (int64_t k = 0; k < count; k++) starts[keys[k] >> shift & 255]++;
    for (int64_t digit = 0, start = 0; digit < 256; digit++) {
      int64_t with = starts[digit];
      starts[digit] = start;
      start += with;
    }
    for (int64_t k = 0; k < count; k++) spare[starts[keys[k] >> shift & 255]++] = keys[k];
    uint32_t *sorted = spare;
    spare = keys;
    keys = sorted;
  }
}

/* Bits of a float32 as a number in the order of the values, and back. */
INLINE uint32_t ordered(uint32_t bits) { return bits >> 31 ? ~bits : bits | 0x80000000u; }
INLINE float of_ordered(uint32_t key) {
  union {
    uint32_t bits;
    float value;
  } found = {key >> 31 ? key & 0x7fffffffu : ~key};
  return found.value;
}

/* Quantiles of the values at some places, between two values on a line, as numpy's default. `keys` is
   room for twice as many. */
INLINE void quantiles_at(const void *values, int64_t start, int64_t count, const int64_t *places,
                         const double *quantiles, uint32_t *keys, float *found, int half) {
  for (int64_t k = 0; k < count; k++) {
    float value = value_at(values, start + places[k], half);
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    keys[k] = ordered(bits);
  }
  sort(keys, keys + count, count, half);
  for (int q = 0; q < QUANTILES; q++) {
    double place = quantiles[q] * (count - 1);
    int64_t below = place, above = below + 1 < count ? below + 1 : below;
    double low = of_ordered(keys[below]), high = of_ordered(keys[above]);
    found[q] = low + (high - low) * (place - below);
  }
}

/* Reduces a batch of images (groups, positions, channels), `stride` values apart: with one group for
   channels that come last in memory, with one channel and a group for each where they come first.
   Quantiles are those of the values at some places of each image.

   Writes (images, NUMBERS + 2 * groups * channels): the numbers of an image, then means and maxima of
   its channels. Returns 0 without memory, and where a value is not finite, or all are too large or too
   small for their squares in float32: then the numbers are not right. */
FOR_EACH_PROCESSOR
int heatlens_reduce(const void *values, int half, int64_t images, int64_t stride, int64_t groups,
                    int64_t positions, int64_t channels, int64_t count, const int64_t *places,
                    const double *quantiles, float *found) {
  int64_t all = groups * channels, size = all * positions;
  double *sums = malloc(all * sizeof *sums);
  uint32_t *keys = malloc(2 * count * sizeof *keys);
  int right = sums && keys;
  /* The last image first: it is still in the cache, and the first one will be for the next layer. */
  for (int64_t image = images - 1; right && image >= 0; image--) {
    float *numbers = found + image * (NUMBERS + 2 * all);
    float *means = numbers + NUMBERS, *maxima = means + all;
    Totals totals = {sums, maxima, 0, INFINITY, 0};
    for (int64_t channel = 0; channel < all; channel++) {
      sums[channel] = 0;
      maxima[channel] = -INFINITY;
    }
    int64_t start = image * stride;
    for (int64_t group = 0; group < groups; group++) {
      totals.sums = sums + group * channels;
      totals.maxima = maxima + group * channels;
      int64_t first = start + group * positions * channels;
      if (half)
        add_image(&totals, values, first, positions, channels, 1);
      else
        add_image(&totals, values, first, positions, channels, 0);
    }
    double sum = 0;
    float high = -INFINITY;
    int64_t dead = 0;
    for (int64_t channel = 0; channel < all; channel++) {
      means[channel] = sums[channel] / positions;
      sum += sums[channel];
      if (maxima[channel] > high) high = maxima[channel];
      /* Without a positive value and with a mean of 0 it has none but zeros. */
      dead += maxima[channel] == 0 && sums[channel] == 0;
    }
    double mean = sum / size, variance = totals.squares / size - mean * mean;
    numbers[0] = mean;
    numbers[1] = variance > 0 ? sqrt(variance) : 0;
    numbers[2] = totals.low;
    numbers[3] = high;
    numbers[4] = sqrt(totals.squares);
    numbers[5] = (double)totals.zeros / size;
    numbers[6] = dead;
    /* While the image is in the cache. */
    if (half)
      quantiles_at(values, start, count, places, quantiles, keys, numbers + 7, 1);
    else
      quantiles_at(values, start, count, places, quantiles, keys, numbers + 7, 0);
    float farthest = fmaxf(high, -totals.low);
    right = numbers[4] < INFINITY && (farthest == 0 || farthest > SMALL);
  }
  free(sums);
  free(keys);
  return right;
}
