/* What the tree builtins share. They run in a copy of this process with blocking descriptors: stdin or stdout carries
 * the stream, stderr the path that failed, and the exit code is the errno. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

builtin_fn builtin_find(const char *name)
{
    if (strcmp(name, "tree-send") == 0)
        return tree_send;
    if (strcmp(name, "tree-receive") == 0)
        return tree_receive;
    if (strcmp(name, "tree-remove") == 0)
        return tree_remove;
    return NULL;
}

int builtin_fail(const char *path, int error)
{
    (void)!write(STDERR_FILENO, path, strlen(path));
    return error > 0 && error < 126 ? error : EIO;
}

int write_all(int fd, const void *data, size_t size)
{
    const char *at = data;
    while (size) {
        ssize_t put = write(fd, at, size);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0) {
            if (put == 0)
                errno = EIO;
            return -1;
        }
        at += put;
        size -= (size_t)put;
    }
    return 0;
}
