/* NormActPool (norm_act_pool.py has the formulas) for channels-last activations, in as few passes as there can be.

   Activations are rows of C channels: x has n images of h by w rows, the pooled map n images of (h / p) by (w / p). p is
   the pooling window, 0 for none; `place` says where in its window a pooled value stood. Sums are taken per image in
   REAL, over the images in double. Channels have nothing to do with each other, so each function works on WIDTH of
   them from `first` on: with the number known, the compiler makes vector instructions of the loops over channels.
   Sums over rows and choices are made in VECTORS of 64 bytes, an extension of gcc's and clang's: these stay in registers.

   Where `image` is given, x is not there: it is a 3x3 convolution of the image, of few channels and with a border of
   zeros, that is cheaper to compute again, an image at a time, than to keep and to read. So is then u, with the weight's
   and bias's tangents, and instead of a gradient by x there are those by weight and bias.

   This file includes itself, for float and double, and within each for every WIDTH. */

#if !defined(REAL)
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
/* What a register holds: of wider vectors gcc keeps the parts in memory. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define EACH for (int c = 0; c < WIDTH; c++)
#define EACH_VECTOR _Pragma("GCC unroll 8") for (int v = 0; v < VECTORS; v++)
#define AT(pointer, v) (((NAME(Vector) *)(pointer))[v])
#define CONST_AT(pointer, v) (((const NAME(Vector) *)(pointer))[v])

#define REAL float
#define INTEGER int32_t
#include "kernels.c"
#undef REAL
#undef INTEGER
#define REAL double
#define INTEGER int64_t
#include "kernels.c"
#undef REAL
#undef INTEGER

#elif !defined(WIDTH)

/* Whatever a kernel may be given, in the order in which kernels.py packs it; what a caller does not have is NULL. */
typedef struct {
    int64_t n, h, w, C, p;
    double eps, slope; /* of the leaky ReLU; 1 for none */
    const REAL *x, *gamma, *beta;
    REAL *y, *mean, *variance, *r, *pooled;
    uint8_t *place;
    const REAL *dy;
    REAL *dx, *dgamma, *dbeta;
    const REAL *u, *gamma_t, *beta_t; /* the direction */
    REAL *u_star, *y_t, *dx_t, *dgamma_t; /* u_star is room for u where the pooling looked */
    /* the convolution: n images of (h + 2) by (w + 2) by `inputs`; weights are 9 inputs by C */
    int64_t inputs;
    const REAL *image, *weight, *bias, *weight_t, *bias_t;
    REAL *dweight, *dbias;
} JOIN(Arguments, REAL);

#define WIDTH 64
#include "kernels.c"
#undef WIDTH
#define WIDTH 32
#include "kernels.c"
#undef WIDTH
#define WIDTH 16
#include "kernels.c"
#undef WIDTH
#define WIDTH 1
#include "kernels.c"
#undef WIDTH

#define ALL_CHANNELS(function)                                                                                         \
    int JOIN(function, REAL)(const JOIN(Arguments, REAL) * a) {                                                        \
        REAL *room = NULL; /* for x and u of one image */                                                              \
        if (a->image && !(room = malloc(2 * a->h * a->w * 64 * sizeof(REAL)))) return 1;                               \
        int64_t first = 0;                                                                                             \
        for (; first + 64 <= a->C; first += 64) JOIN(JOIN(function, REAL), 64)(a, first, room);                        \
        for (; first + 32 <= a->C; first += 32) JOIN(JOIN(function, REAL), 32)(a, first, room);                        \
        for (; first + 16 <= a->C; first += 16) JOIN(JOIN(function, REAL), 16)(a, first, room);                        \
        for (; first < a->C; first++) JOIN(JOIN(function, REAL), 1)(a, first, room);                                   \
        free(room);                                                                                                    \
        return 0;                                                                                                      \
    }
ALL_CHANNELS(value)
ALL_CHANNELS(gradient)
ALL_CHANNELS(second_order)
#undef ALL_CHANNELS

#else
#define NAME(function) JOIN(JOIN(function, REAL), WIDTH)
#define ARGUMENTS const JOIN(Arguments, REAL) * a
#if WIDTH == 1
#define VECTORS 1
typedef REAL NAME(Vector);
typedef INTEGER NAME(Integers);
#define CHOICE(condition, yes, no) ((condition) ? (yes) : (no))
#else
#define VECTORS ((int)(WIDTH * sizeof(REAL) / VECTOR_BYTES))
typedef REAL NAME(Vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
typedef INTEGER NAME(Integers) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(INTEGER)), may_alias));
#define CHOICE(condition, yes, no)                                                                                     \
    ((__typeof__(no))(((condition) & (NAME(Integers))(yes)) | (~(condition) & (NAME(Integers))(no))))
#endif

/* da = leaky' dy, of one row. */
static inline NAME(Vector) NAME(before_activation)(NAME(Vector) y, NAME(Vector) dy, REAL slope) {
    return CHOICE(y > 0, dy, slope * dy);
}

/* Activations of image i: where its first row is, and how far it is to the next. */
typedef struct {
    const REAL *row;
    int64_t stride;
} NAME(Rows);

static inline NAME(Rows) NAME(rows)(ARGUMENTS, int64_t first, int64_t i, const REAL *memory, const REAL *weight,
                                    const REAL *bias, REAL *room) {
    const int64_t h = a->h, w = a->w, C = a->C, run = 3 * a->inputs;
    if (!a->image) return (NAME(Rows)){memory ? memory + i * h * w * C + first : 0, C};
    for (int64_t s = 0; s < h; s++)
        for (int64_t t = 0; t < w; t++) {
            NAME(Vector) z[VECTORS];
            EACH_VECTOR z[v] = bias ? CONST_AT(bias + first, v) : (NAME(Vector)){0};
            for (int64_t ds = 0; weight && ds < 3; ds++) {
                const REAL *patch = a->image + ((i * (h + 2) + s + ds) * (w + 2) + t) * a->inputs;
                const REAL *by = weight + ds * run * C + first;
                for (int64_t k = 0; k < run; k++, by += C) {
                    const REAL pixel = patch[k];
                    EACH_VECTOR z[v] += pixel * CONST_AT(by, v);
                }
            }
            EACH_VECTOR AT(room + (s * w + t) * WIDTH, v) = z[v];
        }
    return (NAME(Rows)){room, WIDTH};
}

static void NAME(value)(ARGUMENTS, int64_t first, REAL *room) {
    const int64_t n = a->n, w = a->w, C = a->C, p = a->p, rows = a->h * w, ho = p ? a->h / p : 0, wo = p ? w / p : 0;
    const REAL slope = (REAL)a->slope;
    double total[WIDTH], square[WIDTH];
    REAL signs[WIDTH], scale[WIDTH], shift[WIDTH];
    EACH total[c] = square[c] = 0;
    EACH signs[c] = (REAL)((a->gamma[first + c] > 0) - (a->gamma[first + c] < 0));
    NAME(Vector) sign[VECTORS];
    EACH_VECTOR sign[v] = CONST_AT(signs, v);

    /* An image at a time, so that it is read from memory once: its mean, its squares about the mean, its pooling.
       Means and squares of the images merge as Chan, Golub and LeVeque (1983) have it. */
    for (int64_t i = 0; i < n; i++) {
        const NAME(Rows) x = NAME(rows)(a, first, i, a->x, a->weight, a->bias, room);
        const REAL *image = x.row;
        const int64_t stride = x.stride;
        NAME(Vector) sum[VECTORS], sum2[VECTORS], left[VECTORS];
        EACH_VECTOR sum[v] = sum2[v] = left[v] = (NAME(Vector)){0};
        for (int64_t q = 0; q < rows; q++) EACH_VECTOR sum[v] += CONST_AT(image + q * stride, v);
        EACH_VECTOR sum[v] /= (REAL)rows;
        for (int64_t q = 0; q < rows; q++) EACH_VECTOR {
            NAME(Vector) d = CONST_AT(image + q * stride, v) - sum[v];
            sum2[v] += d * d;
            left[v] += d; /* what rounding left of the mean */
        }
        EACH_VECTOR {
            sum2[v] -= left[v] * left[v] / (REAL)rows;
            sum[v] += left[v] / (REAL)rows;
        }
        const REAL *m = (const REAL *)sum, *m2 = (const REAL *)sum2;
        EACH {
            double d = m[c] - total[c];
            total[c] += d / (i + 1);
            square[c] += m2[c] + d * d * rows * i / (i + 1);
        }
        for (int64_t s = 0; s < ho; s++)
            for (int64_t t = 0; t < wo; t++) {
                const int64_t out = ((i * ho + s) * wo + t) * C + first;
                const REAL *corner = image + (s * p * w + t * p) * stride;
                NAME(Vector) best[VECTORS], value[VECTORS];
                NAME(Integers) where[VECTORS];
                EACH_VECTOR value[v] = CONST_AT(corner, v), best[v] = value[v] * sign[v], where[v] = (NAME(Integers)){0};
                for (INTEGER q = 1, ds = 0, dt = 1; q < p * p; q++, dt++) {
                    if (dt == p) ds++, dt = 0;
                    const REAL *row = corner + (ds * w + dt) * stride;
                    EACH_VECTOR {
                        NAME(Vector) here = CONST_AT(row, v), key = here * sign[v];
                        NAME(Integers) better = (key > best[v]) | (key != key); /* as PyTorch: the first of equals; NaN wins */
                        best[v] = CHOICE(better, key, best[v]);
                        value[v] = CHOICE(better, here, value[v]);
                        where[v] = CHOICE(better, where[v] * 0 + q, where[v]);
                    }
                }
                EACH_VECTOR AT(a->pooled + out, v) = value[v];
                EACH a->place[out + c] = (uint8_t)((INTEGER *)where)[c];
            }
    }
    EACH {
        double variance = square[c] / (double)(n * rows), r = 1 / sqrt((REAL)variance + a->eps);
        a->mean[first + c] = (REAL)total[c];
        a->variance[first + c] = (REAL)variance;
        a->r[first + c] = (REAL)r;
        scale[c] = (REAL)(a->gamma[first + c] * r);
        shift[c] = (REAL)(a->beta[first + c] - a->gamma[first + c] * r * total[c]);
    }
    const REAL *star = p ? a->pooled : a->x;
    const int64_t end = n * (p ? ho * wo : rows) * C;
    for (int64_t q = first; q < end; q += C) EACH_VECTOR {
        NAME(Vector) z = CONST_AT(star + q, v) * CONST_AT(scale, v) + CONST_AT(shift, v);
        AT(a->y + q, v) = CHOICE(z > 0, z, slope * z);
    }
}

/* Sums over the pooled map: of da = leaky' dy, of da (x* - mean), and of da u*. */
static inline void NAME(pooled_sums)(ARGUMENTS, int64_t first, const REAL *u_star, double *s1, double *s2, double *s3) {
    const int64_t C = a->C, rows = a->p ? (a->h / a->p) * (a->w / a->p) : a->h * a->w;
    const REAL *star = a->p ? a->pooled : a->x, slope = (REAL)a->slope;
    NAME(Vector) mean[VECTORS];
    EACH_VECTOR mean[v] = CONST_AT(a->mean + first, v);
    EACH s1[c] = s2[c] = s3[c] = 0;
    for (int64_t i = 0; i < a->n; i++) {
        NAME(Vector) t1[VECTORS], t2[VECTORS], t3[VECTORS];
        EACH_VECTOR t1[v] = t2[v] = t3[v] = (NAME(Vector)){0};
        for (int64_t q = i * rows * C + first; q < (i + 1) * rows * C; q += C) {
            EACH_VECTOR {
                NAME(Vector) da = NAME(before_activation)(CONST_AT(a->y + q, v), CONST_AT(a->dy + q, v), slope);
                t1[v] += da;
                t2[v] += da * (CONST_AT(star + q, v) - mean[v]);
                if (u_star) t3[v] += da * CONST_AT(u_star + q, v);
            }
        }
        EACH s1[c] += ((REAL *)t1)[c], s2[c] += ((REAL *)t2)[c], s3[c] += ((REAL *)t3)[c];
    }
}

/* out = scatter(placed da) + of_x (x - mean) + of_u u + constant: the last line of gradient and curvature. Of a
   convolution, the gradients of weight and bias that such an out has. */
static inline void NAME(assemble)(ARGUMENTS, int64_t first, REAL *room, int with_u, const REAL *placed, const REAL *of_x,
                                  const REAL *of_u, const REAL *constant, REAL *out) {
    const int64_t n = a->n, h = a->h, w = a->w, C = a->C, p = a->p ? a->p : 1, ho = h / p, wo = w / p;
    const REAL slope = (REAL)a->slope;
    const int64_t run = 3 * a->inputs;
    REAL base[WIDTH];
    double dbias[WIDTH];
    EACH base[c] = constant[c] - of_x[c] * a->mean[first + c];
    EACH dbias[c] = 0;
    if (a->image) for (int64_t k = 0; k < 3 * run; k++) EACH a->dweight[k * C + first + c] = 0;
    for (int64_t i = 0; i < n; i++) {
        const NAME(Rows) x = NAME(rows)(a, first, i, a->x, a->weight, a->bias, room);
        NAME(Rows) u = {0, 0};
        if (with_u) u = NAME(rows)(a, first, i, a->u, a->weight_t, a->bias_t, room + h * w * WIDTH);
        for (int64_t s = 0; s * p < h; s++)
            for (int64_t t = 0; t * p < w; t++) {
                const int64_t at = ((i * ho + s) * wo + t) * C + first;
                NAME(Vector) da[VECTORS];
                INTEGER where[WIDTH];
                EACH_VECTOR da[v] = (NAME(Vector)){0};
                EACH where[c] = 0;
                if (s < ho && t < wo) { /* not the rows and columns that no window takes */
                    EACH_VECTOR da[v] = CONST_AT(placed, v) *
                        NAME(before_activation)(CONST_AT(a->y + at, v), CONST_AT(a->dy + at, v), slope);
                    if (a->p) EACH where[c] = a->place[at + c];
                }
                for (INTEGER q = 0, ds = 0, dt = 0; q < p * p; q++, dt++) {
                    if (dt == p) ds++, dt = 0;
                    if (s * p + ds >= h || t * p + dt >= w) continue;
                    const int64_t row = (s * p + ds) * w + t * p + dt;
                    REAL *to = a->image ? room + row * WIDTH : out + (i * h * w + row) * C + first; /* x may go */
                    EACH_VECTOR {
                        NAME(Vector) z = CONST_AT(x.row + row * x.stride, v) * CONST_AT(of_x, v) + CONST_AT(base, v);
                        NAME(Integers) here = ((const NAME(Integers) *)where)[v] == q;
                        z += CHOICE(here, da[v], da[v] * 0);
                        if (with_u) z += CONST_AT(u.row + row * u.stride, v) * CONST_AT(of_u, v);
                        AT(to, v) = z;
                    }
                }
            }
        if (!a->image) continue;
        NAME(Vector) sum[VECTORS];
        EACH_VECTOR sum[v] = (NAME(Vector)){0};
        for (int64_t q = 0; q < h * w; q++) EACH_VECTOR sum[v] += CONST_AT(room + q * WIDTH, v);
        EACH dbias[c] += ((REAL *)sum)[c];
        for (int64_t ds = 0; ds < 3; ds++)
            for (int64_t k = 0; k < run; k += 3) { /* three weights for each reading of the room */
                NAME(Vector) sum0[VECTORS], sum1[VECTORS], sum2[VECTORS];
                EACH_VECTOR sum0[v] = sum1[v] = sum2[v] = (NAME(Vector)){0};
                for (int64_t s = 0; s < h; s++) {
                    const REAL *pixel = a->image + ((i * (h + 2) + s + ds) * (w + 2)) * a->inputs + k;
                    for (int64_t t = 0; t < w; t++, pixel += a->inputs) {
                        const REAL pixel0 = pixel[0], pixel1 = pixel[1], pixel2 = pixel[2];
                        EACH_VECTOR {
                            NAME(Vector) z = CONST_AT(room + (s * w + t) * WIDTH, v);
                            sum0[v] += pixel0 * z, sum1[v] += pixel1 * z, sum2[v] += pixel2 * z;
                        }
                    }
                }
                REAL *to = a->dweight + (ds * run + k) * C + first;
                EACH_VECTOR AT(to, v) += sum0[v];
                EACH_VECTOR AT(to + C, v) += sum1[v];
                EACH_VECTOR AT(to + 2 * C, v) += sum2[v];
            }
    }
    if (a->image && a->dbias) EACH a->dbias[first + c] = (REAL)dbias[c];
}

static void NAME(gradient)(ARGUMENTS, int64_t first, REAL *room) {
    const double N = (double)(a->n * a->h * a->w);
    double sum[WIDTH], of_x_hat[WIDTH], unused[WIDTH];
    REAL kappa[WIDTH], of_x[WIDTH], constant[WIDTH];
    NAME(pooled_sums)(a, first, 0, sum, of_x_hat, unused);
    EACH {
        double r = a->r[first + c], s1 = sum[c] / N, s2 = r * of_x_hat[c] / N, k = a->gamma[first + c] * r;
        a->dbeta[first + c] = (REAL)sum[c];
        a->dgamma[first + c] = (REAL)(N * s2);
        kappa[c] = (REAL)k;
        of_x[c] = (REAL)(-k * s2 * r);
        constant[c] = (REAL)(-k * s1);
    }
    if (a->dx || a->dweight) NAME(assemble)(a, first, room, 0, kappa, of_x, 0, constant, a->dx);
}

/* The tangent where there is room for it, and the curvature where there is a dy. */
static void NAME(second_order)(ARGUMENTS, int64_t first, REAL *room) {
    const int64_t w = a->w, C = a->C, p = a->p, rows = a->h * w, ho = p ? a->h / p : 0, wo = p ? w / p : 0;
    const double N = (double)(a->n * rows);
    const int with_u = a->u || a->weight_t || a->bias_t;
    const REAL *star = p ? a->pooled : a->x, *u_star = with_u && p ? a->u_star : a->u, slope = (REAL)a->slope;
    double u_mean[WIDTH], m[WIDTH], s1[WIDTH], s2[WIDTH], s3[WIDTH];
    REAL mean[WIDTH];
    EACH mean[c] = a->mean[first + c];
    EACH u_mean[c] = m[c] = 0;
    for (int64_t i = 0; with_u && i < a->n; i++) {
        const NAME(Rows) x = NAME(rows)(a, first, i, a->x, a->weight, a->bias, room);
        const NAME(Rows) u = NAME(rows)(a, first, i, a->u, a->weight_t, a->bias_t, room + rows * WIDTH);
        NAME(Vector) t1[VECTORS], t2[VECTORS];
        EACH_VECTOR t1[v] = t2[v] = (NAME(Vector)){0};
        for (int64_t q = 0; q < rows; q++) EACH_VECTOR {
            NAME(Vector) du = CONST_AT(u.row + q * u.stride, v);
            t1[v] += du;
            t2[v] += du * (CONST_AT(x.row + q * x.stride, v) - CONST_AT(mean, v));
        }
        EACH u_mean[c] += ((REAL *)t1)[c] / N, m[c] += ((REAL *)t2)[c] / N;
        for (int64_t s = 0; s < ho; s++)
            for (int64_t t = 0; t < wo; t++) {
                const int64_t out = ((i * ho + s) * wo + t) * C + first;
                const REAL *corner = u.row + (s * p * w + t * p) * u.stride;
                NAME(Vector) found[VECTORS];
                INTEGER where[WIDTH];
                EACH where[c] = a->place[out + c];
                EACH_VECTOR found[v] = CONST_AT(corner, v);
                for (INTEGER q = 1, ds = 0, dt = 1; q < p * p; q++, dt++) {
                    if (dt == p) ds++, dt = 0;
                    const REAL *row = corner + (ds * w + dt) * u.stride;
                    EACH_VECTOR {
                        NAME(Integers) here = ((const NAME(Integers) *)where)[v] == q;
                        found[v] = CHOICE(here, CONST_AT(row, v), found[v]);
                    }
                }
                EACH_VECTOR AT(a->u_star + out, v) = found[v];
            }
    }
    EACH m[c] *= a->r[first + c];

    if (a->y_t) {
        const int64_t end = a->n * (p ? ho * wo : rows) * C;
        REAL of_star[WIDTH], of_u[WIDTH], shift[WIDTH];
        EACH {
            double r = a->r[first + c], kappa = a->gamma[first + c] * r, gamma_t = a->gamma_t ? a->gamma_t[first + c] : 0;
            double scale = r * (gamma_t - kappa * m[c]), beta_t = a->beta_t ? a->beta_t[first + c] : 0;
            of_star[c] = (REAL)scale;
            of_u[c] = (REAL)kappa;
            shift[c] = (REAL)(beta_t - kappa * u_mean[c] - scale * mean[c]);
        }
        for (int64_t q = first; q < end; q += C) {
            EACH_VECTOR {
                NAME(Vector) z = CONST_AT(star + q, v) * CONST_AT(of_star, v) + CONST_AT(shift, v);
                if (with_u) z += CONST_AT(u_star + q, v) * CONST_AT(of_u, v);
                AT(a->y_t + q, v) = NAME(before_activation)(CONST_AT(a->y + q, v), z, slope);
            }
        }
    }
    if (a->dy) {
        REAL placed[WIDTH], of_x[WIDTH], of_u[WIDTH], constant[WIDTH];
        NAME(pooled_sums)(a, first, u_star, s1, s2, s3);
        EACH {
            double r = a->r[first + c], kappa = a->gamma[first + c] * r, gamma_t = a->gamma_t ? a->gamma_t[first + c] : 0;
            double kappa_t = gamma_t * r - kappa * r * m[c], mean_da = s1[c] / N, mean_da_x_hat = r * s2[c] / N;
            double s2_t = r * (s3[c] / N - u_mean[c] * mean_da - m[c] * mean_da_x_hat), of_u_c = -kappa * mean_da_x_hat * r;
            placed[c] = (REAL)kappa_t;
            of_x[c] = (REAL)(r * (-of_u_c * m[c] - kappa_t * mean_da_x_hat - kappa * s2_t));
            of_u[c] = (REAL)of_u_c;
            constant[c] = (REAL)(-of_u_c * u_mean[c] - kappa_t * mean_da);
            a->dgamma_t[first + c] = (REAL)(N * s2_t);
        }
        if (a->dx_t || a->dweight) NAME(assemble)(a, first, room, with_u, placed, of_x, of_u, constant, a->dx_t);
    }
}

#undef NAME
#undef ARGUMENTS
#undef VECTORS
#undef CHOICE
#endif
