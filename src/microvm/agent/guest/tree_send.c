/* A tree as a stream on stdout: for each file a record (files.c, put_record) with its path below the root, then, of a
 * regular file, as many bytes as the record says; at the end a record of mode 0. The root comes first, as ".". */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

enum { DEPTH_MAX = 1024 };

static uint8_t buffer[DATA_CHUNK];
static size_t used;
static char path[PATH_MAX]; /* of what is being sent, below the root */

static int flush_buffer(void)
{
    size_t size = used;
    used = 0;
    return write_all(STDOUT_FILENO, buffer, size);
}

static int send_record(const struct stat *status, const char *name, const char *target)
{
    if (sizeof buffer - used < RECORD_MAX && flush_buffer() != 0)
        return -1;
    struct writer writer = {buffer + used, buffer + sizeof buffer};
    put_record(&writer, status, name, target);
    used = (size_t)(writer.at - buffer);
    return 0;
}

/* Exactly `size` bytes: a file that shrinks meanwhile is filled up with zeroes, one that grows is cut. */
static int send_data(int fd, uint64_t size)
{
    while (size) {
        if (used == sizeof buffer && flush_buffer() != 0)
            return -1;
        size_t room = sizeof buffer - used;
        if (room > size)
            room = (size_t)size;
        ssize_t got = read(fd, buffer + used, room);
        if (got < 0)
            return -1;
        if (got == 0) {
            memset(buffer + used, 0, room);
            got = (ssize_t)room;
        }
        used += (size_t)got;
        size -= (uint64_t)got;
    }
    return 0;
}

static int send_at(int parent, const char *name, int depth);

static int send_directory(int fd, int depth)
{
    DIR *directory = fdopendir(fd);
    if (!directory) {
        close(fd);
        return -1;
    }
    size_t length = strlen(path);
    struct dirent *entry;
    int failed = 0;
    if (depth == DEPTH_MAX) {
        errno = ELOOP;
        failed = -1;
    }
    while (!failed && (entry = readdir(directory))) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        int added = snprintf(path + length, sizeof path - length, "%s%s", length ? "/" : "", entry->d_name);
        if ((size_t)added >= sizeof path - length) {
            errno = ENAMETOOLONG;
            failed = -1;
        } else {
            failed = send_at(dirfd(directory), entry->d_name, depth + 1);
        }
        if (!failed)
            path[length] = 0;
    }
    int error = errno;
    closedir(directory);
    errno = error;
    return failed;
}

static int send_link(int parent, const char *name, const struct stat *status)
{
    char target[PATH_MAX];
    ssize_t size = readlinkat(parent, name, target, sizeof target - 1);
    if (size < 0)
        return -1;
    target[size] = 0;
    return send_record(status, path, target);
}

static int send_at(int parent, const char *name, int depth)
{
    struct stat status;
    if (fstatat(parent, name, &status, AT_SYMLINK_NOFOLLOW) != 0)
        return errno == ENOENT ? 0 : -1; /* gone since it was listed */
    if (S_ISLNK(status.st_mode))
        return send_link(parent, name, &status);
    if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode))
        return 0; /* devices, pipes and sockets are not data */
    int fd = openat(parent, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) != 0)
        return -1;
    if (send_record(&status, path, "") != 0)
        return -1;
    if (S_ISDIR(status.st_mode))
        return send_directory(fd, depth);
    int failed = S_ISREG(status.st_mode) ? send_data(fd, (uint64_t)status.st_size) : -1;
    close(fd);
    return failed;
}

/* argv: tree-send PATH */
int tree_send(char **argv)
{
    struct stat status;
    if (!argv[1])
        return EINVAL;
    int fd = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) != 0)
        return builtin_fail(argv[1], errno);
    struct stat end = {0};
    if (send_record(&status, ".", "") != 0 || send_directory(fd, 0) != 0 || send_record(&end, "", "") != 0 ||
        flush_buffer() != 0)
        return builtin_fail(path, errno);
    return 0;
}
