/* Requests about single files. They are answered at once: what can take long is in transfer.c and tree_*.c. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

void put_record(struct writer *writer, const struct stat *status, const char *name, const char *target)
{
    put_u32(writer, status->st_mode);
    put_u32(writer, status->st_uid);
    put_u32(writer, status->st_gid);
    put_u32(writer, (uint32_t)status->st_nlink);
    put_u64(writer, (uint64_t)status->st_size);
    put_u64(writer, (uint64_t)status->st_mtim.tv_sec * 1000000000u + (uint64_t)status->st_mtim.tv_nsec);
    put_string(writer, name);
    put_string(writer, target);
}

static void answer(struct conn *conn, int failed, const char *stage)
{
    if (failed)
        conn_error(conn, errno, stage);
    else
        conn_ok(conn);
}

static void stat_request(struct conn *conn, uint32_t flags, const char *path)
{
    struct stat status;
    char target[PATH_MAX] = "";
    if (fstatat(AT_FDCWD, path, &status, flags & PATH_NOFOLLOW ? AT_SYMLINK_NOFOLLOW : 0) != 0) {
        conn_error(conn, errno, "stat");
        return;
    }
    if (S_ISLNK(status.st_mode)) {
        ssize_t size = readlink(path, target, sizeof target - 1);
        target[size < 0 ? 0 : size] = 0;
    }
    uint8_t payload[RECORD_MAX];
    struct writer writer = {payload, payload + sizeof payload};
    put_record(&writer, &status, "", target);
    conn_frame(conn, REPLY_OK, 0, payload, (size_t)(writer.at - payload));
}

static int is_directory(const char *path)
{
    struct stat status;
    return stat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

static int make_directory(char *path, uint32_t mode, uint32_t flags)
{
    if (flags & PATH_PARENTS) {
        for (char *at = path + 1; *path && (at = strchr(at, '/')); at++) {
            *at = 0;
            int failed = mkdir(path, 0755) != 0 && errno != EEXIST && !is_directory(path);
            *at = '/';
            if (failed)
                return -1;
        }
    }
    if (mkdir(path, 0700) == 0)
        return chmod(path, mode == KEEP ? 0755 : mode & 07777);
    return errno == EEXIST && flags & PATH_PARENTS && is_directory(path) ? 0 : -1;
}

static int remove_path(const char *path, uint32_t flags)
{
    struct stat status;
    int failed = lstat(path, &status) != 0 || (S_ISDIR(status.st_mode) ? rmdir(path) : unlink(path)) != 0;
    return failed && !(errno == ENOENT && flags & PATH_MISSING_OK);
}

static int set_attributes(const char *path, uint32_t mode, uint32_t uid, uint32_t gid)
{
    if ((uid != KEEP || gid != KEEP) && chown(path, uid, gid) != 0)
        return -1;
    return mode != KEEP && chmod(path, mode & 07777) != 0;
}

/* Each request is read whole before it acts: a malformed one changes nothing. */
void file_request(struct conn *conn, uint8_t type, struct reader *reader)
{
    uint32_t flags = 0, mode = KEEP, uid = KEEP, gid = KEEP;
    char *path, *other = NULL;
    switch (type) {
    case REQ_FILE_READ:
        read_request(conn, reader);
        return;
    case REQ_FILE_WRITE:
        write_request(conn, reader);
        return;
    case REQ_LIST:
        list_request(conn, reader);
        return;
    case REQ_STAT:
    case REQ_REMOVE:
        flags = get_u32(reader);
        break;
    case REQ_MKDIR:
        flags = get_u32(reader);
        mode = get_u32(reader);
        break;
    case REQ_SET_ATTR:
        mode = get_u32(reader);
        uid = get_u32(reader);
        gid = get_u32(reader);
        break;
    }
    path = get_string(reader);
    if (type == REQ_RENAME || type == REQ_SYMLINK)
        other = get_string(reader);
    if (reader->bad || reader->at != reader->end) {
        conn_protocol_error(conn, "malformed request");
        return;
    }
    switch (type) {
    case REQ_STAT:
        stat_request(conn, flags, path);
        break;
    case REQ_MKDIR:
        answer(conn, make_directory(path, mode, flags) != 0, "mkdir");
        break;
    case REQ_REMOVE:
        answer(conn, remove_path(path, flags), "remove");
        break;
    case REQ_RENAME:
        answer(conn, rename(path, other) != 0, "rename");
        break;
    case REQ_SYMLINK:
        answer(conn, symlink(path, other) != 0, "symlink");
        break;
    case REQ_SET_ATTR:
        answer(conn, set_attributes(path, mode, uid, gid), "set attributes");
        break;
    }
}
