/* Starting a process.
 *
 * The child borrows our memory (CLONE_VM | CLONE_VFORK) on a stack of its own until it executes: no page table is
 * copied, and a failure in the child is simply written where we read it. It is born in its control group
 * (CLONE_INTO_CGROUP), which moving it there later could not do cheaply or without a gap.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"
#include "kernel.h"

enum { STACK_SIZE = 64 << 10 };

#if defined(__x86_64__)
/* clone3(args, size); in the child, fn(arg) on the stack that args names (or on a copy of this one) and exit. */
long clone3_call(struct clone_args_ *args, size_t size, int (*fn)(void *), void *arg);
__asm__(".text\n"
        ".type clone3_call, @function\n"
        "clone3_call:\n"
        "    mov %rdx, %r8\n"
        "    mov %rcx, %r9\n"
        "    mov $435, %eax\n"
        "    syscall\n"
        "    test %rax, %rax\n"
        "    jnz 1f\n"
        "    xor %ebp, %ebp\n"
        "    and $-16, %rsp\n"
        "    mov %r9, %rdi\n"
        "    call *%r8\n"
        "    mov %eax, %edi\n"
        "    mov $60, %eax\n"
        "    syscall\n"
        "1:  ret\n");
#else
static long clone3_call(struct clone_args_ *args, size_t size, int (*fn)(void *), void *arg)
{
    (void)args, (void)size, (void)fn, (void)arg;
    return -ENOSYS;
}
#endif

static int fail(struct spawn *spawn, const char *stage)
{
    spawn->stage = stage;
    spawn->error = errno;
    return 127;
}

/* The raw calls: the library's wrappers would tell threads that do not exist, in memory that is not ours. */
static int become(struct spawn *spawn)
{
    if (syscall(SYS_setgroups, spawn->group_count, spawn->groups) != 0 ||
        syscall(SYS_setresgid, spawn->gid, spawn->gid, spawn->gid) != 0 ||
        syscall(SYS_setresuid, spawn->uid, spawn->uid, spawn->uid) != 0)
        return -1;
    return 0;
}

static const char *path_of(char **envp)
{
    for (; *envp; envp++)
        if (strncmp(*envp, "PATH=", 5) == 0)
            return *envp + 5;
    return "/usr/bin:/bin";
}

/* As execvpe does, without its fall-back to a shell: EACCES on the way is reported if nothing else was found. */
static void execute(const char *file, char **argv, char **envp)
{
    if (strchr(file, '/')) {
        execve(file, argv, envp);
        return;
    }
    int error = ENOENT;
    size_t file_length = strlen(file);
    for (const char *at = path_of(envp); file_length;) {
        char path[4096];
        size_t length = strcspn(at, ":");
        if (length + file_length + 2 <= sizeof path) {
            memcpy(path, at, length);
            path[length] = '/';
            memcpy(path + length + (length > 0), file, file_length + 1);
            execve(path, argv, envp);
            if (errno == EACCES)
                error = EACCES;
            else if (errno != ENOENT && errno != ENOTDIR)
                return;
        }
        if (!at[length])
            break;
        at += length + 1;
    }
    errno = error;
}

static int set_stdio(struct spawn *spawn)
{
    if (setsid() < 0)
        return -1;
    for (int i = 0; i < 3; i++)
        if (dup2(spawn->stdio[i], i) < 0)
            return -1;
    if (spawn->pty && ioctl(0, TIOCSCTTY, 0) != 0)
        return -1;
    return 0;
}

static void reset_signals(void)
{
    sigset_t none;
    sigemptyset(&none);
    signal(SIGPIPE, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static int child(void *argument)
{
    struct spawn *spawn = argument;
    if (set_stdio(spawn) != 0)
        return fail(spawn, "stdio");
    for (size_t i = 0; i < spawn->limit_count; i++) {
        struct spawn_limit *limit = &spawn->limits[i];
        if (syscall(SYS_prlimit64, 0, limit->resource, &limit->soft, NULL) != 0)
            return fail(spawn, "rlimit");
    }
    if (spawn->set_user && become(spawn) != 0)
        return fail(spawn, "user");
    if (spawn->cwd[0] && chdir(spawn->cwd) != 0)
        return fail(spawn, "cwd");
    if (spawn->flags & EXEC_NO_NEW_PRIVS && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return fail(spawn, "no_new_privs");
    if (spawn->builtin) {
        /* A copy of this process, not a new program: our descriptors would stay open behind the host's back. */
        if (syscall(SYS_close_range, 3, ~0u, 0) != 0)
            for (int fd = 3; fd < 4096; fd++)
                close(fd);
        reset_signals();
        return spawn->builtin(spawn->argv);
    }
    reset_signals();
    execute(spawn->path, spawn->argv, spawn->envp);
    return fail(spawn, "exec");
}

pid_t spawn_process(struct spawn *spawn, int cgroup_fd)
{
    static char stack[STACK_SIZE] __attribute__((aligned(16)));
    struct clone_args_ args = {.exit_signal = SIGCHLD};
    if (cgroup_fd >= 0) {
        args.flags |= CLONE_INTO_CGROUP_;
        args.cgroup = (uint64_t)cgroup_fd;
    }
    if (!spawn->builtin) {
        args.flags |= CLONE_VM | CLONE_VFORK;
        args.stack = (uint64_t)(uintptr_t)stack;
        args.stack_size = STACK_SIZE;
    }
    spawn->stage = NULL;
    long pid = clone3_call(&args, sizeof args, child, spawn);
    if (pid == -ENOSYS && cgroup_fd < 0) {
        if (spawn->builtin) {
            pid = fork();
            if (pid == 0)
                _exit(child(spawn));
        } else {
            pid = clone(child, stack + STACK_SIZE, CLONE_VM | CLONE_VFORK | SIGCHLD, spawn);
        }
        if (pid < 0)
            pid = -errno;
    }
    if (pid < 0) {
        spawn->stage = "clone";
        spawn->error = (int)-pid;
        return -1;
    }
    if (spawn->stage) {
        waitpid((pid_t)pid, NULL, 0);
        return -1;
    }
    return (pid_t)pid;
}

int open_pty(uint16_t rows, uint16_t columns, int *slave)
{
    int unlock = 0, master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (master < 0)
        return -1;
    struct winsize size = {.ws_row = rows, .ws_col = columns};
    if (ioctl(master, TIOCSPTLCK, &unlock) != 0 || ioctl(master, TIOCSWINSZ, &size) != 0 ||
        (*slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0) {
        int error = errno;
        close(master);
        errno = error;
        return -1;
    }
    return master;
}
