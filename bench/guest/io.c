/* SPDX-License-Identifier: Apache-2.0
 *
 * What a guest gets out of its block device, its byte stream to the host and its console.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <termios.h>
#include <unistd.h>

#include "bench.h"

#define MIB (1 << 20)
#define STREAM_BYTES (32 * MIB)
#define CHUNK (64 << 10)
#define TRIPS 1000

static void transfer(int fd, int writing, char *buffer, size_t size, off_t at)
{
    ssize_t n = writing ? pwrite(fd, buffer, size, at) : pread(fd, buffer, size, at);
    if (n != (ssize_t)size)
        die("block transfer");
}

/* 64 MiB in requests of 1 MiB, then 2,000 of 4 KiB at random places: O_DIRECT, one at a time. */
void run_block(const char *path)
{
    enum { SPAN = 64 * MIB, RANDOM = 2000 };
    static const char *const names[2] = {"read", "write"};
    static char buffer[MIB] __attribute__((aligned(4096)));
    int fd = open(path, O_RDWR | O_DIRECT);
    if (fd < 0)
        die(path);
    memset(buffer, 0x5A, MIB);
    for (int writing = 0; writing < 2; writing++) {
        say("B block-seq-%s\n", names[writing]);
        int64_t start = now();
        for (off_t at = 0; at < SPAN; at += MIB)
            transfer(fd, writing, buffer, MIB, at);
        say("R block-seq-%s %lld %d\n", names[writing], (long long)(now() - start), SPAN);
    }
    for (int writing = 0; writing < 2; writing++) {
        uint32_t x = 2463534242u;
        say("B block-rand-%s\n", names[writing]);
        int64_t start = now();
        for (int i = 0; i < RANDOM; i++) {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            transfer(fd, writing, buffer, 4096, (off_t)(x % (SPAN / 4096)) * 4096);
        }
        say("R block-rand-%s %lld %d\n", names[writing], (long long)(now() - start), RANDOM);
    }
    close(fd);
}

static int open_stream(const char *where)
{
    if (strncmp(where, "vsock:", 6)) {
        for (int i = 0; i < 200; i++) { /* a port opens only once the host's end is connected */
            int fd = open(where, O_RDWR);
            if (fd >= 0)
                return fd;
            usleep(10000);
        }
        die(where);
    }
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = (unsigned)atoi(where + 6)};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        die("vsock connect");
    return fd;
}

static void send_all(int fd, const char *data, size_t size)
{
    while (size) {
        ssize_t n = write(fd, data, size);
        if (n <= 0)
            die("stream write");
        data += n;
        size -= (size_t)n;
    }
}

static void receive_all(int fd, char *data, size_t size)
{
    while (size) {
        ssize_t n = read(fd, data, size);
        if (n <= 0)
            die("stream read");
        data += n;
        size -= (size_t)n;
    }
}

/* The host echoes TRIPS single bytes, swallows STREAM_BYTES and answers with one byte, then sends STREAM_BYTES after one. */
void run_stream(const char *where)
{
    static char buffer[CHUNK];
    int fd = open_stream(where);
    say("B stream-rtt\n");
    int64_t start = now();
    for (int i = 0; i < TRIPS; i++) {
        send_all(fd, buffer, 1);
        receive_all(fd, buffer, 1);
    }
    say("R stream-rtt %lld %d\n", (long long)(now() - start), TRIPS);
    say("B stream-up\n");
    start = now();
    for (int sent = 0; sent < STREAM_BYTES; sent += CHUNK)
        send_all(fd, buffer, CHUNK);
    receive_all(fd, buffer, 1);
    say("R stream-up %lld %d\n", (long long)(now() - start), STREAM_BYTES);
    say("B stream-down\n");
    start = now();
    send_all(fd, buffer, 1);
    for (int got = 0; got < STREAM_BYTES; got += CHUNK)
        receive_all(fd, buffer, CHUNK);
    say("R stream-down %lld %d\n", (long long)(now() - start), STREAM_BYTES);
    close(fd);
}

/* 4 MiB of text to a console, to the last byte taken by the host. */
void run_console(const char *path)
{
    enum { BYTES = 4 * MIB };
    static char line[4096];
    struct termios raw;
    int fd = open(path, O_RDWR | O_NOCTTY);
    if (fd < 0)
        die(path);
    tcgetattr(fd, &raw);
    cfmakeraw(&raw);
    tcsetattr(fd, TCSANOW, &raw);
    memset(line, 'x', sizeof line);
    line[sizeof line - 1] = '\n';
    say("B console\n");
    int64_t start = now();
    for (int sent = 0; sent < BYTES; sent += (int)sizeof line)
        send_all(fd, line, sizeof line);
    tcdrain(fd);
    say("R console %lld %d\n", (long long)(now() - start), BYTES);
    close(fd);
}
