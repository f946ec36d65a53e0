/* What process 1 does before it serves: the kernel's file systems, modules, the root, the loopback interface. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"
#include "kernel.h"

char boot_error[256];

int boot_fail(const char *what, const char *detail, int error)
{
    const char *reason = strerror(error);
    snprintf(boot_error, sizeof boot_error, "%s %s: %c%s", what, detail, reason[0] | 0x20, reason + 1);
    return -1;
}

int mount_at(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
    if (mount(source, target, type, flags, data) == 0 || errno == EBUSY)
        return 0;
    if (errno == ENOENT && mkdir(target, 0755) == 0 && mount(source, target, type, flags, data) == 0)
        return 0;
    return -1;
}

static void open_console(void)
{
    if (fcntl(STDERR_FILENO, F_GETFD) >= 0)
        return; /* the kernel found /dev/console in the initramfs */
    int fd = open("/dev/console", O_RDWR | O_NOCTTY);
    if (fd < 0)
        fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd < STDERR_FILENO)
        fd = dup(fd);
}

static void load_module(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        say("module %s: %s", path, strerror(errno));
        return;
    }
    size_t length = strlen(path);
    int packed = length < 3 || strcmp(path + length - 3, ".ko") != 0;
    if (syscall(SYS_finit_module, fd, "", packed ? MODULE_INIT_COMPRESSED_FILE_ : 0) != 0 && errno != EEXIST)
        say("module %s: %s", path, strerror(errno));
    close(fd);
}

static void load_modules(void)
{
    static const char directory[] = "/lib/modules-boot";
    struct dirent **entries;
    if (access(directory, F_OK) != 0)
        return;
    int count = scandir(directory, &entries, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char path[300];
        if (entries[i]->d_name[0] != '.') {
            snprintf(path, sizeof path, "%s/%s", directory, entries[i]->d_name);
            load_module(path);
            /* Its memory is free again. That is nearly all of the initramfs: emptying the rest would cost more. */
            unlink(path);
        }
        free(entries[i]);
    }
}

void loopback_up(void)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return; /* a kernel without IPv4 */
    struct ifreq request = {.ifr_name = "lo"};
    if (ioctl(fd, SIOCGIFFLAGS, &request) == 0) {
        request.ifr_flags |= IFF_UP;
        ioctl(fd, SIOCSIFFLAGS, &request);
    }
    close(fd);
}

static void mount_or_say(const char *source, const char *target, const char *type, unsigned long flags,
                         const char *data)
{
    if (mount_at(source, target, type, flags, data) != 0)
        debug("mount %s: %s", target, strerror(errno));
}

static void mount_the_rest(void)
{
    const unsigned long safe = MS_NOSUID | MS_NODEV;
    mount_or_say("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
    mount_or_say("tmpfs", "/dev/shm", "tmpfs", safe, "mode=1777");
    mount_or_say("tmpfs", "/tmp", "tmpfs", safe, "mode=1777");
    mount_or_say("tmpfs", "/run", "tmpfs", safe, "mode=755");
    mount_or_say("cgroup2", "/sys/fs/cgroup", "cgroup2", safe | MS_NOEXEC, NULL);
    symlink("/proc/self/fd", "/dev/fd");
    symlink("/proc/self/fd/0", "/dev/stdin");
    symlink("/proc/self/fd/1", "/dev/stdout");
    symlink("/proc/self/fd/2", "/dev/stderr");
}

void boot(void)
{
    umask(022);
    mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_at("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_at("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=755");
    open_console();
    options_read();
    load_modules();
    if (options.root[0] && switch_to_root() != 0)
        say("%s", boot_error);
    mount_the_rest();
    if (options.hostname[0])
        sethostname(options.hostname, strlen(options.hostname));
    struct rlimit files = {4096, 1 << 20};
    setrlimit(RLIMIT_NOFILE, &files);
}
