/* Requests about the machine: its clock, its randomness, its disks and its end. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "kernel.h"

enum { SEED_MAX = 512 };

static uint64_t available_memory(void)
{
    char text[512];
    if (read_small_file("/proc/meminfo", text, sizeof text) <= 0)
        return 0;
    const char *line = strstr(text, "MemAvailable:");
    return line ? strtoull(line + 13, NULL, 10) * 1024 : 0;
}

static void info(struct conn *conn)
{
    struct sysinfo system;
    struct utsname names;
    struct timespec now;
    uint8_t payload[512];
    struct writer writer = {payload, payload + sizeof payload};
    sysinfo(&system);
    uname(&names);
    clock_gettime(CLOCK_REALTIME, &now);
    put_u64(&writer, boot_ns());
    put_u64(&writer, (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec);
    put_u64(&writer, (uint64_t)system.totalram * system.mem_unit);
    put_u64(&writer, (uint64_t)system.freeram * system.mem_unit);
    put_u64(&writer, available_memory());
    for (int i = 0; i < 3; i++)
        put_u32(&writer, (uint32_t)system.loads[i]);
    put_u32(&writer, system.procs);
    put_string(&writer, names.release);
    put_string(&writer, names.nodename);
    conn_frame(conn, REPLY_OK, 0, payload, (size_t)(writer.at - payload));
}

static int set_clock(uint64_t ns)
{
    struct timespec time = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    return clock_settime(CLOCK_REALTIME, &time);
}

/* Two machines from one snapshot must not draw the same numbers. */
static int reseed(const uint8_t *seed, size_t size)
{
    struct {
        int bits, bytes;
        uint8_t data[SEED_MAX];
    } pool = {(int)size * 8, (int)size, {0}};
    memcpy(pool.data, seed, size);
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -1;
    int failed = ioctl(fd, RNDADDENTROPY_, &pool) != 0 || ioctl(fd, RNDRESEEDCRNG_) != 0;
    int error = errno;
    close(fd);
    errno = error;
    return failed ? -1 : 0;
}

static int write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0444);
    if (fd < 0)
        return -1;
    ssize_t size = (ssize_t)strlen(text);
    int failed = write(fd, text, (size_t)size) != size;
    close(fd);
    return failed ? -1 : 0;
}

/* This machine is a copy of another: all that must differ, in one request, because nothing may run before it. An image
 * without /etc has nobody who would look for a machine id there. */
static int renew(uint64_t ns, const char *host, const char *id, const uint8_t *seed, size_t size)
{
    if ((ns && set_clock(ns)) || reseed(seed, size) || (*host && sethostname(host, strlen(host))))
        return -1;
    return *id && write_file("/etc/machine-id", id) && errno != ENOENT ? -1 : 0;
}

/* Without a disk that takes writes there is nothing to hold still: that is no error. */
static int freeze(int thaw)
{
    sync();
    return frozen_disk_fd < 0 ? 0 : ioctl(frozen_disk_fd, thaw ? FITHAW_ : FIFREEZE_, 0);
}

static void answer(struct conn *conn, int failed, const char *stage)
{
    if (failed)
        conn_error(conn, errno, stage);
    else
        conn_ok(conn);
}

void control_request(struct conn *conn, uint8_t type, struct reader *reader)
{
    uint64_t number = 0;
    uint32_t kind = 0;
    size_t size = (size_t)(reader->end - reader->at);
    uint8_t *payload = reader->at;
    if (type == REQ_SHUTDOWN)
        kind = get_u32(reader);
    if (type == REQ_CLOCK_SET || type == REQ_SHUTDOWN || type == REQ_RENEW)
        number = get_u64(reader);
    const char *host = "", *id = "";
    if (type == REQ_RENEW) {
        host = get_string(reader);
        id = get_string(reader);
        payload = reader->at;
        size = (size_t)(reader->end - reader->at);
        reader->at = reader->end;
    }
    if (type == REQ_PING || type == REQ_RESEED)
        reader->at = reader->end;
    if (reader->bad || reader->at != reader->end || ((type == REQ_RESEED || type == REQ_RENEW) && size > SEED_MAX) ||
        (type == REQ_PING && size > MAX_DATA)) {
        conn_protocol_error(conn, "malformed request");
        return;
    }
    if (testing && (type == REQ_CLOCK_SET || type == REQ_RESEED || type == REQ_RENEW)) {
        conn_error(conn, EPERM, "not process 1"); /* the clock and the pool belong to the machine that tests us */
        return;
    }
    switch (type) {
    case REQ_PING:
        conn_frame(conn, REPLY_OK, 0, payload, size);
        break;
    case REQ_INFO:
        info(conn);
        break;
    case REQ_CLOCK_SET:
        answer(conn, set_clock(number), "clock_settime");
        break;
    case REQ_RESEED:
        answer(conn, reseed(payload, size), "reseed");
        break;
    case REQ_RENEW:
        answer(conn, renew(number, host, id, payload, size), "renew");
        break;
    case REQ_SYNC:
        sync();
        conn_ok(conn);
        break;
    case REQ_FREEZE:
    case REQ_THAW:
        answer(conn, freeze(type == REQ_THAW), type == REQ_THAW ? "thaw" : "freeze");
        break;
    case REQ_SHUTDOWN:
        conn_ok(conn);
        conn_flush(conn);
        shut_down(kind == 1, number);
    }
}
