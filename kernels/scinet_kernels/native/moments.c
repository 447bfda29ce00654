/* Masked moments of pairs of columns, a block of rows at a time: one pass fills a panel that stays in a core's cache,
   two products contract its rows, and the blocks are added in float64 in their order, so that the number of threads
   changes no bit. Formulas: `moments.py`. Shapes: N rows, C classes. */
#include "common.h"

typedef struct {
    const real *values;   /* [N, C]; what stands in unknown cells is never used */
    const uint8_t *known; /* [N, C] or NULL */
    const real *weights;  /* [N, C] or NULL */
    int64_t value_stride, value_step, known_stride, known_step, weight_stride, weight_step;
    const real *pivot; /* [C] */
    int64_t num_rows, num_classes, block_rows;
    real *workspace; /* for each thread: a panel [block_rows, 3 C] and products [4, C, C] */
    int64_t num_threads;
    gemm_t gemm;
} cells_t;

/* Cells of one row: z^2 w, z w and w, all 0 where unknown. Selected, never multiplied: NaN stays out. */
static inline void fill(const real *restrict values, int64_t value_step, const uint8_t *restrict known,
                        int64_t known_step, const real *restrict weights, int64_t weight_step,
                        const real *restrict pivot, int64_t classes, real *restrict squared, real *restrict first,
                        real *restrict weight)
{
#pragma omp simd
    for (int64_t c = 0; c < classes; c++) {
        real given = weights ? weights[c * weight_step] : (real)1;
        given = given > 0 ? given : 0;
        given = !known || known[c * known_step] ? given : 0;
        const real shifted = given > 0 ? values[c * value_step] - pivot[c] : 0;
        weight[c] = given;
        first[c] = shifted * given;
        squared[c] = shifted * shifted * given;
    }
}

/* One row of the panel: z^2 w | z w | w. The usual layouts get loops of their own, which the compiler turns into vector
   code. */
static void fill_row(const cells_t *p, int64_t row, real *to)
{
    const int64_t classes = p->num_classes;
    const real *values = p->values + row * p->value_stride;
    const uint8_t *known = p->known ? p->known + row * p->known_stride : NULL;
    const real *weights = p->weights ? p->weights + row * p->weight_stride : NULL;
    real *squared = to, *first = to + classes, *weight = to + 2 * classes;
    const int is_usual = p->value_step == 1 && (!known || p->known_step == 1) && (!weights || p->weight_step == 1);
    if (is_usual && known && !weights)
        fill(values, 1, known, 1, NULL, 0, p->pivot, classes, squared, first, weight);
    else if (is_usual && known)
        fill(values, 1, known, 1, weights, 1, p->pivot, classes, squared, first, weight);
    else
        fill(values, p->value_step, known, p->known_step, weights, p->weight_step, p->pivot, classes, squared, first,
             weight);
}

static int64_t rows_of(const cells_t *p, int64_t block)
{
    const int64_t left = p->num_rows - block * p->block_rows;
    return left < p->block_rows ? left : p->block_rows;
}

static int64_t num_blocks(const cells_t *p) { return (p->num_rows + p->block_rows - 1) / p->block_rows; }

/* Add n, sx, sxx, sxy to moments [4, C, C]. */
void scinet_moments(const cells_t *p, double *moments)
{
    const int64_t classes = p->num_classes, square = classes * classes, width = 3 * classes;
    int64_t next_thread = 0;
#pragma omp parallel num_threads((int)p->num_threads)
    {
        int64_t thread;
#pragma omp atomic capture
        thread = next_thread++;
        real *panel = p->workspace + thread * (p->block_rows * width + 4 * square);
        real *to_weight = panel + p->block_rows * width, *cross = to_weight + 3 * square;
        const real *first = panel + classes, *weight = panel + 2 * classes;
#pragma omp for ordered schedule(static, 1)
        for (int64_t block = 0; block < num_blocks(p); block++) {
            const int64_t rows = rows_of(p, block);
            for (int64_t i = 0; i < rows; i++)
                fill_row(p, block * p->block_rows + i, panel + i * width);
            multiply(p->gemm, 'T', 'N', width, classes, rows, panel, width, weight, width, 0, to_weight, classes);
            multiply(p->gemm, 'T', 'N', classes, classes, rows, first, width, first, width, 0, cross, classes);
#pragma omp ordered
            for (int64_t i = 0; i < square; i++) {
                moments[i] += to_weight[2 * square + i];
                moments[square + i] += to_weight[square + i];
                moments[2 * square + i] += to_weight[i];
                moments[3 * square + i] += cross[i];
            }
        }
    }
}

/* Add sum w and sum w z of each column to sums [2, C]. */
void scinet_column_sums(const cells_t *p, double *sums)
{
    const int64_t classes = p->num_classes;
    int64_t next_thread = 0;
#pragma omp parallel num_threads((int)p->num_threads)
    {
        int64_t thread;
#pragma omp atomic capture
        thread = next_thread++;
        real *row = p->workspace + thread * (p->block_rows * 3 * classes + 4 * classes * classes);
        double totals[2 * classes];
#pragma omp for ordered schedule(static, 1)
        for (int64_t block = 0; block < num_blocks(p); block++) {
            for (int64_t c = 0; c < 2 * classes; c++)
                totals[c] = 0;
            for (int64_t i = 0; i < rows_of(p, block); i++) {
                fill_row(p, block * p->block_rows + i, row);
                for (int64_t c = 0; c < 2 * classes; c++)
                    totals[c] += row[classes + c]; /* z w, then w */
            }
#pragma omp ordered
            for (int64_t c = 0; c < classes; c++) {
                sums[c] += totals[classes + c];
                sums[classes + c] += totals[c];
            }
        }
    }
}
