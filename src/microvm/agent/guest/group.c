/* All that a command started, to be ended together: a control group a command where the kernel has cgroup v2, else
 * its session. Groups are kept for the next command: making one costs more than running `true`. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "agent.h"
#include "kernel.h"

struct group {
    struct group *next;
    int directory, kill, killed;
    char name[32];
};

static int parent = -1;
static struct group *spare;
static struct group *dying; /* killed, to be removed once empty */
static int made;

void groups_open(const char *directory)
{
    struct statfs status;
    parent = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (parent >= 0 && (fstatfs(parent, &status) != 0 || (uint32_t)status.f_type != CGROUP2_MAGIC_)) {
        close(parent);
        parent = -1;
    }
}

static void bury(void)
{
    for (struct group **at = &dying, *group; (group = *at);) {
        if (unlinkat(parent, group->name, AT_REMOVEDIR) != 0 && errno == EBUSY) {
            at = &group->next;
            continue;
        }
        *at = group->next;
        free(group);
    }
}

static struct group *make(void)
{
    bury();
    struct group *group = calloc(1, sizeof *group);
    if (!group)
        return NULL;
    snprintf(group->name, sizeof group->name, "microvm-%d", made++);
    if (mkdirat(parent, group->name, 0755) != 0) {
        free(group);
        return NULL;
    }
    group->directory = openat(parent, group->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    group->kill = group->directory < 0 ? -1 : openat(group->directory, "cgroup.kill", O_WRONLY | O_CLOEXEC);
    if (group->kill >= 0)
        return group;
    if (group->directory >= 0)
        close(group->directory);
    unlinkat(parent, group->name, AT_REMOVEDIR);
    free(group);
    close(parent); /* a kernel before 5.14: sessions it is */
    parent = -1;
    return NULL;
}

struct group *group_take(void)
{
    if (parent < 0)
        return NULL;
    struct group *group = spare;
    if (!group)
        return make();
    spare = group->next;
    return group;
}

int group_fd(const struct group *group)
{
    return group ? group->directory : -1;
}

void group_give_back(struct group *group)
{
    if (!group)
        return;
    if (group->killed) {
        close(group->kill);
        close(group->directory);
    }
    struct group **list = group->killed ? &dying : &spare;
    group->next = *list;
    *list = group;
    bury();
}

static pid_t session_of(const char *pid)
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%.20s/stat", pid);
    if (read_small_file(path, text, sizeof text) <= 0)
        return -1;
    const char *at = strrchr(text, ')'); /* the name before it may hold anything */
    int session;
    if (!at || sscanf(at + 1, " %*c %*d %*d %d", &session) != 1)
        return -1;
    return session;
}

/* One pass is not enough: a process may fork while we look. */
static void kill_session(pid_t session)
{
    for (int round = 0; round < 10; round++) {
        int killed = 0;
        DIR *processes = opendir("/proc");
        if (!processes)
            return;
        struct dirent *entry;
        while ((entry = readdir(processes))) {
            if (entry->d_name[0] < '1' || entry->d_name[0] > '9' || session_of(entry->d_name) != session)
                continue;
            pid_t pid = (pid_t)atoi(entry->d_name);
            if (pid != session && kill(pid, SIGKILL) == 0)
                killed++;
        }
        closedir(processes);
        if (!killed)
            return;
    }
}

void group_kill(struct group *group, pid_t session)
{
    if (group && pwrite(group->kill, "1", 1, 0) == 1) {
        group->killed = 1;
        return;
    }
    kill_session(session);
}
