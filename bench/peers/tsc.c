/* SPDX-License-Identifier: Apache-2.0
 * Print the rate of the host's time stamp counter in kHz: QEMU's guest sees that counter and is told its rate. */
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(void)
{
    double start = seconds(), end;
    unsigned long long from = __rdtsc(), to;
    do {
        end = seconds();
        to = __rdtsc();
    } while (end - start < 0.1);
    printf("%.0f\n", (double)(to - from) / (end - start) / 1e3);
}
