/* The tiles of the Gaussian operator: every weight is computed in a tile that stays in a core's cache, used, and dropped.

   A tile is query rows against key rows. One product makes its dot products, one pass its weights, and products with
   values and points add it to the sums. Tiles run in rounds: within a round no two tiles share a row of any sum, so that
   threads never wait for each other and the order of every sum, hence each bit of it, is the same for any number of
   threads. Where queries are keys (symmetric), a tile off the diagonal stands for its mirror image too.

   Formulas: kernels/README.md. Shapes: B queries, M keys, D embedding, C classes. */
#include "common.h"

typedef struct {
    /* operands: rows may have any strides; keys is queries in a symmetric problem */
    const real *queries, *keys, *centre; /* [B, D], [M, D], [D] */
    int64_t num_queries, num_keys, width, query_stride, query_step, key_stride, key_step;
    real scale;          /* points are multiplied by it: 1 / bandwidth, or 1 */
    const real *inverse; /* 1 / bandwidth still to be applied, [B] or [1] */
    int64_t inverse_step; /* 1 or 0 */
    /* which pairs count */
    const int64_t *query_ids, *key_ids; /* [B], [M] or NULL: equal ids do not */
    real limit;                        /* nor pairs with -distance^2 / 2 below it */
    int64_t self_offset;                /* key row that is query row 0 itself, or -1 */
    int64_t excludes_self, is_symmetric;
    /* values v = w [c, 1], contiguous: [M, C + 1]; w alone: [M] */
    const real *values, *weights;
    int64_t num_values; /* C */
    /* blocks: rows and columns of a tile, rows packed at a time (a multiple of both) */
    int64_t block_rows, block_columns, packed_rows;
    real *workspace;
    int64_t num_threads;
    gemm_t gemm;
} problem_t;

typedef struct {
    const real *signal; /* [B, C + 1] */
    real *received;     /* [M, C + 1] or NULL: sum_i S_ij signal_i; its last column only if it is wanted */
    int64_t received_columns;
    real *row_towards, *row_total;       /* [B, D], [B] or NULL: sum_j T_ij y_j, sum_j T_ij */
    real *column_towards, *column_total; /* [M, D], [M] or NULL: sum_i T_ij x_i, sum_i T_ij */
    real *spread;                        /* [B] or NULL: sum_j T_ij |y_j|^2 */
} gradients_t;

typedef struct {
    real *points, *halves; /* rows about the centre, scaled, [packed_rows, D]; -|row|^2 / 2 */
    int64_t first, count;
} packed_t;

typedef struct {
    int64_t row, rows, column, columns; /* in the whole problem */
    const real *left, *right, *left_halves, *right_halves;
    int is_mirrored;
} tile_t;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Copy rows [first, first + count) of queries or keys; called by all threads, which share the work. */
static void pack(const problem_t *p, packed_t *into, int is_query, int64_t first, int64_t count)
{
    const real *rows = is_query ? p->queries : p->keys;
    const int64_t stride = is_query ? p->query_stride : p->key_stride, step = is_query ? p->query_step : p->key_step;
    const int64_t width = p->width;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const real *from = rows + (first + i) * stride;
        real *to = into->points + i * width;
        if (step == 1)
            for (int64_t d = 0; d < width; d++)
                to[d] = (from[d] - p->centre[d]) * p->scale;
        else
            for (int64_t d = 0; d < width; d++)
                to[d] = (from[d * step] - p->centre[d]) * p->scale;
        real norm = 0;
#pragma omp simd reduction(+ : norm)
        for (int64_t d = 0; d < width; d++)
            norm += to[d] * to[d];
        into->halves[i] = (real)-0.5 * norm;
    }
#pragma omp single
    {
        into->first = first;
        into->count = count;
    }
}

/* Turn dot products of a tile into weights S_ij, 0 where a pair does not count. */
static void weigh(const problem_t *p, const tile_t *t, real *cells)
{
    const int has_ids = p->query_ids != NULL;
    for (int64_t i = 0; i < t->rows; i++) {
        real *row = cells + i * t->columns;
        const real half = t->left_halves[i], limit = p->limit;
        const real inverse = p->inverse[(t->row + i) * p->inverse_step];
        const real *halves = t->right_halves;
#pragma omp simd
        for (int64_t j = 0; j < t->columns; j++) {
            real exponent = row[j] + half + halves[j];
            exponent = exponent > 0 ? 0 : exponent;
            const real weight = exponential(exponent * inverse * inverse);
            row[j] = exponent < limit ? 0 : weight;
        }
        /* the expansion leaves rounding noise where the distance is 0 */
        const int64_t own = t->row + i + p->self_offset - t->column;
        if (p->self_offset >= 0 && own >= 0 && own < t->columns)
            row[own] = p->excludes_self ? 0 : 1;
        if (has_ids) {
            const int64_t id = p->query_ids[t->row + i], *ids = p->key_ids + t->column;
            int64_t num_equal = 0;
#pragma omp simd reduction(+ : num_equal)
            for (int64_t j = 0; j < t->columns; j++)
                num_equal += ids[j] == id;
            for (int64_t j = 0; num_equal && j < t->columns; j++)
                if (ids[j] == id) {
                    row[j] = 0;
                    num_equal--;
                }
        }
    }
}

static void fill_weights(const problem_t *p, const tile_t *t, real *cells)
{
    multiply(p->gemm, 'N', 'T', t->rows, t->columns, p->width, t->left, p->width, t->right, p->width, 0, cells,
             t->columns);
    weigh(p, t, cells);
}

/* Add what a tile gives to sums [B, C + 1] = sum_j S_ij v_j; the last column is summed by hand, since products are
   quick only for whole vectors of columns. */
static void propagate_tile(const problem_t *p, const tile_t *t, real *cells, real *sums)
{
    const int64_t classes = p->num_values, width = classes + 1;
    fill_weights(p, t, cells);
    const real *weights = p->weights + t->column;
    for (int64_t i = 0; i < t->rows; i++) {
        const real *row = cells + i * t->columns;
        real mass = 0;
#pragma omp simd reduction(+ : mass)
        for (int64_t j = 0; j < t->columns; j++)
            mass += row[j] * weights[j];
        sums[(t->row + i) * width + classes] += mass;
    }
    multiply(p->gemm, 'N', 'N', t->rows, classes, t->columns, cells, t->columns, p->values + t->column * width, width,
             1, sums + t->row * width, width);
    if (!t->is_mirrored)
        return;
    real masses[t->columns];
    memset(masses, 0, sizeof masses);
    for (int64_t i = 0; i < t->rows; i++) {
        const real *row = cells + i * t->columns, weight = p->weights[t->row + i];
        for (int64_t j = 0; j < t->columns; j++)
            masses[j] += row[j] * weight;
    }
    for (int64_t j = 0; j < t->columns; j++)
        sums[(t->column + j) * width + classes] += masses[j];
    multiply(p->gemm, 'T', 'N', t->columns, classes, t->rows, cells, t->columns, p->values + t->row * width, width, 1,
             sums + t->column * width, width);
}

/* cells becomes T_ij = S_ij worth_ij / s_i^2; its sums over rows and columns are taken on the way. */
static void weigh_worth(const problem_t *p, const gradients_t *g, const tile_t *t, real *cells, const real *worth)
{
    const int sums_columns = g->column_total != NULL || t->is_mirrored;
    real totals[t->columns];
    memset(totals, 0, sizeof totals);
    for (int64_t i = 0; i < t->rows; i++) {
        real *row = cells + i * t->columns, total = 0, spread = 0;
        const real *worths = worth + i * t->columns, *halves = t->right_halves;
        const real inverse = p->inverse[(t->row + i) * p->inverse_step];
        /* a row does not pull at itself, and its large weight would leave rounding noise */
        const int64_t own = t->row + i + p->self_offset - t->column;
        if (p->self_offset >= 0 && own >= 0 && own < t->columns)
            row[own] = 0;
#pragma omp simd reduction(+ : total, spread)
        for (int64_t j = 0; j < t->columns; j++) {
            const real cell = row[j] * worths[j] * inverse * inverse;
            row[j] = cell;
            total += cell;
            spread += cell * halves[j];
        }
        if (sums_columns)
            for (int64_t j = 0; j < t->columns; j++)
                totals[j] += row[j];
        if (g->row_total)
            g->row_total[t->row + i] += total;
        if (g->spread)
            g->spread[t->row + i] -= 2 * spread;
    }
    real *column_total = p->is_symmetric ? g->row_total : g->column_total;
    if (sums_columns && column_total)
        for (int64_t j = 0; j < t->columns; j++)
            column_total[t->column + j] += totals[j];
}

/* Add what a tile gives to all gradients; cells and worth are two buffers. */
static void differentiate_tile(const problem_t *p, const gradients_t *g, const tile_t *t, real *cells, real *worth)
{
    const int64_t width = p->num_values + 1, m = t->columns;
    const real *row_signal = g->signal + t->row * width, *row_values = p->values + t->row * width;
    const real *column_values = p->values + t->column * width, *column_signal = g->signal + t->column * width;
    fill_weights(p, t, cells);
    if (g->received) {
        multiply(p->gemm, 'T', 'N', m, g->received_columns, t->rows, cells, m, row_signal, width, 1,
                 g->received + t->column * width, width);
        if (t->is_mirrored)
            multiply(p->gemm, 'N', 'N', t->rows, g->received_columns, m, cells, m, column_signal, width, 1,
                     g->received + t->row * width, width);
    }
    if (!g->row_towards && !g->column_towards)
        return;
    multiply(p->gemm, 'N', 'T', t->rows, m, width, row_signal, width, column_values, width, 0, worth, m);
    if (p->is_symmetric)
        multiply(p->gemm, 'N', 'T', t->rows, m, width, row_values, width, column_signal, width, 1, worth, m);
    weigh_worth(p, g, t, cells, worth);
    if (g->row_towards)
        multiply(p->gemm, 'N', 'N', t->rows, p->width, m, cells, m, t->right, p->width, 1,
                 g->row_towards + t->row * p->width, p->width);
    real *columns = t->is_mirrored ? g->row_towards : g->column_towards;
    if (columns)
        multiply(p->gemm, 'T', 'N', m, p->width, t->rows, cells, m, t->left, p->width, 1,
                 columns + t->column * p->width, p->width);
}

/* Blocks of the tile at a place of a round, -1 where there is none. Each pair of blocks comes once, and none of them
   twice in a round. Among themselves: the diagonal, then a round-robin tournament (circle method). Otherwise each block
   of the shorter side meets those of the longer in turn. */
static void pair_up(int64_t num_left, int64_t num_right, int is_triangle, int64_t round, int64_t place, int64_t *left,
                    int64_t *right)
{
    if (!is_triangle) {
        const int64_t other = (round + place) % (num_left > num_right ? num_left : num_right);
        *left = num_left > num_right ? other : place;
        *right = num_left > num_right ? place : other;
        return;
    }
    if (round == 0) {
        *left = *right = place;
        return;
    }
    const int64_t cycle = (num_left + 1) / 2 * 2 - 1, turn = round - 1;
    int64_t one = place == 0 ? cycle : (turn + place) % cycle, other = (turn - place + cycle) % cycle;
    if (one == num_left) /* an odd number of blocks: one rests */
        one = other = -1;
    *left = least(one, other);
    *right = one + other - *left;
}

static int64_t num_blocks(int64_t count, int64_t block) { return (count + block - 1) / block; }

/* Run all tiles between two packed ranges; called by all threads. */
static void run_tiles(const problem_t *p, const gradients_t *g, real *sums, const packed_t *left,
                      const packed_t *right, real *scratch)
{
    const int is_triangle = left == right;
    const int64_t num_left = num_blocks(left->count, p->block_rows);
    const int64_t num_right = num_blocks(right->count, p->block_columns);
    const int64_t longer = num_left > num_right ? num_left : num_right;
    const int64_t num_rounds = is_triangle ? (num_left + 1) / 2 * 2 : longer;
    for (int64_t round = 0; round < num_rounds; round++) {
        const int64_t half = (num_left + 1) / 2;
        const int64_t num_places = !is_triangle ? least(num_left, num_right) : round ? half : num_left;
#pragma omp for schedule(static, 1)
        for (int64_t place = 0; place < num_places; place++) {
            int64_t i, j;
            pair_up(num_left, num_right, is_triangle, round, place, &i, &j);
            if (i < 0)
                continue;
            const int64_t row = i * p->block_rows, column = j * p->block_columns;
            const tile_t tile = {
                .row = left->first + row,
                .rows = least(p->block_rows, left->count - row),
                .column = right->first + column,
                .columns = least(p->block_columns, right->count - column),
                .left = left->points + row * p->width,
                .right = right->points + column * p->width,
                .left_halves = left->halves + row,
                .right_halves = right->halves + column,
                .is_mirrored = p->is_symmetric && !(is_triangle && i == j),
            };
            if (g)
                differentiate_tile(p, g, &tile, scratch, scratch + p->block_rows * p->block_columns);
            else
                propagate_tile(p, &tile, scratch, sums);
        }
    }
}

/* The workspace holds two packed ranges (one where it takes all rows of a symmetric problem), then each thread's tiles:
   one forward, two backward. */
static void run(const problem_t *p, const gradients_t *g, real *sums)
{
    const int64_t packed_size = p->packed_rows * (p->width + 1), tile_size = p->block_rows * p->block_columns;
    const int64_t rows_at_once = p->packed_rows;
    packed_t left = {p->workspace, p->workspace + p->packed_rows * p->width, 0, 0};
    const int has_one_range = p->is_symmetric && p->packed_rows >= p->num_queries;
    packed_t right = {left.points + packed_size, left.halves + packed_size, 0, 0};
    real *tiles = left.points + packed_size * (has_one_range ? 1 : 2);
    int64_t next_thread = 0;
#pragma omp parallel num_threads((int)p->num_threads)
    {
        int64_t thread;
#pragma omp atomic capture
        thread = next_thread++;
        real *scratch = tiles + thread * tile_size * (g ? 2 : 1);
        for (int64_t row = 0; row < p->num_queries; row += rows_at_once) {
            pack(p, &left, 1, row, least(rows_at_once, p->num_queries - row));
            if (p->is_symmetric)
                run_tiles(p, g, sums, &left, &left, scratch);
            for (int64_t column = p->is_symmetric ? row + rows_at_once : 0; column < p->num_keys;
                 column += rows_at_once) {
                pack(p, &right, 0, column, least(rows_at_once, p->num_keys - column));
                run_tiles(p, g, sums, &left, &right, scratch);
            }
        }
    }
}

void scinet_gaussian_forward(const problem_t *problem, real *sums) { run(problem, NULL, sums); }

void scinet_gaussian_backward(const problem_t *problem, const gradients_t *gradients) { run(problem, gradients, NULL); }
