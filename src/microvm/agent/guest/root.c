/* The root disk: found, mounted read-only below an overlay that takes the writes, and made the root. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

/* A driver that was loaded a moment ago may still be probing its device. */
static int open_disk(const char *device)
{
    for (int tries = 0;; tries++) {
        int fd = open(device, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 || (errno != ENOENT && errno != ENXIO && errno != ENODEV) || tries == 400)
            return fd;
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
}

static const char *type_by_magic(int fd)
{
    uint8_t head[2048];
    if (pread(fd, head, sizeof head, 0) != sizeof head)
        return NULL;
    if (memcmp(head + 1024, "\xe2\xe1\xf5\xe0", 4) == 0)
        return "erofs";
    if (memcmp(head + 1024 + 56, "\x53\xef", 2) == 0)
        return "ext4";
    if (memcmp(head, "hsqs", 4) == 0)
        return "squashfs";
    return NULL;
}

static int mount_disk(const char *device, const char *type, const char *target, unsigned long flags)
{
    int fd = open_disk(device);
    if (fd < 0)
        return boot_fail("cannot open the disk", device, errno);
    if (!type[0])
        type = type_by_magic(fd);
    close(fd);
    if (!type) {
        snprintf(boot_error, sizeof boot_error, "disk %s: neither erofs, ext4 nor squashfs", device);
        return -1;
    }
    if (mkdir(target, 0755) != 0 && errno != EEXIST)
        return boot_fail("mkdir", target, errno);
    if (mount(device, target, type, flags, NULL) != 0) {
        char what[100];
        snprintf(what, sizeof what, "cannot mount as %s the disk", type);
        return boot_fail(what, device, errno);
    }
    return 0;
}

static int mount_overlay(void)
{
    if (strcmp(options.overlay, "tmpfs") == 0) {
        char data[40];
        snprintf(data, sizeof data, "mode=755,size=%s", options.overlay_size);
        if (mount_at("tmpfs", "/upper", "tmpfs", 0, data) != 0)
            return boot_fail("mount", "/upper", errno);
    } else {
        if (mount_disk(options.overlay, "", "/upper", 0) != 0)
            return -1;
        frozen_disk_fd = open("/upper", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    }
    if ((mkdir("/upper/data", 0755) != 0 && errno != EEXIST) || (mkdir("/upper/work", 0755) != 0 && errno != EEXIST))
        return boot_fail("mkdir in", options.overlay, errno);
    /* `metacopy` and `redirect_dir` stay off: an upper directory must not be able to name other files. */
    if (mount_at("overlay", "/root-new", "overlay", 0, "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work") != 0)
        return boot_fail("mount", "the overlay", errno);
    return 0;
}

static int carry_over(const char *name)
{
    char target[64];
    snprintf(target, sizeof target, "/root-new/%s", name);
    if (mount(name, target, NULL, MS_MOVE, NULL) == 0)
        return 0;
    if (errno == ENOENT && mkdir(target, 0755) == 0 && mount(name, target, NULL, MS_MOVE, NULL) == 0)
        return 0;
    return boot_fail("no place in the root for", name, errno);
}

int switch_to_root(void)
{
    int direct = strcmp(options.overlay, "direct") == 0;
    if (direct || strcmp(options.overlay, "none") == 0) {
        if (mount_disk(options.root, options.rootfstype, "/root-new", direct ? 0 : MS_RDONLY) != 0)
            return -1;
        if (direct)
            frozen_disk_fd = open("/root-new", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    } else if (mount_disk(options.root, options.rootfstype, "/lower", MS_RDONLY) != 0 || mount_overlay() != 0) {
        return -1;
    }
    if (carry_over("/proc") != 0 || carry_over("/sys") != 0 || carry_over("/dev") != 0)
        return -1;

    if (chdir("/root-new") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
        return boot_fail("cannot switch to", options.root, errno);
    return 0;
}
