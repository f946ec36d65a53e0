/* SPDX-License-Identifier: Apache-2.0
 *
 * Small programs that each lean on one part of a processor emulator. Every one runs ROUNDS times and reports each round:
 * the first carries the translation of its code, the median of the rest does not.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"

#define ROUNDS 3
#define PAGE 4096

static volatile uint64_t sink;

static void alu(void)
{
    uint64_t x = 88172645463325252ull, sum = 0;
    for (int i = 0; i < 100000000; i++) {
        x ^= x << 7;
        x ^= x >> 9;
        sum += x;
    }
    sink = sum;
}

static void sieve(void)
{
    enum { LIMIT = 4000000 };
    unsigned char *composite = malloc(LIMIT);
    if (!composite)
        die("malloc");
    for (int round = 0; round < 3; round++) {
        memset(composite, 0, LIMIT);
        unsigned count = 0;
        for (unsigned i = 2; i < LIMIT; i++) {
            if (composite[i])
                continue;
            count++;
            for (unsigned k = 2 * i; k < LIMIT; k += i)
                composite[k] = 1;
        }
        sink = count;
    }
    free(composite);
}

#define FUNCTION(n) __attribute__((noinline)) static uint64_t f##n(uint64_t x) { return x * 3 + n; }
FUNCTION(0) FUNCTION(1) FUNCTION(2) FUNCTION(3) FUNCTION(4) FUNCTION(5) FUNCTION(6) FUNCTION(7)

static void indirect(void)
{
    static uint64_t (*const table[8])(uint64_t) = {f0, f1, f2, f3, f4, f5, f6, f7};
    uint64_t x = 1;
    for (int i = 0; i < 20000000; i++)
        x = table[(x >> 5) & 7](x);
    sink = x;
}

static void floating(void)
{
    volatile double seed = 1.0000001;
    double a = seed, b = 0.5, sum = 0;
    for (int i = 0; i < 5000000; i++) {
        a = a * 1.0000001 + 0.1;
        b = b * 0.999 + a;
        sum += a / (b + 1.0);
    }
    sink = (uint64_t)sum;
}

static void copy(void)
{
    enum { SIZE = 1 << 20 };
    char *from = malloc(SIZE), *to = malloc(SIZE);
    if (!from || !to)
        die("malloc");
    memset(from, 1, SIZE);
    for (int i = 0; i < 300; i++) {
        memcpy(to, from, SIZE);
        from[i] = to[SIZE - 1 - i];
    }
    sink = (uint64_t)from[7];
    free(from);
    free(to);
}

static void getppid_loop(void)
{
    for (int i = 0; i < 200000; i++)
        sink = (uint64_t)syscall(SYS_getppid);
}

static void faults(void)
{
    enum { PAGES = 8192 };
    char *area = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED)
        die("mmap");
    madvise(area, (size_t)PAGES * PAGE, MADV_NOHUGEPAGE);
    for (int i = 0; i < PAGES; i++)
        area[(size_t)i * PAGE] = 1;
    munmap(area, (size_t)PAGES * PAGE);
}

static void wait_for(pid_t pid)
{
    int status;
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
        die("child");
}

static void fork_loop(void)
{
    for (int i = 0; i < 200; i++) {
        pid_t pid = fork();
        if (!pid)
            _exit(0);
        wait_for(pid);
    }
}

static void ping_pong(void)
{
    int there[2], back[2];
    char byte = 0;
    if (pipe(there) || pipe(back))
        die("pipe");
    pid_t pid = fork();
    if (!pid) {
        for (int i = 0; i < 5000; i++)
            if (read(there[0], &byte, 1) != 1 || write(back[1], &byte, 1) != 1)
                _exit(1);
        _exit(0);
    }
    for (int i = 0; i < 5000; i++)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            die("ping-pong");
    wait_for(pid);
    for (int i = 0; i < 2; i++) {
        close(there[i]);
        close(back[i]);
    }
}

static void exec_loop(void)
{
    char *const argv[] = {"/proc/self/exe", "nothing", NULL};
    for (int i = 0; i < 100; i++) {
        pid_t pid = vfork();
        if (!pid) {
            execv(argv[0], argv);
            _exit(127);
        }
        wait_for(pid);
    }
}

static const struct {
    const char *name;
    void (*run)(void);
} programs[] = {
    {"alu", alu},           {"sieve", sieve},   {"indirect", indirect}, {"double", floating}, {"memcpy", copy},
    {"getppid", getppid_loop}, {"faults", faults}, {"fork", fork_loop},    {"pipe", ping_pong},  {"exec", exec_loop},
};

int run_program(const char *name)
{
    int found = 0;
    for (size_t i = 0; i < sizeof programs / sizeof programs[0]; i++) {
        if (strcmp(name, "all") && strcmp(name, programs[i].name))
            continue;
        found = 1;
        for (int round = 0; round < ROUNDS; round++) {
            say("B %s\n", programs[i].name);
            int64_t start = now();
            programs[i].run();
            say("R %s %lld\n", programs[i].name, (long long)(now() - start));
        }
    }
    return found;
}
