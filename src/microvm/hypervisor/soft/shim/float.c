/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Doubles and floats on the host's own unit where the answer is the same.
 *
 * The library does so too, but was built so that each operand is classified by a call into libm, which makes an
 * addition several times dearer. The conditions are the library's own: the inexact flag is already set, so that no flag
 * can be lost; rounding is to nearest; no NaN, infinity or subnormal comes in; nothing overflows or comes near a
 * subnormal going out. Whatever else happens, the original decides. These functions hold no state, so they serve every
 * engine in the process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "soft.h"

#define INEXACT 0x20

/* float_status of the library; engine_open() checks the neighbourhood. */
typedef struct Status {
    int8_t tininess, rounding;
    uint8_t flags;
    int8_t extended_precision;
    uint8_t flush_results, flush_inputs, default_nan, quiet_bit;
} Status;

static struct {
    uint64_t (*binary64[4])(uint64_t, uint64_t, Status *);
    uint32_t (*binary32[4])(uint32_t, uint32_t, Status *);
    uint64_t (*sqrt64)(uint64_t, Status *);
    int (*compare64)(uint64_t, uint64_t, Status *);
    int (*compare64_quiet)(uint64_t, uint64_t, Status *);
    int (*compare32)(uint32_t, uint32_t, Status *);
    int (*compare32_quiet)(uint32_t, uint32_t, Status *);
} old;

enum { ADD, SUB, MUL, DIV };

int float_load(void *handle, const char **missing)
{
    const struct {
        void *slot;
        const char *name;
    } symbols[] = {
        {&old.binary64[ADD], "float64_add_x86_64"},   {&old.binary64[SUB], "float64_sub_x86_64"},
        {&old.binary64[MUL], "float64_mul_x86_64"},   {&old.binary64[DIV], "float64_div_x86_64"},
        {&old.binary32[ADD], "float32_add_x86_64"},   {&old.binary32[SUB], "float32_sub_x86_64"},
        {&old.binary32[MUL], "float32_mul_x86_64"},   {&old.binary32[DIV], "float32_div_x86_64"},
        {&old.sqrt64, "float64_sqrt_x86_64"},         {&old.compare64, "float64_compare_x86_64"},
        {&old.compare64_quiet, "float64_compare_quiet_x86_64"},
        {&old.compare32, "float32_compare_x86_64"},   {&old.compare32_quiet, "float32_compare_quiet_x86_64"},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *found = dlsym(handle, symbols[i].name);
        if (!found) {
            *missing = symbols[i].name;
            return -1;
        }
        memcpy(symbols[i].slot, &found, sizeof found);
    }
    return 0;
}

static inline int can_use_host(const Status *s) { return (s->flags & INEXACT) && s->rounding == 0; }

/* Zero or normal: the exponent is neither all ones nor, unless all else is zero too, zero. */
static inline int is_plain64(uint64_t a)
{
    uint64_t magnitude = a << 1;
    return magnitude - (1ull << 53) < (0x7FEull << 53) || !magnitude;
}

static inline int is_plain32(uint32_t a)
{
    uint32_t magnitude = a << 1;
    return magnitude - (1u << 24) < (0xFEu << 24) || !magnitude;
}

static inline double to_double(uint64_t a)
{
    double d;
    memcpy(&d, &a, sizeof d);
    return d;
}

static inline float to_float(uint32_t a)
{
    float f;
    memcpy(&f, &a, sizeof f);
    return f;
}

/* Results from just above the smallest normal number on, below infinity. Zero is left to the original. */
#define DEFINE_BINARY(bits, type, convert, least, most, operation, slot, operator)                                    \
    __attribute__((visibility("default"))) uint##bits##_t float##bits##_##operation##_x86_64(                          \
        uint##bits##_t a, uint##bits##_t b, Status *s)                                                                 \
    {                                                                                                                 \
        if (__builtin_expect(can_use_host(s) && is_plain##bits(a) && is_plain##bits(b), 1)) {                           \
            type r = convert(a) operator convert(b);                                                                  \
            type size = r < 0 ? -r : r;                                                                               \
            if (__builtin_expect(size > least && size <= most, 1)) {                                                  \
                uint##bits##_t out;                                                                                   \
                memcpy(&out, &r, sizeof out);                                                                         \
                return out;                                                                                           \
            }                                                                                                         \
        }                                                                                                             \
        return old.binary##bits[slot](a, b, s);                                                                       \
    }

DEFINE_BINARY(64, double, to_double, DBL_MIN, DBL_MAX, add, ADD, +)
DEFINE_BINARY(64, double, to_double, DBL_MIN, DBL_MAX, sub, SUB, -)
DEFINE_BINARY(64, double, to_double, DBL_MIN, DBL_MAX, mul, MUL, *)
DEFINE_BINARY(64, double, to_double, DBL_MIN, DBL_MAX, div, DIV, /)
DEFINE_BINARY(32, float, to_float, FLT_MIN, FLT_MAX, add, ADD, +)
DEFINE_BINARY(32, float, to_float, FLT_MIN, FLT_MAX, sub, SUB, -)
DEFINE_BINARY(32, float, to_float, FLT_MIN, FLT_MAX, mul, MUL, *)
DEFINE_BINARY(32, float, to_float, FLT_MIN, FLT_MAX, div, DIV, /)

__attribute__((visibility("default"))) uint64_t float64_sqrt_x86_64(uint64_t a, Status *s)
{
    if (can_use_host(s) && is_plain64(a) && !(a >> 63)) {
        double r = __builtin_sqrt(to_double(a));
        uint64_t out;
        memcpy(&out, &r, sizeof out);
        return out;
    }
    return old.sqrt64(a, s);
}

/* Comparing plain numbers raises no flag at all. */
#define DEFINE_COMPARE(bits, convert, name, original)                                                                 \
    __attribute__((visibility("default"))) int name(uint##bits##_t a, uint##bits##_t b, Status *s)                     \
    {                                                                                                                 \
        if (__builtin_expect(is_plain##bits(a) && is_plain##bits(b), 1))                                              \
            return (convert(a) > convert(b)) - (convert(a) < convert(b));                                             \
        return original(a, b, s);                                                                                     \
    }

DEFINE_COMPARE(64, to_double, float64_compare_x86_64, old.compare64)
DEFINE_COMPARE(64, to_double, float64_compare_quiet_x86_64, old.compare64_quiet)
DEFINE_COMPARE(32, to_float, float32_compare_x86_64, old.compare32)
DEFINE_COMPARE(32, to_float, float32_compare_quiet_x86_64, old.compare32_quiet)
