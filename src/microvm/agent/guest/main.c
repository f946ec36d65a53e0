/* The guest agent: process 1 of a sandbox.
 *
 * It prepares the system (boot.c, root.c), says READY to the host over vsock and serves requests (loop.c, dispatch.c)
 * for commands (exec.c), files (files.c, tar_*.c) and the machine itself (control.c) until it is told to shut down.
 * It never exits: what cannot be repaired is reported on the console and ends the machine.
 *
 * For tests it serves as an ordinary process that changes nothing of the system:
 *     agent --test-socket PATH [--test-cgroup DIRECTORY]
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent.h"

static int test_listen(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        die(path, ENAMETOOLONG);
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 64) != 0)
        die(path, errno);
    return fd;
}

/* What a starter ignores would be ignored by every command. The C library keeps two signals to itself and leaves them as
 * they are, hence the plain system call. */
static void default_signals(void)
{
    struct {
        void (*handler)(int);
        unsigned long flags;
        void (*restorer)(void);
        unsigned long mask;
    } standard = {SIG_DFL, 0, NULL, 0};
    for (int number = 1; number <= 64; number++)
        syscall(SYS_rt_sigaction, number, &standard, NULL, sizeof standard.mask);
}

int main(int argc, char **argv)
{
    started_ns = boot_ns();
    default_signals();
    signal(SIGPIPE, SIG_IGN);
    if (getpid() == 1) {
        boot();
        groups_open("/sys/fs/cgroup");
        serve(vsock_listen(options.port), 1);
    }
    if (argc != 3 && argc != 5) {
        say("this program is process 1 of a virtual machine and does nothing elsewhere");
        return 64;
    }
    testing = 1;
    umask(022);
    const char *path = NULL;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--test-socket") == 0)
            path = argv[i + 1];
        else if (strcmp(argv[i], "--test-cgroup") == 0)
            groups_open(argv[i + 1]);
    }
    if (!path)
        return 64;
    prctl(PR_SET_CHILD_SUBREAPER, 1); /* as process 1 does: orphans come here */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    serve(test_listen(path), 0);
}
