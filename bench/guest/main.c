/* SPDX-License-Identifier: Apache-2.0
 *
 * As PID 1: say "M" at once (user space is reached), then do what the command line's `bench=` asks, one word a task,
 * separated by commas, and stop. As a command: do what the arguments ask.
 *
 *   <program>|all   a program of programs.c     block=<path>  stream=<where>  console=<path>
 *   memory          what the guest itself uses  idle          sleep until stopped from outside
 *   root=<disk>|<command>|<argument>...   run that in that erofs file system, as `microvm run` would
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "bench.h"

int say_fd = 1;

void say(const char *format, ...)
{
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    int size = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (write(say_fd, text, (size_t)size) != size)
        _exit(111);
}

static void stop(void)
{
    tcdrain(say_fd);
    if (getpid() != 1)
        _exit(1);
    sync();
    syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART, NULL);
}

void die(const char *what)
{
    say("E %s: %m\n", what);
    stop();
    _exit(1);
}

static void memory(void)
{
    char text[2048], *at;
    int fd = open("/proc/meminfo", O_RDONLY);
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        die("meminfo");
    text[n] = 0;
    long total = strtol(strstr(text, "MemTotal:") + 9, NULL, 10);
    at = strstr(text, "MemFree:") + 8;
    say("R memory %ld %ld\n", strtol(at, NULL, 10), total);
}

/* The shortest way to a command in a root file system that nobody may write: mount, change root, exec, wait. */
static void run_in(char *words)
{
    char *disk = strtok(words, "|"), *argv[64] = {NULL};
    int count = 0, status = -1;
    while (count < 63 && (argv[count] = strtok(NULL, "|")))
        count++;
    if (!count)
        die("no command");
    mkdir("/root", 0755);
    if (mount(disk, "/root", "erofs", MS_RDONLY, NULL))
        die("mount");
    pid_t pid = fork();
    if (!pid) {
        dup2(say_fd, 1);
        if (chroot("/root") || chdir("/") || mount("tmp", "/tmp", "tmpfs", 0, NULL) ||
            mount("proc", "/proc", "proc", 0, NULL) || mount("dev", "/dev", "devtmpfs", 0, NULL))
            _exit(126);
        char *const environment[] = {"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/root", NULL};
        execvpe(argv[0], argv, environment);
        _exit(127);
    }
    waitpid(pid, &status, 0);
    say("R root %d\n", status);
}

static void task(char *word)
{
    char *value = strchr(word, '=');
    if (value)
        *value++ = 0;
    if (value && !strcmp(word, "block"))
        run_block(value);
    else if (value && !strcmp(word, "stream"))
        run_stream(value);
    else if (value && !strcmp(word, "console"))
        run_console(value);
    else if (value && !strcmp(word, "root"))
        run_in(value);
    else if (!strcmp(word, "memory"))
        memory();
    else if (!strcmp(word, "idle"))
        while (1)
            pause();
    else if (!run_program(word))
        die(word);
}

int main(int argc, char **argv)
{
    static char line[4096];
    if (argc == 2 && !strcmp(argv[1], "nothing"))
        return 0;
    if (getpid() != 1) {
        for (int i = 1; i < argc; i++)
            task(argv[i]);
        return 0;
    }
    say("M\n");
    mount("proc", "/proc", "proc", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    int fd = open("/proc/cmdline", O_RDONLY);
    ssize_t n = read(fd, line, sizeof line - 1);
    close(fd);
    if (n > 0 && line[n - 1] == '\n')
        line[n - 1] = 0;
    char *list = strstr(line, "bench=");
    if (list) {
        list += 6;
        list[strcspn(list, " ")] = 0;
        for (char *next, *word = strtok_r(list, ",", &next); word; word = strtok_r(NULL, ",", &next))
            task(word);
    }
    say("D\n");
    stop();
    return 0;
}
