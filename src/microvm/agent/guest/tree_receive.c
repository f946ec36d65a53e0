/* A tree from stdin, in tree_send's format, into a directory. No link inside the destination is followed: somebody in
 * the guest who may write there could otherwise have root write anywhere. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

static uint8_t buffer[DATA_CHUNK];
static size_t start, end;
static int root = -1, parent = -1;
static char parent_name[PATH_MAX]; /* what `parent` is, below the root */
static uid_t uid;
static gid_t gid;

struct entry {
    uint32_t mode;
    uint64_t size;
    int64_t mtime_ns;
    char name[PATH_MAX], target[PATH_MAX];
};

static int fill(void)
{
    ssize_t got = read(STDIN_FILENO, buffer, sizeof buffer);
    if (got <= 0) {
        if (got == 0)
            errno = EPIPE; /* the host left in the middle */
        return -1;
    }
    start = 0;
    end = (size_t)got;
    return 0;
}

static int take(void *to, size_t size)
{
    uint8_t *at = to;
    while (size) {
        if (start == end && fill() != 0)
            return -1;
        size_t part = end - start < size ? end - start : size;
        memcpy(at, buffer + start, part);
        at += part;
        start += part;
        size -= part;
    }
    return 0;
}

static int take_string(char *text)
{
    uint32_t size;
    if (take(&size, sizeof size) != 0)
        return -1;
    if (size >= PATH_MAX) {
        errno = ENAMETOOLONG;
        return -1;
    }
    if (take(text, (size_t)size + 1) != 0)
        return -1;
    if (text[size] == 0 && strlen(text) == size)
        return 0;
    errno = EINVAL;
    return -1;
}

static int take_entry(struct entry *entry)
{
    uint8_t fixed[32];
    if (take(fixed, sizeof fixed) != 0 || take_string(entry->name) != 0 || take_string(entry->target) != 0)
        return -1;
    struct reader reader = {fixed, fixed + sizeof fixed, 0};
    entry->mode = get_u32(&reader);
    reader.at += 12; /* owner and links of the sender's system */
    entry->size = get_u64(&reader);
    entry->mtime_ns = (int64_t)get_u64(&reader);
    return 0;
}

/* Opens the directory that holds `name`, a component at a time; returns the last component. */
static const char *enter_parent(char *name)
{
    char *slash = strrchr(name, '/');
    size_t length = slash ? (size_t)(slash - name) : 0;
    if (parent < 0 || strlen(parent_name) != length || memcmp(parent_name, name, length) != 0) {
        int fd = dup(root);
        for (size_t at = 0; fd >= 0 && at < length;) {
            char part[NAME_MAX + 1];
            size_t size = strcspn(name + at, "/");
            if (size == 0 || size > NAME_MAX) {
                close(fd);
                errno = EINVAL;
                return NULL;
            }
            memcpy(part, name + at, size);
            part[size] = 0;
            int next = -1;
            errno = EINVAL;
            if (strcmp(part, "..") != 0)
                next = openat(fd, part, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
            int error = errno;
            close(fd);
            errno = error;
            fd = next;
            at += size + 1;
        }
        if (fd < 0)
            return NULL;
        if (parent >= 0)
            close(parent);
        parent = fd;
        memcpy(parent_name, name, length);
        parent_name[length] = 0;
    }
    const char *last = slash ? slash + 1 : name;
    if (*last && strcmp(last, ".") != 0 && strcmp(last, "..") != 0)
        return last;
    errno = EINVAL;
    return NULL;
}

static int receive_file(const struct entry *entry, const char *name)
{
    /* What is there is not written through: it may be a link, or have other names. */
    unlinkat(parent, name, 0);
    int fd = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return -1;
    for (uint64_t left = entry->size; left;) {
        if (start == end && fill() != 0)
            return -1;
        size_t part = end - start < left ? end - start : (size_t)left;
        if (write_all(fd, buffer + start, part) != 0)
            return -1;
        start += part;
        left -= part;
    }
    struct timespec times[2] = {{.tv_nsec = UTIME_NOW},
                                {.tv_sec = entry->mtime_ns / 1000000000, .tv_nsec = entry->mtime_ns % 1000000000}};
    if (fchown(fd, uid, gid) != 0 || fchmod(fd, entry->mode & 07777) != 0)
        return -1;
    futimens(fd, times);
    return close(fd);
}

static int receive_directory(const struct entry *entry, const char *name)
{
    if (mkdirat(parent, name, 0700) != 0 && errno != EEXIST)
        return -1;
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return -1;
    int failed = fchown(fd, uid, gid) != 0 || fchmod(fd, entry->mode & 07777) != 0;
    close(fd);
    return failed ? -1 : 0;
}

static int receive_link(const struct entry *entry, const char *name)
{
    unlinkat(parent, name, 0);
    if (symlinkat(entry->target, parent, name) != 0)
        return -1;
    return fchownat(parent, name, uid, gid, AT_SYMLINK_NOFOLLOW);
}

static int receive(struct entry *entry)
{
    if (strcmp(entry->name, ".") == 0)
        return S_ISDIR(entry->mode) && fchown(root, uid, gid) == 0 ? fchmod(root, entry->mode & 07777) : -1;
    const char *name = enter_parent(entry->name);
    if (!name)
        return -1;
    if (S_ISDIR(entry->mode))
        return receive_directory(entry, name);
    if (S_ISLNK(entry->mode))
        return receive_link(entry, name);
    if (S_ISREG(entry->mode))
        return receive_file(entry, name);
    errno = EINVAL;
    return -1;
}

/* argv: tree-receive PATH UID GID */
int tree_receive(char **argv)
{
    static struct entry entry;
    if (!argv[1] || !argv[2] || !argv[3])
        return EINVAL;
    uid = (uid_t)strtoul(argv[2], NULL, 10);
    gid = (gid_t)strtoul(argv[3], NULL, 10);
    if (mkdir(argv[1], 0755) != 0 && errno != EEXIST)
        return builtin_fail(argv[1], errno);
    root = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return builtin_fail(argv[1], errno);
    for (;;) {
        if (take_entry(&entry) != 0)
            return builtin_fail(entry.name, errno);
        if (entry.mode == 0)
            return 0;
        if (receive(&entry) != 0)
            return builtin_fail(entry.name, errno);
    }
}
