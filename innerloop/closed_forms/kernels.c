/* NormActPool (norm_act_pool.py has the formulas) for channels-last activations, in as few passes as there can be.

   Compiled twice, with REAL as float and as double. Activations are rows of C channels: x has n images of h by w rows,
   the pooled map n images of (h / p) by (w / p). p is the pooling window, 0 for none; `place` says where in its window
   a pooled value stood. Sums are taken per image in REAL, over the images in double. Loops over channels run innermost, over
   contiguous memory, so that the compiler turns each into vector instructions. Every function returns 0, or 1 for want of
   memory. */

#ifndef REAL
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define JOIN(a, b) a##b
#define NAME_(f, t) JOIN(f, t)
#define NAME(f) NAME_(f##_, REAL)
#define EACH_CHANNEL for (int64_t c = 0; c < C; c++)

#define REAL float
#include "kernels.c"
#undef REAL
#define REAL double
#include "kernels.c"

#else

typedef struct {
    int64_t n, h, w, C, p;
    REAL slope; /* of the leaky ReLU; 1 for none */
    const REAL *x, *gamma, *y, *mean, *r, *pooled;
    const uint8_t *place;
} NAME(Point);

/* One row of da = leaky' dy. */
static inline void NAME(before_activation)(int64_t C, REAL slope, const REAL *y, const REAL *dy, REAL *da) {
    EACH_CHANNEL da[c] = y[c] > 0 ? dy[c] : slope * dy[c];
}

int NAME(value)(int64_t n, int64_t h, int64_t w, int64_t C, int64_t p, REAL eps, REAL slope, const REAL *restrict x,
                const REAL *restrict gamma, const REAL *restrict beta, REAL *restrict y, REAL *restrict mean,
                REAL *restrict variance, REAL *restrict r, REAL *restrict pooled, uint8_t *restrict place) {
    const int64_t rows = h * w, ho = p ? h / p : h, wo = p ? w / p : w;
    double *total = calloc(2 * C, sizeof(double)), *square = total + C;
    REAL *scratch = malloc(5 * C * sizeof(REAL)), *m = scratch, *m2 = m + C, *sign = m2 + C, *best = sign + C;
    REAL *value = best + C;
    int32_t *where = malloc(C * sizeof(int32_t));
    if (!total || !scratch || !where) return free(total), free(scratch), free(where), 1;
    EACH_CHANNEL sign[c] = (REAL)((gamma[c] > 0) - (gamma[c] < 0));

    /* An image at a time, so that it is read from memory once: its mean, its squares about the mean, its pooling.
       Means and squares of the images merge as Chan, Golub and LeVeque (1983) have it. */
    for (int64_t i = 0; i < n; i++) {
        const REAL *image = x + i * rows * C;
        EACH_CHANNEL m[c] = m2[c] = 0;
        for (int64_t q = 0; q < rows; q++) EACH_CHANNEL m[c] += image[q * C + c];
        EACH_CHANNEL m[c] /= rows;
        for (int64_t q = 0; q < rows; q++) EACH_CHANNEL {
            REAL d = image[q * C + c] - m[c];
            m2[c] += d * d;
        }
        EACH_CHANNEL {
            double d = m[c] - total[c];
            total[c] += d / (i + 1);
            square[c] += m2[c] + d * d * rows * i / (i + 1);
        }
        if (!p) continue;
        for (int64_t a = 0; a < ho; a++)
            for (int64_t b = 0; b < wo; b++) {
                const int64_t out = ((i * ho + a) * wo + b) * C;
                const REAL *first = image + (a * p * w + b * p) * C;
                EACH_CHANNEL best[c] = first[c] * sign[c], where[c] = 0, value[c] = first[c];
                for (int32_t s = 0, q = 0; s < p; s++)
                    for (int32_t t = 0; t < p; t++, q++) {
                        const REAL *row = first + (s * w + t) * C;
                        if (q) EACH_CHANNEL {
                            REAL key = row[c] * sign[c];
                            int better = key > best[c] || key != key; /* as PyTorch: the first of equals; NaN wins */
                            best[c] = better ? key : best[c];
                            value[c] = better ? row[c] : value[c];
                            where[c] = better ? q : where[c];
                        }
                    }
                EACH_CHANNEL pooled[out + c] = value[c], place[out + c] = (uint8_t)where[c];
            }
    }

    REAL *scale = m, *shift = m2;
    EACH_CHANNEL {
        mean[c] = (REAL)total[c];
        variance[c] = (REAL)(square[c] / (double)(n * rows));
        r[c] = (REAL)(1 / sqrt(variance[c] + (double)eps));
        scale[c] = gamma[c] * r[c];
        shift[c] = beta[c] - scale[c] * mean[c];
    }
    const REAL *star = p ? pooled : x;
    for (int64_t q = 0; q < n * ho * wo; q++) EACH_CHANNEL {
        REAL v = star[q * C + c] * scale[c] + shift[c];
        y[q * C + c] = v > 0 ? v : slope * v;
    }
    return free(total), free(scratch), free(where), 0;
}

/* out = placed + of_x (x - mean) + of_u u + constant at full size: the common last line of gradient and curvature. */
static int NAME(assemble)(const NAME(Point) *P, const REAL *restrict dy, const REAL *restrict u,
                          const REAL *restrict placed, const REAL *restrict of_x, const REAL *restrict of_u,
                          const REAL *restrict constant, REAL *restrict out) {
    const int64_t n = P->n, h = P->h, w = P->w, C = P->C, p = P->p ? P->p : 1, ho = h / p, wo = w / p;
    const REAL *restrict x = P->x, *restrict mean = P->mean;
    REAL *scratch = malloc(2 * C * sizeof(REAL)), *da = scratch, *base = da + C;
    int32_t *where = calloc(C, sizeof(int32_t));
    if (!scratch || !where) return free(scratch), free(where), 1;
    EACH_CHANNEL base[c] = constant[c] - of_x[c] * mean[c];
    for (int64_t i = 0; i < n; i++)
        for (int64_t a = 0; a * p < h; a++)
            for (int64_t b = 0; b * p < w; b++) {
                const int pooled = a < ho && b < wo; /* not the rows and columns left over */
                const int64_t at = ((i * ho + a) * wo + b) * C;
                if (pooled) {
                    NAME(before_activation)(C, P->slope, P->y + at, dy + at, da);
                    EACH_CHANNEL da[c] *= placed[c];
                    if (P->p) EACH_CHANNEL where[c] = P->place[at + c];
                }
                for (int64_t s = a * p; s < a * p + p && s < h; s++)
                    for (int64_t t = b * p; t < b * p + p && t < w; t++) {
                        const int32_t q = (int32_t)((s - a * p) * p + t - b * p);
                        const int64_t row = ((i * h + s) * w + t) * C;
                        if (u) EACH_CHANNEL out[row + c] = x[row + c] * of_x[c] + u[row + c] * of_u[c] + base[c];
                        else EACH_CHANNEL out[row + c] = x[row + c] * of_x[c] + base[c];
                        if (pooled) EACH_CHANNEL out[row + c] += where[c] == q ? da[c] : 0;
                    }
            }
    return free(scratch), free(where), 0;
}

/* Sums over the pooled map: of da, of da (x* - mean), and of da u* where there is a u*. */
static int NAME(pooled_sums)(const NAME(Point) *P, const REAL *restrict dy, const REAL *restrict u_star,
                             double *restrict sums) {
    const int64_t C = P->C, rows = P->p ? (P->h / P->p) * (P->w / P->p) : P->h * P->w;
    const REAL *restrict star = P->p ? P->pooled : P->x, *restrict mean = P->mean;
    REAL *scratch = malloc(4 * C * sizeof(REAL)), *s1 = scratch, *s2 = s1 + C, *s3 = s2 + C, *da = s3 + C;
    if (!scratch) return 1;
    for (int64_t c = 0; c < 3 * C; c++) sums[c] = 0;
    for (int64_t i = 0; i < P->n; i++) {
        for (int64_t c = 0; c < 3 * C; c++) scratch[c] = 0;
        for (int64_t q = i * rows * C; q < (i + 1) * rows * C; q += C) {
            NAME(before_activation)(C, P->slope, P->y + q, dy + q, da);
            EACH_CHANNEL s1[c] += da[c], s2[c] += da[c] * (star[q + c] - mean[c]);
            if (u_star) EACH_CHANNEL s3[c] += da[c] * u_star[q + c];
        }
        for (int64_t c = 0; c < 3 * C; c++) sums[c] += scratch[c];
    }
    return free(scratch), 0;
}

int NAME(gradient)(int64_t n, int64_t h, int64_t w, int64_t C, int64_t p, REAL slope, const REAL *x, const REAL *gamma,
                   const REAL *y, const REAL *mean, const REAL *r, const REAL *pooled, const uint8_t *place,
                   const REAL *dy, REAL *dx, REAL *dgamma, REAL *dbeta) {
    const NAME(Point) P = {n, h, w, C, p, slope, x, gamma, y, mean, r, pooled, place};
    const double N = (double)(n * h * w);
    double *sums = malloc(3 * C * sizeof(double));
    REAL *scratch = malloc(3 * C * sizeof(REAL)), *kappa = scratch, *of_x = kappa + C, *constant = of_x + C;
    int failed = !sums || !scratch || NAME(pooled_sums)(&P, dy, NULL, sums);
    if (!failed) {
        EACH_CHANNEL {
            double s1 = sums[c] / N, s2 = r[c] * sums[C + c] / N;
            dbeta[c] = (REAL)sums[c];
            dgamma[c] = (REAL)(N * s2);
            kappa[c] = gamma[c] * r[c];
            of_x[c] = (REAL)(-kappa[c] * s2 * r[c]);
            constant[c] = (REAL)(-kappa[c] * s1);
        }
        if (dx) failed = NAME(assemble)(&P, dy, NULL, kappa, of_x, NULL, constant, dx);
    }
    return free(sums), free(scratch), failed;
}

/* The tangent y_t, and where dy is given the curvature. u, gamma_t, beta_t are the direction; any may be NULL. u_star
   is room for u where the pooling looked. */
int NAME(second_order)(int64_t n, int64_t h, int64_t w, int64_t C, int64_t p, REAL slope, const REAL *x,
                       const REAL *gamma, const REAL *y, const REAL *mean, const REAL *r, const REAL *pooled,
                       const uint8_t *place, const REAL *dy, const REAL *restrict u, const REAL *gamma_t,
                       const REAL *beta_t, REAL *restrict u_star, REAL *restrict y_t, REAL *dx_t, REAL *dgamma_t) {
    const NAME(Point) P = {n, h, w, C, p, slope, x, gamma, y, mean, r, pooled, place};
    const int64_t ho = p ? h / p : h, wo = p ? w / p : w, rows = h * w;
    const double N = (double)(n * rows);
    double *sums = calloc(5 * C, sizeof(double)), *u_sum = sums + 3 * C, *u_x_sum = u_sum + C;
    REAL *scratch = calloc(6 * C, sizeof(REAL)), *restrict s1 = scratch, *restrict s2 = s1 + C, *restrict found = s2 + C;
    int32_t *restrict where = malloc(C * sizeof(int32_t));
    if (!sums || !scratch || !where) return free(sums), free(scratch), free(where), 1;

    for (int64_t i = 0; u && i < n; i++) {
        EACH_CHANNEL s1[c] = s2[c] = 0;
        for (int64_t q = i * rows * C; q < (i + 1) * rows * C; q += C)
            EACH_CHANNEL s1[c] += u[q + c], s2[c] += u[q + c] * (x[q + c] - mean[c]);
        EACH_CHANNEL u_sum[c] += s1[c], u_x_sum[c] += s2[c];
        for (int64_t a = 0; p && a < ho; a++)
            for (int64_t b = 0; b < wo; b++) {
                const int64_t out = ((i * ho + a) * wo + b) * C;
                const REAL *first = u + ((i * h + a * p) * w + b * p) * C;
                EACH_CHANNEL where[c] = place[out + c];
                for (int32_t s = 0, q = 0; s < p; s++)
                    for (int32_t t = 0; t < p; t++, q++) {
                        const REAL *row = first + (s * w + t) * C;
                        EACH_CHANNEL found[c] = where[c] == q ? row[c] : found[c];
                    }
                EACH_CHANNEL u_star[out + c] = found[c];
            }
    }
    const REAL *star = p ? pooled : x;
    if (!p) u_star = (REAL *)u;
    int failed = dy && NAME(pooled_sums)(&P, dy, u ? u_star : NULL, sums);

    REAL *of_star = scratch, *of_u = of_star + C, *shift = of_u + C;
    if (!failed && y_t) {
        EACH_CHANNEL {
            double u_mean = u_sum[c] / N, m = r[c] * u_x_sum[c] / N, kappa = gamma[c] * r[c];
            double scale = r[c] * ((gamma_t ? gamma_t[c] : 0) - kappa * m);
            of_star[c] = (REAL)scale;
            of_u[c] = (REAL)kappa;
            shift[c] = (REAL)((beta_t ? beta_t[c] : 0) - kappa * u_mean - scale * mean[c]);
        }
        for (int64_t q = 0; q < n * ho * wo * C; q += C) {
            EACH_CHANNEL y_t[q + c] = star[q + c] * of_star[c] + shift[c];
            if (u) EACH_CHANNEL y_t[q + c] += u_star[q + c] * of_u[c];
            EACH_CHANNEL y_t[q + c] = y[q + c] > 0 ? y_t[q + c] : slope * y_t[q + c];
        }
    }
    if (!failed && dy) {
        REAL *placed = scratch, *of_x = placed + C, *of_u = of_x + C, *constant = of_u + C;
        EACH_CHANNEL {
            double s1 = sums[c] / N, s2 = r[c] * sums[C + c] / N, u_mean = u_sum[c] / N, m = r[c] * u_x_sum[c] / N;
            double kappa = gamma[c] * r[c], kappa_t = (gamma_t ? gamma_t[c] * r[c] : 0) - kappa * r[c] * m;
            double s2_t = r[c] * (sums[2 * C + c] / N - u_mean * s1 - m * s2);
            placed[c] = (REAL)kappa_t;
            of_x[c] = (REAL)(r[c] * (kappa * s2 * r[c] * m - kappa_t * s2 - kappa * s2_t));
            of_u[c] = (REAL)(-kappa * s2 * r[c]);
            constant[c] = (REAL)(kappa * s2 * r[c] * u_mean - kappa_t * s1);
            dgamma_t[c] = (REAL)(N * s2_t);
        }
        if (dx_t) failed = NAME(assemble)(&P, dy, u, placed, of_x, of_u, constant, dx_t);
    }
    return free(sums), free(scratch), free(where), failed;
}
#endif
