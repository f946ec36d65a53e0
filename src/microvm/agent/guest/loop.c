/* The poll loop. Descriptors are few, so the set is made anew each round: what nobody wants is not in it. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "kernel.h"

enum { CONNS_MAX = 256, SLOTS_MAX = 2 + CONNS_MAX * 4 };

static const uint64_t READY_RETRY_NS = 50000000;
static const uint64_t READY_GIVE_UP_NS = 120000000000u;
static const uint64_t LAST_WORDS_NS = 5000000000u; /* for the host to connect and read why there is no root */

static struct pollfd slots[SLOTS_MAX];
static int slot_count;
static int child_signal = -1; /* readable when a child has ended */

static struct conn *announcement; /* the connection that says READY; later like any other */
static uint64_t announce_at, announce_until, give_up_at;

int vsock_listen(uint32_t port)
{
    struct sockaddr_vm_ address = {.family = AF_VSOCK, .port = port, .cid = VMADDR_CID_ANY};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 64) != 0)
        die("no vsock", errno);
    return fd;
}

static void send_ready(struct conn *conn)
{
    uint8_t payload[1024];
    struct writer writer = {payload, payload + sizeof payload};
    struct utsname system;
    uname(&system);
    put_u32(&writer, PROTOCOL_VERSION);
    put_u32(&writer, options.port);
    put_u64(&writer, started_ns);
    put_u64(&writer, boot_ns());
    put_string(&writer, system.release);
    put_string(&writer, boot_error);
    conn_frame(conn, REPLY_READY, 0, payload, (size_t)(writer.at - payload));
    conn_flush(conn);
}

static void announce(uint64_t now)
{
    struct sockaddr_vm_ address = {.family = AF_VSOCK, .port = options.port, .cid = VMADDR_CID_HOST};
    announce_at = now + READY_RETRY_NS;
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return;
    int refused = connect(fd, (struct sockaddr *)&address, sizeof address);
    if (refused && errno != EINPROGRESS) {
        debug("connect to the host: %s", strerror(errno));
        close(fd);
        return;
    }
    announcement = conn_new(fd);
    if (!announcement)
        return;
    announcement->state = refused ? CONN_CONNECTING : CONN_IDLE;
    if (!refused)
        send_ready(announcement);
}

static void announce_connected(struct conn *conn)
{
    int error = 0;
    socklen_t size = sizeof error;
    if (getsockopt(conn->fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error) {
        conn_close(conn);
        return;
    }
    conn->state = CONN_IDLE;
    send_ready(conn);
}

static uint64_t announce_timer(uint64_t now)
{
    if (!announce_until)
        return 0;
    int connected = announcement && announcement->state != CONN_CONNECTING;
    if (boot_error[0]) {
        /* Nothing can be served. Leave once the host has heard it (and hung up), or after a while. */
        if (connected && !give_up_at)
            give_up_at = now + LAST_WORDS_NS;
        if (now >= (give_up_at ? give_up_at : announce_until))
            power_off(0);
    } else if (connected || now >= announce_until) {
        announce_until = 0;
        loopback_up(); /* while the host makes its first request */
        return 0;
    }
    if (!announcement && now >= announce_at)
        announce(now);
    return announcement ? (give_up_at ? give_up_at : announce_until) : announce_at;
}

static int add_slot(int fd, short events)
{
    if (slot_count == SLOTS_MAX)
        return -1;
    slots[slot_count] = (struct pollfd){.fd = fd, .events = events};
    return slot_count++;
}

static short conn_events(const struct conn *conn)
{
    short events = conn_pending(conn) ? POLLOUT : 0;
    if (conn->state == CONN_CONNECTING || conn->state == CONN_READ || conn->state == CONN_LIST)
        return events | POLLOUT | POLLRDHUP;
    return events | POLLIN;
}

static void fill_slots(int listener)
{
    slot_count = 0;
    add_slot(conn_count < CONNS_MAX ? listener : -1, POLLIN);
    add_slot(child_signal, POLLIN);
    for (struct conn *conn = conns; conn; conn = conn->next)
        conn->poll_slot = add_slot(conn->fd, conn_events(conn));
    for (struct command *command = commands; command; command = command->next) {
        for (int i = 0; i < 2; i++)
            command->poll_slot[i] = exec_wants_output(command, i) ? add_slot(command->out_fd[i], POLLIN) : -1;
        command->poll_slot[2] = -1;
        if (command->stdin_fd >= 0)
            command->poll_slot[2] =
                add_slot(command->stdin_fd, command->stdin_end > command->stdin_start ? POLLOUT : 0);
    }
}

static short events_of(int slot)
{
    return slot >= 0 ? slots[slot].revents : 0;
}

static void accept_all(int listener)
{
    while (conn_count < CONNS_MAX) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0)
            return;
        struct conn *conn = conn_new(fd);
        if (conn) {
            conn->poll_slot = -1;
            conn_input(conn); /* the request usually comes right behind */
        }
    }
}

static void serve_conn(struct conn *conn)
{
    short events = events_of(conn->poll_slot);
    if (!events)
        return;
    if (conn->state == CONN_CONNECTING) {
        announce_connected(conn);
        return;
    }
    if (conn->state == CONN_READ || conn->state == CONN_LIST) {
        if (events & (POLLHUP | POLLERR | POLLRDHUP))
            conn_close(conn);
        return;
    }
    if (events & (POLLIN | POLLHUP | POLLERR))
        conn_input(conn);
}

static void serve_command(struct command *command)
{
    for (int i = 0; i < 2; i++)
        if (events_of(command->poll_slot[i]) && exec_wants_output(command, i))
            exec_output(command, i);
    short events = events_of(command->poll_slot[2]);
    if (!events || command->stdin_fd < 0)
        return;
    if (command->stdin_end > command->stdin_start)
        exec_feed(command);
    else if (events & (POLLERR | POLLHUP))
        exec_stdin_broken(command);
    if (command->exited)
        exec_finish(command);
}

static void sweep(void)
{
    exec_sweep();
    for (struct conn **at = &conns, *conn; (conn = *at);) {
        conn_flush(conn);
        if (conn->state == CONN_READ || conn->state == CONN_LIST)
            file_continue(conn);
        if (conn->state != CONN_CLOSED) {
            at = &conn->next;
            continue;
        }
        *at = conn->next;
        if (conn == announcement) {
            announcement = NULL;
            if (give_up_at)
                power_off(0); /* the host has hung up: it knows */
        }
        free(conn);
        conn_count--;
    }
}

_Noreturn void serve(int listener, int announcing)
{
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    child_signal = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    if (child_signal < 0)
        die("signalfd", errno);
    if (announcing)
        announce_until = now_ns() + (boot_error[0] ? LAST_WORDS_NS : READY_GIVE_UP_NS);
    for (;;) {
        uint64_t now = now_ns(), next = exec_timers(now), announce_next = announce_timer(now);
        if (announce_next && (!next || announce_next < next))
            next = announce_next;
        sweep();
        fill_slots(listener);
        uint64_t wait = next > now ? next - now : 0;
        struct timespec timeout = {.tv_sec = (time_t)(wait / 1000000000u), .tv_nsec = (long)(wait % 1000000000u)};
        int ready = ppoll(slots, (nfds_t)slot_count, next ? &timeout : NULL, NULL);
        if (ready < 0 && errno != EINTR)
            die("ppoll", errno);
        if (ready <= 0)
            continue;
        for (struct conn *conn = conns; conn; conn = conn->next)
            serve_conn(conn);
        for (struct command *command = commands; command; command = command->next)
            serve_command(command);
        struct signalfd_siginfo ended;
        if (events_of(1) && read(child_signal, &ended, sizeof ended) == sizeof ended)
            reap();
        if (events_of(0))
            accept_all(listener);
    }
}
