/* The life of a command: its request, its end, and what it leaves. exec_io.c moves its data. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

enum { LIMITS_MAX = 32 };

static const uint64_t DRAIN_TIME_NS = 500000000;   /* for what an unkillable process keeps open */
static const uint64_t MAX_TIMEOUT_NS = 1ull << 62; /* so that sums do not wrap */

struct command *commands;

static const char *const default_env[] = {
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=linux", NULL};

struct request {
    struct spawn spawn;
    uint8_t stdio[3];
    uint16_t rows, columns;
    uint64_t timeout_ns;
    uint32_t window;
    struct user user;
    struct spawn_limit limits[LIMITS_MAX];
    char home[300], name[100], logname[100];
    char **vector; /* argv, NULL, envp, NULL */
};

static int env_override(char **envp, size_t count, char *entry)
{
    size_t key = strcspn(entry, "=") + 1;
    for (size_t i = 0; i < count; i++) {
        if (strncmp(envp[i], entry, key) == 0) {
            envp[i] = entry;
            return 1;
        }
    }
    return 0;
}

/* Reads the payload; what it points to is the payload. Returns 0 or what is wrong with it. */
static const char *parse(struct reader *reader, struct request *request)
{
    struct spawn *spawn = &request->spawn;
    spawn->flags = get_u32(reader);
    for (int i = 0; i < 3; i++)
        request->stdio[i] = get_u8(reader);
    get_u8(reader);
    request->rows = get_u16(reader);
    request->columns = get_u16(reader);
    request->timeout_ns = get_u64(reader);
    request->window = get_u32(reader);
    uint32_t argc = get_u32(reader), envc = get_u32(reader), limitc = get_u32(reader);
    spawn->cwd = get_string(reader);
    const char *user = get_string(reader);
    size_t room = (size_t)(reader->end - reader->at);
    if (reader->bad || argc == 0 || (uint64_t)argc + envc > room / 5 || limitc > LIMITS_MAX)
        return "malformed request";
    if (user[0]) {
        int error = user_find(user, &request->user);
        if (error) {
            errno = error;
            return "user";
        }
        spawn->set_user = 1;
        spawn->uid = request->user.uid;
        spawn->gid = request->user.gid;
        spawn->groups = request->user.groups;
        spawn->group_count = request->user.group_count;
    }
    request->vector = malloc(((size_t)argc + envc + 10) * sizeof(char *));
    if (!request->vector)
        return "memory";
    spawn->argv = request->vector;
    for (uint32_t i = 0; i < argc; i++)
        spawn->argv[i] = get_string(reader);
    spawn->argv[argc] = NULL;
    spawn->path = spawn->argv[0];
    spawn->envp = spawn->argv + argc + 1;
    size_t count = 0;
    if (!(spawn->flags & EXEC_ENV_REPLACE)) {
        for (size_t i = 0; default_env[i]; i++)
            spawn->envp[count++] = (char *)default_env[i];
        if (request->user.name[0]) {
            snprintf(request->home, sizeof request->home, "HOME=%s", request->user.home);
            snprintf(request->name, sizeof request->name, "USER=%s", request->user.name);
            snprintf(request->logname, sizeof request->logname, "LOGNAME=%s", request->user.name);
            env_override(spawn->envp, count, request->home);
            spawn->envp[count++] = request->name;
            spawn->envp[count++] = request->logname;
        }
    }
    /* The host names each variable once: only ours can be overridden, so the search stays short. */
    size_t own = count;
    for (uint32_t i = 0; i < envc; i++) {
        char *entry = get_string(reader);
        if (!env_override(spawn->envp, own, entry))
            spawn->envp[count++] = entry;
    }
    spawn->envp[count] = NULL;
    spawn->limits = request->limits;
    spawn->limit_count = limitc;
    for (uint32_t i = 0; i < limitc; i++) {
        request->limits[i].resource = get_u32(reader);
        request->limits[i].soft = get_u64(reader);
        request->limits[i].hard = get_u64(reader);
    }
    if (spawn->flags & EXEC_BUILTIN && !(spawn->builtin = builtin_find(spawn->path)))
        return "unknown builtin";
    return reader->bad || reader->at != reader->end ? "malformed request" : NULL;
}

static int null_fd(void)
{
    static int fd = -1;
    if (fd < 0)
        fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    return fd;
}

/* A pipe of which `mine` does not block. A user other than root must be able to open /dev/stdout. */
static int make_pipe(int *mine, int *theirs, int to_command, const struct spawn *spawn)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0)
        return -1;
    *mine = ends[to_command];
    *theirs = ends[!to_command];
    fcntl(*mine, F_SETFL, O_NONBLOCK);
    if (spawn->set_user)
        (void)!fchown(*theirs, spawn->uid, spawn->gid);
    return 0;
}

static int open_stdio(struct command *command, struct request *request)
{
    struct spawn *spawn = &request->spawn;
    if (spawn->flags & EXEC_PTY) {
        int slave = -1;
        command->out_fd[0] = open_pty(request->rows, request->columns, &slave);
        if (command->out_fd[0] < 0)
            return -1;
        spawn->pty = 1;
        spawn->stdio[0] = spawn->stdio[1] = spawn->stdio[2] = slave;
        if (spawn->set_user)
            (void)!fchown(slave, spawn->uid, (gid_t)-1);
        command->stdin_fd = fcntl(command->out_fd[0], F_DUPFD_CLOEXEC, 3);
        return 0;
    }
    for (int i = 0; i < 3; i++) {
        int *mine = i == 0 ? &command->stdin_fd : &command->out_fd[i - 1];
        if (request->stdio[i] == STDIO_STREAM) {
            if (make_pipe(mine, &spawn->stdio[i], i == 0, spawn) != 0)
                return -1;
        } else if (request->stdio[i] == STDIO_MERGE && i == 2) {
            spawn->stdio[2] = spawn->stdio[1];
        } else {
            spawn->stdio[i] = null_fd();
        }
    }
    return 0;
}

static void close_theirs(struct spawn *spawn)
{
    for (int i = 0; i < 3; i++) {
        int fd = spawn->stdio[i], again = (i > 0 && fd == spawn->stdio[0]) || (i > 1 && fd == spawn->stdio[1]);
        if (fd >= 0 && fd != null_fd() && !again)
            close(fd);
    }
}

static void close_stdio(struct command *command)
{
    for (int i = 0; i < 3; i++) {
        int *fd = i == 2 ? &command->stdin_fd : &command->out_fd[i];
        if (*fd >= 0)
            close(*fd);
        *fd = -1;
    }
}

static void forget(struct command *command)
{
    close_stdio(command);
    for (struct command **at = &commands; *at; at = &(*at)->next) {
        if (*at == command) {
            *at = command->next;
            break;
        }
    }
    free(command->stdin_data);
    free(command);
}

static int start(struct command *command, struct request *request)
{
    struct spawn *spawn = &request->spawn;
    if (open_stdio(command, request) != 0) {
        spawn->stage = "stdio";
        spawn->error = errno;
        return -1;
    }
    if (!(spawn->flags & EXEC_LEAVE))
        command->group = group_take();
    command->start_ns = now_ns();
    command->pid = spawn_process(spawn, group_fd(command->group));
    if (command->pid < 0 && command->group && strcmp(spawn->stage, "clone") == 0) {
        group_give_back(command->group); /* a hierarchy that takes no processes: its session will do */
        command->group = NULL;
        command->pid = spawn_process(spawn, -1);
    }
    return command->pid < 0 ? -1 : 0;
}

void exec_request(struct conn *conn, struct reader *reader)
{
    struct request request = {.spawn.stdio = {-1, -1, -1}};
    struct command *command = NULL;
    const char *wrong = parse(reader, &request);
    if (wrong) {
        if (strcmp(wrong, "user") == 0)
            conn_error(conn, errno, wrong);
        else
            conn_protocol_error(conn, wrong);
        free(request.vector);
        return;
    }
    command = calloc(1, sizeof *command);
    if (!command) {
        conn_error(conn, ENOMEM, "memory");
        free(request.vector);
        return;
    }
    command->stdin_fd = command->out_fd[0] = command->out_fd[1] = -1;
    command->flags = request.spawn.flags;
    command->window[0] = command->window[1] = request.window;
    command->stdin_credit = STDIN_WINDOW;
    command->next = commands;
    commands = command;
    int failed = start(command, &request);
    close_theirs(&request.spawn);
    free(request.vector);
    if (failed) {
        conn_error(conn, request.spawn.error, request.spawn.stage);
        group_give_back(command->group);
        forget(command);
        return;
    }
    command->conn = conn;
    conn->command = command;
    conn->state = CONN_EXEC;
    if (request.timeout_ns && request.timeout_ns < MAX_TIMEOUT_NS)
        command->deadline_ns = command->start_ns + request.timeout_ns;
    if (command->flags & EXEC_WANT_STARTED) {
        uint32_t pid = (uint32_t)command->pid;
        conn_frame(conn, REPLY_STARTED, 0, &pid, sizeof pid);
    }
}

static void kill_all(struct command *command)
{
    kill(-command->pid, SIGKILL);
    group_kill(command->group, command->pid);
}

/* The host has gone: so must the command, unless it was asked to outlive it. */
void exec_disconnected(struct command *command)
{
    if (command->conn)
        command->conn->command = NULL;
    command->conn = NULL;
    close_stdio(command);
    if (!command->exited && !(command->flags & EXEC_LEAVE))
        kill_all(command);
}

static void send_exit(struct command *command)
{
    struct conn *conn = command->conn;
    uint8_t payload[48];
    struct writer writer = {payload, payload + sizeof payload};
    int status = command->status;
    int code = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
    put_u32(&writer, (uint32_t)code);
    put_u32(&writer, command->exit_flags | (WIFSIGNALED(status) && WCOREDUMP(status) ? EXIT_CORE : 0));
    put_u32(&writer, (uint32_t)command->pid);
    put_u32(&writer, 0);
    put_u64(&writer, command->wall_ns);
    put_u64(&writer, command->user_us);
    put_u64(&writer, command->system_us);
    put_u64(&writer, command->maxrss_kib);
    conn->command = NULL;
    conn->state = CONN_IDLE;
    command->conn = NULL;
    conn_frame(conn, REPLY_EXIT, 0, payload, sizeof payload);
}

/* Ends the command for the host as soon as its process is gone and its output is sent. */
void exec_finish(struct command *command)
{
    int blocked = 0;
    for (int i = 0; i < 2; i++) {
        if (exec_wants_output(command, i))
            exec_output(command, i);
        blocked |= command->out_fd[i] >= 0 && !exec_wants_output(command, i);
    }
    if (!command->conn)
        return;
    if (command->out_fd[0] >= 0 || command->out_fd[1] >= 0) {
        uint64_t now = now_ns();
        /* The time runs while nothing but the missing end of the stream keeps us, not while the host is slow. */
        if (!command->drain_until_ns || blocked)
            command->drain_until_ns = now + (command->flags & EXEC_LEAVE ? 0 : DRAIN_TIME_NS);
        if (blocked || now < command->drain_until_ns)
            return;
    }
    send_exit(command);
}

/* Frees the commands that nobody waits for any more. */
void exec_sweep(void)
{
    for (struct command *command = commands, *next; command; command = next) {
        next = command->next;
        if (command->exited && !command->conn)
            forget(command);
    }
}

static void exited(struct command *command, int status, const struct rusage *usage, int alone)
{
    command->exited = 1;
    command->status = status;
    command->wall_ns = now_ns() - command->start_ns;
    command->user_us = (uint64_t)usage->ru_utime.tv_sec * 1000000u + (uint64_t)usage->ru_utime.tv_usec;
    command->system_us = (uint64_t)usage->ru_stime.tv_sec * 1000000u + (uint64_t)usage->ru_stime.tv_usec;
    command->maxrss_kib = (uint64_t)usage->ru_maxrss;
    command->end_due_ns = command->hung_until_ns = 0;
    if (!alone && !(command->flags & EXEC_LEAVE))
        group_kill(command->group, command->pid);
    group_give_back(command->group);
    command->group = NULL;
    exec_finish(command);
}

static struct command *command_of(pid_t pid)
{
    for (struct command *command = commands; command; command = command->next)
        if (command->pid == pid && !command->exited)
            return command;
    return NULL;
}

/* Process 1 inherits every orphan. A command's process group is killed while its dead leader still holds the number. */
void reap(void)
{
    for (;;) {
        siginfo_t info = {0};
        if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == 0)
            return;
        struct command *command = command_of(info.si_pid);
        if (command && !(command->flags & EXEC_LEAVE))
            kill(-command->pid, SIGKILL);
        struct rusage usage;
        int status;
        if (wait4(info.si_pid, &status, 0, &usage) != info.si_pid || !command)
            continue;
        /* Whatever the command left has become our child: without children there is nothing to look for. */
        siginfo_t rest = {0};
        int alone = waitid(P_ALL, 0, &rest, WEXITED | WNOHANG | WNOWAIT) != 0 && errno == ECHILD;
        exited(command, status, &usage, alone);
    }
}

static void earlier(uint64_t *next, uint64_t due)
{
    if (due && (!*next || due < *next))
        *next = due;
}

/* Does what is due; returns when the next thing is, 0 for never. */
uint64_t exec_timers(uint64_t now)
{
    uint64_t next = 0;
    for (struct command *command = commands; command; command = command->next) {
        if (!command->exited && command->deadline_ns && now >= command->deadline_ns) {
            command->deadline_ns = 0;
            command->exit_flags |= EXIT_TIMED_OUT;
            kill_all(command);
        }
        if (command->end_due_ns && now >= command->end_due_ns) {
            command->end_due_ns = 0;
            exec_send_ends(command);
        }
        if (command->hung_until_ns && now >= command->hung_until_ns)
            command->hung_until_ns = 0; /* the next poll looks again */
        if (command->exited && command->conn && now >= command->drain_until_ns)
            exec_finish(command);
        if (!command->exited)
            earlier(&next, command->deadline_ns);
        else if (command->conn)
            earlier(&next, command->drain_until_ns);
        earlier(&next, command->end_due_ns);
        earlier(&next, command->hung_until_ns);
    }
    return next;
}
