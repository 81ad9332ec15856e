/* Resizes a part of an image along the rows and then along the columns, to the bit as Pillow does.

   Pillow makes whole rows and columns, and one value at a time: this takes a quarter of its time.
   Its arithmetic is kept: weights are worked out in double and rounded to 22 bits after the point,
   and values are rounded to 8 bits after each of the two passes. `resampling.py` calls this through
   ctypes, and does without it where it was not built. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BITS 22
/* What a sum starts with, so that it is rounded. */
#define HALF (1 << (BITS - 1))
/* Samples of a pixel in memory; the last one of RGB means nothing. */
#define SAMPLES 4
/* Rows that are resized together, with the same weights. */
#define ROWS 4

/* One version for every x86 processor, one for those of the last ten years. */
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

typedef int32_t Pixel __attribute__((vector_size(SAMPLES * sizeof(int32_t))));

/* The Arrow C data interface, which Pillow lends its memory through. */
struct ArrowArray {
  int64_t length, null_count, offset, n_buffers, n_children;
  const void **buffers;
  struct ArrowArray **children;
};

/* What the places of a resized axis are made of. */
typedef struct {
  int64_t taps;        /* room for the weights of a place */
  int64_t start, stop; /* which places of the original axis count, */
  int32_t *first;      /* for each place the first of them, */
  int32_t *count;      /* their number, */
  int32_t *weights;    /* and their weights, `taps` with zeros at the end */
  double *shares;      /* room for those of one place */
} Axis;

static double bilinear(double x) { return x < 1 ? 1 - x : 0; }

/* Keys' cubic with a = -0.5. */
static double bicubic(double x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

static void weigh(Axis *axis, int64_t size, int64_t resized, int64_t from, int64_t to, int reach) {
  double scale = (double)size / resized, width = scale < 1 ? 1 : scale, narrowing = 1 / width;
  axis->stop = 0;
  for (int64_t place = from; place < to; place++) {
    double centre = (place + 0.5) * scale, sum = 0;
    int64_t first = (int64_t)(centre - reach * width + 0.5), last = (int64_t)(centre + reach * width + 0.5);
    if (first < 0) first = 0;
    if (last > size) last = size;
    for (int64_t tap = 0; tap < last - first; tap++) {
      double x = fabs((tap + first - centre + 0.5) * narrowing);
      axis->shares[tap] = reach == 1 ? bilinear(x) : bicubic(x);
      sum += axis->shares[tap];
    }
    int32_t *weights = axis->weights + (place - from) * axis->taps;
    for (int64_t tap = 0; tap < axis->taps; tap++) {
      double share = tap < last - first ? axis->shares[tap] / sum : 0;
      weights[tap] = (int32_t)(share * (1 << BITS) + (share < 0 ? -0.5 : 0.5));
    }
    axis->first[place - from] = (int32_t)first;
    axis->count[place - from] = (int32_t)(last - first);
    if (last > axis->stop) axis->stop = last;
  }
  axis->start = axis->first[0];
}

/* The places `from` to `to` of an axis. Returns 0 without memory; `free_axis` in any case. */
static int make_axis(Axis *axis, int64_t size, int64_t resized, int64_t from, int64_t to, int reach) {
  double scale = (double)size / resized;
  axis->taps = 2 * (int64_t)ceil(reach * (scale < 1 ? 1 : scale)) + 1;
  axis->first = malloc((to - from) * sizeof(int32_t));
  axis->count = malloc((to - from) * sizeof(int32_t));
  axis->weights = malloc((to - from) * axis->taps * sizeof(int32_t));
  axis->shares = malloc(axis->taps * sizeof(double));
  if (!axis->first || !axis->count || !axis->weights || !axis->shares) return 0;
  weigh(axis, size, resized, from, to, reach);
  return 1;
}

static void free_axis(Axis *axis) {
  free(axis->first);
  free(axis->count);
  free(axis->weights);
  free(axis->shares);
}

static inline __attribute__((always_inline)) void narrow(const int32_t *sums, int64_t count, uint8_t *values) {
  for (int64_t i = 0; i < count; i++) {
    int32_t value = sums[i] >> BITS;
    values[i] = value < 0 ? 0 : value > 255 ? 255 : value;
  }
}

/* Resizes rows of pixels, each place with `taps` weights: a fixed number is quicker than the right one.
   `wide` is room for ROWS rows of the pixels that count and `taps` more, and of sums. `resized` has room
   for ROWS more rows. */
FOR_EACH_PROCESSOR
static void resize_rows(const uint8_t *pixels, int64_t width, int64_t rows, const Axis *axis, int64_t columns,
                        int32_t *wide, uint8_t *resized) {
  int64_t count = SAMPLES * (axis->stop - axis->start), pitch = count + SAMPLES * axis->taps;
  int32_t *sums = wide + ROWS * pitch;
  /* What weights of 0 are multiplied with must be memory that was written to. */
  memset(wide, 0, ROWS * pitch * sizeof(int32_t));
  for (int64_t row = 0; row < rows; row += ROWS) {
    for (int64_t r = 0; r < ROWS; r++) {
      int64_t source = row + r < rows ? row + r : rows - 1;
      const uint8_t *values = pixels + SAMPLES * (source * width + axis->start);
      for (int64_t i = 0; i < count; i++) wide[r * pitch + i] = values[i];
    }
    for (int64_t x = 0; x < columns; x++) {
      const int32_t *first = wide + SAMPLES * (axis->first[x] - axis->start);
      const int32_t *weights = axis->weights + x * axis->taps;
      Pixel sum[ROWS];
      for (int r = 0; r < ROWS; r++) sum[r] = (Pixel){HALF, HALF, HALF, HALF};
      for (int64_t tap = 0; tap < axis->taps; tap++) {
        for (int r = 0; r < ROWS; r++) {
          Pixel pixel;
          memcpy(&pixel, first + r * pitch + SAMPLES * tap, sizeof pixel);
          sum[r] += pixel * weights[tap];
        }
      }
      for (int r = 0; r < ROWS; r++) memcpy(sums + SAMPLES * (r * columns + x), &sum[r], sizeof sum[r]);
    }
    narrow(sums, SAMPLES * ROWS * columns, resized + SAMPLES * row * columns);
  }
}

/* Resizes columns of pixels, and leaves out the samples that mean nothing. */
FOR_EACH_PROCESSOR
static void resize_columns(const uint8_t *pixels, int64_t width, const Axis *axis, int64_t rows, int32_t *sums,
                           uint8_t *line, uint8_t *resized) {
  int64_t count = SAMPLES * width;
  for (int64_t row = 0; row < rows; row++) {
    const uint8_t *values = pixels + (axis->first[row] - axis->start) * count;
    const int32_t *weights = axis->weights + row * axis->taps;
    for (int64_t i = 0; i < count; i++) sums[i] = HALF;
    for (int64_t tap = 0; tap < axis->count[row]; tap++, values += count)
      for (int64_t i = 0; i < count; i++) sums[i] += values[i] * weights[tap];
    narrow(sums, count, line);
    for (int64_t x = 0; x < width; x++)
      for (int s = 0; s < SAMPLES - 1; s++) *resized++ = line[SAMPLES * x + s];
  }
}

/* Resizes the pixels that Pillow lends, `width` a row, and writes uint8 (bottom - top, right - left, 3).

   `reach` is 1 for bilinear and 2 for bicubic. Returns whether there was memory. */
int heatlens_resize(const struct ArrowArray *image, int64_t width, int64_t height, int64_t resized_width,
                    int64_t resized_height, int64_t left, int64_t top, int64_t right, int64_t bottom, int reach,
                    uint8_t *resized) {
  const uint8_t *pixels = image->children[0]->buffers[1];
  Axis across, down;
  int done = make_axis(&across, width, resized_width, left, right, reach);
  done = make_axis(&down, height, resized_height, top, bottom, reach) && done;
  uint8_t *strip = NULL;
  int32_t *wide = NULL;
  if (done) {
    int64_t columns = right - left, rows = down.stop - down.start;
    strip = malloc(SAMPLES * columns * (rows + ROWS));
    wide = malloc(SAMPLES * sizeof(int32_t) * ROWS * (across.stop - across.start + across.taps + columns));
    done = strip && wide;
    if (done) {
      resize_rows(pixels + SAMPLES * width * down.start, width, rows, &across, columns, wide, strip);
      resize_columns(strip, columns, &down, bottom - top, wide, strip + SAMPLES * columns * (rows + ROWS - 1), resized);
    }
  }
  free(strip);
  free(wide);
  free_axis(&across);
  free_axis(&down);
  return done;
}
