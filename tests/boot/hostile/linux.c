/* A program for a Linux guest that does its worst, as root or not. What it does is its first argument; a second one is
 * for how many milliseconds. Acts that do not end by themselves end then.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct sockaddr_vm {
    unsigned short family, reserved;
    unsigned port, cid;
    unsigned char zero[4];
};

static uint64_t seed = 0x9E3779B97F4A7C15ull;
static uint64_t deadline;

static uint64_t any(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
}

static int over(void) { return now() > deadline; }

static void say(const char *text) { write(1, text, strlen(text)); }

static volatile uint8_t *physical(uint64_t gpa, size_t size)
{
    int fd = open("/dev/mem", O_RDWR | O_SYNC);
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)gpa);
    if (fd < 0 || at == MAP_FAILED) {
        perror("/dev/mem");
        exit(3);
    }
    close(fd);
    return at;
}

/* Anything, in every width, to `size` bytes of devices at `gpa`. */
static void scribble(uint64_t gpa, size_t size)
{
    volatile uint8_t *at = physical(gpa, size);
    while (!over())
        for (int i = 0; i < 1000; i++) {
            uint64_t what = any(), where = any() % size;
            if (what & 1)
                what = what >> 8 & 0x7F;
            switch (any() % 8) {
            case 0: at[where] = (uint8_t)what; break;
            case 1: *(volatile uint16_t *)(at + (where & ~1ull)) = (uint16_t)what; break;
            case 2: *(volatile uint64_t *)(at + (where & ~7ull)) = what; break;
            case 3: what = *(volatile uint32_t *)(at + (where & ~3ull)); break;
            case 4: what = *(volatile uint64_t *)(at + (where & ~7ull)); break;
            case 5: what = at[where]; break;
            default: *(volatile uint32_t *)(at + (where & ~3ull)) = (uint32_t)what; break;
            }
        }
}

/* The virtio devices: whole pages, and then only registers that exist. */
static void devices(void)
{
    static const uint16_t registers[] = {0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4};
    volatile uint8_t *at = physical(0xC0000000, 8 << 12);
    while (!over())
        for (int i = 0; i < 1000; i++) {
            uint32_t what = (uint32_t)any();
            volatile uint8_t *page = at + ((any() % 8) << 12);
            if (what & 1)
                what = what >> 8 & 0xFF;
            *(volatile uint32_t *)(page + registers[any() % (sizeof registers / sizeof *registers)]) = what;
            if (any() % 64 == 0)
                *(volatile uint32_t *)(page + 0x100 + any() % 64 * 4) = what;
        }
}

/* Every port: the serial line and power management more often than the others. */
static void ports(void)
{
    int fd = open("/dev/port", O_RDWR);
    if (fd < 0) {
        perror("/dev/port");
        exit(3);
    }
    while (!over())
        for (int i = 0; i < 1000; i++) {
            off_t port = any() % 4 ? (off_t)(any() & 0xFFFF) : (off_t)(0x3F8 + any() % 8);
            uint8_t what = (uint8_t)any();
            if (any() % 2)
                pwrite(fd, &what, 1, port);
            else
                pread(fd, &what, 1, port);
        }
}

static void flood(const char *path)
{
    static char line[32768];
    memset(line, 'x', sizeof line);
    int fd = open(path, O_WRONLY);
    if (fd < 0) {
        perror(path);
        exit(3);
    }
    while (!over())
        write(fd, line, sizeof line);
}

static int dial(unsigned port, int flags)
{
    struct sockaddr_vm to = {.family = AF_VSOCK, .port = port, .cid = 2};
    int fd = socket(AF_VSOCK, SOCK_STREAM | flags, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Connections to ports that somebody hears and to ports that nobody does, as many as there can be. */
static void connections(void)
{
    unsigned opened = 0, refused = 0;
    while (!over()) {
        int fd = dial(any() % 2 ? 1024 : 9999, any() % 2 ? SOCK_NONBLOCK : 0);
        fd < 0 ? refused++ : opened++;
        if (fd >= 0 && any() % 4)
            write(fd, "nonsense", 8);
        if (fd >= 0 && any() % 3 == 0)
            close(fd);
    }
    printf("opened %u, refused %u\n", opened, refused);
}

/* Bytes for a host that does not read. */
static void bytes(void)
{
    static char junk[65536];
    int fds[64];
    for (int i = 0; i < 64; i++)
        fds[i] = dial(9999, 0);
    for (int i = 0; i < 64; i++)
        if (fds[i] >= 0)
            fcntl(fds[i], F_SETFL, O_NONBLOCK);
    unsigned long long sent = 0;
    while (!over())
        for (int i = 0; i < 64; i++) {
            ssize_t count = fds[i] < 0 ? -1 : write(fds[i], junk, sizeof junk);
            sent += count > 0 ? (unsigned long long)count : 0;
        }
    printf("sent %llu\n", sent);
}

static void memory(void)
{
    for (;;) {
        char *block = malloc(1 << 20);
        if (block)
            memset(block, (int)any() | 1, 1 << 20);
    }
}

static void processes(void)
{
    for (;;)
        fork();
}

/* LOCK BTS of a register: invalid, but the translator of the software CPU knows no answer. */
static void untranslatable(void) { __asm__ volatile(".byte 0xF0, 0x0F, 0xAB, 0xDD"); }

static void devices_page(void) { scribble(0xC0000000, 12 << 12); }
static void local_apic(void) { scribble(0xFEE00000, 4096); }
static void io_apic(void) { scribble(0xFEC00000, 4096); }
static void holes(void) { scribble(0xE0000000, 1 << 20); }
static void serial(void) { flood("/dev/ttyS0"); }
static void virtio_console(void) { flood("/dev/hvc0"); }
static void output(void) { flood("/dev/stdout"); }
static void kill_all(void) { kill(-1, SIGKILL); }
static void kill_init(void)
{
    for (int signal = 1; signal < 65; signal++)
        kill(1, signal);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } acts[] = {
        {"devices", devices},
        {"pages", devices_page},
        {"ports", ports},
        {"lapic", local_apic},
        {"ioapic", io_apic},
        {"holes", holes},
        {"serial", serial},
        {"hvc", virtio_console},
        {"stdout", output},
        {"connections", connections},
        {"bytes", bytes},
        {"memory", memory},
        {"forks", processes},
        {"untranslatable", untranslatable},
        {"killall", kill_all},
        {"init", kill_init},
    };
    const char *name = argc > 1 ? argv[1] : "";
    deadline = now() + (argc > 2 ? strtoul(argv[2], NULL, 10) : 1000);
    if (argc > 3)
        seed ^= strtoul(argv[3], NULL, 10) * 0x2545F4914F6CDD1Dull;
    signal(SIGPIPE, SIG_IGN);
    for (size_t i = 0; i < sizeof acts / sizeof *acts; i++)
        if (!strcmp(acts[i].name, name)) {
            acts[i].run();
            say("done\n");
            return 0;
        }
    return 2;
}
