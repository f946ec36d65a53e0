/* Transfers of one file or one listing: in pieces, so that a slow host holds up nobody else. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"
#include "kernel.h"

#define RENAME_NOREPLACE_ 1

struct transfer *transfer_new(struct conn *conn)
{
    struct transfer *transfer = calloc(1, sizeof *transfer);
    if (!transfer) {
        conn_error(conn, ENOMEM, "memory");
        return NULL;
    }
    transfer->fd = -1;
    conn->transfer = transfer;
    return transfer;
}

/* Also the end of a write whose host has left: nothing of it remains. */
void transfer_free(struct conn *conn)
{
    struct transfer *transfer = conn->transfer;
    if (transfer->fd >= 0)
        close(transfer->fd);
    if (transfer->directory)
        closedir(transfer->directory);
    if (transfer->temporary[0])
        unlink(transfer->temporary);
    free(transfer);
    conn->transfer = NULL;
    conn->state = CONN_IDLE;
}

static void refuse(struct conn *conn, const char *stage)
{
    int error = errno;
    if (conn->transfer)
        transfer_free(conn);
    conn_error(conn, error, stage);
}

static int malformed(struct conn *conn, const struct reader *reader)
{
    if (!reader->bad && reader->at == reader->end)
        return 0;
    conn_protocol_error(conn, "malformed request");
    return 1;
}

/* O_NONBLOCK: a pipe or a device in the path's place must not stop this process. */
static int open_regular(const char *path, int flags, struct stat *status)
{
    int fd = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0644);
    if (fd < 0)
        return -1;
    int error = 0;
    if (fstat(fd, status) != 0)
        error = errno;
    else if (!S_ISREG(status->st_mode))
        error = S_ISDIR(status->st_mode) ? EISDIR : EINVAL;
    if (!error)
        return fd;
    close(fd);
    errno = error;
    return -1;
}

void read_request(struct conn *conn, struct reader *reader)
{
    uint64_t offset = get_u64(reader), limit = get_u64(reader);
    const char *path = get_string(reader);
    struct stat status;
    if (malformed(conn, reader))
        return;
    struct transfer *transfer = transfer_new(conn);
    if (!transfer)
        return;
    transfer->fd = open_regular(path, O_RDONLY, &status);
    if (transfer->fd < 0 || (offset && lseek(transfer->fd, (off_t)offset, SEEK_SET) < 0)) {
        refuse(conn, "open");
        return;
    }
    transfer->remaining = limit;
    uint8_t payload[RECORD_MAX];
    struct writer writer = {payload, payload + sizeof payload};
    put_record(&writer, &status, "", "");
    conn_frame(conn, REPLY_OK, 0, payload, (size_t)(writer.at - payload));
    conn->state = CONN_READ;
}

static void continue_read(struct conn *conn)
{
    struct transfer *transfer = conn->transfer;
    size_t size = DATA_CHUNK;
    if (size > transfer->remaining)
        size = (size_t)transfer->remaining;
    uint8_t *to = conn_frame_begin(conn, size);
    if (!to)
        return;
    ssize_t got = size ? read(transfer->fd, to, size) : 0;
    if (got > 0) {
        transfer->remaining -= (size_t)got;
        conn_frame_end(conn, MSG_DATA, 0, (size_t)got);
    } else if (got < 0) {
        refuse(conn, "read");
    } else {
        transfer_free(conn);
        conn_frame(conn, MSG_END, 0, "", 0);
    }
}

void list_request(struct conn *conn, struct reader *reader)
{
    const char *path = get_string(reader);
    if (malformed(conn, reader))
        return;
    DIR *directory = opendir(path);
    if (!directory) {
        conn_error(conn, errno, "list");
        return;
    }
    struct transfer *transfer = transfer_new(conn);
    if (!transfer) {
        closedir(directory);
        return;
    }
    transfer->directory = directory;
    conn->state = CONN_LIST;
    conn_ok(conn);
}

static void continue_list(struct conn *conn)
{
    DIR *directory = conn->transfer->directory;
    uint8_t *to = conn_frame_begin(conn, DATA_CHUNK);
    if (!to)
        return;
    struct writer writer = {to, to + DATA_CHUNK};
    struct dirent *entry = NULL;
    while (writer.end - writer.at >= RECORD_MAX && (entry = readdir(directory))) {
        struct stat status;
        char target[PATH_MAX] = "";
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 ||
            fstatat(dirfd(directory), name, &status, AT_SYMLINK_NOFOLLOW) != 0)
            continue; /* gone since */
        if (S_ISLNK(status.st_mode)) {
            ssize_t size = readlinkat(dirfd(directory), name, target, sizeof target - 1);
            target[size < 0 ? 0 : size] = 0;
        }
        put_record(&writer, &status, name, target);
    }
    if (writer.at != to)
        conn_frame_end(conn, MSG_DATA, 0, (size_t)(writer.at - to));
    if (!entry) {
        transfer_free(conn);
        conn_frame(conn, MSG_END, 0, "", 0);
    }
}

void file_continue(struct conn *conn)
{
    while ((conn->state == CONN_READ || conn->state == CONN_LIST) && conn_pending(conn) < 4096) {
        if (conn->state == CONN_READ)
            continue_read(conn);
        else
            continue_list(conn);
        conn_flush(conn);
        if (conn->state == CONN_READ && conn_pending(conn) == 0)
            return; /* the others' turn; POLLOUT brings us back at once */
    }
}

static int make_parents(char *path)
{
    for (char *at = path + 1; *path && (at = strchr(at, '/')); at++) {
        *at = 0;
        int failed = mkdir(path, 0755) != 0 && errno != EEXIST;
        *at = '/';
        if (failed)
            return -1;
    }
    return 0;
}

/* A new file beside the target that takes its place when complete, with the mode and owner of what it replaces. */
static int open_temporary(struct transfer *transfer, struct stat *status)
{
    static unsigned counter;
    int exists = stat(transfer->path, status) == 0;
    if (exists && (transfer->flags & WRITE_EXCLUSIVE || !S_ISREG(status->st_mode))) {
        errno = transfer->flags & WRITE_EXCLUSIVE ? EEXIST : S_ISDIR(status->st_mode) ? EISDIR : EINVAL;
        return -1;
    }
    if (exists) {
        /* Through a symbolic link, as a plain write would go. */
        char *real = realpath(transfer->path, NULL);
        if (!real)
            return -1;
        snprintf(transfer->path, sizeof transfer->path, "%s", real);
        free(real);
        if (transfer->mode == KEEP)
            transfer->mode = status->st_mode;
        if (transfer->uid == KEEP)
            transfer->uid = status->st_uid;
        if (transfer->gid == KEEP)
            transfer->gid = status->st_gid;
    }
    const char *slash = strrchr(transfer->path, '/');
    int directory = slash ? (int)(slash - transfer->path) + 1 : 0;
    int length = snprintf(transfer->temporary, sizeof transfer->temporary, "%.*s.microvm-%d-%u.tmp", directory,
                          transfer->path, (int)getpid(), counter++);
    if ((size_t)length >= sizeof transfer->temporary) {
        transfer->temporary[0] = 0;
        errno = ENAMETOOLONG;
        return -1;
    }
    int fd = open(transfer->temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) {
        int error = errno;
        transfer->temporary[0] = 0;
        errno = error;
    }
    return fd;
}

void write_request(struct conn *conn, struct reader *reader)
{
    uint32_t flags = get_u32(reader), mode = get_u32(reader), uid = get_u32(reader), gid = get_u32(reader);
    uint64_t size = get_u64(reader);
    const char *path = get_string(reader);
    struct stat status;
    if (malformed(conn, reader))
        return;
    struct transfer *transfer = transfer_new(conn);
    if (!transfer)
        return;
    transfer->flags = flags;
    transfer->mode = mode;
    transfer->uid = uid;
    transfer->gid = gid;
    transfer->remaining = size;
    conn->state = CONN_WRITE;
    size_t length = strlen(path);
    if (length == 0 || length >= sizeof transfer->path) {
        transfer->error = length ? ENAMETOOLONG : ENOENT;
        return;
    }
    memcpy(transfer->path, path, length + 1);
    if (flags & WRITE_PARENTS && make_parents(transfer->path) != 0) {
        transfer->error = errno;
        return;
    }
    if (flags & (WRITE_IN_PLACE | WRITE_APPEND)) {
        int how = O_WRONLY | O_CREAT | (flags & WRITE_APPEND ? O_APPEND : O_TRUNC);
        transfer->fd = open_regular(path, how | (flags & WRITE_EXCLUSIVE ? O_EXCL : 0), &status);
    } else {
        transfer->fd = open_temporary(transfer, &status);
        if (transfer->fd >= 0 && transfer->mode == KEEP)
            transfer->mode = 0644;
    }
    if (transfer->fd < 0)
        transfer->error = errno;
}

/* After an error the rest is swallowed: the host, which sends without waiting, finds the answer at the end. */
void file_data(struct conn *conn, const uint8_t *data, size_t size)
{
    struct transfer *transfer = conn->transfer;
    if (transfer->error)
        return;
    if (write_all(transfer->fd, data, size) != 0)
        transfer->error = errno;
    transfer->written += size;
}

static int commit(struct transfer *transfer)
{
    if (transfer->remaining != UINT64_MAX && transfer->remaining != transfer->written) {
        errno = EMSGSIZE;
        return -1;
    }
    if ((transfer->uid != KEEP || transfer->gid != KEEP) && fchown(transfer->fd, transfer->uid, transfer->gid) != 0)
        return -1;
    if (transfer->mode != KEEP && fchmod(transfer->fd, transfer->mode & 07777) != 0)
        return -1;
    int failed = close(transfer->fd);
    transfer->fd = -1;
    if (failed || !transfer->temporary[0])
        return failed;
    unsigned flags = transfer->flags & WRITE_EXCLUSIVE ? RENAME_NOREPLACE_ : 0;
    if (syscall(SYS_renameat2, AT_FDCWD, transfer->temporary, AT_FDCWD, transfer->path, flags) != 0)
        return -1;
    transfer->temporary[0] = 0;
    return 0;
}

void file_end(struct conn *conn)
{
    struct transfer *transfer = conn->transfer;
    if (transfer->error)
        errno = transfer->error;
    if (transfer->error || commit(transfer) != 0) {
        refuse(conn, "write");
        return;
    }
    transfer_free(conn);
    conn_ok(conn);
}
