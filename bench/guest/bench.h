/* SPDX-License-Identifier: Apache-2.0
 *
 * What the guest side of the benchmarks shares. A result is one console line, "R <name> <nanoseconds> [<amount>]", after
 * a line "B <name>" when it starts, so that the host can check the guest's clock against its own.
 */
#ifndef BENCH_H
#define BENCH_H

#include <stdint.h>
#include <time.h>

static inline int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

void say(const char *format, ...);
void die(const char *what);
extern int say_fd;

int run_program(const char *name);            /* programs.c: 0 when there is no such program */
void run_block(const char *path);             /* io.c */
void run_stream(const char *where);           /* io.c: "vsock:<port>" or "<device path>" */
void run_console(const char *path);

#endif
