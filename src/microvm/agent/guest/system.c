/* Clocks, messages on the console, and the ways this machine ends. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

int testing;
int frozen_disk_fd = -1;
uint64_t started_ns;

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

uint64_t now_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

uint64_t boot_ns(void)
{
    return clock_ns(CLOCK_BOOTTIME);
}

static void print(const char *format, va_list values)
{
    char line[512] = "microvm agent: ";
    size_t start = strlen(line);
    int length = vsnprintf(line + start, sizeof line - start - 2, format, values);
    if (length < 0)
        return;
    size_t end = start + (size_t)length;
    if (end > sizeof line - 2)
        end = sizeof line - 2;
    line[end++] = '\r';
    line[end++] = '\n';
    (void)!write(STDERR_FILENO, line, end);
}

void say(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    print(format, values);
    va_end(values);
}

void debug(const char *format, ...)
{
    if (!options.debug)
        return;
    va_list values;
    va_start(values, format);
    print(format, values);
    va_end(values);
}

int read_small_file(const char *path, char *buffer, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    size_t used = 0;
    ssize_t got;
    while (used < size - 1 && (got = read(fd, buffer + used, size - 1 - used)) > 0)
        used += (size_t)got;
    close(fd);
    buffer[used] = 0;
    return (int)used;
}

static void nap(long milliseconds)
{
    struct timespec time = {.tv_sec = milliseconds / 1000, .tv_nsec = milliseconds % 1000 * 1000000};
    nanosleep(&time, NULL);
}

_Noreturn void power_off(int restart)
{
    if (getpid() != 1)
        _exit(restart ? 3 : 0);
    /* A console that is drained by the host may still hold what was said last. */
    tcdrain(STDERR_FILENO);
    /* Without ACPI the kernel turns a power-off into a halt that nobody notices: then a reset is the end. */
    if (!restart && !options.off_by_reset && access("/sys/firmware/acpi/tables/DSDT", F_OK) == 0)
        reboot(RB_POWER_OFF);
    for (;;) {
        reboot(RB_AUTOBOOT);
        nap(1000);
    }
}

_Noreturn void die(const char *what, int error)
{
    say("%s: %s", what, strerror(error));
    if (getpid() != 1)
        _exit(70);
    sync();
    power_off(0);
}

/* Waits until no process is left (in a test: no child) or the time is over. Returns whether all are gone. */
static int wait_for_all(uint64_t deadline)
{
    for (;;) {
        pid_t pid = waitpid(-1, NULL, WNOHANG);
        if (pid > 0)
            continue;
        if (pid < 0 && errno == ECHILD)
            return 1;
        if (now_ns() >= deadline)
            return 0;
        nap(2);
    }
}

static void signal_all(int number)
{
    if (getpid() == 1) {
        kill(-1, number);
        return;
    }
    for (struct command *command = commands; command; command = command->next)
        if (!command->exited)
            kill(-command->pid, number);
}

_Noreturn void shut_down(int restart, uint64_t grace_ns)
{
    signal_all(SIGTERM);
    signal_all(SIGCONT);
    if (!wait_for_all(now_ns() + grace_ns)) {
        signal_all(SIGKILL);
        wait_for_all(now_ns() + 2000000000u);
    }
    if (getpid() == 1) {
        sync();
        if (frozen_disk_fd >= 0) {
            char path[40];
            snprintf(path, sizeof path, "/proc/self/fd/%d", frozen_disk_fd);
            mount(NULL, path, NULL, MS_REMOUNT | MS_RDONLY, NULL);
        }
        mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
        sync();
    }
    power_off(restart);
}
