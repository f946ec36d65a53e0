/* Removing a tree, links unfollowed. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

enum { DEPTH_MAX = 1024 }; /* a descriptor and a stack frame a level */

static char failed_name[256];

static int remove_at(int parent, const char *name, int depth)
{
    if (unlinkat(parent, name, 0) == 0)
        return 0;
    int error = errno;
    if (error == EISDIR || error == EPERM) {
        int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        DIR *directory = fd < 0 ? NULL : fdopendir(fd);
        if (directory) {
            struct dirent *entry;
            int failed = depth == DEPTH_MAX ? ELOOP : 0;
            while (!failed && (entry = readdir(directory)))
                if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
                    failed = remove_at(dirfd(directory), entry->d_name, depth + 1);
            closedir(directory);
            if (failed)
                return failed;
            if (unlinkat(parent, name, AT_REMOVEDIR) == 0)
                return 0;
            error = errno;
        }
    }
    strncpy(failed_name, name, sizeof failed_name - 1);
    return error;
}

/* argv: tree-remove PATH */
int tree_remove(char **argv)
{
    if (!argv[1])
        return EINVAL;
    int error = remove_at(AT_FDCWD, argv[1], 0);
    return error ? builtin_fail(failed_name, error) : 0;
}
